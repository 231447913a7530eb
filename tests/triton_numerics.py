"""The Triton kernels against float64, on CPU tensors through Triton's interpreter.

Not collected by itself: ``test_triton_interpreter.py`` runs it in a process of its own, because the
interpreter must be chosen before Triton is first imported.
"""

from collections.abc import Callable

import pytest
import torch
import triton_state

from fastokd.kernels.triton.columns import FLOOR
from fastokd.kernels.triton.tile import choose_splits
from fastokd.losses import AHBFLoss, FFMLoss, KDCLLoss, MethodLoss, TSBLoss
from fastokd.methods.ahbf import ahbf_graph
from fastokd.ops import triton as triton_executor
from fastokd.ops.reference import PROBABILITY_FLOOR
from fastokd.ops.triton import INTERPRETED
from tests.triton_cases import REFERENCE, TRITON, check, fused, make, run
from tests.triton_graphs import GRAPHS

torch.set_num_threads(1)
assert INTERPRETED, "set TRITON_INTERPRET=1 before Python starts"
triton_state.patch_language_once()


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kind_of_node_and_term(name: str, soft: bool) -> None:
    # 300 classes: one whole chunk of 256 and a rest, in the regime of one warp or more per row.
    check(make(GRAPHS[name](), 2, 300, soft=soft))


@pytest.mark.parametrize("name", ["cascade", "memory", "selection", "first-order eps"])
@pytest.mark.parametrize(
    ("batch", "classes"),
    [
        (1, 2),  # the fewest classes: most lanes have none
        (17, 10),  # rows share a warp; the last program's rows are not all there
        (3, 32),  # the most classes of that regime
        (2, 100),  # a warp holds the row, columns are loaded one by one
        (2, 256),  # a warp holds the row as vectors
        (2, 1000),  # several warps, one chunk, 16-byte loads
        (2, 1001),  # rows not aligned for vectors
        (1, 4500),  # several chunks and a rest
    ],
)
def test_one_shape_per_regime(name: str, batch: int, classes: int) -> None:
    check(make(GRAPHS[name](), batch, classes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 1001])
def test_dtypes(dtype: torch.dtype, classes: int) -> None:
    check(make(GRAPHS["cascade"](), 2, classes, dtype))


@pytest.mark.parametrize("num_branches", [2, 3, 5, 8])
def test_numbers_of_branches(num_branches: int) -> None:
    check(make(ahbf_graph(num_branches), 3, 10))


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
def test_losses_that_solve_remember_or_add_a_term(
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


@pytest.mark.parametrize("classes", [10, 300])
def test_fifteen_rows_of_logits(classes: int) -> None:
    check(make(ahbf_graph(8, mix=False), 3, classes))


def test_empty_batch() -> None:
    inputs = make(GRAPHS["cascade"](), 0, 10)
    check(inputs)
    rows, terms, grads = fused(inputs)
    assert rows.shape == (0,)
    assert terms.shape == (inputs.plan.num_terms, 0)
    assert [grad.shape for grad in grads] == [
        tensor.shape for tensor in (*inputs.logits, *inputs.weights)
    ]


@pytest.mark.parametrize(
    "name",
    ["cascade", "mixed probabilities", "mutual, student first", "minimum", "cascade, exact eps"],
)
@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_huge_and_tiny_logits(name: str, scale: float) -> None:
    check(make(GRAPHS[name](), 3, 100, scale=scale), huge=scale > 1)


@pytest.mark.parametrize("name", ["cascade", "mutual"])
def test_a_common_offset_costs_no_accuracy_in_the_gradient(name: str) -> None:
    inputs = make(GRAPHS[name](), 3, 100)
    inputs.logits = [row + 1000.0 for row in inputs.logits]
    check(inputs)


def test_opposed_branches_keep_their_mixtures_finite() -> None:
    # The mixture's maximum is far below the mixture of the maxima: its exponentials must not all
    # vanish.
    inputs = make(GRAPHS["cascade"](), 2, 100)
    for m, row in enumerate(inputs.logits):
        row[:, m] = 2000.0
    check(inputs, huge=True)


@pytest.mark.parametrize("height", [15.0, 60.0, 90.0, 1e4])
@pytest.mark.parametrize("name", ["cascade", "selection", "mixed probabilities"])
def test_a_logit_far_above_the_guess_at_its_rows_maximum(name: str, height: float) -> None:
    # Of 1300 columns 512 make a chunk; the guess looks at the first chunk's first, fifth, ninth ...
    # column.
    inputs = make(GRAPHS[name](), 3, 1300)
    for m, row in enumerate(inputs.logits):
        row[torch.arange(3), torch.tensor([1, 700 + m, 1299])] += height * (1 + m / 8)
    inputs.target = torch.tensor([1, 3, 1299])
    check(inputs, huge=height > 20)


def test_logits_beyond_all_accuracy_come_to_an_end() -> None:
    rows = run(TRITON, make(GRAPHS["cascade"](), 2, 1300, scale=1e12))[0]
    assert rows.shape == (2,)


def test_identical_rows() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    inputs.logits = [inputs.logits[0].clone() for _ in inputs.logits]
    check(inputs)


def test_one_hot_scores() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    for k, weight in enumerate(inputs.weights):
        weight.zero_()
        weight[:, k % 2] = 1.0
    check(inputs)


def test_weights_that_do_not_add_up_to_one() -> None:
    inputs = make(GRAPHS["cascade"](), 2, 1001)
    inputs.weights = [weight * 4 - 2 for weight in inputs.weights]
    check(inputs)


def test_strided_logits_and_expanded_weights() -> None:
    inputs = make(GRAPHS["shared weights"](), 3, 100)
    first, second, third = inputs.logits
    inputs.logits = [
        first.t().contiguous().t(),
        torch.stack([second, second], 2)[:, :, 0],
        torch.cat([third, third], 1)[:, 100:],
    ]
    inputs.weights = [torch.tensor([0.25, 0.75]).expand(3, 2)]
    check(inputs)


def test_padded_rows_are_loaded_as_vectors() -> None:
    inputs = make(GRAPHS["cascade"](), 2, 1001, torch.bfloat16)
    inputs.logits = [torch.nn.functional.pad(row, (0, 7))[:, :1001] for row in inputs.logits]
    check(inputs)


def test_expanded_upstream_gradient() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 10)
    inputs.grad_rows = torch.tensor(0.125).expand(3)
    check(inputs)


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3), (4, 5, 6), (0, 1, 2, 3)])
def test_frozen_inputs(frozen: tuple[int, ...]) -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    inputs.needs = [k not in frozen for k in range(7)]
    check(inputs)


def test_labels_out_of_range_are_never_a_number() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    inputs.target = torch.tensor([5, 100, -1])
    found, truth = run(TRITON, inputs), run(REFERENCE, inputs)
    for mine, theirs in zip(found, truth, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_zero_probabilities_from_outside() -> None:
    inputs = make(GRAPHS["memory"](), 2, 100)
    for row in inputs.externals:
        row[:, :50] = 0.0
    check(inputs)


def test_bits_repeat() -> None:
    inputs = make(GRAPHS["cascade"](), 2, 300)
    for one, two in zip(run(TRITON, inputs), run(TRITON, inputs), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_fused_kernel_equals_the_two(name: str) -> None:
    inputs = make(GRAPHS[name](), 3, 40)
    inputs.grad_rows = torch.full((3,), 1 / 3)
    rows, terms, grads = fused(inputs)
    # With eight branches the fused kernel takes fewer columns at once, so float32 is summed up in
    # another order.
    rtol, atol = (1e-5, 1e-6) if name == "cascade of eight" else (1e-6, 1e-7)
    for mine, theirs in zip([rows, *terms, *grads], run(TRITON, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def test_a_loss_through_the_registered_operator() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 10)
    found = []
    for impl in ("triton", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs.logits, *inputs.weights)]
        loss, terms = AHBFLoss(lambda_self=2.0, impl=impl)(
            leaves[:4], inputs.target, scores=leaves[4:], kd_weight=0.5, return_terms=True
        )
        loss.backward()
        found.append([loss.detach(), *terms.values(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_operator_is_registered_as_it_behaves() -> None:
    inputs = make(GRAPHS["shared weights"](), 3, 10)
    ints, floats = inputs.plan.encode()
    forward = (*inputs.inputs, list(ints), list(floats), "triton")
    torch.library.opcheck(torch.ops.fastokd.graph_forward.default, forward)
    stats = TRITON.forward(inputs.plan, inputs.inputs)[2]
    backward = (
        inputs.grad_rows,
        *inputs.inputs,
        stats,
        list(ints),
        list(floats),
        "triton",
        [True, False, True, True],
    )
    torch.library.opcheck(torch.ops.fastokd.graph_backward.default, backward)


def test_the_floor_is_the_references() -> None:
    assert FLOOR.value == PROBABILITY_FLOOR


def split(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Have rows split so however many and short they are: long ones take the interpreter long."""
    monkeypatch.setattr(triton_executor, "choose_splits", lambda batch, num_classes: splits)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("name", GRAPHS)
def test_split_rows_with_every_kind_of_node_and_term(
    monkeypatch: pytest.MonkeyPatch, name: str, soft: bool
) -> None:
    split(monkeypatch, 2)
    check(make(GRAPHS[name](), 1 if soft else 2, 1200, soft=soft))


@pytest.mark.parametrize(
    ("name", "batch", "classes", "splits", "soft"),
    [
        (
            "cascade",
            1,
            9001,
            8,
            False,
        ),  # parts of one and of two chunks, rows not aligned for vectors
        ("cascade, detached", 3, 12345, 4, True),
        ("mutual", 1, 20000, 16, False),
        ("mixed probabilities", 1, 9000, 4, False),
        ("selection", 1, 9001, 2, True),
        ("mutual", 2, 1200, 8, False),  # more parts than chunks: some are empty
        ("minimum", 2, 1024, 2, True),  # no chunk that is not whole
    ],
)
def test_split_rows_of_many_classes(
    monkeypatch: pytest.MonkeyPatch, name: str, batch: int, classes: int, splits: int, soft: bool
) -> None:
    split(monkeypatch, splits)
    check(make(GRAPHS[name](), batch, classes, soft=soft))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_split_rows_of_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    split(monkeypatch, 2)
    check(make(GRAPHS["cascade, detached"](), 1, 4500, dtype))


def test_a_label_in_each_part_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, 4)
    inputs = make(
        GRAPHS["cascade, detached"](), 10, 2500
    )  # 512 columns to a chunk, one chunk to a part, 452 more in the last
    inputs.target = torch.tensor([0, 511, 512, 1023, 1024, 1535, 1536, 2047, 2048, 2499])
    check(inputs)


@pytest.mark.parametrize(
    "name",
    ["cascade", "mixed probabilities", "mutual, student first", "minimum", "cascade, exact eps"],
)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_huge_logits_in_split_rows(monkeypatch: pytest.MonkeyPatch, name: str, soft: bool) -> None:
    split(monkeypatch, 2)
    check(make(GRAPHS[name](), 2, 1200, scale=1e4, soft=soft), huge=True)


def test_parts_of_a_row_that_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, 4)
    inputs = make(GRAPHS["cascade"](), 2, 2500)
    for m, row in enumerate(inputs.logits):
        row[:, 512:1024] += 1e4 * (-1) ** m
        row[:, 1536:2048] -= 1e4
    check(inputs, huge=True)


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3), (4, 5, 6), (0, 1, 2, 3)])
def test_frozen_inputs_of_split_rows(
    monkeypatch: pytest.MonkeyPatch, frozen: tuple[int, ...]
) -> None:
    split(monkeypatch, 2)
    inputs = make(GRAPHS["cascade"](), 2, 1200)
    inputs.needs = [k not in frozen for k in range(7)]
    check(inputs)


def test_labels_out_of_range_in_split_rows_are_never_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split(monkeypatch, 2)
    inputs = make(GRAPHS["cascade, detached"](), 3, 1200)
    inputs.target = torch.tensor([5, 1200, -1])
    for mine, theirs in zip(run(TRITON, inputs), run(REFERENCE, inputs), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("name", GRAPHS)
def test_loss_and_gradient_of_split_rows_at_once_equal_the_two_and_repeat(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    split(monkeypatch, 2)
    inputs = make(GRAPHS[name](), 1, 1200)
    inputs.grad_rows = torch.ones(1)
    rows, terms, grads = fused(inputs)
    for mine, theirs in zip([rows, *terms, *grads], run(TRITON, inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_long_rows_are_split_unasked() -> None:
    inputs = make(GRAPHS["cross-entropy alone"](), 1, 40001)
    assert choose_splits(1, 40001) == 4
    check(inputs)
