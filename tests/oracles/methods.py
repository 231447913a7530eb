"""The logit loss of every other method, per sample [B], written out from its equations.

Analytic in logits and mixing weights: gradients come from ``rows.complex_step``, with ``stop``
where a method takes its teacher as a constant.
"""

from collections.abc import Sequence

import numpy as np

from oracles.rows import Array, cross_entropy, distill, kl, log_softmax, softmax, stop

Rows = Sequence[Array]


def _mix(weights: Array, rows: Rows) -> Array:
    return sum(weights[:, k : k + 1] * row for k, row in enumerate(rows))


def _hard(rows: Rows, target: Array) -> Array:
    return sum(cross_entropy(z, target) for z in rows)


def one(
    z: Rows,
    gate: Array,
    target: Array,
    w: float,
    t: float = 3.0,
    eps: float = 0.0,
    detach: bool = True,
) -> Array:
    e = _mix(gate, z)
    return _hard([*z, e], target) + w * sum(distill(e, row, t, eps, detach) for row in z)


def okddip_code(
    peers: Rows,
    leader: Array,
    attention: Rows,
    target: Array,
    w: float,
    t: float = 3.0,
    eps: float = 0.0,
    detach: bool = False,
) -> Array:
    value = _hard([*peers, leader], target)
    for row, a in zip(peers, attention, strict=True):
        value = value + w * distill(_mix(a, peers), row, t, eps, detach)
    return value + w * distill(sum(peers) / len(peers), leader, t, eps, detach)


def okddip_slides(
    peers: Rows,
    leader: Array,
    attention: Rows,
    target: Array,
    w: float,
    t: float = 3.0,
    eps: float = 0.0,
    detach: bool = False,
) -> Array:
    """Mixtures of softened probabilities instead of logits."""
    soft = [softmax(stop(row) if detach else row, t) for row in peers]
    attention = [stop(a) if detach else a for a in attention]
    value = _hard([*peers, leader], target)
    for row, a in zip(peers, attention, strict=True):
        h = _mix(a, soft)
        value = value + w * t * t * kl(h, np.log(h), log_softmax(row, t), eps)
    mean = sum(soft) / len(soft)
    return value + w * t * t * kl(mean, np.log(mean), log_softmax(leader, t), eps)


def dml_network(
    k: int,
    z: Rows,
    target: Array,
    w: float,
    t: float,
    pairwise: bool,
    detach: bool,
    eps: float = 0.0,
) -> Array:
    """The loss of network k; peers pairwise, or the mean of their logits first."""
    others = [row for j, row in enumerate(z) if j != k]
    if pairwise:
        soft = sum(distill(row, z[k], t, eps, detach) for row in others) / len(others)
    else:
        soft = distill(sum(others) / len(others), z[k], t, eps, detach)
    return cross_entropy(z[k], target) + w * soft


def dml(
    z: Rows, target: Array, w: float, t: float, pairwise: bool, detach: bool, eps: float = 0.0
) -> Array:
    return sum(dml_network(k, z, target, w, t, pairwise, detach, eps) for k in range(len(z)))


def cl_ilr(
    z: Rows,
    target: Array,
    w: float,
    t: float = 3.0,
    eps: float = 0.0,
    detach: bool = False,
    ce: float = 1.0,
) -> Array:
    return dml(z, target, w, t, False, detach, eps) + (ce - 1) * _hard(z, target)


def independent(z: Rows, target: Array) -> Array:
    return _hard(z, target)


def ahbf(
    z: Rows,
    scores: Rows,
    target: Array,
    w: float,
    t: float = 3.0,
    ta: float = 4.0,
    branch: float = 2.0,
    own: float = 0.0,
    eps: float = 0.0,
    detach: bool = False,
) -> Array:
    """Eq. 8-14 as a function of complex rows; ``ahbf.py`` has its gradients by hand."""
    value, below = cross_entropy(z[0], target), z[0]
    for row, s in zip(z[1:], scores, strict=True):
        mixed = s[:, :1] * row + s[:, 1:] * below
        value = (
            value
            + _hard([row, mixed], target)
            + w
            * (
                ta * distill(mixed, below, t, eps, detach)
                + branch * distill(row, below, t, eps, detach)
                + own * distill(mixed, row, t, eps, detach)
            )
        )
        below = mixed
    return value


def kdcl(z: Rows, teacher: Array, target: Array, w: float, t: float) -> Array:
    return _hard(z, target) + w * sum(distill(teacher, row, t, detach=True) for row in z)


def naive_teacher(z: Rows, target: Array) -> Array:
    z = [stop(row) for row in z]
    best = np.argmin([cross_entropy(row, target) for row in z], axis=0)
    return np.array([z[k][b] for b, k in enumerate(best)])


def minlogit_teacher(z: Rows, target: Array) -> Array:
    """Labels [B] only."""
    rows = np.arange(len(target))
    return np.min([stop(row) - stop(row)[rows, target][:, None] for row in z], axis=0)


def mixed_teacher(z: Rows, weights: Array) -> Array:
    """KDCL-Linear and -General: the weights are given, [B, M] or [M]."""
    return stop(_mix(np.broadcast_to(weights, (len(z[0]), len(z))), z))


def ffm(
    peers: Rows,
    leader: Array,
    weights: Array,
    target: Array,
    w: float,
    t: float = 3.0,
    alpha: float = 1.0,
    beta: float = 2.0,
    eps: float = 0.0,
    detach: bool = False,
) -> Array:
    fused, mean = _mix(weights, peers), sum(peers) / len(peers)
    soft = alpha * sum(distill(fused, row, t, eps, detach) for row in peers) + beta * distill(
        mean, leader, t, eps, detach
    )
    return _hard([*peers, leader], target) + w * soft


def tsb(
    z: Rows,
    memories: Rows,
    target: Array,
    w: float,
    t: float = 4.0,
    student_first: bool = False,
    scale: float = 1.0,
) -> Array:
    """Both weights 0.5; ``scale`` is the factor of every KL (1 as printed, T^2 for the usual
    scaling).
    """
    mean = sum(softmax(stop(row), t) for row in z) / len(z)
    value = _hard(z, target)
    for i, row in enumerate(z):
        log_q = log_softmax(row, t)
        for h in [mean, *(memory for j, memory in enumerate(memories) if j != i)]:
            if student_first:
                value = value + 0.5 * w * scale * kl(np.exp(log_q), log_q, np.log(h))
            else:
                value = value + 0.5 * w * scale * kl(h, np.log(h), log_q)
    return value


def ffsd(
    students: Rows, leader: Array, fusion: Array, target: Array, w: float, t: float = 2.0
) -> Array:
    value = _hard([*students, leader, fusion], target)
    for i, row in enumerate(students):
        others = [other for j, other in enumerate(students) if j != i]
        value = value + w * sum(distill(other, row, t, detach=True) for other in others) / len(
            others
        )
    mean = sum(students) / len(students)
    return (
        value
        + w * distill(mean, fusion, t, detach=True)
        + w * distill(fusion, leader, t, detach=True)
    )


def afid(
    z1: Array, z2: Array, fusion: Array, target: Array, w: float, t: float = 3.0, eps: float = 0.0
) -> Array:
    soft = (
        distill(fusion, z1, t, eps, True)
        + distill(fusion, z2, t, eps, True)
        + distill((z1 + z2) / 2, fusion, t, eps, True)
    )
    return _hard([z1, z2, fusion], target) + w * soft


def kd_logits(
    z: Array, teacher: Array, target: Array, w: float, t: float = 3.0, eps: float = 0.0
) -> Array:
    return cross_entropy(z, target) + w * distill(teacher, z, t, eps, True)


def kd_stored(
    z: Array, probabilities: Array, target: Array, w: float, t: float = 3.0, eps: float = 0.0
) -> Array:
    """A teacher stored as probabilities that were softened at T."""
    return cross_entropy(z, target) + w * t * t * kl(
        probabilities, np.log(probabilities), log_softmax(z, t), eps
    )


def mixed_cross_entropy_gap(rows: Array, y: Array, a: Array) -> tuple[Array, Array]:
    """Cross-entropy [B] of the mixture ``a`` [B, M] of rows [B, M, C], and how far above its
    minimum it can be at most.

    For a convex f on the simplex, ``f(a) - min f <= <a, g> - min_k g_k`` with g the gradient at a.
    """
    mixed = np.einsum("bm,bmc->bc", a, rows)
    g = np.einsum("bc,bmc->bm", softmax(mixed) - y, rows)
    return -(y * log_softmax(mixed)).sum(1), (a * g).sum(1) - g.min(1)


def error_correlation(rows: Rows, target: Array) -> Array:
    """KDCL-General's C [M, M]: the mean product of two networks' errors, summed over classes."""
    errors = [softmax(z) - np.eye(z.shape[1])[target] for z in rows]
    return np.array([[(one * other).sum(1).mean() for other in errors] for one in errors])


def temporal_accumulator(history: Sequence[Array], beta: float) -> Array:
    """A sample's corrected memory from all that was ever predicted for it, oldest first: a weighted
    mean.
    """
    weights = np.array([beta**age for age in range(len(history))][::-1])
    return sum(w * p for w, p in zip(weights, history, strict=True)) / weights.sum()


def classifier_diversity(weights: Sequence[Array]) -> Array:
    """Analytic, so that a complex step passes through: |x| is x times its sign."""
    total = 0.0
    for i, one in enumerate(weights):
        for other in weights[i + 1 :]:
            product = one @ other.T
            total = total + (np.sign(np.real(product)) * product).sum()
    return total


def feature_fusion(
    features: Rows, conv: Array, scale: Array, shift: Array, weight: Array, bias: Array
) -> Array:
    """The auxiliaries' shares [B, M-1] from their feature maps [B, c, H, W]: 3x3 convolution, batch
    norm, ReLU, mean, linear, softmax.
    """
    x = np.concatenate(features, 1)
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = sum(
        np.einsum("oc,bchw->bohw", conv[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    )
    mean = out.mean((0, 2, 3), keepdims=True)
    variance = ((out - mean) ** 2).mean((0, 2, 3), keepdims=True)
    out = (out - mean) / np.sqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
    out = out * (np.real(out) > 0)
    return softmax(out.mean((2, 3)) @ weight.T + bias)
