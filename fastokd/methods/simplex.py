"""The mixture of logits with the lowest cross-entropy: a convex problem for each sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastokd.ops.executors import Case, resolve
from fastokd.ops.operator import is_plain

MAX_ROWS = 6
"""More rows would make too many faces: there are 2^M - 1."""
_FUSED_LOGITS = 8192  # of a sample, which the registers of one program hold
_STEPS = 16
_STEP_LENGTHS = 15
_FIRST_RANGE = 8.0
_RIDGE = 1e-10


@torch.no_grad()
def lowest_cross_entropy_weights(
    rows: Sequence[Tensor], target: Tensor, impl: str = "reference"
) -> Tensor:
    """Weights ``a`` [B, M] on the simplex that minimise ``CE(sum_k a_k z_k, y)`` for each sample
    (KDCL-Linear).

    Newton's method on the simplex: each step minimises the quadratic model of the cross-entropy
    exactly, as the best of the minima of all 2^M - 1 faces, and goes the best of the lengths 1,
    1/2, ... towards it, so that an optimum on an edge or vertex is met exactly. Where logits are
    large the cross-entropy is almost piecewise linear, with nothing for Newton to see; so it starts
    at a temperature that brings them into a range of 8, and halves that down to 1.

    The number of steps is fixed and nothing waits for the device. The cross-entropy reached is
    above the minimum by at most 1e-9 of the logits' range, for ranges up to 1000. In float64.

    Args:
        rows: 2 to ``MAX_ROWS`` rows of logits [B, C].
        target: int64 [B], or floating [B, C] class probabilities.
        impl: the executor of the loss; "triton" solves in one kernel.
    """
    z = torch.stack([row.detach() for row in rows], 1)
    count, num_classes = z.shape[1:]
    fused = count * num_classes <= _FUSED_LOGITS and is_plain((z, target))
    if fused and resolve(impl, None, Case(z.device.type, z.dtype)) == "triton":
        from fastokd.kernels.triton.simplex import launch_solver  # imports Triton
        from fastokd.ops.triton import device_of

        weights = torch.empty(z.shape[:2], dtype=torch.float64, device=z.device)
        with device_of(z):
            launch_solver(z, target, weights, _STEPS, _STEP_LENGTHS, _FIRST_RANGE, _RIDGE)
        return weights
    z = z.double()
    # With every row shifted so that <y, z> = 0, the cross-entropy of a mixture is its logsumexp.
    if target.is_floating_point():
        expected = torch.einsum("bmc,bc->bm", z, target.double()).unsqueeze(2)
    else:  # labels out of range are the graph's to report
        expected = z.gather(2, target.clamp(0, num_classes - 1).view(-1, 1, 1).expand(-1, count, 1))
    z = z - expected
    # Made on the device: a tensor of Python numbers would be copied there, and wait for it.
    numbers = torch.arange(1, 2**count, device=z.device).unsqueeze(1)
    faces = (numbers >> torch.arange(count, device=z.device) & 1).to(z.dtype)
    halves = 0.5 ** torch.arange(_STEP_LENGTHS, dtype=z.dtype, device=z.device)
    lengths = torch.cat((z.new_zeros(1), halves))
    a = torch.full(z.shape[:2], 1 / count, dtype=z.dtype, device=z.device)
    first = (z.amax((1, 2), keepdim=True) - z.amin((1, 2), keepdim=True)) / _FIRST_RANGE
    for step in range(_STEPS):
        cooled = z / (first / 2**step).clamp_min(1)
        mixed = torch.einsum("bm,bmc->bc", a, cooled)
        p = mixed.softmax(1).unsqueeze(1)
        gradient = (p * cooled).sum(2)
        centred = cooled - gradient.unsqueeze(2)
        goal = _quadratic_minimum(a, gradient, (p * centred) @ centred.mT, faces)
        along = torch.einsum("bm,bmc->bc", goal - a, cooled)
        values = (mixed.unsqueeze(1) + lengths.view(-1, 1) * along.unsqueeze(1)).logsumexp(2)
        # The longest of the best: near the minimum they differ by rounding alone, and Newton's own
        # step is the better.
        tolerance = 1e-14 * (1 + mixed.abs().amax(1, keepdim=True))
        good = values <= values.amin(1, keepdim=True) + tolerance
        a = a + torch.where(good, lengths, 0).amax(1, keepdim=True) * (goal - a)
    return a


def _quadratic_minimum(a: Tensor, gradient: Tensor, hessian: Tensor, faces: Tensor) -> Tensor:
    """The point x [B, M] of the simplex with the lowest ``g (x - a) + (x - a) H (x - a) / 2``.

    On the face of the rows F it solves ``H_FF x_F + nu = (H a - g)_F`` with ``sum x_F = 1``.
    """
    trace = hessian.diagonal(dim1=1, dim2=2).sum(1)
    scale = torch.maximum(trace, 1e-12 * (1 + gradient.abs().amax(1)))
    # The ridge decides where the model is flat, for example for equal rows. A constant added to all
    # entries changes no minimum, and makes the matrices regular.
    ridge = 1 + _RIDGE * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    h = hessian / scale.view(-1, 1, 1) + ridge
    right = (h @ a.unsqueeze(2)).squeeze(2) - gradient / scale.unsqueeze(1)
    pairs = faces.unsqueeze(2) * faces.unsqueeze(1)
    sides = torch.stack((right.unsqueeze(1) * faces, faces.expand(len(a), -1, -1)), 3)
    system = h.unsqueeze(1) * pairs + torch.diag_embed(1 - faces)
    u, v = torch.linalg.solve_ex(system, sides)[0].unbind(3)
    x: Tensor = u - (u.sum(2, keepdim=True) - 1) / v.sum(2, keepdim=True) * v
    # A minimum outside of its face becomes a point of the simplex that is worse than the best.
    x = x.clamp_min(0)
    x = x / x.sum(2, keepdim=True)
    best = (((x @ h) * x).sum(2) / 2 - (x * right.unsqueeze(1)).sum(2)).argmin(1)
    return x.gather(1, best.view(-1, 1, 1).expand(-1, 1, a.shape[1])).squeeze(1)
