"""The graph itself: nodes, terms, and every rule a graph must keep, checked when it is made."""

import math
from dataclasses import dataclass
from functools import cached_property

from fastokd._moved import warn_renamed
from fastokd.errors import GraphError, did_you_mean
from fastokd.graph.nodes import (
    CrossEntropy,
    External,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Node,
    ProbabilityMixture,
    Term,
)

CONSTANTS = (External, MinLogit, LowestCrossEntropy)
_ALLOWED_INPUTS = {
    Mixture: (Logits, Mixture),
    ProbabilityMixture: (Logits, Mixture, External),
    MinLogit: (Logits, Mixture),
    LowestCrossEntropy: (Logits, Mixture),
}


@dataclass(frozen=True)
class Graph:
    """A distillation loss: named nodes, and the terms whose weighted sum is the loss of a sample.

    Raises:
        GraphError: the graph breaks a rule; the message names the node or the term.
    """

    name: str
    nodes: tuple[Node, ...]
    terms: tuple[Term, ...]
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "terms", tuple(self.terms))
        self._check_nodes()
        self._check_acyclic()
        for term in self.terms:
            self._check_term(term)
        self._check_whole()

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def logits(self) -> tuple[str, ...]:
        """The names of the logits rows in the order in which they are passed to the loss."""
        return tuple(node.name for node in self.nodes if isinstance(node, Logits))

    @property
    def externals(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if isinstance(node, External))

    @property
    def mixtures(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if isinstance(node, Mixture))

    @cached_property
    def weight_sources(self) -> dict[str, int]:
        """Name and number of columns of each weight tensor given at run time, in order of first
        use.
        """
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

    @property
    def mixed_at_run_time(self) -> tuple[Mixture | ProbabilityMixture, ...]:
        """The former name of ``dynamic_mixtures``."""
        warn_renamed("Graph.mixed_at_run_time", "dynamic_mixtures")
        return self.dynamic_mixtures

    @cached_property
    def ordered(self) -> tuple[Node, ...]:
        """Nodes with every input before its user; otherwise in the order given."""
        done: dict[str, Node] = {}

        def place(node: Node) -> None:
            if node.name in done:
                return
            for name in node.inputs:
                place(self.by_name[name])
            done[node.name] = node

        for node in self.nodes:
            place(node)
        return tuple(done.values())

    def _check_nodes(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            if not isinstance(node.name, str) or not node.name:
                raise GraphError(
                    f"graph '{self.name}': a {node.kind} node has no name (got {node.name!r})"
                )
            if node.name in seen:
                raise GraphError(
                    f"graph '{self.name}': two nodes are named '{node.name}'; names must differ"
                )
            seen.add(node.name)
        widths: dict[str, tuple[str, int]] = {}
        for node in self.nodes:
            allowed = _ALLOWED_INPUTS.get(type(node))
            if allowed is None:
                continue
            if not node.inputs:
                raise GraphError(f"{node.kind} node '{node.name}' has no inputs")
            if isinstance(node.inputs, str):
                raise GraphError(
                    f"{node.kind} node '{node.name}' has inputs={node.inputs!r}; pass a tuple of"
                    " names"
                )
            for name in node.inputs:
                if name not in seen:
                    raise GraphError(
                        f"node '{node.name}' takes unknown input '{name}'{did_you_mean(name, seen)}"
                    )
                source = self.by_name[name]
                if not isinstance(source, allowed):
                    kinds = " or ".join(cls.kind for cls in allowed)
                    raise GraphError(
                        f"{node.kind} node '{node.name}' cannot take the {source.kind} node"
                        f" '{name}'; it takes {kinds}"
                    )
            if isinstance(node, (Mixture, ProbabilityMixture)):
                self._check_weights(node, widths)
            if isinstance(node, ProbabilityMixture):
                _check_temperature(node.temperature, f"node '{node.name}'")

    def _check_weights(
        self, node: Mixture | ProbabilityMixture, widths: dict[str, tuple[str, int]]
    ) -> None:
        count = len(node.inputs)
        if isinstance(node.weights, str):
            other, width = widths.setdefault(node.weights, (node.name, count))
            if width != count:
                raise GraphError(
                    f"nodes '{other}' and '{node.name}' share the weights '{node.weights}' but have"
                    f" {width} and {count} inputs"
                )
            return
        if len(node.weights) != count:
            raise GraphError(
                f"node '{node.name}' has {count} inputs but {len(node.weights)} weights"
            )
        for value in node.weights:
            if not math.isfinite(value):
                raise GraphError(
                    f"node '{node.name}' has the weight {value}; weights must be finite"
                )
            if value < 0 and isinstance(node, ProbabilityMixture):
                raise GraphError(
                    f"node '{node.name}' has the weight {value}; weights of probabilities must not"
                    " be negative"
                )

    def _check_acyclic(self) -> None:
        state: dict[str, int] = {}
        path: list[str] = []

        def visit(name: str) -> None:
            if state.get(name) == 2:
                return
            if state.get(name) == 1:
                cycle = [*path[path.index(name) :], name]
                raise GraphError(f"graph '{self.name}' has a cycle: {' <- '.join(cycle)}")
            state[name] = 1
            path.append(name)
            for source in self.by_name[name].inputs:
                visit(source)
            path.pop()
            state[name] = 2

        for node in self.nodes:
            visit(node.name)

    def _node(self, name: str, term: Term) -> Node:
        if name not in self.by_name:
            raise GraphError(
                f"term '{term.name}' names the unknown node"
                f" '{name}'{did_you_mean(name, self.by_name)}"
            )
        return self.by_name[name]

    def _check_term(self, term: Term) -> None:
        where = f"term '{term.name}'"
        if not (math.isfinite(term.weight) and term.weight >= 0):
            raise GraphError(
                f"{where} has the weight {term.weight}; weights must be finite and not negative"
            )
        if isinstance(term, CrossEntropy):
            node = self._node(term.node, term)
            if not isinstance(node, (Logits, Mixture)):
                raise GraphError(
                    f"{where}: a cross-entropy needs logits, but '{node.name}' is a"
                    f" {node.kind} node"
                )
            return
        teacher, student = self._node(term.teacher, term), self._node(term.student, term)
        _check_temperature(term.temperature, where)
        if not isinstance(student, (Logits, Mixture)):
            raise GraphError(
                f"{where}: the student must be logits or a mixture, but '{student.name}'"
                f" is a {student.kind} node"
            )
        if teacher is student:
            raise GraphError(f"{where}: '{student.name}' cannot teach itself")
        if isinstance(teacher, CONSTANTS) and not term.detach:
            raise GraphError(
                f"{where}: the {teacher.kind} node '{teacher.name}' is a constant; set detach=True"
            )
        if not isinstance(term.detach, bool) or not isinstance(term.t2_scaling, bool):
            raise GraphError(
                f"{where} has detach={term.detach!r}, t2_scaling={term.t2_scaling!r};"
                " both must be True or False"
            )
        if not (math.isfinite(term.eps) and 0 <= term.eps < 1):
            raise GraphError(f"{where} has eps={term.eps}; it must be in [0, 1)")
        if term.eps_mode not in ("exact", "first_order"):
            raise GraphError(
                f"{where} has eps_mode={term.eps_mode!r}; use 'exact' or 'first_order'"
            )
        if term.direction not in ("teacher_first", "student_first"):
            raise GraphError(
                f"{where} has direction={term.direction!r}; use 'teacher_first' or 'student_first'"
            )
        if term.eps and term.direction == "student_first":
            raise GraphError(
                f"{where}: eps is defined for the teacher-first direction only; set eps=0"
            )
        if (
            term.eps
            and term.eps_mode == "first_order"
            and isinstance(teacher, (External, ProbabilityMixture))
        ):
            raise GraphError(
                f"{where}: eps_mode='first_order' needs a teacher of logits, but"
                f" '{teacher.name}' is a {teacher.kind} node; use 'exact'"
            )

    def _check_whole(self) -> None:
        where = f"graph '{self.name}'"
        if not self.logits:
            raise GraphError(f"{where} has no logits node")
        if not self.terms:
            raise GraphError(f"{where} has no terms: there is nothing to learn from")
        if not 0 <= self.label_smoothing < 1:
            raise GraphError(
                f"{where} has label_smoothing={self.label_smoothing}; it must be in [0, 1)"
            )
        names = [term.name for term in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise GraphError(
                    f"{where} has two terms '{name}'; a node has one cross-entropy and"
                    " a pair of nodes one KL edge"
                )
        used: set[str] = set()
        for term in self.terms:
            used |= {term.node} if isinstance(term, CrossEntropy) else {term.teacher, term.student}
        for node in reversed(self.ordered):
            if node.name in used:
                used.update(node.inputs)
        for node in self.nodes:
            if node.name not in used:
                raise GraphError(
                    f"{node.kind} node '{node.name}' reaches no term, so it can neither learn nor"
                    " teach; remove it or add a term"
                )


def _check_temperature(value: float, where: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise GraphError(f"{where} has temperature={value}; it must be a positive number")
