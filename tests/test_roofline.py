"""The roofline model against cases computed by hand, and its machine-code file against the
compiler.
"""

import json
import os

import pytest

import bench.roofline
from bench.machine_code import PATH, VARIANTS, row
from bench.roofline import (
    BUSY_SHARE,
    CHIPS,
    LAUNCH,
    MEMORY_SHARE,
    Chip,
    launch_bound_steps,
    main,
    measured,
    predict,
    predictions,
)
from bench.suite import SIZES

FOUND = json.loads(PATH.read_text(encoding="utf-8"))
# One GHz and ten multiprocessors, so 40 schedulers; a TB/s.
CHIP = Chip("a chip", "its name", 90, 10, 1e9, 1e12, "made up")


def code(**changed):
    """A kernel of four branches in bfloat16: one warp per row of 1000 classes, in three whole
    chunks of 256 and one of eight pieces.
    """
    return {
        "kernel": "forward",
        "branches": 4,
        "dtype": "bf16",
        "batch": 1000,
        "num_classes": 1000,
        "rows": 1,
        "num_warps": 1,
        "whole": 3,
        "pieces": 8,
        "rest_pieces": 8,
        "instructions": 1000,
        "loop_instructions": 400,
        "exponentials_per_column": 7.0,
    } | changed


def test_predict_many_bytes_is_bound_by_memory():
    found = predict(CHIP, code(instructions=10, loop_instructions=5, exponentials_per_column=0.01))
    assert found.memory == pytest.approx(
        8_000_000 / (MEMORY_SHARE * 1e12)
    )  # 4 branches, 1000 rows of 1000 logits of 2 bytes
    assert found.limit == "memory"
    assert found.seconds == pytest.approx(LAUNCH + found.memory)
    both = predict(CHIP, code(kernel="backward", dtype="fp32"))
    assert both.memory == pytest.approx(4 * found.memory)  # read and written, and twice the bytes


def test_predict_many_instructions_is_bound_by_issue():
    found = predict(CHIP, code())
    # 1000 warps run 1000 instructions and the loop twice more, on 40 schedulers of which 3 of 4
    # cycles count.
    assert found.issue == pytest.approx(1000 * (1000 + 2 * 400) / (40 * 1e9 * BUSY_SHARE))
    assert found.limit == "issue"
    few = predict(CHIP, code(batch=10, rows=2, num_warps=4))
    assert few.issue == pytest.approx(
        1800 / (1e9 * BUSY_SHARE)
    )  # 20 warps on 40 schedulers: each has one to itself
    uneven = predict(CHIP, code(batch=1001, rows=8))
    assert uneven.issue == pytest.approx(
        126 * 1800 / (40 * 1e9 * BUSY_SHARE)
    )  # the last program has one row
    assert predict(CHIP, code(whole=0)).issue == pytest.approx(
        1000 * 1000 / (40 * 1e9 * BUSY_SHARE)
    )


def test_predict_many_exponentials_is_bound_by_them():
    found = predict(CHIP, code(exponentials_per_column=70.0))
    # 1000 rows of 32 lanes take 32 columns of 70 each; ten multiprocessors make 16 a cycle.
    assert found.exponentials == pytest.approx(1000 * 32 * 32 * 70 / (10 * 16 * 1e9 * BUSY_SHARE))
    assert found.limit == "exponentials"
    assert predict(CHIP, code(whole=0, exponentials_per_column=70.0)).exponentials == pytest.approx(
        found.exponentials / 4
    )
    # Two chunks without a loop: the number is of both, by the columns of one.
    assert predict(
        CHIP, code(whole=1, rest_pieces=4, exponentials_per_column=140.0)
    ).exponentials == pytest.approx(found.exponentials / 2)


def test_predict_small_kernel_is_bound_by_launch():
    found = predict(CHIP, code(batch=1, num_classes=10, whole=0, instructions=100))
    assert found.limit == "launch"
    assert LAUNCH < found.seconds < 2 * LAUNCH


def test_predict_forward_backward_counts_both_loops():
    backward = code(kernel="backward", loop_instructions=700)
    found = predict(CHIP, code(kernel="forward_backward"), backward)
    assert found.issue == pytest.approx(1000 * (1000 + 2 * (400 + 700)) / (40 * 1e9 * BUSY_SHARE))
    assert found.exponentials == pytest.approx(2 * predict(CHIP, backward).exponentials)
    single = predict(
        CHIP, code(kernel="forward_backward", whole=0), backward
    )  # the kernel's counts include both passes
    assert single.exponentials == pytest.approx(predict(CHIP, code(whole=0)).exponentials)


@pytest.mark.parametrize("chip", CHIPS)
def test_predictions_cover_every_size_and_kernel(chip):
    found = list(predictions(FOUND, CHIPS[chip]))
    assert [(size, which) for size, which, _ in found] == [
        (size, which) for size in SIZES for which in ("forward", "backward", "forward_backward")
    ]


def test_command_prints_predictions_and_measurements(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "loss": "ahbf",
            "preset": preset,
            "dtype": "bfloat16",
            "batch": 1024,
            "num_classes": 1000,
            "kernel alone graph/forward": seconds,
            "kernel alone graph/both": None,
        }
        for preset, seconds in (("code", 1.0), ("paper", 6.54e-6))
    ]
    for name, device in (("h200", "NVIDIA H200"), ("h200-nvl", "NVIDIA H200 NVL")):
        scale = 1 if name == "h200" else 2
        found = [
            {**row, "kernel alone graph/forward": scale * row["kernel alone graph/forward"]}
            for row in rows
        ]
        (tmp_path / f"kernels-nvidia-{name}.json").write_text(
            json.dumps(
                {"environment": {"device": device}, "rows": [*found, {"loss": "KL", "batch": 1}]}
            )
        )
    (tmp_path / "machine-code.json").write_text(json.dumps(FOUND))
    monkeypatch.setattr(bench.roofline, "PATH", tmp_path / "machine-code.json")
    assert measured(tmp_path, CHIPS["h200"]) == {((1024, 1000), "forward"): 6.54e-6}
    assert measured(tmp_path, CHIPS["a100"]) == {}
    assert main(["--chip", "h200"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("H200 SXM: predictions of a model, not measurements; ")
    assert [line.split()[-1] for line in lines if "1024 x 1000 " in line] == ["6.5", "-", "-"]


def test_command_with_unknown_chip_suggests_a_name(capsys):
    assert main(["--chip", "h20"]) == 2
    assert (
        capsys.readouterr().err
        == "bench.roofline: unknown chip 'h20'; did you mean 'h200'? (choices: a100, b200, h100,"
        " h200)\n"
    )


def test_machine_code_file_has_every_kernel():
    want = [
        (branches, preset, dtype, *size, which, capability)
        for branches, preset, dtype, sizes, capabilities in VARIANTS
        for size in sizes
        for which in ("forward", "backward", "forward_backward")
        for capability in capabilities
    ]
    assert [
        tuple(
            one[name]
            for name in (
                "branches",
                "preset",
                "dtype",
                "batch",
                "num_classes",
                "kernel",
                "capability",
            )
        )
        for one in FOUND["rows"]
    ] == want
    spilling = [
        (
            one["kernel"],
            one["dtype"],
            one["batch"],
            one["num_classes"],
            one["capability"],
            one["spills"],
        )
        for one in FOUND["rows"]
        if one["spills"] or one["stack"]
    ]
    # Two cases with this version of Triton, outside of loops; the page shows them.
    assert spilling == [
        ("forward", "bf16", 256, 100_000, 80, 8),
        ("forward_backward", "fp32", 96, 1000, 90, 2),
    ]


@pytest.mark.parametrize(
    ("which", "dtype", "batch", "num_classes"),
    [("forward", "bf16", 1024, 1000), ("backward", "fp32", 128, 10)],
)
def test_machine_code_file_matches_the_kernels(which, dtype, batch, num_classes):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    if triton.__version__ != FOUND["triton"]:
        pytest.skip(f"the file is from Triton {FOUND['triton']}, this is {triton.__version__}")
    made = row(which, 4, "paper", dtype, batch, num_classes, 90)
    assert made in FOUND["rows"], "the kernels changed: run python -m bench.machine_code"


def test_step_is_bound_by_launches_of_its_kernels(monkeypatch, tmp_path, capsys):
    path = tmp_path / "counts.json"
    cases = {"net, one, eager": {"loss": 9}, "net, one, compiled": {"forward": 900, "loss": 100}}
    path.write_text(json.dumps({"cases": cases}))
    monkeypatch.setattr(bench.roofline, "COUNTS", path)
    assert list(launch_bound_steps()) == [("net, one", 1000, pytest.approx(2.2e-3))]
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["net,", "one", "1000", "2.20"]
