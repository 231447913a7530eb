"""The graph itself: nodes, terms, and every rule a graph must keep, checked when it is made."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from fastokd._moved import renamed_property
from fastokd.errors import GraphError, did_you_mean
from fastokd.graph.nodes import (
    DKD,
    KL,
    L1,
    MSE,
    CrossEntropy,
    External,
    JensenShannon,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Node,
    ProbabilityMixture,
    Standardized,
    Term,
)

CONSTANTS = (External, MinLogit, LowestCrossEntropy)
LEARNING = (Logits, Mixture, Standardized)
PROBABILITIES = (External, ProbabilityMixture)
_ALLOWED_INPUTS: dict[type, tuple[type[Node], ...]] = {
    Mixture: (Logits, Mixture),
    Standardized: (Logits, Mixture),
    ProbabilityMixture: (*LEARNING, External),
    MinLogit: (Logits, Mixture),
    LowestCrossEntropy: (Logits, Mixture),
}


@dataclass(frozen=True)
class Graph:
    """A distillation loss: named nodes, and the terms whose weighted sum is the loss of a sample.

    ``teacher`` is the name of the node that ``with_teacher`` added, the last of its kind.

    Raises:
        GraphError: the graph breaks a rule; the message names the node or the term.
    """

    name: str
    nodes: Sequence[Node]
    terms: Sequence[Term]
    label_smoothing: float = 0.0
    teacher: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "terms", tuple(self.terms))
        self._check_nodes()
        for term in self.terms:
            self._check_term(term)
        self._check_whole()

    def with_teacher(
        self,
        students: str | Sequence[str],
        weight: float = 1.0,
        temperature: float = 3.0,
        *,
        rows: Literal["logits", "probabilities"] = "logits",
        **options: Any,
    ) -> "Graph":
        """The graph with a row of a frozen teacher and a KL term from it to each student.

        The row is named ``teacher``, or ``frozen_teacher`` if the graph has another ``teacher``.

        Args:
            students: the names of the nodes that the teacher teaches.
            weight, temperature: of each term, ``weight * T^2 * KL(p_T(teacher) || p_T(student))``.
            rows: "logits", or "probabilities" that are softened at T already.
            options: further fields of ``KL``; ``detach`` is True, and ``scheduled`` False by
                default, because a trained teacher needs no ramp-up.

        Raises:
            GraphError: the graph has such a teacher, or a name or a number is wrong.
        """
        where = f"graph '{self.name}'"
        _require(not self.teacher, f"{where} has a frozen teacher already, '{self.teacher}'")
        is_known = rows in ("logits", "probabilities")
        _require(is_known, f"{where}: rows={rows!r}; use 'logits' or 'probabilities'")
        name = "frozen_teacher" if "teacher" in self.by_name else "teacher"
        options = {"scheduled": False, **options, "detach": True}
        names = [students] if isinstance(students, str) else students
        terms = [KL(name, student, weight, temperature, **options) for student in names]
        nodes = (*self.nodes, Logits(name) if rows == "logits" else External(name))
        return replace(self, nodes=nodes, terms=(*self.terms, *terms), teacher=name)

    def replace(
        self, change: Callable[[Term], Term | None], nodes: Iterable[Node] = (), name: str = ""
    ) -> "Graph":
        """The graph with other terms.

        Args:
            change: a function from each term to the one in its place; None removes the term.
            nodes: nodes that the new terms need and the graph does not have.
            name: of the new graph, by default the same.

        Derived nodes and a frozen teacher that reach no term any more are removed.

        Raises:
            GraphError: the new graph breaks a rule.
        """
        terms = tuple(new for term in self.terms if (new := change(term)) is not None)
        everything = (*self.nodes, *nodes)
        used = {name for term in terms for name in _nodes_of(term)}
        # A node may follow its users in the list, so repeat until nothing is added.
        while added := {i for node in everything if node.name in used for i in node.inputs} - used:
            used |= added
        remaining = tuple(
            node
            for node in everything
            if node.name in used or not (node.inputs or node.name == self.teacher)
        )
        teacher = self.teacher if self.teacher in used else ""
        return replace(self, nodes=remaining, terms=terms, name=name or self.name, teacher=teacher)

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def logits(self) -> tuple[str, ...]:
        """The names of the logits rows in the order in which they are passed to the loss."""
        return tuple(node.name for node in self.nodes if isinstance(node, Logits))

    @cached_property
    def externals(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if isinstance(node, External))

    @cached_property
    def standardized(self) -> tuple[Standardized, ...]:
        return tuple(node for node in self.nodes if isinstance(node, Standardized))

    @property
    def mixtures(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if isinstance(node, Mixture))

    @cached_property
    def weight_sources(self) -> dict[str, int]:
        """Name and number of columns of each run-time weight tensor, in order of first use."""
        sources: dict[str, int] = {}
        for node in self.dynamic_mixtures:
            sources.setdefault(str(node.weights), len(node.inputs))
        return sources

    @cached_property
    def dynamic_mixtures(self) -> tuple[Mixture | ProbabilityMixture, ...]:
        """The mixtures whose weights are given at run time, for example by a gate."""
        return tuple(
            node
            for node in self.nodes
            if isinstance(node, (Mixture, ProbabilityMixture)) and isinstance(node.weights, str)
        )

    mixed_at_run_time = renamed_property("Graph.mixed_at_run_time", "dynamic_mixtures")

    @cached_property
    def ordered(self) -> tuple[Node, ...]:
        """Nodes with every input before its user; otherwise in the order given."""
        done: dict[str, Node] = {}
        path: list[str] = []

        def place(name: str) -> None:
            if name in path:
                cycle = [*path[path.index(name) :], name]
                raise GraphError(f"graph '{self.name}' has a cycle: {' <- '.join(cycle)}")
            if name in done:
                return
            path.append(name)
            for source in self.by_name[name].inputs:
                place(source)
            done[path.pop()] = self.by_name[name]

        for node in self.nodes:
            place(node.name)
        return tuple(done.values())

    def _check_nodes(self) -> None:
        where, names = f"graph '{self.name}'", [node.name for node in self.nodes]
        for node in self.nodes:
            has_name = isinstance(node.name, str) and node.name
            _require(has_name, f"{where}: a {node.kind} node has no name (got {node.name!r})")
            unique = names.count(node.name) == 1
            _require(unique, f"{where}: two nodes are named '{node.name}'; names must differ")
        widths: dict[str, tuple[str, int]] = {}
        for node in self.nodes:
            if type(node) in _ALLOWED_INPUTS:
                self._check_inputs(node)
            if isinstance(node, (Mixture, ProbabilityMixture)):
                _check_weights(node, widths)
            if isinstance(node, ProbabilityMixture):
                _check_temperature(node.temperature, f"node '{node.name}'")
        _ = self.ordered  # raises for a cycle

    def _check_inputs(self, node: Node) -> None:
        where, allowed = f"{node.kind} node '{node.name}'", _ALLOWED_INPUTS[type(node)]
        _require(node.inputs, f"{where} has no inputs")
        as_tuple = not isinstance(node.inputs, str)
        _require(as_tuple, f"{where} has inputs={node.inputs!r}; pass a tuple of names")
        for name in node.inputs:
            source = self._find(name, f"node '{node.name}' takes unknown input")
            kinds = " or ".join(cls.kind for cls in allowed)
            _require(
                isinstance(source, allowed),
                f"{where} cannot take the {source.kind} node '{name}'; it takes {kinds}",
            )

    def _find(self, name: str, problem: str) -> Node:
        if name not in self.by_name:
            raise GraphError(f"{problem} '{name}'{did_you_mean(name, self.by_name)}")
        return self.by_name[name]

    def _check_term(self, term: Term) -> None:
        where = f"term '{term.name}'"
        unknown = f"{where} names the unknown node"
        _require(
            math.isfinite(term.weight) and term.weight >= 0,
            f"{where} has the weight {term.weight}; weights must be finite and not negative",
        )
        if isinstance(term, CrossEntropy):
            node = self._find(term.node, unknown)
            _require(
                isinstance(node, LEARNING),
                f"{where}: a cross-entropy needs logits, but '{node.name}' is of kind {node.kind}",
            )
        else:
            teacher, student = self._find(term.teacher, unknown), self._find(term.student, unknown)
            _check_pair(term, teacher, student, where)
            if isinstance(term, KL):
                _check_kl(term, teacher, where)
            else:
                _check_divergence(term, teacher, student, where)

    def _check_whole(self) -> None:
        where, names = f"graph '{self.name}'", [term.name for term in self.terms]
        _require(self.logits, f"{where} has no logits node")
        _require(self.terms, f"{where} has no terms: there is nothing to learn from")
        smoothing = f"label_smoothing={self.label_smoothing}"
        _require(0 <= self.label_smoothing < 1, f"{where} has {smoothing}; it must be in [0, 1)")
        for name in names:
            _require(
                names.count(name) == 1,
                f"{where} has two terms '{name}'; a node has one cross-entropy and a pair of nodes"
                " one term of a kind",
            )
        used: set[str] = set()
        for term in self.terms:
            used |= _nodes_of(term)
        for node in reversed(self.ordered):
            if node.name in used:
                used.update(node.inputs)
        for node in self.nodes:
            _require(
                node.name in used,
                f"{node.kind} node '{node.name}' reaches no term, so it can neither learn nor"
                " teach; remove it or add a term",
            )


def _require(valid: object, message: str) -> None:
    if not valid:
        raise GraphError(message)


def _check_weights(node: Mixture | ProbabilityMixture, widths: dict[str, tuple[str, int]]) -> None:
    where, count = f"node '{node.name}'", len(node.inputs)
    if isinstance(node.weights, str):
        other, width = widths.setdefault(node.weights, (node.name, count))
        _require(
            width == count,
            f"nodes '{other}' and '{node.name}' share the weights '{node.weights}' but have"
            f" {width} and {count} inputs",
        )
        return
    number = len(node.weights)
    _require(number == count, f"{where} has {count} inputs but {number} weights")
    for value in node.weights:
        _require(math.isfinite(value), f"{where} has the weight {value}; weights must be finite")
        _require(
            value >= 0 or isinstance(node, Mixture),
            f"{where} has the weight {value}; weights of probabilities must not be negative",
        )


def _nodes_of(term: Term) -> set[str]:
    return {term.node} if isinstance(term, CrossEntropy) else {term.teacher, term.student}


def _check_pair(
    term: KL | JensenShannon | DKD | MSE | L1, teacher: Node, student: Node, where: str
) -> None:
    """The rules of every term between a teacher and a student."""
    _check_temperature(term.temperature, where)
    _require(
        isinstance(student, LEARNING),
        f"{where}: the student must be logits or a mixture, but '{student.name}' is of kind"
        f" {student.kind}",
    )
    _require(teacher is not student, f"{where}: '{student.name}' cannot teach itself")
    _require(
        term.detach or not isinstance(teacher, CONSTANTS),
        f"{where}: the {teacher.kind} node '{teacher.name}' is a constant; set detach=True",
    )
    _require(
        isinstance(term.detach, bool) and isinstance(term.t2_scaling, bool),
        f"{where} has detach={term.detach!r}, t2_scaling={term.t2_scaling!r}; both must be True"
        " or False",
    )


def _check_kl(term: KL, teacher: Node, where: str) -> None:
    has_eps = math.isfinite(term.eps) and 0 <= term.eps < 1
    _require(has_eps, f"{where} has eps={term.eps}; it must be in [0, 1)")
    for field, choices in (
        ("eps_mode", ("exact", "first_order")),
        ("direction", ("teacher_first", "student_first", "symmetric")),
    ):
        value = getattr(term, field)
        words = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        _require(value in choices, f"{where} has {field}={value!r}; use {words}")
    _require(
        not term.eps or term.direction == "teacher_first",
        f"{where}: eps is defined for the teacher-first direction only; set eps=0",
    )
    _require(
        not (term.eps and term.eps_mode == "first_order" and isinstance(teacher, PROBABILITIES)),
        f"{where}: eps_mode='first_order' needs a teacher of logits, but '{teacher.name}' is of"
        f" kind {teacher.kind}; use 'exact'",
    )


def _check_divergence(
    term: JensenShannon | DKD | MSE | L1, teacher: Node, student: Node, where: str
) -> None:
    if isinstance(term, JensenShannon):
        in_range = _is_number(term.beta) and 0 < term.beta < 1
        _require(in_range, f"{where} has beta={term.beta!r}; it must be above 0 and below 1")
        return
    _require(
        isinstance(teacher, LEARNING),
        f"{where} needs a teacher of logits, but '{teacher.name}' is of kind {teacher.kind}",
    )
    if isinstance(term, DKD):
        for field in ("alpha", "beta"):
            value = getattr(term, field)
            is_weight = _is_number(value) and value >= 0
            _require(is_weight, f"{where} has {field}={value!r}; it must be finite and at least 0")
        _require(term.alpha or term.beta, f"{where} has alpha=0 and beta=0; it would be 0")
        return
    for node in (teacher, student):
        _require(
            not isinstance(node, Standardized),
            f"{where} depends on the mean of the logits, which the standardized node"
            f" '{node.name}' does not subtract; use a term with a softmax",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_temperature(value: float, where: str) -> None:
    is_positive = math.isfinite(value) and value > 0
    _require(is_positive, f"{where} has temperature={value}; it must be a positive number")
