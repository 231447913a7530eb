"""Drawing of a graph as SVG: nodes in columns, arrows for mixtures and for teaching."""

import re
from html import escape
from typing import TypeAlias

from fastokd.graph.draw import coefficient, definition, divergence, notes
from fastokd.graph.graph import Graph
from fastokd.graph.nodes import DKD, KL, L1, MSE, CrossEntropy, JensenShannon, Node

_Edge: TypeAlias = KL | JensenShannon | DKD | MSE | L1

_CHARACTER, _LINE, _PAD = 6.7, 16, 7
"""Width of a character, height of a line and padding of text, in pixels."""
_ACROSS, _DOWN = 80, 22
"""Space between columns and between the boxes of a column."""
_COLORS = ("#d9730d", "#0f7b6c", "#6940a5", "#ad1a72", "#0b6e99", "#937264")
"""Colors of the kinds of terms between rows, distinguishable on white and on black."""


class _Box:
    """The box of a node."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.lines = [node.name]
        if node.inputs:
            self.lines += definition(node, graph.externals).replace(" + ", "\n+ ").split("\n")
        losses = (term for term in graph.terms if isinstance(term, CrossEntropy))
        self.lines += [f"CE {coefficient(term)}" for term in losses if term.node == node.name]
        self.width = _CHARACTER * max(map(len, self.lines)) + 2 * _PAD
        self.height = _LINE * len(self.lines) + _PAD
        self.x = self.y = 0.0  # of the upper left corner
        self.column = 0

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


def draw_svg(graph: Graph) -> str:
    """The graph as SVG, with a legend of the coefficients.

    Lines and text have the color of the surrounding text, for light and dark pages.
    """
    boxes = {node.name: _Box(graph, node) for node in graph.ordered}
    _place(graph, boxes)
    edges = [term for term in graph.terms if not isinstance(term, CrossEntropy)]
    kinds = list(dict.fromkeys(_kind(term) for term in edges))
    colors = {kind: _COLORS[index % len(_COLORS)] for index, kind in enumerate(kinds)}
    left = 30 + 22 * max((abs(_rows(boxes, term)) for term in edges), default=0)
    mark = re.sub(r"\W", "_", graph.name)  # unique within a page
    legend = 30 + _CHARACTER * max(map(len, kinds), default=0)
    width = left + max(legend, *(box.x + box.width for box in boxes.values())) + 10
    bottom = max(box.y + box.height for box in boxes.values()) + 20
    height = bottom + _LINE * len(kinds) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-left:.0f} -10 {width:.0f}'
        f' {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img"'
        ' font-family="monospace" font-size="11" fill="none"'
        f' stroke="currentColor"><title>{escape(graph.name)}</title>'
    ]
    parts.append(_marker(f"{mark}-mix", "currentColor"))
    parts += [_marker(f"{mark}-{index}", colors[kind]) for index, kind in enumerate(kinds)]
    parts += _mixing(graph, boxes, f'stroke-opacity="0.55" marker-end="url(#{mark}-mix)"')
    for term in edges:
        color, marker = colors[_kind(term)], f"{mark}-{kinds.index(_kind(term))}"
        style = f'stroke="{color}" stroke-width="2" marker-end="url(#{marker})"'
        parts.append(_teaching(boxes, term, style))
    for name, box in boxes.items():
        parts += _rectangle(box, rounded=bool(graph.by_name[name].inputs))
    for index, kind in enumerate(kinds):
        y = bottom + _LINE * index
        parts.append(f'<path d="M0 {y:.0f}h20" stroke="{colors[kind]}" stroke-width="2"/>')
        parts.append(_text(28, y + 4, kind))
    return "".join([*parts, "</svg>"])


def _rectangle(box: _Box, rounded: bool) -> list[str]:
    """A box and its lines of text."""
    radius = _LINE / 2 if rounded else 2
    lines = [
        _text(box.x + _PAD, box.y + _LINE * (index + 1) - 2, line, bold=not index)
        for index, line in enumerate(box.lines)
    ]
    return [
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}"'
        f' height="{box.height:.0f}" rx="{radius:.0f}"/>',
        *lines,
    ]


def _mixing(graph: Graph, boxes: dict[str, _Box], style: str) -> list[str]:
    """The arrows from every node's inputs to the node."""
    pairs = [(boxes[name], boxes[node.name]) for node in graph.ordered for name in node.inputs]
    return [
        _curve(start.x + start.width, start.middle - 5, end.x, end.middle - 5, style)
        for start, end in pairs
    ]


def _kind(term: _Edge) -> str:
    """The legend of a term between a teacher and a student."""
    label = f"{divergence(term)} {coefficient(term)}"
    return ", ".join(filter(None, (label, notes(term))))


def _rows(boxes: dict[str, _Box], term: _Edge) -> int:
    """The number of boxes that a student is above its teacher; 0 in different columns."""
    teacher, student = boxes[term.teacher], boxes[term.student]
    if teacher.column != student.column:
        return 0
    column = [box for box in boxes.values() if box.column == student.column]
    column.sort(key=lambda box: box.y)
    return column.index(teacher) - column.index(student)


def _place(graph: Graph, boxes: dict[str, _Box]) -> None:
    """Place inputs in the first column and other nodes right of their inputs, centered on them."""
    for node in graph.ordered:
        boxes[node.name].column = 1 + max((boxes[name].column for name in node.inputs), default=-1)
    x = 0.0
    for column in range(1 + max(box.column for box in boxes.values())):
        nodes = [node for node in graph.ordered if boxes[node.name].column == column]
        stack = [boxes[node.name] for node in nodes]
        inputs = [boxes[name].middle for node in nodes for name in node.inputs]
        height = sum(box.height + _DOWN for box in stack) - _DOWN
        y = (sum(inputs) / len(inputs) if inputs else 0.0) - height / 2
        for box in stack:
            box.x, box.y = x, y
            y += box.height + _DOWN
        x += max(box.width for box in stack) + _ACROSS
    top = min(box.y for box in boxes.values())
    for box in boxes.values():
        box.y -= top


def _teaching(boxes: dict[str, _Box], term: _Edge, style: str) -> str:
    """The arrow from a teacher to its student, left of the column if they share one."""
    teacher, student = boxes[term.teacher], boxes[term.student]
    if teacher.column == student.column:
        away = -22 * abs(_rows(boxes, term)) - (8 if teacher.y > student.y else 0)
        return (
            f'<path d="M{teacher.x:.0f} {teacher.middle:.0f}C{teacher.x + away:.0f}'
            f" {teacher.middle:.0f} {student.x + away:.0f} {student.middle + 4:.0f}"
            f' {student.x - 7:.0f} {student.middle + 4:.0f}" {style}/>'
        )
    start, end = teacher.x + teacher.width, student.x - 7
    if teacher.column > student.column:
        start, end = teacher.x, student.x + student.width + 7
    return _curve(start, teacher.middle + 5, end, student.middle + 5, style)


def _curve(x: float, y: float, to_x: float, to_y: float, style: str) -> str:
    half = (to_x - x) / 2
    return (
        f'<path d="M{x:.0f} {y:.0f}C{x + half:.0f} {y:.0f} {to_x - half:.0f} {to_y:.0f} {to_x:.0f}'
        f' {to_y:.0f}" {style}/>'
    )


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" fill="currentColor"'
        f' stroke="none"{weight}>{escape(text)}</text>'
    )


def _marker(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="4.5"'
        f' markerHeight="4.5" orient="auto"><path d="M0 0L8 4L0 8z" fill="{color}"'
        ' stroke="none"/></marker>'
    )
