"""AHBFLoss and BaselineLoss as a user meets them, with the executor that ``auto`` chooses."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.ahbf import Result, ahbf
from torch import Tensor

from fastokd.losses import AHBFLoss, BaselineLoss, DMLLoss, GraphLoss, MethodLoss, ramp_up
from fastokd.losses.graph_loss import GraphInputs, overridable
from fastokd.methods.ahbf import PRESETS
from fastokd.methods.dml import dml_graph
from fastokd.methods.kdcl import kdcl_graph

ORACLE_PRESETS = {
    "paper": {"lambda_ta": 4.0, "lambda_branch": 2.0},
    "code": {"lambda_ta": 1.5, "lambda_branch": 3.0, "lambda_self": 1.5, "eps": 1e-7},
}


class Batch:
    """Four branches, seven rows, nine classes unless said."""

    def __init__(
        self,
        num_branches: int = 4,
        batch: int = 7,
        num_classes: int = 9,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        requires_grad: bool = True,
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def leaf(value: Tensor) -> Tensor:
            return value.to(dtype).requires_grad_(requires_grad)

        self.logits = [
            leaf(3 * torch.randn((batch, num_classes), generator=g, dtype=torch.float64))
            for _ in range(num_branches)
        ]
        self.scores = [
            leaf(torch.randn((batch, 2), generator=g, dtype=torch.float64).softmax(1))
            for _ in range(num_branches - 1)
        ]
        self.tas = [
            leaf(3 * torch.randn((batch, num_classes), generator=g, dtype=torch.float64))
            for _ in range(num_branches - 1)
        ]
        self.labels = torch.randint(num_classes, (batch,), generator=g)
        self.soft = (
            torch.rand((batch, num_classes), generator=g, dtype=torch.float64).softmax(1).to(dtype)
        )

    def oracle(self, target: Tensor, tas: bool = False, **options: object) -> Result:
        rows = [z.detach().double().numpy() for z in self.logits]
        mixed = {"tas": self.tas} if tas else {"scores": self.scores}
        mixed = {
            name: [x.detach().double().numpy() for x in values] for name, values in mixed.items()
        }
        return ahbf(
            rows,
            target.double().numpy() if target.is_floating_point() else target.numpy(),
            **mixed,
            **options,
        )


def gradients(loss: Tensor, leaves: list[Tensor], **options: object) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, **options))


def same(got: Tensor, want: object, scale: float = 1.0) -> None:
    # float64 against float64: rounding only.
    np.testing.assert_allclose(
        got.detach().numpy(), np.asarray(want) * scale, rtol=1e-11, atol=1e-12
    )


# --- the value and the two call forms
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("preset", ["paper", "code"])
def test_ahbf_preset_with_scores_matches_formula(preset: str, soft: bool) -> None:
    batch = Batch()
    target = batch.soft if soft else batch.labels
    loss = AHBFLoss.preset(preset)(batch.logits, target, scores=batch.scores, kd_weight=0.3)
    want = batch.oracle(target, kd_weight=0.3, **ORACLE_PRESETS[preset])
    assert loss.shape == ()
    same(loss, want.loss.mean())
    for got, expected in zip(
        gradients(loss, [*batch.logits, *batch.scores]), [*want.logits, *want.scores], strict=True
    ):
        same(got, expected, 1 / 7)


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_ahbf_preset_with_ta_logits_matches_formula(preset: str) -> None:
    batch = Batch()
    loss = AHBFLoss.preset(preset)(batch.logits, batch.labels, ta_logits=batch.tas, kd_weight=0.3)
    want = batch.oracle(batch.labels, tas=True, kd_weight=0.3, **ORACLE_PRESETS[preset])
    same(loss, want.loss.mean())
    for got, expected in zip(
        gradients(loss, [*batch.logits, *batch.tas]), [*want.logits, *want.tas], strict=True
    ):
        same(got, expected, 1 / 7)


def test_ahbf_options_reach_formula() -> None:
    batch = Batch(3)
    criterion = AHBFLoss(
        3,
        temperature=2.5,
        lambda_ta=0.5,
        lambda_branch=1.25,
        lambda_self=0.75,
        detach_teacher=True,
        teacher_eps=1e-3,
        label_smoothing=0.2,
    )
    loss = criterion(batch.logits, batch.labels, scores=batch.scores)
    want = batch.oracle(
        batch.labels,
        temperature=2.5,
        lambda_ta=0.5,
        lambda_branch=1.25,
        lambda_self=0.75,
        detach=True,
        eps=1e-3,
        smoothing=0.2,
    )
    same(loss, want.loss.mean())
    for got, expected in zip(
        gradients(loss, [*batch.logits, *batch.scores]), [*want.logits, *want.scores], strict=True
    ):
        same(got, expected, 1 / 7)


def test_ahbf_defaults_are_paper_preset() -> None:
    batch = Batch()
    default = AHBFLoss()(batch.logits, batch.labels, scores=batch.scores)
    same(default, AHBFLoss.preset("paper")(batch.logits, batch.labels, scores=batch.scores).item())
    same(
        default,
        batch.oracle(batch.labels, temperature=3.0, lambda_ta=4.0, lambda_branch=2.0).loss.mean(),
    )


def test_preset_with_overrides_uses_them() -> None:
    criterion = AHBFLoss.preset("code", 3, temperature=2.0, detach_teacher=True, reduction="sum")
    assert (
        criterion.num_branches,
        criterion.temperature,
        criterion.detach_teacher,
        criterion.reduction,
    ) == (3, 2.0, True, "sum")
    assert criterion.lambda_ta == 1.5


def test_ahbf_with_stacked_tensors_equals_sequences() -> None:
    batch = Batch()
    criterion = AHBFLoss.preset("code")
    listed = criterion(batch.logits, batch.labels, scores=batch.scores)
    stacked = criterion(torch.stack(batch.logits), batch.labels, scores=torch.stack(batch.scores))
    tupled = criterion(tuple(batch.logits), batch.labels, scores=tuple(batch.scores))
    same(stacked, listed.item())
    same(tupled, listed.item())
    for got, want in zip(
        gradients(stacked, [*batch.logits, *batch.scores]),
        gradients(listed, [*batch.logits, *batch.scores]),
        strict=True,
    ):
        same(got, want.numpy())
    mixed = criterion(batch.logits, batch.labels, ta_logits=batch.tas)
    same(
        criterion(torch.stack(batch.logits), batch.labels, ta_logits=torch.stack(batch.tas)),
        mixed.item(),
    )


def test_score_column_0_weighs_branch() -> None:
    batch = Batch(2)
    only_branch = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(7, 2)
    criterion = AHBFLoss(2)
    loss = criterion(batch.logits, batch.labels, scores=[only_branch])
    same(loss, criterion(batch.logits, batch.labels, ta_logits=[batch.logits[1]]).item())


def test_ahbf_with_model_mixing_equals_scores() -> None:
    batch = Batch()
    tas, previous = [], batch.logits[0]
    for z, s in zip(batch.logits[1:], batch.scores, strict=True):
        previous = s[:, :1] * z + s[:, 1:] * previous
        tas.append(previous)
    criterion = AHBFLoss()
    inside = criterion(batch.logits, batch.labels, scores=batch.scores)
    outside = criterion(batch.logits, batch.labels, ta_logits=tas)
    leaves = [*batch.logits, *batch.scores]
    for got, want in zip(gradients(outside, leaves), gradients(inside, leaves), strict=True):
        same(got, want.numpy())
    mixtures = criterion.mixtures(batch.logits, scores=batch.scores)
    assert list(mixtures) == ["ta2", "ta3", "ta4"]
    for got, want in zip(mixtures.values(), tas, strict=True):
        assert not got.requires_grad
        same(got, want.detach().numpy())


def test_ahbf_with_one_hot_target_equals_label() -> None:
    batch = Batch()
    criterion = AHBFLoss(label_smoothing=0.1)
    one_hot = F.one_hot(batch.labels, 9)
    same(
        criterion(batch.logits, one_hot.double(), scores=batch.scores),
        criterion(batch.logits, batch.labels, scores=batch.scores).item(),
    )


# --- options of the call
# -------------------------------------------------------------------------------------------


def test_ahbf_reductions_match_formula() -> None:
    batch = Batch()
    want = batch.oracle(batch.labels).loss
    for reduction, expected in (("none", want), ("sum", want.sum()), ("mean", want.mean())):
        loss = AHBFLoss(reduction=reduction)(batch.logits, batch.labels, scores=batch.scores)
        same(loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_are_unweighted_batch_means(reduction: str) -> None:
    batch = Batch(3)
    criterion = AHBFLoss.preset("code", 3, reduction=reduction)
    loss, terms = criterion(
        batch.logits, batch.labels, scores=batch.scores, kd_weight=0.25, return_terms=True
    )
    want = batch.oracle(batch.labels, kd_weight=0.25, **ORACLE_PRESETS["code"])
    assert set(terms) == {
        "ce/branch1",
        "ce/branch2",
        "ce/branch3",
        "ce/ta2",
        "ce/ta3",
        "kl/ta2->branch1",
        "kl/branch2->branch1",
        "kl/ta2->branch2",
        "kl/ta3->ta2",
        "kl/branch3->ta2",
        "kl/ta3->branch3",
    }
    for name, value in terms.items():
        assert value.shape == ()
        assert not value.requires_grad
        same(value, want.terms[name].mean())
    same(
        loss,
        criterion(batch.logits, batch.labels, scores=batch.scores, kd_weight=0.25).detach().numpy(),
    )


def test_edge_with_zero_weight_adds_no_term() -> None:
    batch = Batch(2)
    _, terms = AHBFLoss(2, lambda_ta=0.0)(
        batch.logits, batch.labels, scores=batch.scores, return_terms=True
    )
    assert set(terms) == {"ce/branch1", "ce/branch2", "ce/ta2", "kl/branch2->branch1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kd_weight_as_tensor_equals_float(dtype: torch.dtype) -> None:
    batch = Batch(dtype=dtype)
    criterion = AHBFLoss()
    number = criterion(batch.logits, batch.labels, scores=batch.scores, kd_weight=0.3)
    for weight in (torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.3)):
        tensor = criterion(batch.logits, batch.labels, scores=batch.scores, kd_weight=weight)
        assert tensor.dtype == number.dtype == dtype
        torch.testing.assert_close(tensor, number, rtol=1e-6, atol=1e-6)
    hard = criterion(batch.logits, batch.labels, scores=batch.scores, kd_weight=0)
    tas = criterion.mixtures(batch.logits, scores=batch.scores)
    torch.testing.assert_close(
        hard, sum(F.cross_entropy(z, batch.labels) for z in (*batch.logits, *tas.values()))
    )


def test_kd_weight_as_leaf_gets_gradient() -> None:
    batch = Batch()
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = AHBFLoss()(batch.logits, batch.labels, scores=batch.scores, kd_weight=weight)
    # The loss is linear in it.
    slope = (
        batch.oracle(batch.labels, kd_weight=1.0).loss
        - batch.oracle(batch.labels, kd_weight=0.0).loss
    ).mean()
    same(gradients(loss, [weight])[0], slope)


@pytest.mark.parametrize(
    ("epoch", "length", "value"),
    [
        (0, 300, 0.0067),
        (75, 300, 0.0601),
        (150, 300, 0.2865),
        (225, 300, 0.7316),
        (299, 300, 0.99994),
        (0, 80, 0.0067),
        (20, 80, 0.0601),
        (40, 80, 0.2865),
        (60, 80, 0.7316),
        (80, 80, 1.0),
        (299, 80, 1.0),
        (0, 0, 1.0),
        (17, 0, 1.0),
    ],
)
def test_ramp_up_matches_published_values(epoch: int, length: int, value: float) -> None:
    # Printed with four decimals (five where the fourth is a nine).
    assert ramp_up(epoch, length) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(("epoch", "length"), [(-1, 300), (0, -300)])
def test_ramp_up_of_negative_number_is_refused(epoch: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"epoch={epoch}, length={length}"):
        ramp_up(epoch, length)


# --- mixing weights


def test_scores_of_one_row_equal_expanded_scores() -> None:
    batch = Batch(3)
    rows = [score.detach()[0].clone().requires_grad_() for score in batch.scores]
    criterion = AHBFLoss(3)
    loss = criterion(batch.logits, batch.labels, scores=rows)
    same(
        loss,
        criterion(batch.logits, batch.labels, scores=[row.expand(7, 2) for row in rows]).item(),
    )
    assert gradients(loss, rows)[0].shape == (2,)


def test_forward_backward_with_sum_is_refused() -> None:
    batch = Batch(3)
    with pytest.raises(
        ValueError, match="reduction='sum': forward_backward needs reduction='mean'"
    ):
        AHBFLoss(3, reduction="sum").forward_backward(
            batch.logits, batch.labels, scores=batch.scores
        )


# --- precision and state
# ------------------------------------------------------------------------------------------------


def test_loss_of_float64_is_float64() -> None:
    batch = Batch()
    assert AHBFLoss()(batch.logits, batch.labels, scores=batch.scores).dtype == torch.float64


@pytest.mark.parametrize("change", ["half", "bfloat16", "float", "double"])
def test_term_weights_after_dtype_change_are_unrounded(change: str) -> None:
    """``model.half()`` converts every floating buffer of every submodule; 0.1 would become 0.09998
    or 0.1001.
    """
    batch = Batch()
    holder = torch.nn.Sequential(AHBFLoss(lambda_ta=0.1, lambda_branch=0.3))
    getattr(holder, change)()
    loss = holder[0](batch.logits, batch.labels, scores=batch.scores)
    same(loss, batch.oracle(batch.labels, lambda_ta=0.1, lambda_branch=0.3).loss.mean())


def test_loss_after_meta_device_matches_formula() -> None:
    batch = Batch()
    criterion = AHBFLoss().to("meta")
    same(
        criterion(batch.logits, batch.labels, scores=batch.scores),
        batch.oracle(batch.labels).loss.mean(),
    )


def test_loss_after_inference_mode_has_gradients() -> None:
    batch = Batch()
    criterion = AHBFLoss().to(
        "meta"
    )  # so the call makes its term weights again, as a first GPU call
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        criterion(batch.logits, batch.labels, scores=batch.scores)
    criterion(batch.logits, batch.labels, scores=batch.scores, kd_weight=weight).backward()
    assert weight.grad.isfinite()


def test_loss_copied_or_pickled_is_equal() -> None:
    batch = Batch()
    criterion = AHBFLoss.preset("code")
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []
    want = criterion(batch.logits, batch.labels, scores=batch.scores).item()
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other(batch.logits, batch.labels, scores=batch.scores).item() == want
    assert "ahbf: 7 nodes, 16 terms" in repr(criterion)


def test_ahbf_presets_hold_teacher_eps() -> None:
    assert set(PRESETS) == {"paper", "code"}
    assert AHBFLoss.preset("code").teacher_eps == 1e-7


def test_baseline_loss_is_cross_entropy() -> None:
    batch = Batch(1)
    for smoothing in (0.0, 0.1):
        loss, terms = BaselineLoss(label_smoothing=smoothing)(
            batch.logits, batch.labels, kd_weight=0.3, return_terms=True
        )
        want = F.cross_entropy(batch.logits[0], batch.labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(terms, {"ce/branch1": want.detach()}, rtol=1e-13, atol=1e-13)


def test_graph_loss_with_named_weights_matches_formula() -> None:
    """KDCL-General: one weight row for all samples; the teacher is a constant, the weights get no
    gradient.
    """
    batch = Batch(2)
    criterion = GraphLoss(kdcl_graph("general", 2))
    weights = torch.tensor([0.727273, 0.272727], dtype=torch.float64)
    loss = criterion(
        batch.logits, batch.labels, weights={"teacher_weights": weights}, kd_weight=0.5
    )
    teacher = (weights[0] * batch.logits[0] + weights[1] * batch.logits[1]).detach()
    want = sum(
        F.cross_entropy(z, batch.labels)
        + 0.5
        * 9
        * F.kl_div(F.log_softmax(z / 3, 1), F.softmax(teacher / 3, 1), reduction="batchmean")
        for z in batch.logits
    )
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    assert list(criterion.mixtures(batch.logits, {"teacher_weights": weights})) == ["teacher"]


def test_loss_with_own_constructor_keeps_its_signature():
    class Own(MethodLoss):
        def __init__(self, num_branches=2, alpha=1.5, reduction="mean", impl="auto"):
            self.alpha = alpha
            super().__init__(dml_graph(num_branches), num_branches, reduction, impl)

    assert list(inspect.signature(Own).parameters) == ["num_branches", "alpha", "reduction", "impl"]
    assert {name: option.default for name, option in Own.options().items()} == {"alpha": 1.5}
    assert Own(3, 2.0).alpha == 2.0


def test_common_options_are_the_last_positional_arguments():
    loss = DMLLoss(3, 2.0, 0.5, "mean", False, 1e-7, 0.1, "sum", "reference")
    values = (loss.label_smoothing, loss.reduction, loss.impl)
    assert values == (0.1, "sum", "reference")
    parameters = inspect.signature(DMLLoss).parameters.values()
    positional = [each.name for each in parameters if each.kind != each.KEYWORD_ONLY]
    assert positional[-3:] == ["label_smoothing", "reduction", "impl"]
    with pytest.raises(TypeError, match="multiple values"):
        DMLLoss(3, num_branches=2)
    with pytest.raises(TypeError, match="too many positional"):
        DMLLoss(*range(20))


def test_graph_inputs_may_make_further_rows():
    class WithHead(GraphLoss):
        @overridable
        def graph_inputs(self, logits, target=None, *, head):
            return GraphInputs([*logits, head])

    rows = list(torch.randn(3, 4, 5))
    target = torch.tensor([0, 1, 2, 3])
    graph = dml_graph(3)
    expected = GraphLoss(graph)(rows, target)
    torch.testing.assert_close(WithHead(graph)(rows[:2], target, head=rows[2]), expected)
