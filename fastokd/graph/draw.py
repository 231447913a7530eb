"""Drawings of a graph: plain text for a terminal, Mermaid for documentation."""

import re

from fastokd.graph.graph import Graph
from fastokd.graph.nodes import (
    DKD,
    KL,
    L1,
    MSE,
    CrossEntropy,
    JensenShannon,
    Node,
    ProbabilityMixture,
    Standardized,
    Term,
)


def _number(value: float) -> str:
    return f"{value:.6g}"


def definition(node: Node, externals: tuple[str, ...]) -> str:
    """The right-hand side of a node's definition."""
    if not node.inputs:
        return "given"
    if isinstance(node, Standardized):
        return f"({node.input} - mean) / standard deviation"
    weights = getattr(node, "weights", None)
    if weights is None:
        functions = {
            "minimum": "min over inputs shifted by their label's logit",
            "selection": "the input with the lowest cross-entropy",
        }
        return f"{functions[node.kind]}: {', '.join(node.inputs)}"
    parts = []
    for column, name in enumerate(node.inputs):
        factor = f"{weights}[{column}]" if isinstance(weights, str) else _number(weights[column])
        row = name
        if isinstance(node, ProbabilityMixture) and name not in externals:
            row = f"softmax({name}/{_number(node.temperature)})"
        parts.append(f"{factor}*{row}")
    return " + ".join(parts)


def coefficient(term: Term) -> str:
    """The weight of a term with everything constant multiplied out."""
    return _number(term.coefficient) + (" * kd_weight" if term.scheduled else "")


def divergence(term: KL | JensenShannon | DKD | MSE | L1) -> str:
    """The name of a term between a teacher and a student, as it is drawn."""
    return type(term).word.upper()


def notes(term: KL | JensenShannon | DKD | MSE | L1) -> str:
    """The properties of a term between a teacher and a student, without its coefficient."""
    parts = [] if isinstance(term, (MSE, L1)) else [f"T={_number(term.temperature)}"]
    if isinstance(term, DKD):
        parts.append(f"alpha={_number(term.alpha)}")
    if isinstance(term, (DKD, JensenShannon)):
        parts.append(f"beta={_number(term.beta)}")
    if term.detach:
        parts.append("teacher detached")
    if isinstance(term, KL) and term.eps:
        order = " first order" if term.eps_mode == "first_order" else ""
        parts.append(f"eps={_number(term.eps)}{order}")
    if isinstance(term, KL) and term.direction != "teacher_first":
        parts.append(term.direction.replace("_", " "))
    return ", ".join(parts)


def draw_text(graph: Graph) -> str:
    """The graph as lines of text: definitions of the nodes, effective coefficients of the terms."""
    lines = [f"graph {graph.name}: {len(graph.nodes)} nodes, {len(graph.terms)} terms"]
    width = max(len(node.name) for node in graph.nodes)
    kind_width = max(len(node.kind) for node in graph.nodes)
    lines.append("nodes")
    lines += [
        f"  {node.name:<{width}}  {node.kind:<{kind_width}}  {definition(node, graph.externals)}"
        for node in graph.ordered
    ]
    lines.append("terms (coefficient of each per-sample value; T^2 and weights multiplied out)")
    for term in graph.terms:
        if isinstance(term, CrossEntropy):
            lines.append(f"  {coefficient(term):>16}  CE({term.node}, target)")
        else:
            pair = [term.teacher, term.student]
            if isinstance(term, KL) and term.direction == "student_first":
                pair.reverse()
            separator = " || " if isinstance(term, KL) else ", "
            remark = f"; {notes(term)}" if notes(term) else ""
            text = f"{divergence(term)}({separator.join(pair)})  teaches {term.student}{remark}"
            lines.append(f"  {coefficient(term):>16}  {text}")
    if graph.label_smoothing:
        lines.append(f"label smoothing {_number(graph.label_smoothing)} in every cross-entropy")
    return "\n".join(lines)


def _quotable(text: str) -> str:
    """Text that may stand between Mermaid's quotation marks."""
    return text.replace('"', "'")


def draw_mermaid(graph: Graph) -> str:
    """A Mermaid flowchart: solid lines mix, thick lines teach, dotted lines are cross-entropies."""
    # Numbered: names may differ in punctuation only, or be "label" or one of Mermaid's words.
    ids = {
        node.name: f"n{index}_{re.sub(r'[^A-Za-z0-9]', '_', node.name)}"
        for index, node in enumerate(graph.ordered)
    }
    lines = ["flowchart LR"]
    for node in graph.ordered:
        shape = ("[{}]", "([{}])")[bool(node.inputs)]
        lines.append(f"  {ids[node.name]}" + shape.format(f'"{_quotable(node.name)}"'))
        weights = getattr(node, "weights", None)
        for column, name in enumerate(node.inputs):
            label = ""
            if isinstance(weights, str):
                label = f'|"{_quotable(weights)}[{column}]"|'
            elif weights is not None:
                label = f'|"{_number(weights[column])}"|'
            lines.append(f"  {ids[name]} -->{label} {ids[node.name]}")
    lines.append('  label{{"label"}}')
    for term in graph.terms:
        if isinstance(term, CrossEntropy):
            lines.append(f'  label -. "{coefficient(term)}" .-> {ids[term.node]}')
        else:
            label = ", ".join(filter(None, (coefficient(term), notes(term))))
            arrow = f'"{divergence(term)} {label}"'
            lines.append(f"  {ids[term.teacher]} == {arrow} ==> {ids[term.student]}")
    return "\n".join(lines)
