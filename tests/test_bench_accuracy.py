"""``bench.accuracy`` trains what its result file lacks, and refuses to mix settings or images."""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_rel

from bench.accuracy import __main__ as command
from bench.accuracy import presets, tables
from bench.accuracy.images import cifar10, image_list
from bench.accuracy.matrix import measured, plan_matrix
from bench.accuracy.presets import FINE_TUNING, PRESETS, TINY_IMAGENET, Preset
from fastokd.errors import ConfigError
from fastokd.experiments.analysis.figures import shows
from fastokd.experiments.analysis.runs import Run, read_run
from fastokd.models import create_model
from fastokd.train.config import TrainConfig
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.session import begin_run

SMALL = TrainConfig(
    model="resnet8", aux_blocks=1, epochs=2, batch_size=16, device="cpu", precision="fp32"
)


def test_fine_tuning_page_has_the_measured_errors():
    root = Path(__file__).parents[1]
    result = json.loads((root / "bench/results/accuracy-fine-tuning-cpu.json").read_text())
    text = " ".join((root / "docs/fine-tuning.md").read_text().split())
    for row, words in (
        ("from scratch", "error from scratch"),
        ("alone from the weights", "alone from the weights"),
        ("AHBF from the weights", "with AHBF,"),
        ("AHBF and a teacher from the weights", "with AHBF and a teacher."),
    ):
        runs = [run for run in result["runs"] if run["row"] == row]
        error = statistics.mean(100 * (1 - run["last"][run["student"]]) for run in runs)
        assert f"{error:.1f} % {words}" in text


def write_images(root, splits=("train", "test"), count=16, seed=0):
    """Two classes of random 8 x 8 images; returns the folder."""
    rng = np.random.default_rng(seed)
    for split in splits:
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                low = 0 if label == "dark" else 128
                pixels = rng.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{index:03}.png")
    return root


def small_preset(**changes):
    """A matrix of three runs that take a few seconds."""
    base = dataclasses.replace(SMALL, method="baseline")
    preset = Preset(
        name="small",
        title="Two classes",
        images=lambda images, folder: image_list(images, folder / "small.csv", 8, "test"),
        rows={"alone": base, "ahbf, two": dataclasses.replace(SMALL, branches=2)},
        order=((("alone",), (0, 1)), (("ahbf, two",), (0,))),
    )
    return dataclasses.replace(preset, **changes)


def call(root, monkeypatch, *arguments, preset=None, images="images", out="results.json"):
    """Run the command on ``root``; returns its exit code."""
    preset = preset or small_preset()
    monkeypatch.setitem(command.PRESETS, "small", preset)
    paths = {"--data": root / images, "--runs": root / "runs", "--out": root / out}
    options = [str(text) for pair in paths.items() for text in pair]
    return command.main(["small", *options, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images, the runs of ``small_preset`` and their result file."""
    root = tmp_path_factory.mktemp("accuracy")
    write_images(root / "images")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(root, monkeypatch) == 0
    return root


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of ``trained`` with the result file and images, without run folders."""
    shutil.copytree(trained / "images", tmp_path / "images")
    shutil.copy(trained / "results.json", tmp_path)
    return tmp_path


def read(root):
    return json.loads((root / "results.json").read_text())


def test_result_file_has_every_run_in_order_with_its_record(trained):
    found = read(trained)
    assert [(entry["row"], entry["seed"]) for entry in found["runs"]] == [
        ("alone", 0),
        ("alone", 1),
        ("ahbf, two", 0),
    ]
    assert found["data"]["num_images"] == {"train": 16, "test": 32}
    entry = found["runs"][2]
    records = RunFolder(trained / "runs" / "matrix" / "runs" / "ahbf-two-seed0").read_metrics()
    assert entry["last"] == records[-1]["eval"]
    assert entry["best"] == records[entry["best_epoch"] - 1]["eval"]
    assert entry["student"] == "branch1"
    assert "ta2" in entry["last"]
    assert entry["seconds"] == pytest.approx(sum(each["seconds"] for each in records), abs=0.06)
    assert entry["environment"]["torch"] == torch.__version__
    assert found["settings"]["ahbf, two"]["branches"] == 2
    assert "data" not in found["settings"]["alone"]


def test_metrics_of_run_are_computed():
    records = [
        {
            "epoch": epoch,
            "seconds": 30.0,
            "images_per_second": speed,
            "eval": {"branch1": student, "ta2": 0.5},
        }
        for epoch, (speed, student) in enumerate([(10.0, 0.6), (100.0, 0.9), (110.0, 0.8)])
    ]
    data = {"num_classes": 2, "image_size": [8, 8], "num_images": {"train": 16}}
    config = dataclasses.replace(SMALL, epochs=3)
    found = measured(Run(Path("run"), config, tuple(records), "branch1", {}, data, {}, ()))
    expected = {
        "epochs": 3,
        "student": "branch1",
        "last": {"branch1": 0.8, "ta2": 0.5},
        "best": {"branch1": 0.9, "ta2": 0.5},
        "best_epoch": 2,
        "seconds": 90.0,
        "images_per_second": 100.0,
    }
    assert {name: found[name] for name in expected} == expected


def test_training_flops_are_three_forward_passes_of_every_image(trained):
    """Multiply-adds are counted by hand: hooks on convolutions and linear layers."""

    def forward_flops(model):
        total = 0

        def count(module, _, output):
            nonlocal total
            per_output = module.weight.numel() // module.weight.shape[0]
            total += 2 * per_output * output.numel()

        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(count)
        model.eval()(torch.zeros(1, 3, 8, 8))
        return total

    alone = create_model("resnet8", method="baseline", num_classes=2)
    images, epochs = 16, 2
    assert read(trained)["runs"][0]["flops"] == 3 * forward_flops(alone) * images * epochs


def test_finished_rows_are_not_trained_again(copied, monkeypatch):
    before = (copied / "results.json").read_bytes()
    assert call(copied, monkeypatch) == 0
    assert (copied / "results.json").read_bytes() == before
    assert not (copied / "runs" / "matrix" / "runs").exists()


def test_missing_run_is_trained_and_others_are_kept(copied, monkeypatch):
    found = read(copied)
    removed = found["runs"].pop(1)
    (copied / "results.json").write_text(json.dumps(found))
    assert call(copied, monkeypatch) == 0
    now = read(copied)["runs"]
    assert [now[0], now[2]] == found["runs"]
    assert (now[1]["seed"], now[1]["last"]) == (1, removed["last"])  # the same bits
    assert [each.name for each in (copied / "runs/matrix/runs").iterdir()] == ["alone-seed1"]


def test_stopped_run_is_resumed(copied, monkeypatch):
    """A run of which only the first epoch is left ends like the run that was not stopped."""
    found = read(copied)
    removed = found["runs"].pop(0)
    (copied / "results.json").write_text(json.dumps(found))
    preset = small_preset()
    data = preset.images(copied / "images", copied / "runs" / "images")
    runs = copied / "runs" / "matrix"
    matrix = plan_matrix(preset, data, runs, copied / "results.json")
    (job,) = matrix.queue
    # The command is stopped after the first epoch, as by a signal.

    begin_run(job.config, job.path, job.name, Reporter(quiet=True)).run(until=1)
    (runs / "accuracy.json").write_text(json.dumps({**matrix.record, "data": {}}))
    assert call(copied, monkeypatch) == 0
    assert read_run(job.path).epochs == 2
    assert read(copied)["runs"][0]["last"] == removed["last"]


@pytest.mark.parametrize("change", [("alone", "lr", 0.2), ("ahbf, two", "branches", 3)])
def test_changed_settings_of_row_with_results_are_refused(copied, monkeypatch, capsys, change):
    row, field, value = change
    rows = small_preset().rows
    rows = {**rows, row: dataclasses.replace(rows[row], **{field: value})}
    before = (copied / "results.json").read_bytes()
    assert call(copied, monkeypatch, preset=small_preset(rows=rows)) == 2
    message = capsys.readouterr().err
    assert f"results of the row '{row}'" in message
    assert {"lr": "lr: 0.1, 0.2", "branches": "branches: 2, 3"}[field] in message
    assert (copied / "results.json").read_bytes() == before


def test_other_images_are_refused(copied, monkeypatch, capsys):
    write_images(copied / "others", seed=1)
    assert call(copied, monkeypatch, images="others") == 2
    assert "results on other images" in capsys.readouterr().err


def test_unwritable_result_folder_is_refused_before_training(copied, monkeypatch, capsys):
    (copied / "file").write_text("")
    assert call(copied, monkeypatch, out="file/results.json") != 0
    assert "file" in capsys.readouterr().err
    assert not (copied / "runs" / "matrix" / "runs").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"preset": "small"}'])
def test_damaged_result_file_is_refused(copied, monkeypatch, capsys, text):
    (copied / "results.json").write_text(text)
    assert call(copied, monkeypatch) == 2
    assert "damaged" in capsys.readouterr().err
    assert (copied / "results.json").read_text() == text


def test_unknown_row_and_numbers_below_one_are_refused(copied, monkeypatch, capsys):
    for arguments in (["--rows", "alon"], ["--seeds", "0"], ["--per-device", "0"]):
        assert call(copied, monkeypatch, *arguments) == 2
        assert arguments[1] in capsys.readouterr().err


def test_image_list_takes_first_files_of_each_class(tmp_path):
    write_images(tmp_path / "images", count=4)
    path = image_list(tmp_path / "images", tmp_path / "list.csv", 2, "test")
    head, *lines = path.read_text().splitlines()
    assert head == "path,label,split"
    assert [line.rpartition("/")[2] for line in lines if line.endswith(",train")] == [
        "000.png,dark,train",
        "001.png,dark,train",
        "000.png,light,train",
        "001.png,light,train",
    ]
    assert sum(line.endswith(",test") for line in lines) == 8
    with pytest.raises(ConfigError, match="4 images; 5 are needed"):
        image_list(tmp_path / "images", tmp_path / "list.csv", 5, "test")
    with pytest.raises(ConfigError, match="val/CLASS"):
        image_list(tmp_path / "images", tmp_path / "list.csv", 2, "val")


def test_missing_archive_names_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.accuracy.images.ARCHIVES", (tmp_path / "none",))
    with pytest.raises(ConfigError, match=r"no cifar10-jpeg\.tar\.xz.*--data"):
        cifar10(None, tmp_path / "images")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_valid_and_every_row_is_trained(preset):
    for config in preset.rows.values():
        check_config(config)
    assert {row for row, _ in preset.runs} == set(preset.rows)


def test_student_alone_at_equal_compute_costs_as_much_as_ahbf():
    """The ratio is counted on the real networks, with the profiler of torch."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(**options):
        model = create_model("resnet8", num_classes=100, **options).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
        return counter.get_total_flops()

    ratio = flops(method="ahbf", num_branches=4, aux_blocks=1) / flops(method="baseline")
    epochs = {
        row: TINY_IMAGENET.rows[row].epochs
        for row in (presets.ALONE, presets.AHBF, presets.EQUAL_COMPUTE)
    }
    assert epochs[presets.ALONE] == epochs[presets.AHBF] == 20
    assert epochs[presets.EQUAL_COMPUTE] == round(20 * ratio)


def test_longer_fine_tuning_alone_costs_as_much_as_ahbf():
    """Counted with the profiler of torch; a frozen teacher's pass is a third of a trained one."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(row, **options):
        config = FINE_TUNING.rows[row]
        options = {"num_classes": 50, "at": config.at, "aux_blocks": config.aux_blocks, **options}
        model = create_model(config.model, method=config.method, **options).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
        return counter.get_total_flops()

    alone, ahbf = flops(FINE_TUNING.alone), flops("AHBF from the weights", num_branches=3)
    teacher = flops(presets.LARGER) / 3
    epochs = [config.epochs for row, config in FINE_TUNING.rows.items() if "epochs" in row]
    usual = FINE_TUNING.rows[FINE_TUNING.alone].epochs
    assert epochs == [round(usual * ahbf / alone), round(usual * (ahbf + teacher) / alone)]


# --- rows that start from the students of others


def chained_preset():
    """Fine-tuning with a teacher, each from a run on other images; two seeds of the last row."""
    base = dataclasses.replace(SMALL, method="baseline")
    first = dataclasses.replace(base, data="before.csv")
    fine = dataclasses.replace(base, weights="pretrained", epochs=1)

    def images(source, folder):
        image_list(source, folder / "before.csv", 8, "test")
        return image_list(source, folder / "small.csv", 16, "test")

    return small_preset(
        images=images,
        rows={
            "ahbf": dataclasses.replace(fine, method="ahbf", branches=2, teacher="teacher"),
            "teacher": fine,
            "pretrained": first,
        },
        order=((("ahbf", "teacher"), (0, 1)), (("pretrained",), (0,))),
        alone="teacher",
    )


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """A folder with the runs of ``chained_preset`` that its row "ahbf" needs, of one seed."""
    root = tmp_path_factory.mktemp("chained")
    write_images(root / "images")
    with pytest.MonkeyPatch.context() as monkeypatch:
        wanted = ("--rows", "ahbf", "--seeds", "1")
        assert call(root, monkeypatch, *wanted, preset=chained_preset()) == 0
    return root


def test_rows_start_from_the_runs_of_other_rows(chained):
    runs = chained / "runs" / "matrix" / "runs"
    assert sorted(each.name for each in runs.iterdir()) == [
        "ahbf-seed0",
        "pretrained-seed0",
        "teacher-seed0",
    ]
    found = read_run(runs / "ahbf-seed0").config
    assert found.weights == str(runs / "pretrained-seed0")
    assert found.teacher == str(runs / "teacher-seed0")
    assert Path(found.data).name == "small.csv"
    assert Path(read_run(runs / "pretrained-seed0").config.data).name == "before.csv"
    assert "pretrained-seed0" in (runs / "ahbf-seed0" / "log.txt").read_text()


def test_result_file_names_needed_rows_and_other_images(chained):
    found = read(chained)
    assert found["data"]["num_images"] == {"train": 32, "test": 32}
    settings = found["settings"]["ahbf"]
    assert (settings["weights"], settings["teacher"]) == ("pretrained", "teacher")
    records = {run["row"]: run.get("data", {}).get("num_images") for run in found["runs"]}
    assert records == {"ahbf": None, "teacher": None, "pretrained": {"train": 16, "test": 32}}


def test_rows_on_other_images_are_not_compared(chained, monkeypatch):
    monkeypatch.setitem(tables.PRESETS, "small", chained_preset())
    lines = tables.accuracy_tables(chained / "results.json")
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        "ahbf",
        "teacher",
    ]
    (line,) = (line for line in lines if line.startswith("pretrained: "))
    assert "16 train and 32 test images of 2 other classes" in line
    names = {label for label in tables.frontier(chained / "results.json")["series"]}
    assert names == {"ahbf", "teacher"}


def test_changed_images_of_a_needed_row_are_refused(chained, monkeypatch, tmp_path, capsys):
    shutil.copytree(chained, root := tmp_path / "copy")
    found = read(root)
    (run,) = (each for each in found["runs"] if each["row"] == "pretrained")
    run["data"]["fingerprint"] = "0" * 64
    (root / "results.json").write_text(json.dumps(found))
    assert call(root, monkeypatch, "--dry-run", preset=chained_preset()) == 2
    assert "fingerprint 000000000000" in capsys.readouterr().err


# --- tables and figure


def made_up(tmp_path):
    """A result file of a preset with made-up errors; returns its path."""

    def run(row, seed, error, flops, ensemble=None):
        last = {"branch1": 1 - error / 100}
        if ensemble is not None:
            last["ensemble"] = 1 - ensemble / 100
        best = {"branch1": 1 - (error - 1) / 100}
        machine = {"torch": "2.14", "commit": "abc", "device": "cpu"}
        record = {"student": "branch1", "last": last, "best": best, "best_epoch": 1}
        cost = {"epochs": 20, "flops": flops, "seconds": 1800.0, "environment": machine}
        return {"row": row, "seed": seed, **record, **cost}

    alone, equal, ahbf = presets.ALONE, presets.EQUAL_COMPUTE, presets.AHBF
    taught = (63.0, 65.0, 62.5)
    longer = {"epochs": 40, "flops": 8 * 10**12}
    runs = [
        *(run(alone, seed, error, 4 * 10**12) for seed, error in enumerate((65.0, 66.0, 64.0))),
        *(run(equal, seed, error, 16 * 10**12) for seed, error in enumerate((60.0, 61.0))),
        *(run(ahbf, seed, error, 16 * 10**12, 62.0) for seed, error in enumerate(taught)),
        {**run("alone, 40 epochs", 0, 62.0, 0), **longer},
    ]
    found = {
        "preset": TINY_IMAGENET.name,
        "data": {"num_images": {"train": 20_000, "val": 5_000}, "num_classes": 100},
        "settings": {
            alone: {"method": "baseline", "epochs": 20, "lr": 0.05},
            equal: {"method": "baseline", "epochs": 85, "lr": 0.05},
            ahbf: {"method": "ahbf", "epochs": 20, "lr": 0.05},
            "alone, 40 epochs": {"method": "baseline", "epochs": 40, "lr": 0.05},
        },
        "runs": runs,
    }
    path = tmp_path / "accuracy-x-cpu.json"
    path.write_text(json.dumps(found))
    return path


def test_table_has_differences_at_equal_epochs_and_equal_compute(tmp_path):
    text = "\n".join(tables.accuracy_tables(made_up(tmp_path)))
    p = ttest_rel([63.0, 65.0, 62.5], [65.0, 66.0, 64.0]).pvalue
    equal = ttest_rel([63.0, 65.0], [60.0, 61.0]).pvalue
    assert (
        "| ahbf, paper | 0, 1, 2 | 20 | 63.50 +- 1.32 | 62.50 +- 1.32 | 62.00 +- 0.00 | 4.00 |"
        f" -1.50 +- 0.50 (n=3), p {p:.3g} | +3.50 +- 0.71 (n=2), p {equal:.3g} | 0.5 |" in text
    )
    assert "| alone, 40 epochs | 0 | 40 | 62.00 | 61.00 | - | 2.00 | - | - | 0.5 |" in text
    assert "20,000 train and 5,000 val images of 100 classes" in text
    assert "Not trained yet: ahbf, code; one" in text


def test_figure_joins_rows_that_differ_only_in_epochs(tmp_path):
    data = tables.frontier(made_up(tmp_path))
    alone, ahbf = data["series"][presets.ALONE], data["series"][presets.AHBF]
    assert [point["teraflops"] for point in alone] == [4.0, 8.0, 16.0]
    assert [point["error"] for point in alone] == pytest.approx([65.0, 62.0, 60.5])
    assert [point["seeds"] for point in alone] == [3, 1, 2]
    assert ahbf[0]["deviation"] == pytest.approx(statistics.stdev([63.0, 65.0, 62.5]))
    figure = tables.draw_frontier(data, tmp_path / "figure.svg")
    assert shows(figure, data)
