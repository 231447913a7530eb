"""The GPU entry: its dry run goes through the code of every part, a later call continues an
ended one, and mistakes are reported.
"""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
import torch

import bench.report
from bench import gpu_tables
from bench.accuracy import images
from bench.gpu import accuracy, kernels, results
from bench.gpu import tests as gpu_tests
from bench.gpu.entry import PARTS, main, run_part
from bench.gpu.kernels import NUM_BRANCHES, SINGLES, make_inputs
from bench.gpu.part import Context, Part, Row
from bench.gpu.profile import kernel_summary
from bench.gpu.results import ROOT, Results, identity
from bench.gpu.tests import run_files
from bench.loaders import LARGE_MODEL
from fastokd.errors import Preempted
from fastokd.experiments.step_benchmark import SPENT
from fastokd.graph import DIVERGENCES
from fastokd.methods import get_method, list_methods
from fastokd.models import create_model, find_backbone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The files of a dry run of all parts, and the output of it and of a second one."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--dry-run", "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    assert main(arguments) == 0
    return folder / "out", arguments


def read(out, part):
    return json.loads((out / f"{part}-dry-run.json").read_text())


def named(found, entries="rows"):
    return {row["row"]: row for row in found[entries]}


def test_dry_run_measures_every_row_of_every_part(everything):
    out, _ = everything
    for name, part in PARTS.items():
        found = read(out, name)
        assert found["complete"], (name, found["left"])
        assert found[part.entries]
        assert found["identity"]["code"]
        assert found["sessions"][0]["started"] == found["environment"]["started"]
    assert named(read(out, "environment"))["copy"]["gb_s"] > 0
    (tests,) = read(out, "tests")["rows"]
    assert tests["returncode"] == 0, tests
    assert {
        f"tests/test_{name}.py"
        for name in (
            "triton_gpu",
            "step_gpu",
            "data_dali_gpu",
            "data_loader",
            "kdcl",
            "tsb",
            "memory",
        )
    } <= set(tests["files"])
    (ladder,) = read(out, "step")["ladders"]
    measured = [row for row in ladder["rows"] if row["reason"] != "needs a GPU"]
    assert {row["kind"] for row in measured} == {"first", "lever", "alternative", "student"}
    assert all(not row["reason"] and row["images_per_second"][0] > 0 for row in measured), measured
    (profile,) = read(out, "profile")["rows"]
    trace = gzip.decompress((out / profile["trace"]).read_bytes())
    assert b"host_name" not in trace
    assert {event.get("cat") for event in json.loads(trace)["traceEvents"]} >= {"cpu_op"}
    assert profile["kernels"]
    data = read(out, "data")["rows"]
    assert all(
        row["images_per_second"] > 0 for row in data if "loader" in row and "skipped" not in row
    )
    assert 0 <= named(read(out, "data"))["waiting"]["waiting_share"] < 1


def test_kernel_rows_cover_methods_and_name_missing_providers(everything):
    rows = read(everything[0], "kernels")["rows"]
    assert {row["loss"] for row in rows} == {*list_methods(), *SINGLES, *DIVERGENCES}
    assert {(row["loss"], row["preset"]) for row in rows if row["loss"] == "ahbf"} == {
        ("ahbf", "paper"),
        ("ahbf", "code"),
    }
    for row in rows:
        times = {name: value for name, value in row.items() if "/" in name}
        assert times.keys() >= {
            "eager/both",
            "eager graph/both",
            "compiled graph/both",
            "fused/both",
            "fused graph/both",
            "one kernel graph/both",
        }
        assert all(
            value > 0 for name, value in times.items() if not name.startswith(("liger", "quack"))
        ), row
        assert all(low <= times[name] <= high for name, (low, high) in row["spread"].items())
        if "preset" not in row:
            assert all(
                peer in row["reasons"] or f"{peer}/both" in row for peer in ("liger", "quack")
            )


def test_complete_part_is_repeated_only_on_request(everything, capsys):
    out, arguments = everything
    before = {path.name: path.read_bytes() for path in out.glob("*.json")}
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("is complete") == len(PARTS)
    assert {path.name: path.read_bytes() for path in out.glob("*.json")} == before
    assert main(["environment", "--again", *arguments]) == 0
    (aside,) = (out / "earlier").iterdir()
    assert (
        aside.read_bytes()
        == before["environment-dry-run.json"]
        != (out / "environment-dry-run.json").read_bytes()
    )


def test_accuracy_rows_have_errors_of_every_branch(everything):
    found = read(everything[0], "accuracy")
    assert [(row["method"], row["preset"]) for row in found["rows"]] == [
        ("baseline", "paper"),
        ("ahbf", "paper"),
        ("ahbf", "code"),
        ("one", "code"),
        ("okddip", "code"),
    ]
    assert found["plan"]["epochs"] == 1
    assert not found["data"]["original_files"]
    assert {"branch1", "branch4", "ta2", "ensemble"} <= found["rows"][1]["last"].keys()
    for row in found["rows"]:
        assert row["last"].keys() == row["best"].keys()
        assert row["student"] in row["last"]
        assert row["images_per_second"] > 0 < row["seconds"]


def test_dry_run_results_make_all_tables(everything, monkeypatch):
    out, _ = everything
    monkeypatch.setattr(bench.report, "RESULTS", out)
    monkeypatch.setattr(bench.report, "ROOT", out)
    pages = bench.report.blocks() | bench.report.accuracy_blocks()
    paths = {name: out / f"{name}-dry-run.json" for name in PARTS}
    assert "GB/s" in gpu_tables.environment_lines(paths["environment"])[1]
    assert "| all | 0 | 0 | 0 | 0 |  |" in gpu_tables.tests_lines(paths["tests"])
    kernels = gpu_tables.kernel_tables(paths["kernels"])
    assert sum(line.startswith("| ahbf (paper) | 8 x 10 | bfloat16 |") for line in kernels) == 2
    assert any(line.startswith("| KL | 8 x 10 |") for line in kernels)
    assert any(
        "branch" in line and "ta2" in line for line in gpu_tables.accuracy_tables(paths["accuracy"])
    )
    assert any(
        line.startswith("| torchvision | 48 x 48 |")
        for line in gpu_tables.data_tables(paths["data"])
    )
    assert any(
        "ms a step without the profiler" in line
        for line in gpu_tables.profile_tables(paths["profile"])
    )
    for line in (*kernels, *gpu_tables.accuracy_tables(paths["accuracy"])):
        assert not line.startswith("Not complete")
    assert (pages["kernels"], pages["profile"]) == (
        kernels,
        gpu_tables.profile_tables(paths["profile"]),
    )
    assert (pages["gpu data"], pages["accuracy"]) == (
        gpu_tables.data_tables(paths["data"]),
        gpu_tables.accuracy_tables(paths["accuracy"]),
    )
    assert pages["gpu"][-3:] == gpu_tables.tests_lines(paths["tests"])[-3:]


def context_of(tmp_path, minutes=1e9):
    return Context(CPU, "dry-run", tmp_path / "out", tmp_path / "runs", minutes, True)


def toy(rows, measured, minutes=0.0, fails=()):
    """A part with rows of these names, which notes what it measures and fails once for each name in
    ``fails``.
    """
    failing = list(fails)

    def measure(name):
        measured.append(name)
        if name in failing:
            failing.remove(name)
            raise RuntimeError(f"{name} broke\nand more")
        return {"value": len(measured)}

    return Part(
        "toy",
        0.0,
        lambda context, results: (
            Row(name, minutes, lambda name=name: measure(name)) for name in rows
        ),
        lambda row: str(row["value"]),
    )


def test_killed_call_loses_one_row(tmp_path):
    measured, context = [], context_of(tmp_path)

    def killed(context, results):
        yield Row("a", 0.0, lambda: {"value": 0})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_part(Part("toy", 0.0, killed, lambda row: ""), context, {"code": "1"}, False)
    assert [row["row"] for row in read(context.out, "toy")["rows"]] == ["a"]
    run_part(toy("abc", measured), context, {"code": "1"}, False)
    found = read(context.out, "toy")
    assert measured == ["b", "c"]
    assert [row["value"] for row in found["rows"]] == [0, 1, 2]
    assert found["complete"]
    assert len(found["sessions"]) == 2


def test_failed_row_keeps_others_and_is_retried(tmp_path, capsys):
    measured, context = [], context_of(tmp_path)
    part = toy("abc", measured, fails=["b"])
    run_part(part, context, {"code": "1"}, False)
    found = read(context.out, "toy")
    failed = named(found)["b"]
    assert (failed["error"], failed["where"][-1].partition(":")[0]) == (
        "RuntimeError: b broke",
        Path(__file__).name,
    )
    assert found["left"] == {"b": "failed: RuntimeError: b broke"}
    assert not found["complete"]
    run_part(part, context, {"code": "1"}, False)
    assert measured == ["a", "b", "c", "b"]
    assert read(context.out, "toy")["complete"]


def test_partial_row_is_preserved_after_error(tmp_path):
    def broken(context, results):
        def measure():
            results.put({"row": "a", "partial": "half of it", "half": 1})
            raise TypeError("no such argument")

        yield Row("a", 0.0, measure)

    path = tmp_path / "out" / "toy-dry-run.json"
    for _ in range(2):
        run_part(Part("toy", 0.0, broken, str), context_of(tmp_path), identity(CPU), False)
        found = json.loads(path.read_text())
        assert found["rows"][0]["half"] == 1
        assert found["rows"][0]["error"] == "TypeError: no such argument"
        assert not found["complete"]


def test_partial_row_is_retried(tmp_path):
    outcomes = iter(["2 failed", None])

    def rows(context, results):
        yield Row(
            "a",
            0.0,
            lambda: {"value": 1} | ({"partial": wrong} if (wrong := next(outcomes)) else {}),
        )

    path = tmp_path / "out" / "toy-dry-run.json"
    part = Part("toy", 0.0, rows, str)
    run_part(part, context_of(tmp_path), identity(CPU), False)
    found = json.loads(path.read_text())
    assert (found["complete"], found["left"]) == (False, {"a": "2 failed"})
    run_part(part, context_of(tmp_path), identity(CPU), False)
    found = json.loads(path.read_text())
    assert (found["complete"], found["left"]) == (True, {})


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.gpu.entry.run_part", interrupted)
    assert (
        main(["environment", "--dry-run", "--out", str(tmp_path), "--runs", str(tmp_path)]) == 130
    )
    assert (
        capsys.readouterr().err
        == "bench.gpu: interrupted; the rows so far are kept, and a later call continues\n"
    )


def test_first_signal_after_deadline_does_not_end_process(monkeypatch):
    signals = accuracy.Deadline(lambda: True)
    monkeypatch.setattr("os._exit", lambda code: pytest.fail("it ended at once"))
    assert signals.received == signal.SIGUSR1
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signals.heard, signals.received) == (signal.SIGTERM, signal.SIGTERM)


def test_part_sources_exist_and_differ():
    assert all(
        (results.ROOT / source).exists() for part in PARTS.values() for source in part.code()
    )
    assert len({identity(CPU, part.code())["code"] for part in PARTS.values()}) == len(PARTS)


def test_missing_pytest_refuses_tests_part(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        PARTS["tests"].refusal(context_of(tmp_path))
        == "pytest is not installed: pip install pytest"
    )


def test_run_files_with_missing_file_is_partial():
    found = run_files(["tests/no_such_file.py"], 60)
    assert found["partial"] == "pytest ended with 4"
    assert found["passed"] == 0


def test_rows_beyond_time_limit_are_skipped_and_reported(tmp_path, capsys, monkeypatch):
    measured, context = [], context_of(tmp_path)
    monkeypatch.setattr(Context, "minutes_left", lambda self: 1.0)
    run_part(toy("ab", measured, minutes=1.5), context, {"code": "1"}, False)
    assert not measured
    found = read(context.out, "toy")
    assert found["left"] == dict.fromkeys("ab", "needs at least 1.5 minutes, 1.0 were left")
    assert "0 rows" in (out := capsys.readouterr().out)
    assert "2 left (a: needs at least 1.5 minutes, 1.0 were left)" in out


@pytest.mark.parametrize(
    ("identity", "complete", "again", "kept", "said"),
    [
        ({"code": "1", "device": "x"}, False, False, True, ""),
        ({"code": "2", "device": "x"}, False, False, False, "it is of code 1, now 2"),
        ({"code": "1", "device": "y"}, False, False, False, "it is of device x, now y"),
        ({"code": "2", "device": "x"}, True, False, True, "not of the current code"),
        ({"code": "1", "device": "x"}, True, True, False, "--again"),
    ],
)
def test_results_with_other_identity_are_not_extended(
    tmp_path, identity, complete, again, kept, said
):
    path = tmp_path / "toy-x.json"
    first = Results(path, "toy", {"code": "1", "device": "x"}, CPU)
    first.put({"row": "a", "value": 1})
    first.finish({} if complete else {"b": "no minutes"})
    before = path.read_bytes()
    results = Results(path, "toy", identity, CPU, again=again)
    assert said in results.note
    assert results.has("a") == kept
    assert results.complete == (complete and kept)
    moved = list(tmp_path.glob("earlier/toy-x-*.json"))
    assert [file.read_bytes() for file in moved] == ([] if kept else [before])
    assert path.exists() == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"part": "toy"}',
        (
            '{"part": "other", "complete": true, "identity": {}, "environment": {}, "sessions": [],'
            ' "rows": []}'
        ),
    ],
)
def test_damaged_results_file_is_moved_away(tmp_path, text):
    path = tmp_path / "toy-x.json"
    path.write_text(text)
    results = Results(path, "toy", {}, CPU)
    assert "started again" in results.note
    assert not results.rows
    (aside,) = tmp_path.glob("earlier/*")
    assert aside.read_text() == text


def test_identity_changes_with_measured_code(monkeypatch, tmp_path):
    before = identity(CPU)
    for folder in ("kernels", "fastokd/train", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr("bench.gpu.results.ROOT", tmp_path)
    first = identity(CPU)
    assert first["code"] != before["code"]
    (tmp_path / "docs" / "a.py").write_text("2")
    assert identity(CPU) == first
    (tmp_path / "fastokd/train/a.py").write_text("2")
    assert identity(CPU)["code"] != first["code"]
    assert identity(CPU) | {"code": ""} == before | {"code": ""}


def test_step_benchmark_resumes_within_part(tmp_path, monkeypatch, capsys):
    """Out of minutes after four rows: these are not measured again."""
    arguments = [
        "step",
        "--dry-run",
        "--out",
        str(tmp_path / "out"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    asked = []

    def minutes_left(self):
        asked.append(1)
        return 1.0 if len(asked) < 6 else -1.0

    with monkeypatch.context() as patch:
        patch.setattr(Context, "minutes_left", minutes_left)
        assert main(arguments) == 0
    assert "of its 11 rows are there" in capsys.readouterr().out
    (ladder,) = read(tmp_path / "out", "step")["ladders"]
    before = [row for row in ladder["rows"] if row["reason"] != SPENT]
    assert ladder["partial"]
    assert 3 <= len(before) < 8
    assert main(arguments) == 0
    found = read(tmp_path / "out", "step")
    (ladder,) = found["ladders"]
    assert ladder["rows"][: len(before)] == before
    assert not [row for row in ladder["rows"] if row["reason"] == SPENT]
    assert found["complete"]
    assert "partial" not in ladder


def test_run_stopped_at_deadline_resumes_in_next_call(tmp_path, monkeypatch, capsys):
    runs = accuracy.FIRST[:1]
    monkeypatch.setattr(accuracy, "FIRST", runs)
    arguments = [
        "accuracy",
        "--dry-run",
        "--out",
        str(tmp_path / "out"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    asked = []

    def minutes_left(self):
        asked.append(1)
        return 1.0 if len(asked) < 40 else -1.0  # 23 steps an epoch

    with monkeypatch.context() as patch:
        patch.setattr(Context, "minutes_left", minutes_left)
        assert main([*arguments, "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert "stopped in epoch" in said
    assert not read(tmp_path / "out", "accuracy")["rows"]
    assert main([*arguments, "--epochs", "4"]) == 2
    assert "--epochs 4: the plan in" in capsys.readouterr().err
    assert main(arguments) == 0
    found = read(tmp_path / "out", "accuracy")
    (row,) = found["rows"]
    assert found["plan"]["epochs"] == row["epochs"] == 3
    (log,) = (tmp_path / "runs").glob("accuracy-*/*/log.txt")
    assert "--- resumed ---" in log.read_text()
    # The row is made again from the run's folder where it was lost.
    path = tmp_path / "out" / "accuracy-dry-run.json"
    path.write_text(json.dumps(found | {"rows": [], "complete": False}))
    assert main(arguments) == 0
    assert read(tmp_path / "out", "accuracy")["rows"] == [row]


def test_real_signal_ends_accuracy_part(tmp_path, monkeypatch):
    """It is not taken for the end of the minutes."""
    signals = accuracy.Deadline(lambda: True)
    assert signals.received
    assert not signals.heard

    def interrupted(*_, signals, **__):
        signals.heard = 15
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(accuracy, "begin_run", interrupted)
    assert (
        main(
            [
                "accuracy",
                "--dry-run",
                "--out",
                str(tmp_path / "out"),
                "--runs",
                str(tmp_path / "runs"),
            ]
        )
        == Preempted.exit_code
    )


def test_accuracy_on_other_images_is_refused(tmp_path):
    results = Results(tmp_path / "x.json", "accuracy", {}, CPU)
    context = context_of(tmp_path)
    about = {
        "name": "digits",
        "num_images": {"train": 2, "test": 1},
        "image_size": [8, 8],
        "fingerprint": "1",
    }
    accuracy._note_data(context, results, about)
    accuracy._note_data(context, results, about | {"name": "renamed"})
    with pytest.raises(accuracy.Refused, match="other images"):
        accuracy._note_data(context, results, about | {"fingerprint": "2"})


def test_accuracy_table_lists_published_and_measured(tmp_path):
    def run(recipe, preset, seed, accuracy, best):
        return {
            "row": f"{recipe} {preset} {seed}",
            "recipe": recipe,
            "preset": preset,
            "seed": seed,
            "student": "branch1",
            "seconds": 120.0,
            "images_per_second": 60_000.0,
            "last": {"branch1": accuracy, "ta2": 0.95},
            "best": {"branch1": best, "ta2": 0.95},
        }

    environment = {
        "device": "NVIDIA H200",
        "torch": "2.11",
        "triton": "3.6",
        "command": "python -m bench.gpu accuracy",
    }
    found = {
        "complete": False,
        "left": {"x": "no minutes"},
        "environment": environment,
        "sessions": [{"commit": "a"}, {"commit": "b"}, {"commit": "a"}],
        "plan": {"epochs": 60, "seeds": 3},
        "data": {
            "name": "cifar10-jpeg",
            "num_images": {"train": 50_000, "test": 10_000},
            "original_files": False,
        },
        "rows": [
            run("cifar10-resnet32-ahbf", "paper", 0, 0.93, 0.94),
            run("cifar10-resnet32-ahbf", "paper", 1, 0.91, 0.92),
            run("cifar10-resnet32-baseline", "paper", 0, 0.9, 0.9),
        ],
    }
    path = tmp_path / "accuracy-x.json"
    path.write_text(json.dumps(found))
    lines = gpu_tables.accuracy_tables(path)
    assert (
        lines[0]
        == "NVIDIA H200; torch 2.11, Triton 3.6; commit a, b; `accuracy-x.json`, made by `python -m"
        " bench.gpu accuracy`."
    )
    assert "60 epochs instead of the papers' 300" in lines[1]
    assert "'cifar10-jpeg' (50,000 train, 10,000 test images), not the original files" in lines[1]
    assert (
        "| `cifar10-resnet32-ahbf`, paper | 0, 1 | 8.00 +- 1.41 | 7.00 +- 1.41 | AHBF Table 1: 5.32"
        " +- 0.11 | 2 | 60,000 |" in lines
    )
    assert (
        "| `cifar10-resnet32-baseline`, paper | 0 | 10.00 | 10.00 | AHBF Table 1: 6.31 +- 0.07;"
        " OKDDip slides: 6.34 +- 0.03; FFM + CD: 6.38 +- 0.10 | 2 | 60,000 |" in lines
    )
    assert (
        "| `cifar10-resnet32-ahbf`, paper | last | branch1 8.00 +- 1.41; ta2 5.00 +- 0.00 |"
        in lines
    )
    assert (
        "| `cifar10-resnet32-ahbf`, paper | best | branch1 7.00 +- 1.41; ta2 5.00 +- 0.00 |"
        in lines
    )
    assert lines[-2] == "Not complete, 1 rows to go: x."


def test_kernel_table_matches_manual_values(tmp_path):
    """4 MB in 2 us at 4 TB/s are half of the floor's speed; losing rows stay."""
    row = {
        "row": "r",
        "loss": "ahbf",
        "preset": "paper",
        "batch": 8,
        "num_classes": 10,
        "dtype": "bfloat16",
        "bytes_forward": 4_000_000,
        "bytes_both": 8_000_000,
        "eager/forward": 9e-6,
        "eager graph/forward": 8e-6,
        "compiled graph/forward": 1e-6,
        "fused/forward": 5e-6,
        "fused graph/forward": 2e-6,
        "spread": {"fused graph/forward": [1.5e-6, 3e-6]},
        "reasons": {},
    }
    single = {
        "row": "s",
        "loss": "KL",
        "batch": 8,
        "num_classes": 10,
        "dtype": "float32",
        "bytes_forward": 1,
        "bytes_both": 8_000_000,
        "liger/both": 8e-6,
        "liger graph/both": None,
        "one kernel graph/both": 4e-6,
        "spread": {"one kernel graph/both": [4e-6, 4e-6]},
        "reasons": {"quack": "not installed"},
    }
    found = {
        "complete": True,
        "left": {},
        "environment": {"device": "G", "torch": "2", "triton": "3", "command": "c"},
        "identity": {"code": "0a1b"},
        "sessions": [{"commit": None}],
        "copy_bandwidth_gb_s": 4000.0,
        "rows": [row, single],
    }
    path = tmp_path / "k.json"
    path.write_text(json.dumps(found))
    lines = gpu_tables.kernel_tables(path)
    assert (
        "| ahbf (paper) | 8 x 10 | bfloat16 | forward | 9 | 8 | 1 | 5 | 2 | 2 | 1.5-3 | 4.00 | 0.50"
        " | 1 | 50% |" in lines
    )
    assert (
        "| KL | 8 x 10 | float32 | with gradients | - | - | 8 | - | - | - | 4 | 4-4 | - | 2.00 | -"
        " | 2 | 50% |" in lines
    )
    assert "- quack: not installed (s)" in lines
    assert lines[0] == "G; torch 2, Triton 3; sources 0a1b; `k.json`, made by `c`."
    assert not gpu_tables.readme_lines(path)  # neither row is of a size that the README shows
    path.write_text(
        json.dumps(
            found
            | {
                "rows": [
                    row
                    | {
                        "batch": 1024,
                        "num_classes": 1000,
                        "one kernel graph/both": 3e-6,
                        "eager graph/both": 9e-6,
                        "spread": row["spread"] | {"one kernel graph/both": [3e-6, 3e-6]},
                    }
                ]
            }
        )
    )
    assert (
        gpu_tables.readme_lines(path)[-2]
        == "| ahbf (paper) | 1024 x 1000 | bfloat16 | with gradients | 9 | - | 3 | 3-3 | 3.00 | - |"
        " 2 | 67% |"
    )


def test_profile_counts_overlapping_kernels_once():
    def kernel(name, begin, time, **other):
        return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": time, **other}

    events = [
        kernel("a", 0, 10),
        kernel("b", 5, 10),
        kernel("a", 20, 10),
        kernel("c", 40, 10),
        kernel("host", 0, 1000, cat="cpu_op"),
        {"ph": "M", "name": "a"},
    ]
    found = kernel_summary(events, 2)
    assert found["span_ms"] == pytest.approx(0.025)
    assert found["busy_share"] == pytest.approx(35 / 50)
    assert found["overlap"] == pytest.approx(40 / 35)
    assert (found["calls"], found["gaps"], found["longest_gap_us"]) == (2, 1, 10)
    assert found["kernels"][0] == {"name": "a", "calls": 1, "us": 10, "share": 0.5}
    assert kernel_summary([], 2) == {"calls": 0.0, "kernels": []}


def test_run_files_records_failures_and_kills_hanging_test(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
    )  # their imports would take most of the seconds that the second file has
    good, hanging, broken = (tmp_path / f"test_{name}.py" for name in ("good", "hanging", "broken"))
    broken.write_text("import no_such_package\n")
    good.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_right(): pass\ndef test_wrong():"
        " assert 1 + 1 == 3, 'a sum'\n@pytest.fixture\ndef broken(): raise OSError('no disk')\ndef"
        " test_error(broken): pass\ndef test_left(): pytest.skip('why not')\n"
    )
    hanging.write_text(
        "import pytest, time\npytestmark = pytest.mark.gpu\ndef test_right(): pass\ndef"
        " test_hangs(): time.sleep(600)\n"
    )
    plain = ["-c", "/dev/null", "--rootdir", str(tmp_path), "-W", "ignore"]
    found = run_files([str(broken), str(good)], 60, plain)
    assert (
        found["passed"],
        found["failed"],
        found["errors"],
        found["skipped"],
        found["returncode"],
    ) == (1, 1, 2, 1, 1)
    messages = {
        failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]
    }
    assert messages["test_wrong"].startswith("AssertionError: a sum")
    assert messages["test_error"] == "OSError: no disk"
    assert (
        messages["test_broken.py"] == "E   ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert "a sum" in found["output"]
    assert found["partial"] == "1 failed, 2 errors"
    assert not found["unfinished"]
    found = run_files([str(hanging)], 12, plain)
    assert found["partial"] == "killed after 12 s"
    assert [test.rpartition("::")[2] for test in found["unfinished"]] == ["test_hangs"]
    assert found["passed"] == 1


@pytest.mark.parametrize(("name", "read", "written"), [("cross-entropy", 1, 1), ("KL", 2, 1)])
def test_single_loss_least_bytes_match_manual_count(name, read, written):
    """A constant teacher is read and gets no gradient."""
    inputs = make_inputs(SINGLES[name], 4, 6, torch.float32, CPU)
    row = 4 * 6 * 4
    assert inputs.least_bytes() == (read * row, (read + written) * row)
    assert len(inputs.leaves()) == written


@pytest.mark.parametrize("name", ["ahbf", *SINGLES])
def test_providers_of_row_agree(name, tmp_path):
    graph = SINGLES.get(name) or get_method(name).loss_class(num_branches=3).graph
    inputs = make_inputs(graph, 5, 7, torch.float32, CPU)
    cases = (
        kernels._single_cases(context_of(tmp_path), name, inputs)[0]
        if name in SINGLES
        else kernels._graph_cases(context_of(tmp_path), graph, inputs, kernels.PASSES)
    )
    with context_of(tmp_path).not_compiled():
        found = {
            which: call()
            for which, (call, _) in cases.items()
            if not which.startswith(("liger", "quack"))
        }
    mean, grads = found.pop("one kernel graph/both")
    rows, _, same_grads = found.pop("kernel alone graph/both")
    found |= {
        "mean/forward": mean,
        "rows/forward": rows.mean(),
        "kernel alone graph/forward": found["kernel alone graph/forward"].mean(),
        "grads/both": [grad for grad in grads if grad is not None],
        "same grads/both": [grad for grad in same_grads if grad is not None],
    }
    for which, value in found.items():
        expected = found[f"eager/{which.rpartition('/')[2]}"]
        torch.testing.assert_close(
            list(value) if isinstance(value, (list, tuple)) else value,
            list(expected) if isinstance(expected, tuple) else expected,
            rtol=1e-4,
            atol=1e-6,
        )


def test_large_image_benchmark_has_suitable_network():
    assert find_backbone(LARGE_MODEL).image_size == 224
    assert create_model(LARGE_MODEL, "ahbf", 10, NUM_BRANCHES, 1).num_branches == NUM_BRANCHES


def test_gpu_tests_use_gpu_mark():
    """Tests that are skipped without a GPU have the mark by which the entry finds them."""
    by_hand = "skipif(" + "not torch.cuda.is_available()"
    assert not [
        file.name for file in Path(__file__).parent.glob("test_*.py") if by_hand in file.read_text()
    ]


def test_expired_time_limit_skips_every_part(tmp_path, capsys):
    assert (
        main(
            [
                "--dry-run",
                "--out",
                str(tmp_path / "out"),
                "--runs",
                str(tmp_path / "runs"),
                "--minutes",
                "1e-9",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert [f"{name}: skipped, it needs at least" in out for name in PARTS] == [True] * len(PARTS)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["kernel", "--dry-run"], 2, "unknown part 'kernel'; did you mean 'kernels'?"),
        (["--minutes", "0", "--dry-run"], 2, "--minutes 0.0: it must be positive"),
        (["--epochs", "0", "--dry-run"], 2, "--epochs 0: it must be positive"),
        (["--images", "nowhere", "--dry-run"], 2, "--images nowhere: no such folder"),
        (["--data", "nowhere", "--dry-run"], 3, "nowhere: no readable folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, code, said, capsys, tmp_path):
    assert (
        main([*arguments, "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]) == code
    )
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_missing_gpu_suggests_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_unwritable_folder_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(["--dry-run", "--out", str(tmp_path / "file"), "--runs", str(tmp_path / "runs")]) == 5
    )
    captured = capsys.readouterr()
    assert "cannot write" in captured.err
    assert not captured.out


def test_gpu_test_groups_run_every_test_once(tmp_path):
    """A file is split by the names of its tests, because a group's time is limited."""
    for file in {file for file, _ in gpu_tests.ALONE.values()}:
        expressions = [words for name, words in gpu_tests.ALONE.values() if name == file]
        tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
        for test in tests:
            chosen = [_is_selected(words, test) for words in expressions]
            assert chosen.count(True) == 1, test
    context = dataclasses.replace(context_of(tmp_path), dry=False)
    names = [row.name for row in gpu_tests._rows(context, None)]
    assert names == [*gpu_tests.ALONE, "others"]


def _is_selected(words: str, test: str) -> bool:
    """Check if pytest's ``-k`` selects a test, for expressions of ``not``, ``and`` and names."""
    parts = [part.strip() for part in words.split(" and ")] if words else []
    return all((part.removeprefix("not ") in test) != part.startswith("not ") for part in parts)


def test_accuracy_finds_images_next_to_checkout(tmp_path, monkeypatch):
    context = dataclasses.replace(context_of(tmp_path), dry=False, runs=tmp_path)
    picture = tmp_path / "cifar10-jpeg" / "train" / "cat" / "1.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "cifar10-jpeg" / "train", "train")
    shutil.rmtree(tmp_path / "cifar10-jpeg")
    monkeypatch.setattr(images, "ARCHIVES", (tmp_path / "none",))
    assert "no --data, and no cifar10-jpeg.tar.xz" in accuracy._refusal(context)
    monkeypatch.setattr(images, "ARCHIVES", (tmp_path / "none", tmp_path))
    assert accuracy._data(context) == str(tmp_path / "cifar10-jpeg")
    assert picture.read_bytes() == b"a picture"
    monkeypatch.setattr("tarfile.open", lambda *_: pytest.fail("unpacked again"))
    assert accuracy._data(context) == str(tmp_path / "cifar10-jpeg")
    assert accuracy._data(dataclasses.replace(context, data="mine")) == "mine"


def test_accuracy_without_data_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ARCHIVES", (tmp_path / "none",))
    context = Context(CPU, "x", tmp_path, tmp_path, 0.0, False)
    assert "--data" in accuracy._refusal(context)
