"""``fastokd compare``: its numbers are those of the run folders, and what does not compare is
refused.
"""

import csv
import glob
import io
import json
import math
import re
import shlex
import statistics
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from sample_runs import change_config, change_json, change_records, copied, records
from scipy import stats

from fastokd.cli import main
from fastokd.experiments.analysis.compare import compare
from fastokd.experiments.analysis.runs import read_run, read_runs
from fastokd.models import create_model
from fastokd.models.summary import model_costs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compare.md"
RUNS = ("ahbf-seed0", "ahbf-seed1", "baseline-seed0", "baseline-seed1")


def runs_in(folder):
    return [str(folder / name) for name in RUNS]


@pytest.fixture
def runs(sample_runs, tmp_path):
    """Copies that a test may change."""
    for name in RUNS:
        copied(sample_runs / name, tmp_path / name)
    return tmp_path


def said(capsys, *arguments):
    """Output of the command line without the latencies, which take seconds."""
    assert main(["compare", *map(str, arguments), "--no-latency"]) == 0
    return capsys.readouterr().out


def mistake(capsys, code, *arguments):
    assert main(["compare", *map(str, arguments), "--no-latency"]) == code
    text = capsys.readouterr().err
    assert text.startswith("fastokd: ")
    assert text.count("\n") == 1
    return text


def as_csv(capsys, *arguments):
    return {
        row["runs"]: row
        for row in csv.DictReader(io.StringIO(said(capsys, *arguments, "--format", "csv")))
    }


def errors(runs, method, row="branch1", best=False):
    """Of each seed, in %: in the last epoch, or in that with the highest accuracy of the
    student.
    """
    found = []
    for seed in (0, 1):
        epochs = records(runs / f"{method}-seed{seed}")
        chosen = max(epochs, key=lambda record: record["eval"]["branch1"]) if best else epochs[-1]
        found.append(100 - 100 * chosen["eval"][row])
    return found


def test_errors_match_run_records(sample_runs, capsys):
    rows = as_csv(capsys, *runs_in(sample_runs))
    assert list(rows) == ["resnet8 ahbf", "resnet8 baseline"]
    for method in ("ahbf", "baseline"):
        row = rows[f"resnet8 {method}"]
        assert (row["num_seeds"], row["seeds"], row["epochs"], row["finished_epochs"]) == (
            "2",
            "0 1",
            "2",
            "2",
        )
        for name, best in (("last_error", False), ("best_error", True)):
            expected = errors(sample_runs, method, best=best)
            assert [float(value) for value in row[f"{name}_by_seed"].split()] == pytest.approx(
                expected
            )
            assert float(row[f"{name}_mean"]) == pytest.approx(statistics.mean(expected))
            assert float(row[f"{name}_std"]) == pytest.approx(statistics.stdev(expected))
    assert float(rows["resnet8 ahbf"]["ensemble_last_error_mean"]) == pytest.approx(
        statistics.mean(errors(sample_runs, "ahbf", "ensemble"))
    )
    assert rows["resnet8 baseline"]["ensemble_last_error_mean"] == ""


def test_last_and_best_differ_if_best_epoch_is_not_last(runs, capsys):
    change_records(
        runs / "ahbf-seed0",
        lambda record: record["eval"].update(branch1=0.75 - 0.25 * record["epoch"], ensemble=0.625),
    )
    row = as_csv(capsys, runs / "ahbf-seed0")["resnet8 ahbf"]
    assert (
        float(row["last_error_mean"]),
        float(row["best_error_mean"]),
        float(row["ensemble_last_error_mean"]),
    ) == (50, 25, 37.5)
    assert row["last_error_std"] == row["best_error_std"] == ""
    text = said(capsys, runs / "ahbf-seed0")
    assert re.search(
        r"\S+ahbf-seed0 +resnet8 ahbf +0 +2 of 2 +50\.00 +25\.00 \(epoch 1\) +37\.50 ", text
    )
    assert "+-" not in text.split("resnet8 ahbf")[1].partition("\n")[0]


def test_formats_show_equal_numbers(sample_runs, capsys, tmp_path):
    cells = {}
    for method in ("ahbf", "baseline"):
        spreads = [
            f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}"
            for values in (errors(sample_runs, method), errors(sample_runs, method, best=True))
        ]
        ensemble = errors(sample_runs, method, "ensemble") if method == "ahbf" else None
        cells[f"resnet8 {method}"] = [
            "2",
            "2",
            *spreads,
            (
                "-"
                if ensemble is None
                else f"{statistics.mean(ensemble):.2f} +- {statistics.stdev(ensemble):.2f}"
            ),
        ]
    terminal = said(capsys, *runs_in(sample_runs))
    assert (
        main(
            ["compare", *runs_in(sample_runs), "--no-latency", "--out", str(tmp_path / "found.md")]
        )
        == 0
    )
    assert (
        main(
            [
                "compare",
                *runs_in(sample_runs),
                "--no-latency",
                "--out",
                str(tmp_path / "found.html"),
            ]
        )
        == 0
    )
    markdown, html = (tmp_path / "found.md").read_text(), (tmp_path / "found.html").read_text()
    for label, expected in cells.items():
        assert (
            re.split(
                r" {2,}", next(line for line in terminal.splitlines() if line.startswith(label))
            )[1:6]
            == expected
        )
        assert (
            next(line for line in markdown.splitlines() if line.startswith(f"| {label}"))
            .removesuffix(" |")
            .split(" | ")[1:6]
            == expected
        )
        row = re.search(rf'<th scope="row">{label}</th>(.*)</tr>', html)[1]
        assert [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)][:5] == expected
    for heading in ("student, last epoch", "student, best epoch", "ensemble, last epoch"):
        assert f" {heading} |" in markdown


def give_errors(runs, method, by_seed):
    """Runs of a method with these last errors in % by seed, all else as in seed 0."""
    for seed, error in by_seed.items():
        run = runs / f"{method}-seed{seed}"
        if not run.exists():
            copied(runs / f"{method}-seed0", run)
            change_config(run, seed=seed)
        change_records(
            run, lambda record, error=error: record["eval"].update(branch1=1 - error / 100)
        )
    return [str(runs / f"{method}-seed{seed}") for seed in by_seed]


def test_paired_test_uses_common_seeds(runs, capsys):
    alone, taught = {0: 7.0, 1: 6.5, 2: 6.0, 8: 1.0}, {0: 6.2, 1: 6.3, 2: 5.1, 9: 90.0}
    paths = give_errors(runs, "ahbf", taught) + give_errors(runs, "baseline", alone)
    differences = [taught[seed] - alone[seed] for seed in (0, 1, 2)]
    t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    row = as_csv(capsys, *paths)["resnet8 ahbf"]
    assert (row["reference"], row["paired_seeds"]) == ("resnet8 baseline", "3")
    assert float(row["last_error_difference"]) == pytest.approx(statistics.mean(differences))
    assert float(row["p"]) == pytest.approx(2 * stats.t.sf(abs(t), df=2))
    shown = f"{statistics.mean(differences):+.2f} +- {statistics.stdev(differences):.2f} (n=3)"
    assert f"{shown} {float(row['p']):.3g}" in " ".join(said(capsys, *paths).split())


def test_columns_of_the_tests_have_different_names(runs):
    groups = read_runs([runs / "ahbf-seed0", runs / "baseline-seed0"])
    for table in compare(groups, latency=False).tables():
        assert len(set(table.head)) == len(table.head)
    columns = compare(groups, latency=False).tables()[1].head
    assert columns[2:5:2] == ("p, equal epochs", "p, equal compute")


def test_missing_paired_test_reports_reason(runs, capsys, monkeypatch):
    taught, alone = (
        give_errors(runs, "ahbf", {0: 6.0, 1: 5.0}),
        give_errors(runs, "baseline", {0: 7.0, 1: 6.0}),
    )
    assert "No p at equal epochs for resnet8 ahbf: all differences are equal." in said(
        capsys, *taught, *alone
    )
    one = said(capsys, taught[0], *alone)
    assert "-1.00 (n=1)" in one
    assert "No p at equal epochs for resnet8 ahbf: needs 2 shared seeds." in one
    assert "No difference at equal epochs for resnet8 ahbf: no shared seed." in said(
        capsys, taught[0], alone[1]
    )
    give_errors(runs, "baseline", {1: 6.5})
    assert "No p" not in said(capsys, *taught, *alone)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert "No p at equal epochs for resnet8 ahbf: needs scipy: pip install -e '.[plots]'." in said(
        capsys, *taught, *alone
    )


def test_errors_are_compared_with_same_network(runs, capsys):
    small = give_errors(runs, "baseline", {0: 7.0, 1: 6.0}) + give_errors(
        runs, "ahbf", {0: 6.5, 1: 5.0}
    )
    assert as_csv(capsys, *small[2:])["resnet8 ahbf"].get("reference", "") == ""
    assert "No difference for resnet8 ahbf: there are no other runs of resnet8." in said(
        capsys, *small[2:]
    )
    large = []
    for method, by_seed in (
        ("one", {0: 5.0, 1: 4.0}),
        ("ahbf", {0: 4.0, 1: 3.5}),
        ("baseline", {0: 9.0, 1: 8.9}),
    ):
        for seed, error in by_seed.items():
            run = copied(runs / "ahbf-seed0", runs / f"large-{method}-{seed}")
            change_config(
                run,
                model="resnet14",
                method=method,
                seed=seed,
                branches=1 if method == "baseline" else 3,
            )
            change_records(
                run, lambda record, error=error: record["eval"].update(branch1=1 - error / 100)
            )
            large.append(str(run))
    rows = as_csv(capsys, *small, *large)
    assert {label: row["reference"] for label, row in rows.items()} == {
        "resnet8 baseline": "",
        "resnet8 ahbf": "resnet8 baseline",
        "resnet14 one": "resnet14 baseline",
        "resnet14 ahbf": "resnet14 baseline",
        "resnet14 baseline": "",
    }
    differences = {
        label: float(row["last_error_difference"])
        for label, row in rows.items()
        if row["reference"]
    }
    assert differences == pytest.approx(
        {"resnet8 ahbf": -0.75, "resnet14 one": -4.45, "resnet14 ahbf": -5.2}
    )
    text = said(capsys, *small, *large)
    assert (
        "The reference at equal epochs of resnet8 ahbf is resnet8 baseline.\nThe reference at equal"
        " epochs of resnet14 one; resnet14 ahbf is resnet14 baseline." in text
    )
    assert [line.split()[:2] for line in text.splitlines() if "  reference  " in line] == [
        ["resnet8", "baseline"],
        ["resnet14", "baseline"],
    ]
    without = said(capsys, *small, *large[:4])
    assert "The reference at equal epochs of resnet14 ahbf is resnet14 one." in without
    alone = said(capsys, *small, *large[:2])
    assert "No difference for resnet14 one: there are no other runs of resnet14." in alone
    assert re.search(r"^resnet14 one +-  +-  +-  +-  +\d+$", alone, re.MULTILINE)


def test_costs_match_networks(sample_runs, capsys):
    rows = as_csv(capsys, *runs_in(sample_runs))
    with torch.device("meta"):
        costs = model_costs(create_model("resnet8", "ahbf", 10, 3, 1), 8)
    for row, training in (
        (rows["resnet8 ahbf"], costs["training"]),
        (rows["resnet8 baseline"], costs["student"]),
    ):
        assert row["student"] == "resnet8"
        assert (int(row["parameters"]), int(row["flops"]), int(row["training_flops"])) == (
            costs["student"].parameters,
            costs["student"].flops,
            training.flops,
        )
    ratio = f"{costs['training'].flops / costs['student'].flops:.2f}"
    assert re.search(
        rf"^resnet8 ahbf +resnet8 +{costs['student'].parameters:,} +\S+$"
        rf"(.*\n)*^resnet8 ahbf +{ratio} ",
        said(capsys, *runs_in(sample_runs)),
        re.MULTILINE,
    )


def test_training_time_is_a_multiple_of_baseline_on_same_machine(runs, capsys):
    for name in RUNS:
        # The median: the first epoch may compile.
        change_records(
            runs / name,
            lambda record, name=name: record.update(
                images_per_second=(
                    (1000 if name.startswith("baseline") else 250) if record["epoch"] else 1000
                )
            ),
        )
        for seed, epoch in ((0, 2), (1, 2)):
            if name.endswith(str(seed)):
                last = records(runs / name)[-1]
                with open(runs / name / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({**last, "epoch": epoch}) + "\n")
    rows = as_csv(capsys, *runs_in(runs))
    assert float(rows["resnet8 ahbf"]["images_per_second"]) == 250
    assert float(rows["resnet8 ahbf"]["training_time_times_alone"]) == 4
    assert float(rows["resnet8 baseline"]["training_time_times_alone"]) == 1
    assert as_csv(capsys, *runs_in(runs)[:2])["resnet8 ahbf"]["training_time_times_alone"] == ""
    change_json(runs / "ahbf-seed0" / "environment.json", lambda found: found.update(threads=64))
    assert as_csv(capsys, *runs_in(runs))["resnet8 ahbf"]["training_time_times_alone"] == ""


@pytest.mark.parametrize(
    "lever",
    [
        {"compile": True},
        {"cuda_graph": True},
        {"flat": True},
        {"channels_last": False},
        {"impl": "reference"},
        {"loader": "torchvision"},
        {"precision": "bf16"},
        {"device_batch": 32},
    ],
)
def test_training_time_of_other_configuration_has_no_ratio(runs, capsys, lever):
    def times_alone():
        return as_csv(capsys, *runs_in(runs))["resnet8 ahbf"]["training_time_times_alone"]

    for seed in (0, 1):
        change_config(runs / f"baseline-seed{seed}", **lever)
    assert times_alone() == ""
    for seed in (0, 1):
        change_config(runs / f"ahbf-seed{seed}", **lever)
    assert float(times_alone()) > 0
    for seed in (0, 1):
        change_config(
            runs / f"ahbf-seed{seed}", streams=True
        )  # what a student alone has no branches for
    assert float(times_alone()) > 0


def test_latency_of_same_student_is_measured_once(sample_runs):
    ahbf, baseline = compare(read_runs([sample_runs / name for name in RUNS])).rows
    assert set(ahbf.latencies) >= {("cpu", 1), ("cpu", 128)}
    assert ahbf.latencies is baseline.latencies
    # Which batch is faster is not tested: other work on the machine changes measured times.
    assert all(latency.seconds > 0 for latency in ahbf.latencies.values())


def test_group_labels_show_differing_options(runs, capsys):
    for name, options in (
        ("other", {"temperature": 4.0, "lambda_ta": 2.0}),
        ("again", {"lambda_ta": 2.0, "temperature": 4.0}),
    ):
        copied(runs / "ahbf-seed0", runs / name)
        change_config(
            runs / name, lr=0.0123456789, method_options=options, seed=int(name == "again")
        )
    copied(runs / "ahbf-seed0", runs / "elsewhere")
    change_config(
        runs / "elsewhere", seed=5, data="moved/digits", keep_checkpoints=7, impl="reference"
    )
    rows = as_csv(capsys, runs / "ahbf-seed0", runs / "other", runs / "elsewhere", runs / "again")
    assert list(rows) == [
        "resnet8 ahbf, method_options none, lr 0.05",
        "resnet8 ahbf, method_options lambda_ta=2 temperature=4, lr 0.0123456789",
    ]
    assert rows["resnet8 ahbf, method_options none, lr 0.05"]["seeds"] == "0 5"


def test_student_of_run_is_ema_or_deepest_branch(runs):
    change_config(runs / "ahbf-seed0", ema=0.99)
    change_records(runs / "ahbf-seed0", lambda record: record["eval"].update(ema=0.5))
    assert read_run(runs / "ahbf-seed0").student == "ema"
    change_config(runs / "ahbf-seed1", compression=True)
    assert read_run(runs / "ahbf-seed1").student == "branch3"


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        (
            "environment.json",
            lambda found: found["data"].update(fingerprint="ab" * 32),
            "data: digits {first:.12}, digits abababababab",
        ),
        (
            "student.json",
            lambda found: found["accuracy"].update(split="val", num_images=77),
            "split: test, val; number of images: 100, 77",
        ),
        (
            "student.json",
            lambda found: found["preprocessing"].update(image_size=[16, 16], shorter_side=18),
            "image size: 8 x 8, 16 x 16; shorter side before the crop: 8, 18",
        ),
    ],
)
def test_runs_evaluated_on_different_images_are_refused(runs, capsys, file, change, what):
    fingerprint = json.loads((runs / "ahbf-seed0" / "environment.json").read_text())["data"][
        "fingerprint"
    ]
    change_json(runs / "baseline-seed1" / file, change)
    text = mistake(capsys, 2, *runs_in(runs))
    assert (
        f"{runs / 'ahbf-seed0'} and {runs / 'baseline-seed1'} were evaluated on different images"
        in text
    )
    assert f"({what.format(first=fingerprint)})" in text


def test_runs_with_different_val_split_are_refused(runs, capsys):
    change_config(runs / "baseline-seed0", val_split=0.1)
    assert "(val_split: 0.0, 0.1)" in mistake(capsys, 2, *runs_in(runs))


def test_run_without_records_reports_data_of_its_checkpoint(runs, capsys):
    (runs / "ahbf-seed1" / "environment.json").write_text("{")
    (runs / "ahbf-seed1" / "student.json").unlink()
    text = said(capsys, *runs_in(runs))
    assert f"{runs / 'ahbf-seed1'}: environment.json is missing or damaged" in text
    assert f"{runs / 'ahbf-seed1'}: student.json is missing or damaged" in text
    state = torch.load(runs / "ahbf-seed1" / "checkpoints" / "last.pt", weights_only=True)
    state["data"]["fingerprint"] = "cd" * 32
    torch.save(state, runs / "ahbf-seed1" / "checkpoints" / "last.pt")
    assert "cdcdcdcdcdcd" in mistake(capsys, 2, *runs_in(runs))
    (runs / "ahbf-seed1" / "checkpoints" / "last.pt").unlink()
    assert "no record of its data is left" in said(capsys, *runs_in(runs))


def cut(run):
    """Leave the first epoch alone."""
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")


def test_unfinished_run_uses_completed_epochs(runs, capsys):
    for seed in (0, 1):
        change_config(runs / f"ahbf-seed{seed}", epochs=9)
    text = said(capsys, *runs_in(runs))
    assert f"{runs / 'ahbf-seed0'}: unfinished, 2 of 9 epochs" in text
    assert re.search(r"^resnet8 ahbf +2 +2 of 9 ", text, re.MULTILINE)
    row = as_csv(capsys, *runs_in(runs))["resnet8 ahbf"]
    assert float(row["last_error_mean"]) == pytest.approx(statistics.mean(errors(runs, "ahbf")))
    assert (row["paired_seeds"], row["p"]) == ("0", "")
    assert (
        "No difference at equal epochs for resnet8 ahbf: there is no run of resnet8 baseline with 9"
        " epochs." in text
    )
    for seed in (0, 1):
        change_config(runs / f"baseline-seed{seed}", epochs=9)
    cut(runs / "ahbf-seed0")
    cut(runs / "ahbf-seed1")
    text = said(capsys, *runs_in(runs))
    assert (
        "No difference at equal epochs for resnet8 ahbf: 1 of 9 epochs are finished, of the"
        " reference 2 of 9." in text
    )


@pytest.mark.parametrize("planned", [2, 9])
def test_runs_with_different_epochs_are_not_averaged(runs, capsys, planned):
    paths = give_errors(runs, "ahbf", {0: 6.0, 1: 70.0, 2: 5.0}) + give_errors(
        runs, "baseline", {0: 7.0, 1: 80.0, 2: 6.5}
    )
    for path in paths:
        change_config(Path(path), epochs=planned)
    cut(runs / "ahbf-seed1")
    row = as_csv(capsys, *paths)["resnet8 ahbf"]
    assert (
        row["num_seeds"],
        row["seeds"],
        row["left_out_seeds"],
        row["epochs"],
        row["finished_epochs"],
    ) == ("2", "0 2", "1", str(planned), "2")
    assert (float(row["last_error_mean"]), float(row["best_error_mean"])) == pytest.approx(
        (5.5, 5.5)
    )
    assert (row["paired_seeds"], float(row["last_error_difference"])) == ("2", pytest.approx(-1.25))
    text = said(capsys, *paths)
    assert f"{runs / 'ahbf-seed1'}: unfinished, 1 of {planned} epochs" in text
    assert (
        "\n\nExcluded from means, differences and p, with fewer finished epochs than other runs of"
        f" the row: seed 1 of resnet8 ahbf (1 of {planned} epochs).\n" in text
    )
    assert re.search(
        rf"^resnet8 ahbf +2 +2{'' if planned == 2 else ' of 9'} +5\.50 \+- 0\.71 ",
        text,
        re.MULTILINE,
    )
    assert "Excluded from means" not in said(capsys, paths[0], *paths[2:])


def test_best_epoch_unlike_summary_is_reported(runs, capsys):
    run = runs / "ahbf-seed0"
    assert "summary.json" not in said(capsys, run)
    change_records(run, lambda record: record["eval"].update(branch1=0.75 - 0.25 * record["epoch"]))
    change_json(run / "summary.json", lambda found: found.update(best_epoch=1))
    text = said(capsys, run)
    assert (
        f"{run}: its best epoch is 1, which is used here; summary.json and best.pt are of epoch 2"
        in text
    )
    assert "25.00 (epoch 1)" in text
    change_config(run, epochs=9)
    change_json(
        run / "summary.json", lambda found: found.update(epochs=1)
    )  # the run was resumed, and has not ended since
    assert "summary.json" not in said(capsys, run)
    (run / "summary.json").write_text("[")
    assert "summary.json" not in said(capsys, run)


@pytest.mark.parametrize(
    "line", ['{"epoch": 1, "lr"', '{"epoch": 1, "eval": {"branch1": "high"}}', "\x00\x80"]
)
def test_records_after_damaged_line_are_ignored(runs, capsys, line):
    first = (runs / "ahbf-seed0" / "metrics.jsonl").read_text().splitlines()[0]
    (runs / "ahbf-seed0" / "metrics.jsonl").write_bytes(f"{first}\n{line}".encode("latin-1"))
    text = said(capsys, *runs_in(runs))
    assert (
        f"{runs / 'ahbf-seed0'}: metrics.jsonl is damaged in line 2: only what is before it is used"
        in text
    )
    assert read_run(runs / "ahbf-seed0").epochs == 1


def test_folder_without_run_is_refused_in_one_line(runs, capsys):
    assert "no runs: give run folders" in mistake(capsys, 2)
    assert "does not exist" in mistake(capsys, 4, runs / "nothing")
    assert "is not a run folder (it has no config.yaml); pass a folder" in mistake(capsys, 4, runs)
    text = mistake(capsys, 2, *runs_in(runs), runs / "ahbf-seed1")
    assert "same configuration with the same seed 1" in text
    (runs / "ahbf-seed0" / "metrics.jsonl").unlink()
    assert "it has no finished epoch in metrics.jsonl" in mistake(capsys, 4, *runs_in(runs))
    (runs / "ahbf-seed1" / "config.yaml").write_text("method: [")
    assert "is not valid YAML" in mistake(capsys, 2, runs / "ahbf-seed1")
    change_config(runs / "baseline-seed0", preset="papre")
    assert (
        "baseline-seed0/config.yaml: unknown preset 'papre' of method 'baseline'; did you mean"
        " 'paper'?" in mistake(capsys, 2, runs / "baseline-seed0")
    )


def test_unreadable_student_has_no_latency(runs):
    for name in ("ahbf-seed0", "baseline-seed0"):
        (runs / name / "student.safetensors").write_bytes(b"nothing")
    found = compare(read_runs([runs / "ahbf-seed0", runs / "baseline-seed0"]))
    assert found.rows[0].latencies == {}
    assert [remark for remark in found.remarks if "no latency of its student" in remark]


def test_documentation_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in PAGE.read_text(encoding="utf-8").split("```")[1].splitlines() if line]
    assert {line.split()[1] for line in lines} == {"train", "compare", "plot", "report"}
    for line in lines:
        words = [
            word
            for part in shlex.split(line)[1:]
            for word in (sorted(glob.glob(part)) if "*" in part else [part])
        ]
        assert main(words) == 0, line
    assert "| resnet8 ahbf | 2 | 2 |" in (tmp_path / "comparison.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs",
        "comparison.md",
        "plots",
        "report.html",
    }
