"""The reference executor: plain PyTorch and autograd, the definition of the results.

Everything is computed in log-space from log-softmax, so that both sides of every KL edge have
finite gradients wherever the logits are finite.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastokd.graph.plan import (
    CROSS_ENTROPY,
    EPS_EXACT,
    EPS_FIRST_ORDER,
    JENSEN_SHANNON,
    KL_TERM,
    MINIMUM,
    MIXTURE,
    NON_TARGET,
    PROBABILITY_MIXTURE,
    SQUARED_ERROR,
    STUDENT_FIRST,
    TARGET_KL,
    Plan,
    PlanNode,
    PlanTerm,
)
from fastokd.ops.inputs import Gradients, Inputs, Needs, Outputs, compute_dtype

PROBABILITY_FLOOR = 1e-30
"""Lowest probability of an external row inside logarithms, in every dtype and executor."""


MASKED = -1e37
"""Stands for -inf in logits, so that a class that two rows mask contributes 0 instead of NaN."""
_COLD = 0.1
"""Divided by a temperature below this, ``MASKED`` might overflow float32."""
MASKED_LOSS = 1e30
"""A term above this is infinite: the label or a class of the teacher is masked in the student."""


def _label_logit(row: Tensor, target: Tensor) -> Tensor:
    """``<y, row>`` [B]. A label out of range gives NaN: wrong numbers must not look right."""
    if target.is_floating_point():
        return (row * target.to(row.dtype)).sum(1)
    num_classes = row.shape[1]
    valid = (target >= 0) & (target < num_classes)
    picked = row.gather(1, target.clamp(0, num_classes - 1).unsqueeze(1)).squeeze(1)
    return picked * torch.where(valid, 1.0, float("nan")).to(row.dtype)


def _cross_entropy(row: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """``-sum_c y_c log p_1(row)_c`` [B], ``y = (1 - a) * target + a / C``, label smoothing a."""
    log_p = F.log_softmax(row, 1)
    loss = -_label_logit(log_p, target)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    return loss


def _softened(row: Tensor, temperature: float) -> Tensor:
    """``row / T``, in which masked classes stay finite."""
    softened = row / temperature
    return softened.clamp_min(MASKED) if temperature < _COLD else softened


def _node_weights(node: PlanNode, weights: Sequence[Tensor], like: Tensor) -> list[Tensor | float]:
    """One factor per input: a column [B, 1] of a run-time weight tensor, or a constant."""
    if node.source < 0:
        return list(node.constants)
    return list(weights[node.source].to(like.dtype).unsqueeze(2).unbind(1))


def _derived(
    plan: Plan, node: PlanNode, rows: list[Tensor], weights: Sequence[Tensor], target: Tensor
) -> Tensor:
    """The row [B, C] of a derived node; for a probability mixture its logarithm."""
    inputs = [rows[k] for k in node.inputs]
    if node.kind == MIXTURE:
        total = torch.zeros_like(inputs[0])
        for factor, row in zip(_node_weights(node, weights, inputs[0]), inputs, strict=True):
            total = total + factor * row
        return total
    if node.kind == PROBABILITY_MIXTURE:
        factors = _node_weights(node, weights, inputs[0])
        logs = [
            row.clamp_min(PROBABILITY_FLOOR).log()
            if plan.is_external(k)
            else F.log_softmax(_softened(row, node.temperature), 1)
            for k, row in zip(node.inputs, inputs, strict=True)
        ]
        # Relative to the largest log p_k, the sum stays finite where every p_k underflows.
        peak = torch.stack([log_p.detach() for log_p in logs]).amax(0)
        total = torch.zeros_like(peak)
        for factor, log_p in zip(factors, logs, strict=True):
            total = total + factor * (log_p - peak).exp()
        return peak + total.clamp_min(PROBABILITY_FLOOR).log()
    if node.kind == NON_TARGET:
        (row,) = inputs
        label = target.clamp(0, row.shape[1] - 1).unsqueeze(1)
        return row.scatter(1, label, MASKED)
    with torch.no_grad():
        if node.kind == MINIMUM:
            shifted = [row - _label_logit(row, target).unsqueeze(1) for row in inputs]
            return torch.stack(shifted).amin(0)
        losses = torch.stack([_cross_entropy(row, target, 0.0) for row in inputs])
        chosen = losses.argmin(0)
        stacked = torch.stack(inputs)
        return stacked[chosen, torch.arange(chosen.shape[0], device=chosen.device)]


def node_rows(plan: Plan, inputs: Inputs) -> list[Tensor]:
    """The row [B, C] of every node in the compute dtype, in the order of the plan's ids.

    Probability mixtures are returned as logarithms, external rows unchanged.
    """
    dtype = compute_dtype(inputs.logits[0])
    rows = [row.to(dtype) for row in (*inputs.logits, *inputs.externals)]
    for node in plan.nodes:
        rows.append(_derived(plan, node, rows, inputs.weights, inputs.target))
    return rows


def _kl(plan: Plan, term: PlanTerm, rows: list[Tensor]) -> Tensor:
    teacher = rows[term.teacher].detach() if term.detach else rows[term.teacher]
    log_q = F.log_softmax(_softened(rows[term.student], term.temperature), 1)
    if plan.is_external(term.teacher):
        p, log_p = teacher, teacher.clamp_min(PROBABILITY_FLOOR).log()
    elif plan.is_probability(term.teacher):
        p, log_p = teacher.exp(), teacher
    else:
        log_p = F.log_softmax(_softened(teacher, term.temperature), 1)
        p = log_p.exp()
    # A class that both rows mask: it has no share in the value, and eps is for those that exist.
    absent = (p <= PROBABILITY_FLOOR) & (log_q < -MASKED_LOSS)
    if term.direction == STUDENT_FIRST:
        return (log_q.exp() * (log_q - log_p)).sum(1)
    if term.direction == JENSEN_SHANNON:
        beta = term.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_teacher = beta * p * (log_p - log_m)
        return (of_teacher + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(1)
    if term.eps_mode == EPS_EXACT:
        raised = p + term.eps
        return (raised * (raised.log() - log_q)).masked_fill(absent, 0.0).sum(1)
    value = (p * (log_p - log_q)).masked_fill(absent, 0.0).sum(1)
    if term.eps_mode == EPS_FIRST_ORDER:
        value = value + term.eps * (1 + log_p - log_q).masked_fill(absent, 0.0).sum(1)
    return value


def _target_kl(plan: Plan, term: PlanTerm, rows: list[Tensor], target: Tensor) -> Tensor:
    """The KL divergence of the pairs (probability of the label, of all other classes)."""

    def log_odds(non_target: int) -> Tensor:
        (node,) = plan.nodes[non_target - plan.first_derived].inputs
        label_logit = _label_logit(rows[node], target) / term.temperature
        return label_logit - _softened(rows[non_target], term.temperature).logsumexp(1)

    student, teacher = log_odds(term.student), log_odds(term.teacher)
    teacher = teacher.detach() if term.detach else teacher
    pairs = [(F.logsigmoid(sign * teacher), F.logsigmoid(sign * student)) for sign in (1.0, -1.0)]
    return torch.stack([log_p.exp() * (log_p - log_q) for log_p, log_q in pairs]).sum(0)


def _error(term: PlanTerm, rows: list[Tensor]) -> Tensor:
    """The mean over the classes of the squared or absolute difference of two rows of logits."""
    teacher = rows[term.teacher].detach() if term.detach else rows[term.teacher]
    gap = rows[term.student] - teacher
    return (gap.square() if term.kind == SQUARED_ERROR else gap.abs()).mean(1)


def _value(plan: Plan, term: PlanTerm, rows: list[Tensor], target: Tensor) -> Tensor:
    """The value [B] of a term."""
    if term.kind == CROSS_ENTROPY:
        return _cross_entropy(rows[term.student], target, plan.label_smoothing)
    if term.kind == KL_TERM:
        return term.scale * _kl(plan, term, rows)
    if term.kind == TARGET_KL:
        return term.scale * _target_kl(plan, term, rows, target)
    return term.scale * _error(term, rows)


def term_values(plan: Plan, inputs: Inputs) -> Tensor:
    """The unweighted terms [T, B], differentiable in logits and weights."""
    with torch.autocast(inputs.logits[0].device.type, enabled=False):
        rows = [row.to(compute_dtype(row)) for row in inputs.logits]
        masked = [row.masked_fill(row == -torch.inf, MASKED) for row in rows]
        rows = node_rows(plan, inputs._replace(logits=masked))
        values: list[Tensor] = []
        for term in plan.terms:
            value = _value(plan, term, rows, inputs.target)
            if term.output < len(values):
                values[-1] = values[-1] + value
            else:
                values.append(value)
        terms = torch.stack(values)
        return terms.masked_fill(terms > MASKED_LOSS, torch.inf)


def weighted_rows(term_weights: Tensor, terms: Tensor) -> Tensor:
    """The loss of each row [B] from the term weights [T] or [B, T] and the terms [T, B]."""
    if term_weights.dim() == 1:
        return (term_weights.unsqueeze(1) * terms).sum(0)
    weights = term_weights.t().contiguous()  # in the layout of the terms, for the same sums
    return (weights * torch.where((weights == 0) & ~terms.isfinite(), 0.0, terms)).sum(0)


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd on, also in an operator called below autograd, as by dispatch modes."""
    keys = [torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView]
    excluded = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, was_excluded in zip(keys, excluded, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, was_excluded)


class ReferenceExecutor:
    """Runs on every device. Its backward pass recomputes the forward pass."""

    name = "reference"

    def unsupported_reason(self, plan: Plan | None, case: object) -> str | None:
        return None

    def num_stats(self, plan: Plan) -> int:
        return 0

    def forward(self, plan: Plan, inputs: Inputs) -> Outputs:
        with torch.no_grad():
            terms = term_values(plan, inputs)
            rows = weighted_rows(inputs.term_weights, terms)
        return rows, terms, terms.new_empty((0, terms.shape[1]))

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Needs
    ) -> Gradients:
        return self._differentiate(plan, grad_rows, inputs, needs)[2]

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Needs
    ) -> tuple[Tensor, Tensor, Gradients]:
        batch = inputs.target.shape[0]
        grad_rows = inputs.term_weights.new_full((batch,), 1 / max(batch, 1))
        return self._differentiate(plan, grad_rows, inputs, needs)

    def _differentiate(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, needs: Needs
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Rows, terms, and the gradients of ``sum(grad_rows * rows)``, from a separate graph."""
        leaves = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(inputs.differentiable, needs, strict=True)
        ]
        count, trainable = len(inputs.logits), [leaf for leaf in leaves if leaf.requires_grad]
        with _recording():
            inputs = inputs._replace(logits=leaves[:count], weights=leaves[count:])
            terms = term_values(plan, inputs)
            rows = weighted_rows(inputs.term_weights, terms)
            options = {"allow_unused": True, "materialize_grads": True}
            grads = torch.autograd.grad(rows, trainable, grad_rows, **options) if trainable else ()
        remaining = iter(grads)
        gradients = [next(remaining) if leaf.requires_grad else None for leaf in leaves]
        return rows.detach(), terms.detach(), gradients


EXECUTOR = ReferenceExecutor()
