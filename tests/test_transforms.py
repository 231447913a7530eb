"""What lies beyond one backward pass: second derivatives and torch.func, through the operator."""

import opaque_executor
import pytest
import torch

from fastokd.losses import AHBFLoss

opaque_executor.register()


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    scores = torch.randn(1, 4, 2, generator=generator, dtype=torch.float64).softmax(-1)
    return logits, scores, torch.randint(0, 5, (4,), generator=generator)


def loss(impl, case, logits):
    return AHBFLoss(2, impl=impl)(logits, case[2], scores=case[1])


def test_create_graph_gives_the_right_first_derivative(case):
    grads = [
        torch.autograd.grad(loss(impl, case, case[0]), case[0], create_graph=True)[0]
        for impl in ("reference", "opaque")
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_a_second_derivative_is_refused_and_the_reference_has_it(case):
    (grad,) = torch.autograd.grad(loss("opaque", case, case[0]), case[0], create_graph=True)
    with pytest.raises(
        NotImplementedError,
        match="cannot be differentiated twice with impl='opaque'; use impl='reference'",
    ):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(loss("reference", case, case[0]), case[0], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), case[0])
    assert second.abs().sum() > 0


@pytest.mark.parametrize("impl", ["reference", "opaque"])
def test_func_grad(case, impl):
    found = torch.func.grad(lambda logits: loss(impl, case, logits))(case[0].detach())
    (expected,) = torch.autograd.grad(loss("reference", case, case[0]), case[0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_vmap_is_refused(case):
    with pytest.raises(
        NotImplementedError,
        match=r"cannot be mapped with torch\.vmap with impl='opaque'; use impl='reference'",
    ):
        torch.func.vmap(lambda logits: loss("opaque", case, logits))(
            torch.stack([case[0].detach()] * 3)
        )
