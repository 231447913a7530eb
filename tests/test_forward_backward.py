"""The loss and its backward pass at once equal the two after each other, on every executor."""

import opaque_executor
import pytest
import torch

from fastokd.losses import AHBFLoss, BaselineLoss
from fastokd.ops.executors import executor_states

opaque_executor.register()
STATE = executor_states()["cpu"]
IMPLS = [
    "reference",
    "opaque",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(STATE is not None, reason=f"the cpu executor cannot run: {STATE}"),
    ),
]


def make(batch=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    # Logits and scores that come out of a network, so that the gradients must travel on.
    weight = torch.randn(3, 5, 7, generator=generator, dtype=dtype).requires_grad_()
    gate = torch.randn(2, 5, 2, generator=generator, dtype=dtype).requires_grad_()
    images = torch.randn(batch, 5, generator=generator, dtype=dtype)
    return (
        (weight, gate),
        [images @ part for part in weight],
        [(images @ part).softmax(1) for part in gate],
        torch.randint(0, 7, (batch,), generator=generator),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_forward_then_backward(impl, dtype):
    criterion = AHBFLoss.preset("code", 3, impl=impl)
    leaves, logits, scores, target = make(dtype=dtype)
    loss, terms = criterion(logits, target, scores=scores, kd_weight=0.3, return_terms=True)
    loss.backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    leaves, logits, scores, target = make(dtype=dtype)
    at_once, terms_at_once = criterion.forward_backward(
        logits, target, scores=scores, kd_weight=0.3
    )
    assert not at_once.requires_grad
    torch.testing.assert_close(at_once, loss.detach())
    assert list(terms) == list(terms_at_once)
    for name, value in terms.items():
        torch.testing.assert_close(terms_at_once[name], value)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_by_the_model_frozen_parts_and_accumulation(impl):
    (weight, _), logits, _, target = make()
    tas = [0.5 * (logits[0] + logits[1]), logits[2].detach()]
    logits[1] = logits[1].detach()
    criterion = AHBFLoss(3, impl=impl)
    criterion(logits, target, ta_logits=tas).backward()
    once = weight.grad.clone()
    (weight, _), logits, _, target = make()
    tas = [0.5 * (logits[0] + logits[1]), logits[2].detach()]
    logits[1] = logits[1].detach()
    weight.grad = once.clone()  # gradients add up, as with backward()
    criterion.forward_backward(logits, target, ta_logits=tas)
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_requires_a_gradient(impl):
    _, logits, _, target = make()
    loss, _ = BaselineLoss(impl=impl).forward_backward([logits[0].detach()], target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0].detach(), target))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl):
    leaves, logits, scores, target = make(batch=0)
    loss, _ = AHBFLoss(3, impl=impl).forward_backward(logits, target, scores=scores)
    assert loss == 0
    assert all(not leaf.grad.any() for leaf in leaves)


def test_another_reduction_is_refused():
    _, logits, scores, target = make()
    with pytest.raises(ValueError, match="this loss has reduction='sum'"):
        AHBFLoss(3, reduction="sum").forward_backward(logits, target, scores=scores)
