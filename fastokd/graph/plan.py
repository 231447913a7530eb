"""Lowering: a graph becomes a flat, hashable plan of integers and floats, which every executor
reads.

Node ids: the logits rows come first (0 .. num_logits-1), then the external rows, then the derived
nodes in topological order. Term weights are not part of a plan: they are run-time data, so that
changing one recompiles nothing.

A term of the graph lowers to one or two terms of the plan, whose sum it is: its value is their
common *output*. A standardized node lowers to a mixture of one input, whose run-time weight follows
those of the graph. DKD lowers to terms between *non-target* nodes: rows of logits without the
label's class.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

from fastokd.graph.graph import Graph
from fastokd.graph.nodes import (
    DKD,
    KL,
    MSE,
    CrossEntropy,
    Distillation,
    External,
    JensenShannon,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    ProbabilityMixture,
    Standardized,
    Term,
)

T = TypeVar("T")
PLAN_VERSION = 2

MIXTURE, PROBABILITY_MIXTURE, MINIMUM, SELECTION, NON_TARGET = 0, 1, 2, 3, 4
CROSS_ENTROPY, KL_TERM, TARGET_KL, SQUARED_ERROR, ABSOLUTE_ERROR = 0, 1, 2, 3, 4
EPS_NONE, EPS_FIRST_ORDER, EPS_EXACT = 0, 1, 2
TEACHER_FIRST, STUDENT_FIRST, JENSEN_SHANNON = 0, 1, 2

_KINDS = {
    Mixture: MIXTURE,
    Standardized: MIXTURE,
    ProbabilityMixture: PROBABILITY_MIXTURE,
    MinLogit: MINIMUM,
    LowestCrossEntropy: SELECTION,
}


class PlanNode(NamedTuple):
    """A derived node. ``source`` is the index of the run-time weight tensor, or -1 if ``constants``
    hold the weights; ``temperature`` is that of a probability mixture. The row of a non-target node
    is its one input with the label's class at -inf; no other node has it as an input.
    """

    kind: int
    inputs: tuple[int, ...]
    source: int
    constants: tuple[float, ...]
    temperature: float


class PlanTerm(NamedTuple):
    """A term. Only ``kind``, ``student`` and ``output`` matter for a cross-entropy.

    A ``TARGET_KL`` is the divergence of the pairs (probability of the label, of all other classes)
    of the inputs of two non-target nodes. The two errors are means over the classes.
    """

    kind: int
    student: int
    teacher: int = -1
    temperature: float = 1.0
    scale: float = 1.0
    """The term's factor, such as T^2."""
    detach: int = 0
    direction: int = TEACHER_FIRST
    eps_mode: int = EPS_NONE
    eps: float = 0.0
    beta: float = 0.0
    """Of a Jensen-Shannon divergence."""
    output: int = 0
    """The number of the graph's term that it is a part of."""


class Plan(NamedTuple):
    """A lowered graph. Hashable; equal graphs (whatever their names) give equal plans."""

    num_logits: int
    num_externals: int
    weight_widths: tuple[int, ...]
    nodes: tuple[PlanNode, ...]
    terms: tuple[PlanTerm, ...]
    label_smoothing: float

    @property
    def num_terms(self) -> int:
        """T, the number of the graph's terms."""
        return self.terms[-1].output + 1

    @property
    def label_terms(self) -> tuple[bool, ...]:
        """For each of the graph's terms whether it is a cross-entropy with the target."""
        by_output = {term.output: term.kind == CROSS_ENTROPY for term in self.terms}
        return tuple(by_output.values())

    @property
    def needs_labels(self) -> bool:
        """True if class probabilities cannot be the target."""
        return any(node.kind == NON_TARGET for node in self.nodes)

    @property
    def first_derived(self) -> int:
        """The id of the first derived node."""
        return self.num_logits + self.num_externals

    def is_external(self, node: int) -> bool:
        return self.num_logits <= node < self.first_derived

    def kind(self, node: int) -> int | None:
        """The kind of a derived node; None for logits and external rows."""
        return None if node < self.first_derived else self.nodes[node - self.first_derived].kind

    def is_learning(self, node: int) -> bool:
        """True for rows of logits that can learn: branches, their mixtures, non-target rows."""
        return node < self.num_logits or self.kind(node) in (MIXTURE, NON_TARGET)

    def is_probability(self, node: int) -> bool:
        """True for rows that are probabilities already: external rows and probability mixtures."""
        return self.is_external(node) or self.kind(node) == PROBABILITY_MIXTURE

    def encode(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The plan as two flat arrays: what the registered operator and the C ABI take.

        Integers: version, num_logits, num_externals, S, the S weight widths, N derived nodes, each
        as (kind, source, K, K inputs), the number of terms, each as (kind, student, teacher,
        detach, direction, eps_mode, output). Floats: label_smoothing; per node (temperature, then
        K constants if source is -1); per term (temperature, scale, eps, beta).
        """
        return _encode(self)


@lru_cache(maxsize=512)
def _encode(plan: Plan) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ints = [PLAN_VERSION, plan.num_logits, plan.num_externals]
    ints += [len(plan.weight_widths), *plan.weight_widths, len(plan.nodes)]
    floats = [plan.label_smoothing]
    for node in plan.nodes:
        ints += [node.kind, node.source, len(node.inputs), *node.inputs]
        floats += [node.temperature, *node.constants]
    ints.append(len(plan.terms))
    for term in plan.terms:
        ints += [term.kind, term.student, term.teacher, term.detach, term.direction, term.eps_mode]
        ints.append(term.output)
        floats += [term.temperature, term.scale, term.eps, term.beta]
    return tuple(ints), tuple(floats)


@lru_cache(maxsize=512)
def decode_plan(ints: tuple[int, ...], floats: tuple[float, ...]) -> Plan:
    """The inverse of ``Plan.encode``; a ValueError for arrays of another version or length."""
    if not ints or ints[0] != PLAN_VERSION:
        version = ints[0] if ints else None
        raise ValueError(f"plan version {version} is not {PLAN_VERSION}: lower the graph again")
    int_at, float_at = iter(ints[1:]), iter(floats)
    num_logits, num_externals, num_sources = _take(int_at, 3)
    widths = _take(int_at, num_sources)
    (label_smoothing,), (num_nodes,) = _take(float_at, 1), _take(int_at, 1)
    nodes, terms = [], []
    for _ in range(num_nodes):
        kind, source, count = _take(int_at, 3)
        inputs, (temperature,) = _take(int_at, count), _take(float_at, 1)
        weighted = source < 0 and kind in (MIXTURE, PROBABILITY_MIXTURE)
        constants = _take(float_at, count if weighted else 0)
        nodes.append(PlanNode(kind, inputs, source, constants, temperature))
    for _ in range(*_take(int_at, 1)):
        kind, student, teacher, detach, direction, eps_mode, output = _take(int_at, 7)
        temperature, scale, eps, beta = _take(float_at, 4)
        numbers = (temperature, scale, detach, direction, eps_mode, eps, beta, output)
        terms.append(PlanTerm(kind, student, teacher, *numbers))
    if next(int_at, None) is not None or next(float_at, None) is not None:
        raise ValueError("the encoded plan is too long: pass both arrays of one Plan.encode()")
    return Plan(num_logits, num_externals, widths, tuple(nodes), tuple(terms), label_smoothing)


def _take(values: Iterator[T], count: int) -> tuple[T, ...]:
    taken = tuple(itertools.islice(values, count))
    if len(taken) < count:
        fix = "pass both arrays of Plan.encode() whole"
        raise ValueError(f"the encoded plan is cut short: {fix}")
    return taken


def lower(graph: Graph) -> Plan:
    """Lower a graph to its plan."""
    derived = [node for node in graph.ordered if not isinstance(node, (Logits, External))]
    names = (*graph.logits, *graph.externals, *(node.name for node in derived))
    ids = {name: index for index, name in enumerate(names)}
    sources = [*graph.weight_sources, *(node.name for node in graph.standardized)]

    nodes = []
    for node in derived:
        weights = node.name if isinstance(node, Standardized) else getattr(node, "weights", ())
        source = sources.index(weights) if isinstance(weights, str) else -1
        constants = () if source >= 0 else tuple(map(float, weights))
        inputs = tuple(ids[name] for name in node.inputs)
        temperature = float(getattr(node, "temperature", 1.0))
        nodes.append(PlanNode(_KINDS[type(node)], inputs, source, constants, temperature))
    others = _NonTargetNodes(nodes, len(ids))
    terms = [
        part._replace(output=output)
        for output, term in enumerate(graph.terms)
        for part in _lower_term(term, ids, others)
    ]
    widths = (*graph.weight_sources.values(), *[1] * len(graph.standardized))
    counts, smoothing = (len(graph.logits), len(graph.externals)), float(graph.label_smoothing)
    return Plan(*counts, widths, tuple(nodes), tuple(terms), smoothing)


class _NonTargetNodes:
    """The ids of the non-target nodes by their input; new ones are added to the nodes."""

    def __init__(self, nodes: list[PlanNode], first: int) -> None:
        self.nodes, self.next_id, self.ids = nodes, first, dict[int, int]()

    def __getitem__(self, node: int) -> int:
        if node not in self.ids:
            self.nodes.append(PlanNode(NON_TARGET, (node,), -1, (), 1.0))
            self.ids[node], self.next_id = self.next_id, self.next_id + 1
        return self.ids[node]


def _lower_term(term: Term, ids: dict[str, int], others: _NonTargetNodes) -> list[PlanTerm]:
    """The parts of a term of the graph."""
    if isinstance(term, CrossEntropy):
        return [PlanTerm(CROSS_ENTROPY, ids[term.node])]
    pair = ids[term.student], ids[term.teacher]
    if isinstance(term, DKD):
        part = _pair_term(TARGET_KL, term, others[pair[0]], others[pair[1]])
        parts = part, part._replace(kind=KL_TERM)
        factors = term.alpha, term.beta
        return [
            each._replace(scale=each.scale * factor)
            for each, factor in zip(parts, factors, strict=True)
            if factor
        ]
    if isinstance(term, JensenShannon):
        part = _pair_term(KL_TERM, term, *pair)
        return [part._replace(direction=JENSEN_SHANNON, beta=float(term.beta))]
    if not isinstance(term, KL):
        return [_pair_term(SQUARED_ERROR if isinstance(term, MSE) else ABSOLUTE_ERROR, term, *pair)]
    eps_mode = EPS_EXACT if term.eps_mode == "exact" else EPS_FIRST_ORDER
    part = _pair_term(KL_TERM, term, *pair)
    part = part._replace(eps_mode=eps_mode if term.eps else EPS_NONE, eps=float(term.eps))
    swapped = part._replace(direction=STUDENT_FIRST)
    if term.direction == "symmetric":
        half = part.scale / 2
        return [part._replace(scale=half), swapped._replace(scale=half)]
    return [swapped if term.direction == "student_first" else part]


def _pair_term(kind: int, term: Distillation, student: int, teacher: int) -> PlanTerm:
    detach = int(term.detach)
    return PlanTerm(kind, student, teacher, float(term.temperature), term.scale, detach)
