"""Other divergences in the place of a graph's KL terms."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fastokd.errors import GraphError, did_you_mean
from fastokd.graph.graph import Graph
from fastokd.graph.nodes import DKD, KL, L1, MSE, JensenShannon, Logits, Mixture, Standardized, Term

DIVERGENCES = ("kl", "reverse-kl", "symmetric-kl", "js", "dkd", "mse", "l1")
"""KL as the method has it, KL(student || teacher), the mean of both directions, Jensen-Shannon,
decoupled distillation, and the errors of the logits."""
_PARAMETERS = {"js": ("beta",), "dkd": ("alpha", "beta")}


def with_divergence(
    graph: Graph,
    divergence: str = "kl",
    *,
    alpha: float | None = None,
    beta: float | None = None,
    standardize: bool = False,
) -> Graph:
    """The graph with another divergence in every KL term, with the same weights, and the same
    temperatures where the divergence has one.

    Args:
        graph: the distillation graph.
        divergence: one of ``DIVERGENCES``.
        alpha, beta: parameters of ``DKD``, or ``beta`` of ``JensenShannon``; None for their
            defaults.
        standardize: standardize both rows of logits of every KL term (``Standardized``).

    Raises:
        GraphError: the graph has no KL term, or one with an eps or a kind of teacher that the
            divergence does not support; or the divergence has no such parameter.
    """
    _check(graph, divergence, {"alpha": alpha, "beta": beta})
    if divergence == "kl" and not standardize:
        return graph
    parameters = {"alpha": alpha, "beta": beta}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    nodes: dict[str, Standardized] = {}

    def row(name: str) -> str:
        """The standardized row of a node."""
        node = graph.by_name[name]
        if isinstance(node, Standardized):
            return name
        if not isinstance(node, (Logits, Mixture)):
            raise GraphError(
                f"standardize needs rows of logits, but '{name}' is of kind {node.kind}"
            )
        standardized = Standardized(f"standardized {name}", name)
        if standardized not in graph.nodes:
            nodes[name] = standardized
        return standardized.name

    def change(term: Term) -> Term:
        if not isinstance(term, KL):
            return term
        teacher, student = term.teacher, term.student
        if standardize:
            teacher, student = row(teacher), row(student)
        return _changed(term, teacher, student, divergence, parameters)

    terms = {term: change(term) for term in graph.terms}
    return graph.replace(terms.__getitem__, tuple(nodes.values()))


def _check(graph: Graph, divergence: str, parameters: dict[str, float | None]) -> None:
    if divergence not in DIVERGENCES:
        raise GraphError(f"divergence={divergence!r}{did_you_mean(divergence, DIVERGENCES)}")
    for name, value in parameters.items():
        if value is not None and name not in _PARAMETERS.get(divergence, ()):
            raise GraphError(f"divergence '{divergence}' has no parameter {name} (got {value})")
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise GraphError(f"{name}={value!r}; it must be a number")
    edges = [term for term in graph.terms if isinstance(term, KL)]
    if not edges:
        raise GraphError(f"graph '{graph.name}' has no KL term whose divergence could be changed")
    for term in edges:
        if term.eps and divergence != "kl":
            raise GraphError(
                f"divergence '{divergence}': term '{term.name}' has eps={term.eps:g}, which is"
                " defined for KL only; set it to 0 (teacher_eps=0)"
            )


def _changed(
    term: KL, teacher: str, student: str, divergence: str, parameters: Mapping[str, Any]
) -> Term:
    """A KL term's counterpart between two rows."""
    term = replace(term, teacher=teacher, student=student)
    if divergence == "kl":
        return term
    if divergence == "reverse-kl":
        return replace(term, direction="student_first")
    if divergence == "symmetric-kl":
        return replace(term, direction="symmetric")
    kind = {"js": JensenShannon, "dkd": DKD, "mse": MSE, "l1": L1}[divergence]
    common = {field.name for field in fields(kind)} & {field.name for field in fields(term)}
    changed: Term = kind(**{name: getattr(term, name) for name in common}, **parameters)
    return changed
