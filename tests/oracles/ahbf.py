"""AHBF (eq. 8-14 and the published code): its value and every gradient, derived by hand.

Per row, with p = p_T(teacher), q = p_T(student), l = log(p + eps) - log q:
    student side of D_T^eps:  T ((1 + C eps) q - p - eps) teacher side:             T p (l - sum_c
    p_c l_c) cross-entropy:            p_1(z) - y          (for sum_c y_c = s: s p_1(z) - y) mixture
    u = s1 a + s2 b:  dL/da += s1 g, dL/db += s2 g, dL/ds1 = <g, a>, dL/ds2 = <g, b>   with g =
    dL/du
"""

from dataclasses import dataclass

import numpy as np

from oracles.rows import Array, cross_entropy, distill, log_softmax, softmax, target_rows


@dataclass
class Result:
    """Per row: the loss [B]; by name the value of each term [B]; the gradients of ``sum_b
    loss_b``.
    """

    loss: Array
    terms: dict[str, Array]
    logits: list[Array]
    tas: list[Array]
    scores: list[Array]


def ahbf(
    branches: list[Array],
    target: Array,
    scores: list[Array] | None = None,
    tas: list[Array] | None = None,
    *,
    temperature: float = 3.0,
    lambda_ta: float = 4.0,
    lambda_branch: float = 2.0,
    lambda_self: float = 0.0,
    detach: bool = False,
    eps: float = 0.0,
    smoothing: float = 0.0,
    kd_weight: float = 1.0,
) -> Result:
    """M branches [B, C] with M-1 scores [B, 2] (branch, previous TA), or with M-1 TAs mixed
    already.
    """
    num_branches, num_classes = len(branches), branches[0].shape[1]
    ta = [branches[0]]
    for m in range(1, num_branches):
        ta.append(
            scores[m - 1][:, :1] * branches[m] + scores[m - 1][:, 1:] * ta[m - 1]
            if tas is None
            else tas[m - 1]
        )
    grad_z = [np.zeros_like(z) for z in branches]
    # ta[0] is branch 1: one array, so that what reaches TA 1 reaches the branch.
    grad_ta = [grad_z[0]] + [np.zeros_like(z) for z in branches[1:]]
    loss, terms = np.zeros(len(target)), {}

    soft = target_rows(target, num_classes)
    soft = (1 - smoothing) * soft + smoothing / num_classes

    def hard(name: str, z: Array, grad: Array) -> None:
        nonlocal loss
        terms[f"ce/{name}"] = cross_entropy(z, target, smoothing)
        loss = loss + terms[f"ce/{name}"]
        grad += soft.sum(1, keepdims=True) * softmax(z) - soft

    def edge(
        name: str,
        teacher: Array,
        student: Array,
        weight: float,
        grad_teacher: Array,
        grad_student: Array,
    ) -> None:
        nonlocal loss
        if weight == 0:
            return
        terms[f"kl/{name}"] = distill(teacher, student, temperature, eps)
        loss = loss + kd_weight * weight * terms[f"kl/{name}"]
        p, log_q = softmax(teacher, temperature), log_softmax(student, temperature)
        q = np.exp(log_q)
        factor = kd_weight * weight * temperature
        grad_student += factor * ((1 + num_classes * eps) * q - p - eps)
        if not detach:
            ratio = np.log(p + eps) - log_q
            grad_teacher += factor * p * (ratio - (p * ratio).sum(1, keepdims=True))

    names = ["branch1"] + [f"ta{m + 1}" for m in range(1, num_branches)]
    for m in range(num_branches):
        hard(f"branch{m + 1}", branches[m], grad_z[m])
    for m in range(1, num_branches):
        hard(names[m], ta[m], grad_ta[m])
    for m in range(1, num_branches):
        own, ta_name, below = f"branch{m + 1}", names[m], names[m - 1]
        edge(f"{ta_name}->{below}", ta[m], ta[m - 1], lambda_ta, grad_ta[m], grad_ta[m - 1])
        edge(f"{own}->{below}", branches[m], ta[m - 1], lambda_branch, grad_z[m], grad_ta[m - 1])
        edge(f"{ta_name}->{own}", ta[m], branches[m], lambda_self, grad_ta[m], grad_z[m])

    if tas is not None:
        return Result(loss, terms, grad_z, grad_ta[1:], [])
    grad_scores: list[Array] = [np.zeros_like(s) for s in scores]
    for m in range(num_branches - 1, 0, -1):
        g, s = grad_ta[m], scores[m - 1]
        grad_scores[m - 1] = np.stack([(g * branches[m]).sum(1), (g * ta[m - 1]).sum(1)], 1)
        grad_z[m] += s[:, :1] * g
        grad_ta[m - 1] += s[:, 1:] * g
    return Result(loss, terms, grad_z, [], grad_scores)
