"""Budgets for the compiled kernels' registers, spills and instructions. They need no GPU."""

import os
import re
from dataclasses import replace
from functools import cache

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from fastokd.graph import CrossEntropy, Graph, Logits, lower, with_divergence
from fastokd.graph.plan import Plan
from fastokd.kernels.triton.budget import (
    SIZES,
    Cost,
    cascade,
    compile_kernel,
    launch_tile,
    main,
    measure,
)
from fastokd.kernels.triton.specialize import specialize
from fastokd.kernels.triton.tile import Tile, choose_splits
from tests.triton_graphs import GRAPHS

# Instructions per class and row (in all M branches) in the loop over whole chunks, at M = 4, 6 KL
# edges, sm_90, and registers. Actual values on Triton 3.8 and 3.6: forward 59.1 and 59.2, 96 and 80
# registers; backward 85.8 and 89.5, 128 registers; without vectors 62.8 and 64.0, 95.0 and 98.1.
MOST_PER_COLUMN = {
    ("forward", True): 62,
    ("backward", True): 91,
    ("forward", False): 67,
    ("backward", False): 100,
}
MOST_REGISTERS = {"forward": 96, "backward": 192}


def cost_of(
    which: str,
    branches: int,
    batch: int,
    classes: int,
    dtype: str,
    capability: int = 90,
    stride: int = 0,
) -> Cost:
    plan = cascade(branches)
    return _cost(
        which,
        plan,
        launch_tile(
            plan, batch, classes, dtype, stride, forward_backward=which == "forward_backward"
        ),
        dtype,
        capability,
    )


@cache  # batches that share a tile share its kernel
def _cost(which: str, plan: Plan, tile: Tile, dtype: str, capability: int) -> Cost:
    return measure(compile_kernel(which, plan, tile, dtype, capability), tile)


def check(which: str, branches: int, batch: int, classes: int, dtype: str, capability: int) -> None:
    tile = launch_tile(
        cascade(branches), batch, classes, dtype, forward_backward=which == "forward_backward"
    )
    if tile.splits > 1:
        for part in {"forward": ("main", "merge"), "backward": ("columns", "weights")}.get(
            which, ()
        ):
            cost = cost_of(part, branches, batch, classes, dtype, capability)
            assert (cost.stack, cost.spills) == (0, 0), (part, cost)
        return
    cost = cost_of(which, branches, batch, classes, dtype, capability)
    assert (cost.stack, cost.spills) == (0, 0), cost
    assert cost.registers <= 255
    if classes > 32 and classes * SIZES[dtype] % 16 == 0 and tile.pieces * SIZES[dtype] == 16:
        assert cost.vector_loads >= branches, cost
        assert which == "forward" or cost.vector_stores >= branches, cost
    if tile.whole > 1:
        assert cost.exponentials_per_column == 2 * branches - 1, cost


@pytest.mark.parametrize(
    ("which", "branches", "batch", "classes", "dtype", "capability"),
    [
        ("forward", 4, 128, 10, "bf16", 90),  # rows share a warp
        ("backward", 4, 128, 100, "fp32", 80),  # a warp holds the row
        ("forward", 2, 96, 1000, "fp32", 100),  # four warps hold the row
        ("backward", 8, 1024, 1000, "bf16", 90),  # the most branches: the most registers
        ("forward_backward", 4, 128, 100, "bf16", 90),
        ("backward", 8, 128, 32, "fp32", 90),  # the most columns of few classes
    ],
)
def test_kernel_has_no_spills_and_wide_loads(
    which: str, branches: int, batch: int, classes: int, dtype: str, capability: int
) -> None:
    check(which, branches, batch, classes, dtype, capability)


@pytest.mark.grid
@pytest.mark.parametrize("which", ["forward", "backward", "forward_backward"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("branches", [2, 4, 8])
@pytest.mark.parametrize("classes", [10, 32, 100, 1000, 1001, 21841])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("batch", [128, 1024])
def test_grid_case_compiles_without_spills(
    which: str, branches: int, batch: int, classes: int, dtype: str, capability: int
) -> None:
    check(which, branches, batch, classes, dtype, capability)


@pytest.mark.parametrize(("which", "aligned"), MOST_PER_COLUMN, ids=str)
def test_kernel_stays_within_instruction_budget(which: str, aligned: bool) -> None:
    cost = cost_of(which, 4, 1024, 1000 if aligned else 1001, "bf16")
    assert cost.per_column <= MOST_PER_COLUMN[which, aligned], cost
    assert cost.barriers == 0, "one warp per row needs no barrier"
    assert cost.registers <= MOST_REGISTERS[which], cost


@pytest.mark.parametrize(
    ("branches", "most"), [(2, 25), pytest.param(8, 136, marks=pytest.mark.grid)]
)
def test_forward_of_two_and_eight_branches_stays_in_budget(branches: int, most: float) -> None:
    cost = cost_of("forward", branches, 1024, 1000, "bf16")  # 24.4 and 132.3
    assert cost.per_column <= most, cost


def test_choose_splits_splits_few_long_rows() -> None:
    assert [choose_splits(batch, 100000) for batch in (0, 1, 8, 32, 33, 128, 255, 256)] == [
        1,
        8,
        8,
        8,
        8,
        2,
        2,
        1,
    ]
    assert [choose_splits(8, classes) for classes in (1000, 16383, 16384, 21841, 50000, 10**6)] == [
        1,
        1,
        2,
        2,
        4,
        32,
    ]


@pytest.mark.parametrize(
    ("branches", "classes", "dtype"),
    [
        (4, 131072, "bf16"),
        pytest.param(8, 100001, "bf16", marks=pytest.mark.grid),
        pytest.param(2, 100000, "fp32", marks=pytest.mark.grid),
        pytest.param(4, 100001, "fp32", marks=pytest.mark.grid),
        pytest.param(8, 100000, "fp32", marks=pytest.mark.grid),
    ],
)
def test_split_kernels_stay_within_budget(branches: int, classes: int, dtype: str) -> None:
    plan = cascade(branches)
    tile = launch_tile(plan, 8, classes, dtype)
    assert tile.splits > 1
    for which in ("main", "merge", "columns", "weights"):
        cost = measure(compile_kernel(which, plan, tile, dtype), tile)
        assert (cost.stack, cost.spills) == (0, 0), (which, cost)
        if which in ("merge", "weights"):
            assert cost.barriers == 0, (which, cost)
        elif tile.rest == 0:
            direction = "forward" if which == "main" else "backward"
            assert cost.vector_loads >= branches, (which, cost)
            assert cost.per_column <= MOST_PER_COLUMN[direction, True], (which, cost)


def split_graph(name: str, soft_target: bool) -> None:
    plan = lower(GRAPHS[name]())
    soft_target = soft_target and not plan.needs_labels
    tile = launch_tile(plan, 8, 100001, "bf16", soft_target=soft_target)
    spec = specialize(plan)
    stages = ["first"] * spec.needs_first_pass(soft_target) + ["main"]
    stages += ["normalized"] * bool(spec.normalized_edges)
    for which in (*stages, "merge", "columns", *["weights"] * bool(spec.num_weights)):
        cost = measure(compile_kernel(which, plan, tile, "bf16"), tile)
        assert (cost.stack, cost.spills) == (0, 0), (which, cost)


def test_split_graph_compiles_without_spills() -> None:
    split_graph("mixed probabilities", soft_target=False)


@pytest.mark.grid
@pytest.mark.parametrize("soft_target", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_split_graph_compiles_without_spills(name: str, soft_target: bool) -> None:
    split_graph(name, soft_target)


def compile_graph(name: str, classes: int, dtype: str, soft_target: bool) -> None:
    plan = lower(GRAPHS[name]())
    soft_target = soft_target and not plan.needs_labels
    tile = launch_tile(plan, 1024, classes, dtype, soft_target=soft_target)
    for which in ("forward", "backward"):
        cost = measure(compile_kernel(which, plan, tile, dtype), tile)
        # float64 serves gradient checks and takes two registers per value.
        assert dtype == "fp64" or (cost.stack, cost.spills) == (0, 0), (which, cost)


@pytest.mark.parametrize(
    ("name", "soft_target"),
    [
        ("mixed probabilities", True),
        ("first-order eps", False),
        ("decoupled", False),
        ("divergences", True),
    ],
)
def test_graph_compiles_without_spills(name: str, soft_target: bool) -> None:
    compile_graph(name, 10, "fp32", soft_target)


@pytest.mark.grid
@pytest.mark.parametrize("soft_target", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize(
    ("classes", "dtype"), [(10, "fp32"), (1000, "bf16"), (1001, "fp16"), (1000, "fp64")]
)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_compiles_without_spills(
    name: str, classes: int, dtype: str, soft_target: bool
) -> None:
    compile_graph(name, classes, dtype, soft_target)


@pytest.mark.parametrize(
    ("divergence", "most"),
    [
        ("kl", {"forward": 14.3, "backward": 17.0}),
        ("symmetric-kl", {"forward": 15.9, "backward": 19.4}),
        ("js", {"forward": 12.3, "backward": 27.9}),  # its forward pass takes two loops
        ("dkd", {"forward": 18.2, "backward": 21.8}),
    ],
)
def test_divergence_stays_within_instruction_budget(
    divergence: str, most: dict[str, float]
) -> None:
    """A student's cross-entropy and a term from a frozen teacher: instructions per column."""
    student = Graph("student", (Logits("student"),), (CrossEntropy("student"),))
    graph = with_divergence(student.with_teacher("student", temperature=4.0), divergence)
    plan = lower(graph)
    tile = launch_tile(plan, 1024, 1000, "bf16")
    for which, limit in most.items():
        cost = measure(compile_kernel(which, plan, tile, "bf16"), tile)
        assert (cost.stack, cost.spills) == (0, 0), (which, cost)
        assert cost.per_column <= limit, (which, cost)


def test_weights_of_rows_stay_within_the_instruction_budget() -> None:
    """Ignored labels and sample weights: the weights of the terms differ from row to row."""
    plan = cascade(4)
    tile = replace(launch_tile(plan, 1024, 1000, "bf16"), weights_per_row=1)
    for which in ("forward", "backward"):
        cost = measure(compile_kernel(which, plan, tile, "bf16"), tile)
        assert (cost.stack, cost.spills) == (0, 0), (which, cost)
        assert cost.per_column <= MOST_PER_COLUMN[which, True], (which, cost)
        assert cost.registers <= MOST_REGISTERS[which], (which, cost)


def test_padded_rows_of_odd_length_are_loaded_as_vectors() -> None:
    cost = cost_of("forward", 2, 1024, 1001, "bf16", stride=1008)
    assert cost.vector_loads >= 2, cost


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_offsets_of_strided_columns_have_64_bits(which: str) -> None:
    """C times the column stride of transposed logits can exceed 2^31."""
    stride = 200_000_003  # so large that 64 bits are needed for the lanes of one warp
    plan = lower(GRAPHS["cross-entropy alone"]())
    tile = replace(launch_tile(plan, 1024, 1501, "fp32"), logit_strides=((1, stride),))
    ptx = compile_kernel(which, plan, tile, "fp32").asm["ptx"]
    offsets = {
        line.strip()
        for line in ptx.splitlines()
        for number in re.findall(r"\b\d{9,}\b", line)
        if int(number) % stride == 0
    }
    assert offsets
    assert all(re.search(r"64|\.wide\.", line) for line in offsets), offsets


def test_main_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "--branches",
                "2",
                "--classes",
                "10",
                "--batches",
                "128",
                "--dtypes",
                "bf16",
                "--kernels",
                "forward",
            ]
        )
        == 0
    )
    table = capsys.readouterr().out.splitlines()
    assert table[-1].split()[:6] == ["forward", "90", "2", "bf16", "128", "10"]
