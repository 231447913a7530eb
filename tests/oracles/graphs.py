"""Any distillation graph, interpreted in NumPy straight from its nodes and terms (no plan, no
torch).

Reads the public fields of nodes and terms only; ``type(x).__name__`` says what something is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oracles.rows import (
    Array,
    absolute,
    complex_step,
    cross_entropy,
    decoupled,
    jensen_shannon,
    kl,
    log_softmax,
    softmax,
    standardized,
    stop,
    target_rows,
)


def _row(
    graph: Any, name: str, given: Mapping[str, Array], weights: Mapping[str, Array], target: Array
) -> Array:
    """The row of a node, as logits or as probabilities according to its kind."""
    if name in given:
        return given[name]
    node = next(node for node in graph.nodes if node.name == name)
    kind = type(node).__name__
    rows = [_row(graph, source, given, weights, target) for source in node.inputs]
    if kind in ("Mixture", "ProbabilityMixture"):
        factors = (
            weights[node.weights] if isinstance(node.weights, str) else np.array(node.weights)[None]
        )
        if kind == "ProbabilityMixture":
            external = [_kind(graph, source) == "External" for source in node.inputs]
            rows = [
                row if known else softmax(row, node.temperature)
                for row, known in zip(rows, external, strict=True)
            ]
        return sum(factors[:, k : k + 1] * row for k, row in enumerate(rows))
    if kind == "Standardized":
        return standardized(rows[0])
    rows = [stop(row) for row in rows]
    if kind == "MinLogit":
        y = target_rows(target, rows[0].shape[1])
        return np.min([row - (y * row).sum(1, keepdims=True) for row in rows], axis=0)
    assert kind == "LowestCrossEntropy"
    best = np.argmin([cross_entropy(row, target) for row in rows], axis=0)
    return np.array([rows[k][b] for b, k in enumerate(best)])


def _kind(graph: Any, name: str) -> str:
    return type(next(node for node in graph.nodes if node.name == name)).__name__


def _term(
    graph: Any, term: Any, given: Mapping[str, Array], weights: Mapping[str, Array], target: Array
) -> Array:
    if type(term).__name__ == "CrossEntropy":
        return cross_entropy(
            _row(graph, term.node, given, weights, target), target, graph.label_smoothing
        )
    teacher = _row(graph, term.teacher, given, weights, target)
    teacher = stop(teacher) if term.detach else teacher
    student = _row(graph, term.student, given, weights, target)
    kind = type(term).__name__
    if kind == "MSE":
        return ((student - teacher) ** 2).mean(1)
    if kind == "L1":
        return absolute(student - teacher).mean(1)
    scale = term.temperature**2 if term.t2_scaling else 1.0
    if kind == "DKD":
        options = term.temperature, term.alpha, term.beta
        return scale * decoupled(teacher, student, target, *options)
    log_q = log_softmax(student, term.temperature)
    if _kind(graph, term.teacher) in ("External", "ProbabilityMixture"):
        p, log_p = teacher, np.log(teacher)
    else:
        log_p = log_softmax(teacher, term.temperature)
        p = np.exp(log_p)
    if kind == "JensenShannon":
        return scale * jensen_shannon(p, log_p, log_q, term.beta)
    if term.direction == "student_first":
        value = kl(np.exp(log_q), log_q, log_p)
    elif term.direction == "symmetric":
        value = (kl(p, log_p, log_q) + kl(np.exp(log_q), log_q, log_p)) / 2
    elif term.eps and term.eps_mode == "first_order":
        value = kl(p, log_p, log_q) + term.eps * (1 + log_p - log_q).sum(1)
    else:
        value = kl(p, log_p, log_q, term.eps)
    return value * scale


def evaluate(
    graph: Any,
    logits: Sequence[Array],
    weights: Mapping[str, Array],
    externals: Mapping[str, Array],
    target: Array,
    kd_weight: float,
) -> tuple[Array, Array]:
    """The loss [B] and the unweighted terms [T, B]."""
    names = [node.name for node in graph.nodes if type(node).__name__ == "Logits"]
    given = {**dict(zip(names, logits, strict=True)), **externals}
    terms = np.stack([_term(graph, term, given, weights, target) for term in graph.terms])
    factors = np.array(
        [term.weight * (kd_weight if term.scheduled else 1.0) for term in graph.terms]
    )
    return factors @ terms, terms


def gradients(
    graph: Any,
    logits: Sequence[Array],
    weights: Mapping[str, Array],
    externals: Mapping[str, Array],
    target: Array,
    kd_weight: float,
    upstream: Array,
) -> tuple[list[Array], dict[str, Array]]:
    """The gradients of ``sum_b upstream_b loss_b`` for the logits and, by name, for the weights."""
    names, count = list(weights), len(logits)

    def loss(*inputs: Array) -> Array:
        return evaluate(
            graph,
            inputs[:count],
            dict(zip(names, inputs[count:], strict=True)),
            externals,
            target,
            kd_weight,
        )[0]

    found = complex_step(loss, [*logits, *weights.values()], upstream)
    return found[:count], dict(zip(names, found[count:], strict=True))
