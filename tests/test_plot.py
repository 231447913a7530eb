"""``fastokd plot``: what is drawn is what the runs recorded."""

import re
import statistics
import sys
import xml.etree.ElementTree as ET

import pytest
from sample_runs import EPOCHS, change_config, change_json, change_records, copied, records

from fastokd.cli import main
from fastokd.experiments.analysis.curves import overview_figures, training_figures

pytest.importorskip("matplotlib", reason="pip install -e '.[plots]'")
import matplotlib
from matplotlib.figure import Figure

ROWS = ("branch1", "branch2", "branch3", "ta2", "ta3", "ensemble")


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, by the name of its file."""
    figures = []
    savefig = Figure.savefig

    def note(figure, *args, **options):
        if figure not in figures:
            figures.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    return figures


def panel(figures, title):
    """The axes with this title, or alone in a figure with it."""
    return next(
        axes
        for figure in figures
        for axes in figure.axes
        if title in (axes.get_title(), figure.get_suptitle())
    )


def plot(runs, out):
    return main(["plot", *map(str, runs), "--out", str(out)])


def test_lines_are_means_and_bands_are_ranges_of_the_records(sample_runs, tmp_path, drawn, capsys):
    runs = {
        method: [sample_runs / f"{method}-seed{seed}" for seed in (0, 1)]
        for method in ("ahbf", "baseline")
    }
    assert plot(runs["ahbf"] + runs["baseline"], tmp_path) == 0
    found = {method: [records(run) for run in paths] for method, paths in runs.items()}
    for title, scale, value in (
        ("branch1", 100, lambda record: record["eval"]["branch1"]),
        ("ta3", 100, lambda record: record["eval"]["ta3"]),
        ("loss", 1, lambda record: record["train"]["loss"]),
        ("kl/ta2->branch1", 1, lambda record: record["train"]["kl/ta2->branch1"]),
        ("learning rate", 1, lambda record: record["lr"]),
        ("ramp-up (kd_weight)", 1, lambda record: record["kd_weight"]),
        ("training, images/s", 1, lambda record: record["images_per_second"]),
        ("waiting for images, % of the time", 100, lambda record: record["waiting_share"]),
    ):
        axes = panel(drawn, title)
        taught = title in ("ta3", "kl/ta2->branch1", "ramp-up (kd_weight)")
        shown = ["ahbf"] if taught else ["ahbf", "baseline"]
        assert [line.get_label() for line in axes.get_lines()] == [
            f"resnet8 {method} (mean and range of 2 seeds)" for method in shown
        ]
        for line, band, method in zip(axes.get_lines(), axes.collections, shown, strict=True):
            values = [
                [scale * value(run[epoch]) for run in found[method]] for epoch in range(EPOCHS)
            ]
            assert list(line.get_xdata()) == [1, 2]
            assert list(line.get_ydata()) == pytest.approx(
                [statistics.mean(each) for each in values]
            )
            vertices = band.get_paths()[0].vertices
            for epoch, each in enumerate(values, 1):
                drawn_there = [y for x, y in vertices if x == epoch]
                assert (min(drawn_there), max(drawn_there)) == (
                    pytest.approx(min(each)),
                    pytest.approx(max(each)),
                )
    assert "wrote 20 files" in capsys.readouterr().out


def test_figures_are_png_and_svg_and_reproducible(sample_runs, tmp_path):
    run = sample_runs / "ahbf-seed0"
    assert plot([run], tmp_path) == 0
    names = {*ROWS, "overview", "loss", "schedule", "throughput"}
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in names for ending in ("png", "svg")
    }
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
    again = list(training_figures({"resnet8 ahbf": [records(run)]}, "digits, resnet8", ("svg",)))
    assert [figure.name for figure in again] == ["loss", "schedule", "throughput"]
    for figure in again:
        assert figure.files["svg"] == (tmp_path / f"{figure.name}.svg").read_bytes()
    assert matplotlib.get_backend().lower() == "agg"  # needs no display


def test_values_of_only_some_seeds_are_dotted_and_reported(sample_runs, tmp_path, drawn, capsys):
    runs = [copied(sample_runs / f"ahbf-seed{seed}", tmp_path / f"run{seed}") for seed in (0, 1)]
    first = (runs[1] / "metrics.jsonl").read_text().splitlines()[0]
    (runs[1] / "metrics.jsonl").write_text(f"{first}\n{{")
    assert plot(runs, tmp_path / "plots") == 0
    text = capsys.readouterr().out
    assert f"{runs[1]}: metrics.jsonl is damaged in line 2" in text
    assert f"{runs[1]}: unfinished, 1 of 2 epochs" in text
    both, alone = panel(drawn, "branch1").get_lines()
    found = [
        [100 * record["eval"]["branch1"] for record in records(runs[0])],
        [100 * records(sample_runs / "ahbf-seed1")[0]["eval"]["branch1"]],
    ]
    assert (list(both.get_xdata()), list(both.get_ydata())) == (
        [1],
        pytest.approx([statistics.mean((found[0][0], found[1][0]))]),
    )
    assert (alone.get_linestyle(), list(alone.get_xdata()), list(alone.get_ydata())) == (
        ":",
        [1, 2],
        pytest.approx(found[0]),
    )


def test_plot_of_old_records_omits_missing_values(sample_runs, tmp_path, drawn):
    run = copied(sample_runs / "ahbf-seed0", tmp_path / "run")
    change_records(run, lambda record: [record.pop(name) for name in ("train", "waiting_share")])
    assert plot([run], tmp_path / "plots") == 0
    assert not (tmp_path / "plots" / "loss.svg").exists()
    assert not panel(drawn, "waiting for images, % of the time").get_lines()
    assert panel(drawn, "training, images/s").get_lines()


def test_plot_of_incompatible_runs_is_refused(sample_runs, tmp_path, capsys, monkeypatch):
    other = copied(sample_runs / "baseline-seed0", tmp_path / "other")
    change_json(
        other / "environment.json", lambda found: found["data"].update(fingerprint="ab" * 32)
    )
    assert plot([sample_runs / "ahbf-seed0", other], tmp_path / "plots") == 2
    assert "were evaluated on different images" in capsys.readouterr().err
    assert plot([tmp_path], tmp_path / "plots") == 4
    assert "is not a run folder" in capsys.readouterr().err
    change_config(other, ema=0.9)
    assert plot([other], tmp_path / "plots") == 4
    assert "has no accuracy of ema" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot([sample_runs / "ahbf-seed0"], tmp_path / "plots") == 2
    assert (
        capsys.readouterr().err == "fastokd: drawing needs matplotlib: pip install -e '.[plots]'\n"
    )
    assert not (tmp_path / "plots").exists()


def test_logarithmic_axes_have_plain_numbers(sample_runs, tmp_path):
    assert plot([sample_runs / "ahbf-seed0"], tmp_path) == 0
    text = (tmp_path / "schedule.svg").read_text(encoding="utf-8")
    assert "mathdefault" not in text
    comments = re.findall(r"<!-- ([\d.]+) -->", text)  # of each text that is drawn
    assert [float(number) for number in comments if float(number) in (0.01, 0.02, 0.05)]


def test_figures_of_a_page_have_one_width(sample_runs):
    groups = {"ahbf": [records(sample_runs / "ahbf-seed0")]}
    widths = set()
    for draw in (overview_figures, training_figures):
        for figure in draw(groups, "runs", ["svg"]):
            widths.add(re.search(rb'<svg[^>]* width="([\d.]+)pt"', figure.files["svg"])[1])
    assert len(widths) == 1
