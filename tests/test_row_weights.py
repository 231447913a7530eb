"""Ignored labels, weights of samples and classes, and dense logits, against PyTorch's losses and
against the same loss on chosen rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_catalog import make_inputs
from graph_strategy import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastokd.graph import Graph
from fastokd.losses import AFIDLoss, AHBFLoss, BaselineLoss, DMLLoss, GraphLoss, KDCLLoss
from fastokd.losses.dense import DenseLayout
from fastokd.losses.row_weights import weigh_rows

EXECUTORS = ("reference", "cpu")
BATCH, CLASSES, BRANCHES = 12, 5, 3


@pytest.fixture(params=EXECUTORS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(7))


def close(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def ahbf_inputs(*positions: int) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves: the logits of three branches, and the mixing weights of two assistants."""
    logits = [draw(BATCH, CLASSES, *positions, seed=m) for m in range(BRANCHES)]
    scores = [draw(BATCH, 2, *positions, seed=9 + m).softmax(1) for m in range(BRANCHES - 1)]
    return [z.requires_grad_() for z in logits], [a.requires_grad_() for a in scores]


def loss_and_gradients(loss: Tensor, leaves: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, list(leaves))


# --- against torch.nn.functional.cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["labels", "ignored", "soft"])
def test_baseline_equals_cross_entropy(
    impl: str, reduction: Any, smoothing: float, weighted: bool, target: str
) -> None:
    logits = draw(BATCH, CLASSES).requires_grad_()
    truth: Tensor = labels(BATCH)
    if target == "ignored":
        truth = truth.index_fill(0, torch.tensor([1, 7, 11]), -100)
    if target == "soft":
        truth = draw(BATCH, CLASSES, seed=3).softmax(1)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    criterion = BaselineLoss(1, class_weight=weight, impl=impl, **options)
    expected = F.cross_entropy(logits, truth, weight=weight, **options)
    (grad,) = torch.autograd.grad(expected.sum(), logits)
    ours = criterion([logits], truth)
    close(ours, expected)
    close(torch.autograd.grad(ours.sum(), logits)[0], grad)
    if reduction == "mean":
        leaf = logits.detach().requires_grad_()
        close(criterion.forward_backward([leaf], truth)[0], expected.detach())
        close(leaf.grad, grad)


def test_other_ignore_index_equals_cross_entropy(impl: str) -> None:
    logits, target = draw(BATCH, CLASSES), labels(BATCH)
    target[2] = 255
    ours = BaselineLoss(1, ignore_index=255, impl=impl)([logits], target)
    close(ours, F.cross_entropy(logits, target, ignore_index=255))


def test_dense_baseline_equals_cross_entropy(impl: str) -> None:
    logits = draw(2, CLASSES, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
    target = labels(2, 4, 3)
    target[0, 1] = -100
    weight = torch.rand(CLASSES, dtype=torch.float64)
    for options in ({}, {"reduction": "none"}):
        ours = BaselineLoss(1, class_weight=weight, impl=impl, **options)([logits], target)
        expected = F.cross_entropy(logits, target, weight=weight, **options)
        close(ours, expected)
        pair = [torch.autograd.grad(each.sum(), logits)[0] for each in (ours, expected)]
        close(*pair)


def test_class_weight_leaves_kl_terms_unchanged(impl: str) -> None:
    logits, scores = ahbf_inputs()
    target, weight = labels(BATCH), torch.rand(CLASSES, dtype=torch.float64)
    plain = AHBFLoss(BRANCHES, impl=impl)(logits, target, scores=scores)
    ours = AHBFLoss(BRANCHES, class_weight=weight, impl=impl)(logits, target, scores=scores)
    rows = list(logits)
    previous = logits[0]
    for branch, mix in zip(logits[1:], scores, strict=True):
        previous = mix[:, :1] * branch + mix[:, 1:] * previous
        rows.append(previous)
    change = sum(
        F.cross_entropy(row, target, weight=weight) - F.cross_entropy(row, target) for row in rows
    )
    leaves = [*logits, *scores]
    close(loss_and_gradients(ours, leaves), loss_and_gradients(plain + change, leaves))


# --- against the same loss on chosen rows


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_rows_equal_absent_rows(impl: str, reduction: Any) -> None:
    logits, scores = ahbf_inputs()
    target = labels(BATCH)
    counted = [0, 2, 3, 5, 6, 10]
    masked = torch.full_like(target, -100)
    masked[counted] = target[counted]
    leaves = [*logits, *scores]
    criterion = AHBFLoss(BRANCHES, reduction=reduction, impl=impl)
    ours, terms = criterion(logits, masked, scores=scores, return_terms=True)
    chosen = [leaf[counted] for leaf in leaves]
    expected, means = criterion(
        chosen[:BRANCHES], target[counted], scores=chosen[BRANCHES:], return_terms=True
    )
    close(loss_and_gradients(ours, leaves), loss_and_gradients(expected, leaves))
    close(terms, means)


def test_sample_weights_equal_repeated_rows(impl: str) -> None:
    logits, scores = ahbf_inputs()
    target, counts = labels(BATCH), torch.arange(BATCH) % 4
    leaves = [*logits, *scores]
    criterion = AHBFLoss(BRANCHES, impl=impl)
    weight = 0.25 * counts.double()  # only ratios matter
    ours = criterion(logits, target, scores=scores, sample_weight=weight)
    repeated = [leaf.repeat_interleave(counts, 0) for leaf in leaves]
    expected = criterion(
        repeated[:BRANCHES], target.repeat_interleave(counts), scores=repeated[BRANCHES:]
    )
    truth = loss_and_gradients(expected, leaves)
    close(loss_and_gradients(ours, leaves), truth)
    value, _ = criterion.forward_backward(logits, target, scores=scores, sample_weight=weight)
    close((value, *[leaf.grad for leaf in leaves]), truth)


def test_all_rows_ignored_give_zero(impl: str) -> None:
    logits, scores = ahbf_inputs()
    target = torch.full((BATCH,), -100)
    for reduction in ("mean", "sum", "none"):
        loss = AHBFLoss(BRANCHES, reduction=reduction, impl=impl)(logits, target, scores=scores)
        assert not loss.any()
        grads = torch.autograd.grad(loss.sum(), [*logits, *scores])
        assert not any(grad.any() for grad in grads)


def test_ignored_row_with_masked_class_stays_finite(impl: str) -> None:
    logits = draw(4, CLASSES)
    logits[:, 0] = float("-inf")
    target = torch.tensor([1, -100, 2, 3])
    ours = BaselineLoss(1, impl=impl)([logits], target)
    close(ours, F.cross_entropy(logits, target))


@settings(max_examples=40, deadline=None)
@given(
    graph=random_graphs(with_standardized=True),
    reduction=st.sampled_from(("mean", "sum")),
    dense=st.booleans(),
)
def test_random_graph_ignores_masked_rows(graph: Graph, reduction: Any, dense: bool) -> None:
    """Against the loss of each row that counts; dense logits are the same rows at 2 x 3 places."""
    inputs = make_inputs(graph, batch=6, num_classes=4, dtype=torch.float64)
    counted = [0, 2, 5]
    masked = torch.full_like(inputs.target, -100)
    masked[counted] = inputs.target[counted]
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 3.0], dtype=torch.float64)

    def place(value: Tensor) -> Tensor:
        placed = value.reshape(2, 3, *value.shape[1:]) if dense else value
        return placed.movedim(2, 1) if placed.dim() == 3 else placed

    for impl in EXECUTORS:
        ours = GraphLoss(graph, impl=impl, reduction=reduction)(
            [place(row) for row in inputs.logits],
            place(masked),
            weights={name: place(value) for name, value in inputs.weights.items()},
            externals={name: place(value) for name, value in inputs.externals.items()},
            sample_weight=place(weight),
        )
        by_row = GraphLoss(graph, impl=impl, reduction="none")(
            [row[counted] for row in inputs.logits],
            inputs.target[counted],
            weights={name: value[counted] for name, value in inputs.weights.items()},
            externals={name: value[counted] for name, value in inputs.externals.items()},
        )
        expected = (by_row * weight[counted]).sum()
        if reduction == "mean":
            expected = expected / weight[counted].sum()
        leaves = inputs.leaves()
        options: Any = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(ours, leaves, **options)
        truth = torch.autograd.grad(expected, leaves, **options)
        torch.testing.assert_close(
            (ours.detach(), *grads), (expected.detach(), *truth), rtol=1e-9, atol=1e-10
        )


# --- dense logits


@pytest.mark.parametrize("last", [False, True])
def test_dense_loss_equals_loss_of_its_rows(impl: str, last: bool) -> None:
    logits, scores = ahbf_inputs(2, 3)
    target, weight = labels(BATCH, 2, 3), draw(BATCH, 2, 3).abs()
    target[3, 1] = -100

    def rows(value: Tensor) -> Tensor:
        return torch.stack(
            [value[b, :, i, j] for b in range(BATCH) for i in range(2) for j in range(3)]
        )

    leaves = [*logits, *scores]
    criterion = AHBFLoss(BRANCHES, impl=impl, class_dim=-1 if last else 1)
    given_logits, given_scores = logits, scores
    if last:
        given_logits, given_scores = (
            [leaf.permute(0, 2, 3, 1) for leaf in each] for each in (logits, scores)
        )
    ours = criterion(given_logits, target, scores=given_scores, sample_weight=weight)
    expected = AHBFLoss(BRANCHES, impl=impl)(
        [rows(leaf) for leaf in logits],
        target.flatten(),
        scores=[rows(leaf) for leaf in scores],
        sample_weight=weight.flatten(),
    )
    close(loss_and_gradients(ours, leaves), loss_and_gradients(expected, leaves))
    if not last:
        stacked = criterion(
            torch.stack(logits), target, scores=torch.stack(scores), sample_weight=weight
        )
        close(stacked, ours)


def test_shared_scores_and_weights_reach_all_positions(impl: str) -> None:
    logits, _ = ahbf_inputs(2, 3)
    _, scores = ahbf_inputs()
    target, weight = labels(BATCH, 2, 3), draw(BATCH).abs()
    criterion = AHBFLoss(BRANCHES, impl=impl)
    ours = criterion(logits, target, scores=scores, sample_weight=weight)
    spread = [each[:, :, None, None].expand(-1, -1, 2, 3) for each in scores]
    weights = weight[:, None, None].expand(-1, 2, 3)
    expected = criterion(logits, target, scores=spread, sample_weight=weights)
    leaves = [*logits, *scores]
    close(loss_and_gradients(ours, leaves), loss_and_gradients(expected, leaves))


def test_channels_last_and_tokens_are_not_copied() -> None:
    maps = draw(2, CLASSES, 4, 3).to(memory_format=torch.channels_last)
    tokens = draw(2, 7, CLASSES)
    for logits, class_dim in ((maps, 1), (tokens, -1)):
        layout = DenseLayout.of([logits, logits], class_dim)
        assert layout is not None
        rows = layout.rows(logits, "logits")
        assert rows.data_ptr() == logits.data_ptr()
        assert rows.shape == (logits.numel() // CLASSES, CLASSES)


def test_dense_rows_have_names_in_their_layout() -> None:
    logits, scores = ahbf_inputs(2, 3)
    named = AHBFLoss(BRANCHES).named_logits(logits, scores=scores)
    assert {row.shape for row in named.values()} == {(BATCH, CLASSES, 2, 3)}
    close(named["branch2"], logits[1].detach())
    close(named["ensemble"], torch.stack(logits).mean(0).detach())


@pytest.mark.parametrize("last", [False, True])
def test_one_position_equals_rows(impl: str, last: bool) -> None:
    logits, scores = ahbf_inputs()
    target = labels(BATCH)
    dim = 1 if last else 2
    criterion = AHBFLoss(BRANCHES, impl=impl, class_dim=-1 if last else 1)
    ours = criterion(
        [row.unsqueeze(dim) for row in logits],
        target.unsqueeze(1),
        scores=[each.unsqueeze(dim) for each in scores],
    )
    leaves = [*logits, *scores]
    expected = AHBFLoss(BRANCHES, impl=impl)(logits, target, scores=scores)
    close(loss_and_gradients(ours, leaves), loss_and_gradients(expected, leaves))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_dense_batch_gives_zero(impl: str, shape: tuple[int, ...]) -> None:
    batch, *positions = shape
    logits = [torch.zeros(batch, CLASSES, *positions, requires_grad=True) for _ in range(2)]
    for scores in (torch.zeros(batch, 2, *positions), torch.zeros(batch, 2)):
        loss = AHBFLoss(2, impl=impl)(logits, labels(*shape), scores=[scores])
        assert loss.item() == 0.0
        loss.backward()
    assert all(not row.grad.any() for row in logits)
    named = AHBFLoss(2).named_logits(logits, scores=[scores])
    assert named["ta2"].shape == logits[0].shape


def test_dense_mixtures_have_the_layout_of_the_logits() -> None:
    logits, scores = ahbf_inputs(2, 3)
    criterion, target = AHBFLoss(BRANCHES), labels(BATCH, 2, 3)
    mixed = criterion.mixtures(logits, scores=scores)["ta2"]
    close(mixed, (scores[0][:, :1] * logits[1] + scores[0][:, 1:] * logits[0]).detach())
    weights = criterion.mixing_weights(logits, target, scores=scores)["ta3"]
    close(weights["branch3"], scores[1][:, 0].detach())


def test_dense_teacher_equals_teacher_of_rows() -> None:
    logits, teacher = draw(2, CLASSES, 3), draw(2, CLASSES, 3, seed=5)
    target = labels(2, 3)
    criterion = DMLLoss(2).add_teacher("branch1")
    ours = criterion([logits, logits], target, teacher=teacher)
    flat = [each.movedim(1, -1).reshape(-1, CLASSES) for each in (logits, teacher)]
    expected = criterion([flat[0], flat[0]], target.flatten(), teacher=flat[1])
    close(ours, expected)


# --- tracing, and losses of other kinds


def test_compiled_loss_ignores_rows() -> None:
    logits, scores = ahbf_inputs()
    target = labels(BATCH).index_fill(0, torch.tensor([0, 4]), -100)
    criterion = AHBFLoss(BRANCHES)
    expected = loss_and_gradients(criterion(logits, target, scores=scores), [*logits, *scores])
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    close(loss_and_gradients(compiled(logits, target, scores=scores), [*logits, *scores]), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_compiled_loss_weighs_smoothed_classes(soft: bool) -> None:
    logits, weight = draw(BATCH, CLASSES), torch.rand(CLASSES, dtype=torch.float64)
    target = draw(BATCH, CLASSES, seed=3).softmax(1) if soft else labels(BATCH)
    criterion = BaselineLoss(1, label_smoothing=0.1, class_weight=weight)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    expected = F.cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
    close(compiled([logits], target), expected)


def test_solver_of_kdcl_does_not_see_ignored_labels(impl: str) -> None:
    logits = [draw(BATCH, CLASSES, seed=m).requires_grad_() for m in range(2)]
    target = labels(BATCH)
    criterion = KDCLLoss(2, variant="linear", impl=impl)
    masked = target.index_fill(0, torch.tensor([3]), -100)
    counted = [row for row in range(BATCH) if row != 3]
    expected = criterion([row[counted] for row in logits], target[counted])
    close(
        loss_and_gradients(criterion(logits, masked), logits), loss_and_gradients(expected, logits)
    )


def test_loss_without_ignored_rows_keeps_its_bits() -> None:
    logits, scores = ahbf_inputs()
    target = labels(BATCH)
    ours = AHBFLoss(BRANCHES)(logits, target, scores=scores)
    without = AHBFLoss(BRANCHES, ignore_index=None)(logits, target, scores=scores)
    assert torch.equal(ours, without)


def test_class_weight_is_a_buffer_of_every_loss() -> None:
    weight = torch.nn.Parameter(torch.rand(CLASSES))
    for criterion in (BaselineLoss(1, class_weight=weight), AHBFLoss(2, class_weight=weight)):
        assert torch.equal(criterion.class_weight, weight)
        assert criterion.to(torch.float64).class_weight.dtype == torch.float64
        assert (list(criterion.state_dict()), list(criterion.parameters())) == ([], [])
    assert BaselineLoss(1).class_weight is None


def test_label_out_of_range_is_nan_whatever_the_weights() -> None:
    """On a GPU, where labels are not checked: the nearest class may have weight 0."""
    logits, lowered = draw(4, CLASSES), BaselineLoss(1).lowered
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    target = torch.tensor([0, 7, -3, 2])
    rows = weigh_rows(lowered.plan, lowered.unsmoothed, logits, target, None, weight, None)
    factors = rows.factors[:, 0].tolist()
    assert (factors[0], factors[3]) == (0.0, 1.0)
    assert rows.factors[1:3].isnan().all()


# --- bad input


def _call(criterion: Callable[..., Any], target: Tensor | None = None, **inputs: Any) -> None:
    criterion([draw(BATCH, CLASSES)], labels(BATCH) if target is None else target, **inputs)


def _weight(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _call(BaselineLoss(1, ignore_index=3)), "ignore_index=3 is one of the 5 classes"),
        (
            lambda: _call(BaselineLoss(1, ignore_index=None), torch.full((BATCH,), -100)),
            r"target\[0\] is -100, but the logits have 5 classes",
        ),
        (
            lambda: _call(BaselineLoss(1), torch.tensor([-100] * 11 + [9])),
            r"target\[11\] is 9, but the logits have 5 classes",
        ),
        (
            lambda: BaselineLoss(1, class_weight=_weight(1.0, -1.0)),
            r"class_weight\[1\] is -1.0; it must be finite",
        ),
        (lambda: BaselineLoss(1, class_weight=_weight(float("nan"))), r"class_weight\[0\] is nan"),
        (
            lambda: BaselineLoss(1, class_weight=torch.ones(2, 2)),
            r"class_weight has the shape \(2, 2\); it must be \[C\]",
        ),
        (
            lambda: _call(BaselineLoss(1, class_weight=torch.ones(4))),
            r"class_weight has the shape \(4,\); it must be \[5\]",
        ),
        (
            lambda: _call(BaselineLoss(1), sample_weight=torch.ones(3)),
            r"sample_weight has the shape \(3,\); it must be \[12\]",
        ),
        (
            lambda: _call(BaselineLoss(1), sample_weight=torch.full((BATCH,), -2.0)),
            r"sample_weight\[0\] is -2.0; it must be finite and at least 0",
        ),
        (lambda: BaselineLoss(1, class_dim=2), "class_dim=2; use 1"),
        (
            lambda: _call(BaselineLoss(1), sample_weight=torch.full((BATCH,), float("nan"))),
            r"sample_weight\[0\] is nan; it must be finite and at least 0",
        ),
        (lambda: BaselineLoss(1, ignore_index=2.5), "ignore_index=2.5; it must be an integer"),
        (lambda: BaselineLoss(1, ignore_index=True), "ignore_index=True; it must be an integer"),
        (
            lambda: BaselineLoss(1)(draw(2, 5, 3), labels(2, 3)),
            "branch_logits holds 2 tensors; this loss needs 1; one tensor is a stack of them, so"
            " pass a list",
        ),
        (
            lambda: DMLLoss(2)([draw(2, 5, 3), draw(2, 5)], labels(2, 3)),
            r"branch_logits\[1\] has the shape \(2, 5\); with these logits it must be \[2, K, 3\]",
        ),
        (
            lambda: DMLLoss(2)([draw(2, 3, 5)] * 2, labels(2, 3)),
            r"target has the shape \(2, 3\); labels must be \[2, 5\]; pass class_dim=-1 if",
        ),
        (
            lambda: DMLLoss(2)([draw(2, 5, 3)] * 2, draw(2, 5).softmax(1)),
            r"target has the shape \(2, 5\); with these logits it must be \[2, K, 3\]",
        ),
        (
            lambda: AHBFLoss(2)([draw(2, 5, 3)] * 2, labels(2, 3), scores=[[0.5, 0.5]]),
            r"scores\[0\] must be a floating tensor, got list",
        ),
        (
            lambda: DMLLoss(2).add_teacher("branch1")([draw(2, 5)] * 2, labels(2), teacher=[1]),
            "teacher must be a tensor, got list",
        ),
        (
            lambda: DMLLoss(2)([draw(2, 5, 3)] * 2, labels(2, 4)),
            r"target has the shape \(2, 4\); labels must be \[2, 3\]",
        ),
        (
            lambda: DMLLoss(2)([draw(2, 5, 3)] * 2, labels(2)),
            r"target has the shape \(2,\); labels must be \[2, 3\]",
        ),
        (
            lambda: DMLLoss(2)([draw(2, 5, 3), draw(2, 5, 4)], labels(2, 3)),
            r"branch_logits\[1\] has the shape \(2, 5, 4\); with these logits",
        ),
        (
            lambda: AFIDLoss(2)([draw(2, 5, 3)] * 2, labels(2, 3), fusion_logits=draw(2, 5, 2)),
            r"fusion_logits has the shape \(2, 5, 2\); with these logits",
        ),
        (
            lambda: KDCLLoss(2, variant="minlogit", class_weight=torch.ones(5))(
                [draw(BATCH, CLASSES)] * 2, draw(BATCH, CLASSES).softmax(1)
            ),
            "class_weight: this graph compares rows by their cross-entropy",
        ),
    ],
)
def test_bad_argument_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_class_weight_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="class_weight must be a floating tensor"):
        BaselineLoss(1, class_weight=[1.0, 2.0])
