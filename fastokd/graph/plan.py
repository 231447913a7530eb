"""Lowering: a graph becomes a flat, hashable plan of integers and floats, which every executor
reads.

Node ids: the logits rows come first (0 .. num_logits-1), then the external rows, then the derived
nodes in topological order. Term weights are not part of a plan: they are run-time data, so that
changing one recompiles nothing.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

from fastokd.graph.graph import Graph
from fastokd.graph.nodes import (
    KL,
    External,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    ProbabilityMixture,
)

T = TypeVar("T")
PLAN_VERSION = 1

MIXTURE, PROBABILITY_MIXTURE, MINIMUM, SELECTION = 0, 1, 2, 3
CROSS_ENTROPY, KL_TERM = 0, 1
EPS_NONE, EPS_FIRST_ORDER, EPS_EXACT = 0, 1, 2
TEACHER_FIRST, STUDENT_FIRST = 0, 1

_KINDS = {
    Mixture: MIXTURE,
    ProbabilityMixture: PROBABILITY_MIXTURE,
    MinLogit: MINIMUM,
    LowestCrossEntropy: SELECTION,
}


class PlanNode(NamedTuple):
    """A derived node. ``source`` is the index of the run-time weight tensor, or -1 if ``constants``
    hold the weights; ``temperature`` is that of a probability mixture.
    """

    kind: int
    inputs: tuple[int, ...]
    source: int
    constants: tuple[float, ...]
    temperature: float


class PlanTerm(NamedTuple):
    """A term. Only ``kind`` and ``student`` matter for a cross-entropy.

    ``scale`` is T^2, or 1 where the graph switches that off."""

    kind: int
    student: int
    teacher: int = -1
    temperature: float = 1.0
    scale: float = 1.0
    detach: int = 0
    direction: int = TEACHER_FIRST
    eps_mode: int = EPS_NONE
    eps: float = 0.0


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
        return len(self.terms)

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
        """True for rows of logits that can learn: branches and their mixtures."""
        return node < self.num_logits or self.kind(node) == MIXTURE

    def is_probability(self, node: int) -> bool:
        """True for rows that are probabilities already: external rows and probability mixtures."""
        return self.is_external(node) or self.kind(node) == PROBABILITY_MIXTURE

    def encode(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The plan as two flat arrays: what the registered operator and the C ABI take.

        Integers: version, num_logits, num_externals, S, the S weight widths, N derived nodes, each
        as (kind, source, K, K inputs), T terms, each as (kind, student, teacher, detach, direction,
        eps_mode). Floats: label_smoothing; per node (temperature, then K constants if source is
        -1); per term (temperature, scale, eps).
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
        floats += [term.temperature, term.scale, term.eps]
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
        kind, student, teacher, detach, direction, eps_mode = _take(int_at, 6)
        temperature, scale, eps = _take(float_at, 3)
        numbers = (temperature, scale, detach, direction, eps_mode, eps)
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
    sources = list(graph.weight_sources)

    nodes, terms = [], []
    for node in derived:
        weights = getattr(node, "weights", ())
        source = sources.index(weights) if isinstance(weights, str) else -1
        constants = () if source >= 0 else tuple(map(float, weights))
        inputs = tuple(ids[name] for name in node.inputs)
        temperature = float(getattr(node, "temperature", 1.0))
        nodes.append(PlanNode(_KINDS[type(node)], inputs, source, constants, temperature))
    for term in graph.terms:
        if not isinstance(term, KL):
            terms.append(PlanTerm(CROSS_ENTROPY, ids[term.node]))
            continue
        temperature = float(term.temperature)
        scale = temperature**2 if term.t2_scaling else 1.0
        direction = STUDENT_FIRST if term.direction == "student_first" else TEACHER_FIRST
        eps_mode = EPS_EXACT if term.eps_mode == "exact" else EPS_FIRST_ORDER
        terms.append(
            PlanTerm(
                KL_TERM,
                ids[term.student],
                ids[term.teacher],
                temperature,
                scale,
                int(term.detach),
                direction,
                eps_mode if term.eps else EPS_NONE,
                float(term.eps),
            )
        )
    widths, smoothing = tuple(graph.weight_sources.values()), float(graph.label_smoothing)
    counts = len(graph.logits), len(graph.externals)
    return Plan(*counts, widths, tuple(nodes), tuple(terms), smoothing)
