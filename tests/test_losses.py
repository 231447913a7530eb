"""AHBFLoss and BaselineLoss as a user meets them."""

import copy
import pickle

import numpy as np
import opaque_executor
import pytest
import torch
import torch.nn.functional as F
from oracles.ahbf import Result, ahbf
from torch import Tensor

from fastokd.losses import AHBFLoss, BaselineLoss, GraphLoss, ramp_up
from fastokd.methods.ahbf import PRESETS
from fastokd.methods.kdcl import kdcl_graph

OPAQUE = opaque_executor.register()
# "auto" is the formula under autograd on a machine without native executors; OPAQUE goes through
# the operator.
IMPLS = ["reference", OPAQUE, "auto"]
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("preset", ["paper", "code"])
def test_presets_with_scores(preset: str, soft: bool, impl: str) -> None:
    batch = Batch()
    target = batch.soft if soft else batch.labels
    loss = AHBFLoss.preset(preset, impl=impl)(
        batch.logits, target, scores=batch.scores, kd_weight=0.3
    )
    want = batch.oracle(target, kd_weight=0.3, **ORACLE_PRESETS[preset])
    assert loss.shape == ()
    same(loss, want.loss.mean())
    for got, expected in zip(
        gradients(loss, [*batch.logits, *batch.scores]), [*want.logits, *want.scores], strict=True
    ):
        same(got, expected, 1 / 7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("preset", ["paper", "code"])
def test_presets_with_mixed_tas(preset: str, impl: str) -> None:
    batch = Batch()
    loss = AHBFLoss.preset(preset, impl=impl)(
        batch.logits, batch.labels, ta_logits=batch.tas, kd_weight=0.3
    )
    want = batch.oracle(batch.labels, tas=True, kd_weight=0.3, **ORACLE_PRESETS[preset])
    same(loss, want.loss.mean())
    for got, expected in zip(
        gradients(loss, [*batch.logits, *batch.tas]), [*want.logits, *want.tas], strict=True
    ):
        same(got, expected, 1 / 7)


def test_every_option_reaches_the_formula() -> None:
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


def test_defaults_are_the_papers() -> None:
    batch = Batch()
    default = AHBFLoss()(batch.logits, batch.labels, scores=batch.scores)
    same(default, AHBFLoss.preset("paper")(batch.logits, batch.labels, scores=batch.scores).item())
    same(
        default,
        batch.oracle(batch.labels, temperature=3.0, lambda_ta=4.0, lambda_branch=2.0).loss.mean(),
    )


def test_preset_takes_overrides() -> None:
    criterion = AHBFLoss.preset("code", 3, temperature=2.0, detach_teacher=True, reduction="sum")
    assert (
        criterion.num_branches,
        criterion.temperature,
        criterion.detach_teacher,
        criterion.reduction,
    ) == (3, 2.0, True, "sum")
    assert criterion.lambda_ta == 1.5


def test_stacked_tensors_are_the_same_as_sequences() -> None:
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


def test_column_0_weighs_the_branch_and_column_1_the_previous_ta() -> None:
    batch = Batch(2)
    only_branch = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(7, 2)
    criterion = AHBFLoss(2)
    loss = criterion(batch.logits, batch.labels, scores=[only_branch])
    same(loss, criterion(batch.logits, batch.labels, ta_logits=[batch.logits[1]]).item())


def test_both_forms_agree_when_the_model_mixes() -> None:
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


def test_soft_one_hot_target_is_the_label() -> None:
    batch = Batch()
    criterion = AHBFLoss(label_smoothing=0.1)
    one_hot = F.one_hot(batch.labels, 9)
    same(
        criterion(batch.logits, one_hot.double(), scores=batch.scores),
        criterion(batch.logits, batch.labels, scores=batch.scores).item(),
    )


# --- options of the call
# -------------------------------------------------------------------------------------------


def test_reductions() -> None:
    batch = Batch()
    want = batch.oracle(batch.labels).loss
    for reduction, expected in (("none", want), ("sum", want.sum()), ("mean", want.mean())):
        loss = AHBFLoss(reduction=reduction)(batch.logits, batch.labels, scores=batch.scores)
        same(loss, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_are_unweighted_batch_means_by_name(reduction: str, impl: str) -> None:
    batch = Batch(3)
    criterion = AHBFLoss.preset("code", 3, reduction=reduction, impl=impl)
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


def test_an_edge_without_weight_is_no_term() -> None:
    batch = Batch(2)
    _, terms = AHBFLoss(2, lambda_ta=0.0)(
        batch.logits, batch.labels, scores=batch.scores, return_terms=True
    )
    assert set(terms) == {"ce/branch1", "ce/branch2", "ce/ta2", "kl/branch2->branch1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kd_weight_is_a_float_or_a_0d_tensor(dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("impl", IMPLS)
def test_kd_weight_can_be_learned(impl: str) -> None:
    batch = Batch()
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = AHBFLoss(impl=impl)(batch.logits, batch.labels, scores=batch.scores, kd_weight=weight)
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
def test_ramp_up(epoch: int, length: int, value: float) -> None:
    # Printed with four decimals (five where the fourth is a nine).
    assert ramp_up(epoch, length) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(("epoch", "length"), [(-1, 300), (0, -300)])
def test_ramp_up_refuses_negative_numbers(epoch: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"epoch={epoch}, length={length}"):
        ramp_up(epoch, length)


# --- autograd
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients(impl: str) -> None:
    batch = Batch()
    criterion = AHBFLoss(impl=impl)
    want = batch.oracle(batch.labels).loss.mean()
    with torch.no_grad():
        loss = criterion(batch.logits, batch.labels, scores=batch.scores)
    assert not loss.requires_grad
    same(loss, want)
    with torch.inference_mode():
        loss, terms = criterion(batch.logits, batch.labels, scores=batch.scores, return_terms=True)
        assert len(terms) == 13
    same(loss, want)
    frozen = Batch(requires_grad=False)
    loss = criterion(frozen.logits, frozen.labels, scores=frozen.scores)
    assert not loss.requires_grad
    same(loss, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_get_no_gradient_and_change_none(impl: str) -> None:
    batch, whole = Batch(), Batch()
    batch.logits[2].requires_grad_(False)
    batch.scores[0].requires_grad_(False)
    AHBFLoss(impl=impl)(batch.logits, batch.labels, scores=batch.scores).backward()
    AHBFLoss(impl="reference")(whole.logits, whole.labels, scores=whole.scores).backward()
    assert batch.logits[2].grad is None
    assert batch.scores[0].grad is None
    for k in (0, 1, 3):
        same(batch.logits[k].grad, whole.logits[k].grad.numpy())
    for k in (1, 2):
        same(batch.scores[k].grad, whole.scores[k].grad.numpy())


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_with_retain_graph(impl: str) -> None:
    batch = Batch()
    leaves = [*batch.logits, *batch.scores]
    loss = AHBFLoss(impl=impl)(batch.logits, batch.labels, scores=batch.scores)
    first = gradients(loss, leaves, retain_graph=True)
    second = gradients(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradients(impl: str) -> None:
    batch = Batch()
    leaves = [*batch.logits, *batch.scores]
    want = batch.oracle(batch.labels)
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 1e-3, 100.0], dtype=torch.float64)
    rows = AHBFLoss(reduction="none", impl=impl)(batch.logits, batch.labels, scores=batch.scores)
    for got, expected in zip(
        gradients(rows, leaves, grad_outputs=upstream), [*want.logits, *want.scores], strict=True
    ):
        same(got, expected * upstream.numpy()[:, None])
    # As a gradient scaler multiplies it.
    scaled = 65536.0 * AHBFLoss(impl=impl)(batch.logits, batch.labels, scores=batch.scores)
    for got, expected in zip(gradients(scaled, leaves), [*want.logits, *want.scores], strict=True):
        same(got, expected * 65536.0 / 7)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_tensor_in_several_places_gets_the_sum(impl: str) -> None:
    batch = Batch(2)
    z, s = batch.logits[0], batch.scores[0]
    loss = AHBFLoss(2, impl=impl)([z, z], batch.labels, scores=[s])
    want = ahbf([z.detach().numpy()] * 2, batch.labels.numpy(), [s.detach().numpy()])
    same(gradients(loss, [z])[0], (want.logits[0] + want.logits[1]) / 7)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str) -> None:
    plain = Batch()
    # Columns apart, rows apart, and rows that are all one (stride 0): what slices, transposes and
    # expands give.
    wide = torch.zeros(7, 18, dtype=torch.float64)
    wide[:, ::2] = plain.logits[0].detach()
    turned = plain.logits[1].detach().t().contiguous().t()
    expanded = plain.logits[2].detach()[:1].expand(7, 9)
    leaves = [
        wide.requires_grad_(),
        turned.requires_grad_(),
        expanded.requires_grad_(),
        plain.logits[3],
    ]
    logits = [wide[:, ::2], turned, expanded, plain.logits[3]]
    score = plain.scores[0].detach()[0].requires_grad_()
    scores = [score.expand(7, 2), plain.scores[1].detach().t().contiguous().t(), plain.scores[2]]
    assert not any(z.is_contiguous() for z in logits[:3])
    got = gradients(AHBFLoss(impl=impl)(logits, plain.labels, scores=scores), [*leaves, score])
    want = ahbf(
        [z.detach().numpy() for z in logits],
        plain.labels.numpy(),
        [s.detach().numpy() for s in scores],
    )
    same(got[0][:, ::2], want.logits[0] / 7)
    for k in (1, 2, 3):
        same(got[k], want.logits[k] / 7)
    same(got[4], want.scores[0].sum(0) / 7)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_for_all_rows_may_be_one_row(impl: str) -> None:
    batch = Batch(3)
    rows = [score.detach()[0].clone().requires_grad_() for score in batch.scores]
    criterion = AHBFLoss(3, impl=impl)
    loss = criterion(batch.logits, batch.labels, scores=rows)
    same(
        loss,
        criterion(batch.logits, batch.labels, scores=[row.expand(7, 2) for row in rows]).item(),
    )
    assert gradients(loss, rows)[0].shape == (2,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction: str, impl: str) -> None:
    batch = Batch(3, batch=0)
    loss, terms = AHBFLoss(3, reduction=reduction, impl=impl)(
        batch.logits, batch.labels, scores=batch.scores, return_terms=True
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum().item() == 0
    assert all(value.item() == 0 for value in terms.values())
    loss.sum().backward()
    assert batch.logits[0].grad.shape == (0, 9)
    assert batch.scores[0].grad.shape == (0, 2)


def test_empty_batch_of_selected_teachers() -> None:
    z = [torch.zeros((0, 5), requires_grad=True) for _ in range(2)]
    for variant in ("naive", "minlogit"):
        loss = GraphLoss(kdcl_graph(variant))(z, torch.zeros(0, dtype=torch.long))
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_inputs_are_never_written_to(soft: bool, impl: str) -> None:
    batch = Batch(dtype=torch.float32)
    target = batch.soft if soft else batch.labels
    weight = torch.tensor(0.5)
    given = [*batch.logits, *batch.scores, target, weight]
    before = [(x.detach().clone(), x._version) for x in given]
    AHBFLoss.preset("code", impl=impl)(
        batch.logits, target, scores=batch.scores, kd_weight=weight
    ).backward()
    for tensor, (value, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@pytest.mark.parametrize("impl", IMPLS)
def test_one_class_and_one_row(impl: str) -> None:
    """With a single class every probability is 1: nothing to learn, nothing to teach."""
    batch = Batch(3, batch=1, num_classes=1)
    loss = AHBFLoss(3, impl=impl)(batch.logits, batch.labels, scores=batch.scores)
    assert loss.item() == 0
    assert all(g.item() == 0 for g in gradients(loss, batch.logits))


# --- precision and state
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)], ids=["bf16", "fp16"]
)
def test_low_precision_gradients_are_off_by_their_own_rounding_only(
    dtype: torch.dtype, step: float, impl: str
) -> None:
    batch = Batch(dtype=dtype)
    loss = AHBFLoss.preset("code", impl=impl)(batch.logits, batch.labels, scores=batch.scores)
    want = batch.oracle(batch.labels, **ORACLE_PRESETS["code"])
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(
        loss.item(), want.loss.mean(), rtol=3e-6
    )  # some 25 roundings of float32
    for leaf, got, expected in zip(
        [*batch.logits, *batch.scores],
        gradients(loss, [*batch.logits, *batch.scores]),
        [*want.logits, *want.scores],
        strict=True,
    ):
        assert got.dtype == leaf.dtype == dtype
        # atol: fp16's smallest step, and float32 sums of about 10 terms of size 1.
        np.testing.assert_allclose(got.double().numpy(), expected / 7, rtol=step, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast(impl: str) -> None:
    """A linear layer under autocast gives bfloat16 logits; the loss is computed in float32 and
    inside the region too.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 9)
    x, batch = torch.randn(7, 6), Batch(2, dtype=torch.float32)
    criterion = AHBFLoss(2, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        assert logits.dtype == torch.bfloat16
        loss, terms = criterion(
            [logits, logits], batch.labels, scores=batch.scores, return_terms=True
        )
        inside = gradients(loss, [layer.weight], retain_graph=True)[0]
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in terms.values())
    row = logits.detach().double().numpy()
    want = ahbf([row, row], batch.labels.numpy(), [batch.scores[0].detach().double().numpy()])
    np.testing.assert_allclose(
        loss.item(), want.loss.mean(), rtol=3e-6
    )  # some 25 roundings of float32
    assert torch.equal(gradients(loss, [layer.weight])[0], inside)


def test_float64_is_computed_in_float64() -> None:
    batch = Batch()
    assert AHBFLoss()(batch.logits, batch.labels, scores=batch.scores).dtype == torch.float64


@pytest.mark.parametrize("change", ["half", "bfloat16", "float", "double"])
def test_term_weights_are_not_rounded_by_a_change_of_dtype(change: str) -> None:
    """``model.half()`` converts every floating buffer of every submodule; 0.1 would become 0.09998
    or 0.1001.
    """
    batch = Batch()
    holder = torch.nn.Sequential(AHBFLoss(lambda_ta=0.1, lambda_branch=0.3))
    getattr(holder, change)()
    loss = holder[0](batch.logits, batch.labels, scores=batch.scores)
    same(loss, batch.oracle(batch.labels, lambda_ta=0.1, lambda_branch=0.3).loss.mean())


def test_module_survives_the_meta_device() -> None:
    batch = Batch()
    criterion = AHBFLoss().to("meta")
    same(
        criterion(batch.logits, batch.labels, scores=batch.scores),
        batch.oracle(batch.labels).loss.mean(),
    )


def test_first_call_under_inference_mode_spoils_nothing() -> None:
    batch = Batch()
    criterion = AHBFLoss().to(
        "meta"
    )  # So that the call has to make its term weights anew, as on a first GPU call.
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        criterion(batch.logits, batch.labels, scores=batch.scores)
    criterion(batch.logits, batch.labels, scores=batch.scores, kd_weight=weight).backward()
    assert weight.grad.isfinite()


def test_module_has_no_state_and_can_be_copied() -> None:
    batch = Batch()
    criterion = AHBFLoss.preset("code")
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []
    want = criterion(batch.logits, batch.labels, scores=batch.scores).item()
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other(batch.logits, batch.labels, scores=batch.scores).item() == want
    assert "ahbf: 7 nodes, 16 terms" in repr(criterion)


def test_presets_say_what_the_formula_needs() -> None:
    assert set(PRESETS) == {"paper", "code"}
    assert AHBFLoss.preset("code").teacher_eps == 1e-7


def test_baseline_is_cross_entropy() -> None:
    batch = Batch(1)
    for smoothing in (0.0, 0.1):
        loss, terms = BaselineLoss(label_smoothing=smoothing)(
            batch.logits, batch.labels, kd_weight=0.3, return_terms=True
        )
        want = F.cross_entropy(batch.logits[0], batch.labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(terms, {"ce/branch1": want.detach()}, rtol=1e-13, atol=1e-13)


def test_graph_loss_takes_weights_by_name() -> None:
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
