"""The Triton kernels on CPU tensors through Triton's interpreter: the contract of all executors,
and rows that are split among programs.

Not collected by itself: ``test_triton_interpreter.py`` runs it in a separate process, because the
interpreter must be chosen before Triton is first imported.

``make test`` has every check of the contract, every graph in each kind of kernel, both kinds of
target and every dtype, but not each combination of these; the grid has them all.
"""

from collections.abc import Callable, Container, Iterable

import masked_rows  # registers its checks
import numpy as np
import pytest
import torch
import triton_state
import worked_values  # noqa: F401  # registers its checks
from executor_contract import (
    CHECKS,
    EXTREME,
    GRAPHS,
    ONLY_IN_GRID,
    Subject,
    evaluated,
    names,
    same_bits,
)
from graph_catalog import make_inputs
from oracles import methods as oracle

from fastokd.kernels.triton import launch
from fastokd.kernels.triton.columns import FLOOR
from fastokd.kernels.triton.tile import choose_splits
from fastokd.losses import FFMLoss, KDCLLoss, MethodLoss, TSBLoss
from fastokd.methods.simplex import lowest_cross_entropy_weights
from fastokd.ops import forward_backward
from fastokd.ops.reference import PROBABILITY_FLOOR
from fastokd.ops.triton import INTERPRETED
from tests.triton_graphs import GRAPHS as TRITON_GRAPHS

torch.set_num_threads(1)
assert INTERPRETED, "set TRITON_INTERPRET=1 before Python starts"
triton_state.speed_up_interpreter()
TRITON = Subject("triton", "cpu")


@pytest.mark.parametrize("name", [name for name in names("triton") if name not in ONLY_IN_GRID])
def test_interpreter_keeps_contract(name: str) -> None:
    CHECKS[name]("triton", "cpu")


@pytest.mark.grid
@pytest.mark.parametrize("name", names("triton"))
def test_interpreter_keeps_contract_in_every_case(name: str) -> None:
    CHECKS[name]("triton", "cpu", True)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        *(
            (variant, lambda impl, variant=variant: KDCLLoss(3, variant, impl=impl))
            for variant in ("naive", "linear", "minlogit", "general")
        ),
        ("tsb", lambda impl: TSBLoss(3, impl=impl)),
        ("tsb as printed", lambda impl: TSBLoss(3, student_first=True, impl=impl)),
        ("ffm", lambda impl: FFMLoss(3, lambda_cd=0.1, impl=impl)),
        ("ffm detached", lambda impl: FFMLoss(3, lambda_cd=0.1, detach_teacher=True, impl=impl)),
    ],
)
def test_losses_with_state_or_extra_terms_match_reference(
    name: str, criterion: Callable[[str], MethodLoss]
) -> None:
    """Twice on the same batch, so that a memory is not empty the second time."""
    generator = torch.Generator().manual_seed(4)
    rows = [2 * torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    shares, weights = (
        torch.rand(3, 2, generator=generator, dtype=torch.float64),
        [torch.randn(5, 2, generator=generator) for _ in range(3)],
    )
    target = torch.tensor([0, 4, 2])
    ends = []
    for impl in ("reference", "triton"):
        loss = criterion(impl)
        loss.prepare(4, 5, torch.device("cpu"))
        for _ in range(2):
            leaves = [
                leaf.clone().requires_grad_()
                for leaf in (*rows, *([shares, *weights] if name.startswith("ffm") else []))
            ]
            given = (
                {"fusion_weights": leaves[3], "classifiers": leaves[4:]}
                if name.startswith("ffm")
                else {}
            )
            given |= {"index": torch.tensor([3, 0, 1])} if name.startswith("tsb") else {}
            value, terms = loss.forward_backward(leaves[:3], target, kd_weight=0.5, **given)
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        ends.append([value, *terms.values(), *grads])
    assert len(ends[0]) > 8
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("count", "num_classes", "scale", "alike", "soft"),
    [
        (2, 10, 1.0, 1.0, False),
        (2, 3, 100.0, 1.0, True),
        (3, 7, 5.0, 1.0, True),
        (5, 10, 5.0, 1e-3, False),
        (6, 12, 100.0, 1.0, False),
        (3, 10, 1.0, 0.0, False),
    ],
)
def test_linear_weights_in_one_kernel_are_optimal(
    count: int, num_classes: int, scale: float, alike: float, soft: bool
) -> None:
    """The certificate of ``tests/test_kdcl.py``; rows with ``alike`` < 1 are nearly equal."""
    random = np.random.default_rng(count)
    base, own = random.normal(size=(2, 1, num_classes)), random.normal(size=(2, count, num_classes))
    rows = scale * (own if alike == 1 else base + alike * own)
    labels = random.integers(num_classes, size=2)
    y = random.dirichlet(np.full(num_classes, 0.3), 2) if soft else np.eye(num_classes)[labels]
    given = [row.clone() for row in torch.from_numpy(rows).unbind(1)]
    target = torch.from_numpy(y if soft else labels)
    a = lowest_cross_entropy_weights(given, target, "triton").numpy()
    assert (a >= 0).all()
    assert a.sum(1) == pytest.approx(np.ones(2), abs=1e-12)
    gap = oracle.mixed_cross_entropy_gap(rows, y, a)[1]
    assert (gap <= 1e-9 * (1 + np.ptp(rows, axis=(1, 2)))).all()


def test_probability_floor_equals_reference() -> None:
    assert FLOOR.value == PROBABILITY_FLOOR


# --- rows that are split among programs


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Split rows into a number of parts, however short they are: long ones take the interpreter
    long.
    """
    return lambda parts: monkeypatch.setattr(
        launch, "choose_splits", lambda batch, num_classes: parts
    )


def graphs_and_targets(
    graphs: Iterable[str], few: Container[tuple[str, bool]]
) -> pytest.MarkDecorator:
    """Each graph with labels and with soft targets; in ``make test`` the few pairs."""
    return pytest.mark.parametrize(
        ("name", "soft"),
        [
            pytest.param(
                name,
                soft,
                marks=[] if (name, soft) in few else pytest.mark.grid,
                id=f"{name}, {'soft' if soft else 'labels'}",
            )
            for name in graphs
            for soft in (False, True)
        ],
    )


# ``test_split_rows_of_huge_logits_match_float64`` has soft targets of further graphs.
@graphs_and_targets(
    TRITON_GRAPHS,
    {*((name, False) for name in TRITON_GRAPHS), ("cross-entropy alone", True), ("memory", True)},
)
def test_split_rows_of_every_kind_match_float64(
    split: Callable[[int], None], name: str, soft: bool
) -> None:
    split(2)
    TRITON.compare(make_inputs(GRAPHS[name], 1 if soft else 2, 1200, soft_target=soft))


@pytest.mark.parametrize(
    ("name", "batch", "classes", "splits", "soft"),
    [
        # Parts of one and of two chunks, rows not aligned for vectors.
        ("cascade", 1, 4601, 4, False),
        pytest.param("cascade", 1, 9001, 8, False, marks=pytest.mark.grid),
        ("cascade, detached", 2, 6173, 2, True),
        pytest.param("cascade, detached", 3, 12345, 4, True, marks=pytest.mark.grid),
        ("mutual", 1, 10000, 16, False),
        pytest.param("mutual", 1, 20000, 16, False, marks=pytest.mark.grid),
        ("mixed probabilities", 1, 9000, 4, False),
        ("selection", 1, 9001, 2, True),
        ("mutual", 2, 1200, 8, False),  # more parts than chunks: some are empty
        ("minimum", 2, 1024, 2, True),  # no chunk that is not whole
    ],
)
def test_split_rows_of_many_classes_match_float64(
    split: Callable[[int], None], name: str, batch: int, classes: int, splits: int, soft: bool
) -> None:
    split(splits)
    TRITON.compare(make_inputs(GRAPHS[name], batch, classes, soft_target=soft))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_split_rows_of_every_dtype_match_float64(
    split: Callable[[int], None], dtype: torch.dtype
) -> None:
    split(2)
    TRITON.compare(make_inputs(GRAPHS["cascade, detached"], 1, 4500, dtype))


def test_split_rows_with_label_in_each_part_match(split: Callable[[int], None]) -> None:
    split(4)
    # 512 columns to a chunk, one chunk to a part, 452 more in the last
    inputs = make_inputs(GRAPHS["cascade, detached"], 10, 2500)
    inputs.target = torch.tensor([0, 511, 512, 1023, 1024, 1535, 1536, 2047, 2048, 2499])
    TRITON.compare(inputs)


@graphs_and_targets(EXTREME, {*((name, True) for name in EXTREME), ("cascade", False)})
def test_split_rows_of_huge_logits_match_float64(
    split: Callable[[int], None], name: str, soft: bool
) -> None:
    split(2)
    inputs = make_inputs(GRAPHS[name], 2, 1200, scale=1e4, soft_target=soft)
    TRITON.compare(inputs, huge=True)


def test_split_rows_with_distant_parts_match_float64(split: Callable[[int], None]) -> None:
    split(4)
    inputs = make_inputs(GRAPHS["cascade"], 2, 2500)
    with torch.no_grad():
        for m, row in enumerate(inputs.logits):
            row[:, 512:1024] += 1e4 * (-1) ** m
            row[:, 1536:2048] -= 1e4
    TRITON.compare(inputs, huge=True)


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3), (4, 5, 6), (0, 1, 2, 3)])
def test_split_rows_with_frozen_inputs_match_float64(
    split: Callable[[int], None], frozen: tuple[int, ...]
) -> None:
    split(2)
    inputs = make_inputs(GRAPHS["cascade"], 2, 1200)
    for index in frozen:
        inputs.leaves()[index].requires_grad_(False)
    TRITON.compare(inputs)


@pytest.mark.parametrize("name", ["cascade, exact eps", "mixed probabilities"])
def test_split_rows_with_masked_parts_match_float64(
    split: Callable[[int], None], name: str
) -> None:
    split(4)
    inputs = TRITON.make(masked_rows.MASKED_GRAPHS[name], (1, 2500), scale=1.0)
    masked_rows.compare_with_absent(TRITON, inputs, torch.arange(2500) // 512 % 2 == 0)


def test_split_rows_with_wrong_labels_are_nan(split: Callable[[int], None]) -> None:
    split(2)
    inputs = make_inputs(GRAPHS["cascade, detached"], 3, 1200)
    inputs.target = torch.tensor([5, 1200, -1])
    results = [evaluated(inputs, impl) for impl in ("triton", "reference")]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


# The same kernels as in two passes.
@pytest.mark.parametrize("name", ["cascade of eight", "memory", "selection", "mixed probabilities"])
def test_split_rows_in_one_and_two_passes_are_equal(
    split: Callable[[int], None], name: str
) -> None:
    split(2)
    inputs = make_inputs(GRAPHS[name], 1, 1200)
    expected = TRITON.run(inputs)
    rows, terms, grads = forward_backward(inputs.plan, *inputs.arguments(), impl="triton")
    same_bits((rows, terms, *grads), expected)


def test_long_rows_are_split_and_match_float64() -> None:
    assert choose_splits(1, 40001) == 4
    TRITON.compare(make_inputs(GRAPHS["cross-entropy alone"], 1, 40001))
