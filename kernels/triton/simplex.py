"""The solver of KDCL-Linear: for each sample the mixture of logits with the lowest cross-entropy.

The method is that of ``fastokd.methods.simplex``, in one kernel with one program per sample.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _log_sum_exp(values, valid):
    values = tl.where(valid, values, -float("inf"))
    top = tl.max(values, 0)
    return top + tl.log(tl.sum(tl.exp(values - top), 0))


@triton.jit
def _quadratic_minimum(a, gradient, hessian, ridge, COUNT: tl.constexpr, FACES: tl.constexpr):
    """The point of the simplex with the lowest quadratic model, the best of all faces: ``x`` with
    ``h_FF x_F + nu = right_F`` and sum 1. Face number f has the rows of the bits of f.
    """
    SIZE: tl.constexpr = a.shape[0]
    own = tl.arange(0, SIZE)
    real = own < COUNT
    on_diagonal = own[:, None] == own[None, :]
    scale = tl.sum(tl.sum(tl.where(on_diagonal, hessian, 0.0), 1), 0)
    largest = tl.max(tl.where(real, tl.abs(gradient), 0.0), 0)
    scale = tl.maximum(scale, 1e-12 * (1 + largest))
    # A constant added to all entries changes no minimum, and makes the matrices regular.
    h = hessian / scale + tl.where(on_diagonal, ridge, 0.0) + 1.0
    h = tl.where(real[:, None] & real[None, :], h, 0.0)
    right = tl.sum(h * a[None, :], 1) - gradient / scale

    numbers = tl.arange(0, FACES)
    member = ((numbers[:, None] >> own[None, :]) & 1).to(tl.float64)  # [FACES, SIZE]
    pairs = member[:, :, None] * member[:, None, :]
    identity = tl.where(on_diagonal[None, :, :], 1.0 - member[:, :, None], 0.0)
    matrix = h[None, :, :] * pairs + identity
    u = right[None, :] * member
    v = member
    # Gauss-Jordan elimination without pivoting, as the matrices are positive definite.
    for k in range(COUNT):
        chosen = own == k
        pivot_row = tl.sum(tl.where(chosen[None, :, None], matrix, 0.0), 1)
        column = tl.sum(tl.where(chosen[None, None, :], matrix, 0.0), 2)
        pivot = tl.sum(tl.where(chosen[None, :], pivot_row, 0.0), 1)[:, None]
        u_k = tl.sum(tl.where(chosen[None, :], u, 0.0), 1)[:, None] / pivot
        v_k = tl.sum(tl.where(chosen[None, :], v, 0.0), 1)[:, None] / pivot
        pivot_row = pivot_row / pivot
        matrix = tl.where(
            chosen[None, :, None],
            pivot_row[:, None, :],
            matrix - column[:, :, None] * pivot_row[:, None, :],
        )
        u = tl.where(chosen[None, :], u_k, u - column * u_k)
        v = tl.where(chosen[None, :], v_k, v - column * v_k)
    sums = tl.where(numbers > 0, tl.sum(v, 1), 1.0)
    x = u - ((tl.sum(u, 1) - 1) / sums)[:, None] * v
    # A minimum outside of its face becomes a point of the simplex that is worse than the best.
    x = tl.maximum(x, 0.0)
    x = x / tl.where(numbers > 0, tl.sum(x, 1), 1.0)[:, None]
    curved = tl.sum(x * tl.sum(x[:, :, None] * h[None, :, :], 1), 1)
    values = curved / 2 - tl.sum(x * right[None, :], 1)
    values = tl.where(numbers > 0, values, float("inf"))
    best = tl.argmin(values, 0)
    return tl.sum(tl.where((numbers == best)[:, None], x, 0.0), 0)


@triton.jit
def lowest_cross_entropy_kernel(
    rows,
    target,
    weights,
    ridge,
    first_range,
    COUNT: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    STEPS: tl.constexpr,
    LENGTHS: tl.constexpr,
    SIZE: tl.constexpr,
    FACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights [batch, COUNT] in float64, from contiguous logits [batch, COUNT, NUM_CLASSES] and a
    contiguous target. ``SIZE`` and ``BLOCK`` are the powers of two from COUNT and NUM_CLASSES on,
    ``FACES`` is 2^COUNT, ``LENGTHS`` the step lengths that are tried, a power of two.
    """
    sample = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, SIZE)
    columns = tl.arange(0, BLOCK)
    valid = columns < NUM_CLASSES
    offsets = (sample * COUNT + own[:, None]) * NUM_CLASSES + columns[None, :]
    used = (own < COUNT)[:, None] & valid[None, :]
    z = tl.load(rows + offsets, mask=used, other=0.0).to(tl.float64)
    # With every row shifted so that <y, z> = 0, the cross-entropy of a mixture is its logsumexp.
    if SOFT:
        y = tl.load(target + sample * NUM_CLASSES + columns, mask=valid, other=0.0).to(tl.float64)
        expected = tl.sum(z * y[None, :], 1)
    else:  # labels out of range are the graph's to report
        label = tl.minimum(tl.maximum(tl.load(target + sample), 0), NUM_CLASSES - 1)
        expected = tl.sum(tl.where((columns == label)[None, :], z, 0.0), 1)
    z = tl.where(used, z - expected[:, None], 0.0)
    top = tl.max(tl.max(tl.where(used, z, -float("inf")), 1), 0)
    bottom = tl.min(tl.min(tl.where(used, z, float("inf")), 1), 0)
    temperature = (top - bottom) / first_range
    a = (own < COUNT).to(tl.float64) / COUNT
    powers = tl.arange(0, LENGTHS)
    for _ in range(STEPS):
        cooled = z / tl.maximum(temperature, 1.0)
        temperature = temperature / 2
        mixed = tl.sum(a[:, None] * cooled, 0)
        value = _log_sum_exp(mixed, valid)
        p = tl.where(valid, tl.exp(mixed - value), 0.0)
        gradient = tl.sum(p[None, :] * cooled, 1)
        centered = tl.where(used, cooled - gradient[:, None], 0.0)
        hessian = tl.zeros((SIZE, SIZE), tl.float64)
        for k in range(COUNT):
            row = tl.sum(tl.where((own == k)[:, None], centered, 0.0), 0)
            products = tl.sum((p * row)[None, :] * centered, 1)
            hessian = tl.where((own == k)[None, :], products[:, None], hessian)
        goal = _quadratic_minimum(a, gradient, hessian, ridge, COUNT, FACES)
        along = tl.sum((goal - a)[:, None] * cooled, 0)
        values = tl.zeros((LENGTHS,), tl.float64) + value
        length = 1.0
        for k in range(1, LENGTHS):
            values = tl.where(powers == k, _log_sum_exp(mixed + length * along, valid), values)
            length = length / 2
        # The longest of the best: near the minimum they differ by rounding alone, and Newton's own
        # step is the better. Power k stands for the length 2^(1-k), power 0 for the length 0.
        largest = tl.max(tl.where(valid, tl.abs(mixed), 0.0), 0)
        good = (values <= tl.min(values, 0) + 1e-14 * (1 + largest)) & (powers > 0)
        power = tl.min(tl.where(good, powers, LENGTHS), 0)
        a += tl.where(power < LENGTHS, tl.exp2(1.0 - power.to(tl.float64)), 0.0) * (goal - a)
    tl.store(weights + sample * COUNT + own, a, mask=own < COUNT)


def launch_solver(
    rows: Any, target: Any, weights: Any, steps: int, lengths: int, first_range: float, ridge: float
) -> None:
    """Write the weights of a batch.

    Args:
        rows: contiguous logits [B, M, C].
        target: int64 [B], or floating [B, C] class probabilities.
        weights: contiguous float64 [B, M].
        steps: Newton's steps.
        lengths: lengths of a step that are tried next to 0; one less than a power of two.
        first_range: range of the logits in the first step.
        ridge: added to the diagonal of scaled Hessians.
    """
    batch, count, num_classes = rows.shape
    size, block = triton.next_power_of_2(count), triton.next_power_of_2(num_classes)
    if batch:
        lowest_cross_entropy_kernel[(batch,)](
            rows,
            target.contiguous(),
            weights,
            ridge,
            first_range,
            COUNT=count,
            NUM_CLASSES=num_classes,
            SOFT=target.is_floating_point(),
            STEPS=steps,
            LENGTHS=lengths + 1,
            SIZE=size,
            FACES=2**count,
            BLOCK=block,
            num_warps=8 if size * block > 2048 else 4,
        )
