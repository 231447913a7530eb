"""Rows of logits and probabilities, [B, C] in float64 or complex128; every value is per sample,
[B].

The functions are analytic, so that a gradient can be taken by a complex step; ``stop`` (the real
part) is then exactly a stop-gradient.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def stop(x: Array) -> Array:
    """A constant of the same value: what detaching means under a complex step."""
    return np.real(x)


def log_softmax(z: Array, temperature: float = 1.0) -> Array:
    z = z / temperature
    z = z - np.real(z).max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def softmax(z: Array, temperature: float = 1.0) -> Array:
    return np.exp(log_softmax(z, temperature))


def target_rows(target: Array, num_classes: int) -> Array:
    """Labels [B] or class probabilities [B, C], as probabilities."""
    return np.eye(num_classes)[target] if target.ndim == 1 else target.astype(np.float64)


def cross_entropy(z: Array, target: Array, smoothing: float = 0.0) -> Array:
    """``-sum_c y_c log p_1(z)_c``; smoothing a replaces y by ``(1 - a) y + a / C``."""
    num_classes = z.shape[1]
    y = (1 - smoothing) * target_rows(target, num_classes) + smoothing / num_classes
    return -(y * log_softmax(z)).sum(axis=1)


def kl(p: Array, log_p: Array, log_q: Array, eps: float = 0.0) -> Array:
    """``sum_c (p_c + eps) (log(p_c + eps) - log q_c)``, the teacher p first; no T^2."""
    if eps:
        p = p + eps
        log_p = np.log(p)
    return (p * (log_p - log_q)).sum(axis=1)


def jensen_shannon(p: Array, log_p: Array, log_q: Array, beta: float) -> Array:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``."""
    q = np.exp(log_q)
    log_m = np.log(beta * p + (1 - beta) * q)
    return beta * kl(p, log_p, log_m) + (1 - beta) * kl(q, log_q, log_m)


def decoupled(
    teacher: Array, student: Array, labels: Array, temperature: float, alpha: float, beta: float
) -> Array:
    """``alpha TCKD + beta NCKD`` of two rows of logits, without T^2: the KL divergences of
    (p_label, 1 - p_label), and of the probabilities of the other classes divided by their sum.
    """
    if teacher.shape[1] == 1:
        return np.zeros(len(teacher))
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    is_label = np.eye(p.shape[1], dtype=bool)[labels]

    def parts(rows: Array) -> tuple[Array, Array]:
        others = rows[~is_label].reshape(len(rows), -1)
        total = others.sum(axis=1, keepdims=True)
        return np.concatenate([rows[is_label][:, None], total], axis=1), others / total

    (pair_p, rest_p), (pair_q, rest_q) = parts(p), parts(q)
    target = kl(pair_p, np.log(pair_p), np.log(pair_q))
    return alpha * target + beta * kl(rest_p, np.log(rest_p), np.log(rest_q))


def absolute(x: Array) -> Array:
    """|x|, whose derivative at 0 is 0."""
    return np.where(np.real(x) > 0, x, np.where(np.real(x) < 0, -x, 0.0))


def standardized(z: Array) -> Array:
    """``(z - mean) / std`` of each row."""
    centered = z - z.mean(axis=1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=1, keepdims=True))


def distill(
    teacher: Array, student: Array, temperature: float, eps: float = 0.0, detach: bool = False
) -> Array:
    """``D_T(teacher -> student)`` of two rows of logits, with T^2."""
    teacher = stop(teacher) if detach else teacher
    log_p = log_softmax(teacher, temperature)
    return temperature**2 * kl(np.exp(log_p), log_p, log_softmax(student, temperature), eps)


def complex_step(
    f: Callable[..., Array], inputs: Sequence[Array], upstream: Array | None = None
) -> list[Array]:
    """The gradient of ``sum_b upstream_b f(*inputs)_b`` with respect to each real input [B, K].

    Row b of f may depend on row b of the inputs only; then one evaluation per column gives every
    row's derivative. The step is far below rounding, so the result is as exact as the formula.
    """
    step = 1e-60
    gradients = []
    for index, value in enumerate(inputs):
        gradient = np.zeros(value.shape)
        for column in range(value.shape[1]):
            moved = [x.astype(np.complex128) if k == index else x for k, x in enumerate(inputs)]
            moved[index][:, column] += 1j * step
            gradient[:, column] = np.imag(f(*moved)) / step
        gradients.append(gradient if upstream is None else gradient * upstream[:, None])
    return gradients
