"""The constants with which the kernels compute one plan. No Triton, no torch.

Glossary. ``kernels/cpu`` uses the same words (see ``program.hpp``).

- *Node*: a row of values per sample: logits, an external row of probabilities, or a derived node.
- *Softmax*: one node at one temperature. Its exponentials are summed over the classes.
- *Base*: a softmax whose exponentials are computed. The exponentials of a *derived* softmax of the
  same node are their second, third or fourth power: ``exp(z) = exp(z / T)^T``. So a node usually
  takes one exponential per column, however many temperatures it has.
- *Scaled node*: a node times ``log2(e) / T`` with its highest temperature T.
- *Edge*: a KL term ``sum_c p_first (log p_first - log p_second)``. The teacher is *first*, or the
  student if the direction says so.
- *Moment*: the mean of ``log p_first - log p_second`` under ``p_first``, without the logarithms of
  the two sums. An edge between two rows of logits needs no more than its moment.
- *External edge*: an edge whose teacher is an external row.
- *Normalized edge*: an edge that needs normalized probabilities, because its teacher is a
  probability mixture or because an exact eps is added to the teacher's probabilities. It takes a
  pass over the columns of its own, after the sums are known.
- *Statistics*: the values per row that the forward pass keeps for the backward pass.
- *Pass*: one reading of all columns. The *main pass* takes the sums. The *first pass* runs before
  it where selections or minima need it, the *normalized pass* after it where edges need it.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from fastokd.graph.plan import (
    CROSS_ENTROPY,
    EPS_EXACT,
    EPS_FIRST_ORDER,
    MINIMUM,
    MIXTURE,
    PROBABILITY_MIXTURE,
    SELECTION,
    STUDENT_FIRST,
    Plan,
    PlanTerm,
)
from fastokd.kernels.triton.constant import Constant

LOG2E = math.log2(math.e)
MAX_POWER = 4
FIRST_PASS, MAIN_PASS, NORMALIZED_PASS = 0, 1, 2
SKIPPED = -1
"""Kind of a derived node that a pass does not need: its row is never read."""


class DerivedNode(NamedTuple):
    """A mixture, minimum or selection."""

    node: int
    kind: int
    inputs: tuple[int, ...]
    first_weight: int
    """Position of its first weight among all run-time weights; -1: ``constants`` are the weights"""
    constants: tuple[float, ...]
    selection: int
    """Number of this selection; -1 for other kinds"""


class ScaledNode(NamedTuple):
    """A node that at least one softmax is taken of."""

    node: int
    scale: float
    """log2(e) / highest temperature"""


class Softmax(NamedTuple):
    """The exponentials of one node at one temperature."""

    node: int
    scaled_node: int
    ratio: float
    """Highest temperature of the node / temperature"""
    power: int
    """The exponential is this power of the base's; 0: it is computed separately"""
    base: int
    """The base softmax; itself unless ``power`` is above 1"""
    learns: bool = False
    """A gradient flows through it, or through a softmax derived from it"""


class Moment(NamedTuple):
    """A sum of value differences, weighted with the exponentials of a softmax."""

    softmax: int
    first: int
    """Scaled node"""
    first_ratio: float
    second: int
    """Scaled node; -1 if the second row is external"""
    second_ratio: float
    external: int
    """External row whose logarithm is subtracted; -1: none"""


class ExternalProduct(NamedTuple):
    """A sum ``(x + eps) (log2(x + eps) - student * factor)`` over an external row x."""

    external: int
    student: int
    factor: float
    eps: float


class Pass(NamedTuple):
    """One pass over the columns that takes maxima and sums of exponentials."""

    nodes: tuple[DerivedNode, ...]
    scaled_nodes: tuple[ScaledNode, ...]
    softmaxes: tuple[Softmax, ...]
    moments: tuple[Moment, ...] = ()
    external_products: tuple[ExternalProduct, ...] = ()
    summed_nodes: tuple[int, ...] = ()
    """Derived nodes whose values are summed over the classes"""


class CrossEntropyTerm(NamedTuple):
    """A cross-entropy with the target."""

    term: int
    student: int
    softmax: int


class Edge(NamedTuple):
    """A KL term between two rows of logits. Its moment has the same index."""

    term: int
    scale: float
    temperature: float
    first: int
    first_softmax: int
    first_learns: bool
    second: int
    second_softmax: int
    second_learns: bool
    eps: float
    """Of the first-order approximation"""


class ExternalEdge(NamedTuple):
    """A KL term with an external row of probabilities as teacher."""

    term: int
    scale: float
    temperature: float
    student: int
    student_softmax: int
    teacher: int
    student_first: bool
    eps: float
    moment: int
    """If ``student_first``, else -1"""
    product: int
    """Its ``ExternalProduct`` if not ``student_first``, else -1"""


class NormalizedEdge(NamedTuple):
    """A KL term that needs normalized probabilities."""

    term: int
    scale: float
    temperature: float
    student: int
    student_softmax: int
    teacher: int
    teacher_softmax: int
    """-1 if the teacher is a probability mixture"""
    teacher_learns: bool
    student_first: bool
    eps: float
    prob_mixture: int
    """-1 if the teacher is a row of logits"""
    first_product: int
    """Position of its first sum for the mixture's inputs among those of all edges"""


class ProbMixture(NamedTuple):
    """A probability mixture."""

    node: int
    inputs: tuple[int, ...]
    softmaxes: tuple[int, ...]
    """Of the inputs; -1 for external rows"""
    first_weight: int
    constants: tuple[float, ...]
    temperature: float


class Span(NamedTuple):
    """Positions of one group of a row's statistics."""

    start: int
    stop: int


class StatsLayout(NamedTuple):
    """Order of a row's statistics."""

    maxima: Span
    """Scaled maxima, by scaled node"""
    sums: Span
    """Sums of exponentials, by softmax"""
    means: Span
    """Moments divided by their sums of exponentials"""
    label_logits: Span
    """By row of logits"""
    row_sums: Span
    """Sums over the classes, by row of logits"""
    summed_nodes: Span
    mass: Span
    """Mass of the target; NaN if the label is out of range"""
    chosen: Span
    """Position of the chosen input, by selection"""
    external_masses: Span
    normalized: Span
    """Value and mean of the teacher's side, by normalized edge"""
    prob_masses: Span
    """By probability mixture"""
    products: Span
    """By normalized edge from a probability mixture and its input"""


@dataclass(frozen=True, eq=False, repr=False)
class Spec(Constant):
    """Constants of the kernels for one plan. One object per plan.

    Attributes:
        widths: columns of each source of run-time weights.
        use_label_logits: the label logits of the nodes are needed.
        use_row_sums: the sums of the nodes over the classes are needed.
        passes: the first pass (without scaled nodes if no selection needs it) and the main pass.
        selections: positions of the selections among the derived nodes.
    """

    num_logits: int
    num_externals: int
    num_nodes: int
    num_terms: int
    label_smoothing: float
    widths: tuple[int, ...]
    use_label_logits: bool
    use_row_sums: bool
    passes: tuple[Pass, Pass]
    cross_entropies: tuple[CrossEntropyTerm, ...]
    edges: tuple[Edge, ...]
    external_edges: tuple[ExternalEdge, ...]
    normalized_edges: tuple[NormalizedEdge, ...]
    prob_mixtures: tuple[ProbMixture, ...]
    selections: tuple[int, ...]

    @property
    def first(self) -> Pass:
        return self.passes[FIRST_PASS]

    @property
    def main(self) -> Pass:
        return self.passes[MAIN_PASS]

    @cached_property
    def layout(self) -> StatsLayout:
        main = self.main
        mixtures = [edge.prob_mixture for edge in self.normalized_edges if edge.prob_mixture >= 0]
        sizes = (
            len(main.scaled_nodes),
            len(main.softmaxes),
            len(main.moments),
            self.num_logits * self.use_label_logits,
            self.num_logits * self.use_row_sums,
            len(main.summed_nodes),
            1,
            len(self.selections),
            self.num_externals * bool(main.external_products),
            2 * len(self.normalized_edges),
            len(self.prob_mixtures),
            sum(len(self.prob_mixtures[number].inputs) for number in mixtures),
        )
        return StatsLayout(*(Span(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))))

    @property
    def num_stats(self) -> int:
        return self.layout.products.stop

    @property
    def first_external_sum(self) -> int:
        """Number of plain sums of the main pass before the masses of external rows."""
        return self.num_logits * self.use_row_sums + len(self.main.summed_nodes)

    @property
    def num_plain(self) -> int:
        """Number of plain sums of the main pass: of rows, then masses of external rows and
        external products if there are any.
        """
        products = len(self.main.external_products)
        return self.first_external_sum + (self.num_externals + products if products else 0)

    @property
    def num_running_sums(self) -> int:
        """Number of maxima and weighted sums of the main pass."""
        main = self.main
        return len(main.scaled_nodes) + len(main.softmaxes) + len(main.moments)

    @property
    def num_normalized(self) -> int:
        """Number of sums of the normalized pass."""
        return self.num_stats - self.layout.normalized.start

    @property
    def num_weights(self) -> int:
        return sum(self.widths)

    def first_weight(self, source: int) -> int:
        """Position of a source's first column among all weights."""
        return sum(self.widths[: int(source)])

    @cached_property
    def mixtures(self) -> tuple[DerivedNode, ...]:
        """Mixtures of logits, each before its inputs."""
        return tuple(node for node in reversed(self.first.nodes) if node.kind == MIXTURE)

    def needs_first_pass(self, soft_target: bool) -> bool:
        """Whether the main pass depends on a pass over all columns before it."""
        return bool(self.selections) or (bool(soft_target) and self.has_minimum)

    def num_partials(self, soft_target: bool) -> int:
        """Number of sums that each program keeps for its part of a split row."""
        return self.first_partial(NORMALIZED_PASS + 1, soft_target)

    def first_partial(self, number: int, soft_target: bool) -> int:
        """Position of the sums of a pass among those of all passes. The main pass has maxima,
        weighted sums, then plain sums.
        """
        first, main = self.passes
        early = self.needs_first_pass(soft_target)
        target_sums = (self.num_logits + 1) * bool(soft_target)
        sizes = (
            (len(first.scaled_nodes) + len(first.softmaxes) + target_sums) * early,
            len(main.scaled_nodes)
            + len(main.softmaxes)
            + len(main.moments)
            + target_sums * self.use_label_logits * (not early)
            + self.num_plain,
            self.num_normalized,
        )
        return sum(sizes[: int(number)])

    @property
    def has_minimum(self) -> bool:
        return any(node.kind == MINIMUM for node in self.main.nodes)


_Temperatures = dict[int, set[float]]
_Index = dict[tuple[int, float], int]


def _softmax_temperatures(plan: Plan) -> _Temperatures:
    """Temperatures of the softmaxes of each node in the main pass."""
    temperatures: _Temperatures = {}
    mixtures = set()
    for term in plan.terms:
        temperatures.setdefault(term.student, set()).add(term.temperature)
        if term.kind != CROSS_ENTROPY:
            if not plan.is_probability(term.teacher):
                temperatures.setdefault(term.teacher, set()).add(term.temperature)
            elif not plan.is_external(term.teacher):
                mixtures.add(term.teacher)
    for mixture in mixtures:
        node = plan.nodes[mixture - plan.first_derived]
        for k in node.inputs:
            if not plan.is_external(k):
                temperatures.setdefault(k, set()).add(node.temperature)
    return temperatures


def _softmaxes(temperatures: _Temperatures) -> tuple[tuple[ScaledNode, ...], list[Softmax], _Index]:
    """Scaled nodes, softmaxes, and the index of each softmax by node and temperature."""
    scaled_nodes: list[ScaledNode] = []
    softmaxes: list[Softmax] = []
    index: _Index = {}
    for node in sorted(temperatures):
        highest = max(temperatures[node])
        first = len(softmaxes)
        for temperature in sorted(temperatures[node], reverse=True):
            ratio = highest / temperature
            whole = abs(ratio - round(ratio)) < 1e-12 and ratio <= MAX_POWER + 0.5
            power = round(ratio) if whole else 0
            number = index[node, temperature] = len(softmaxes)
            base = first if power > 1 else number
            softmaxes.append(Softmax(node, len(scaled_nodes), ratio, power, base))
        scaled_nodes.append(ScaledNode(node, LOG2E / highest))
    return tuple(scaled_nodes), softmaxes, index


class _Builder:
    """Collects the terms of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.nodes = _derived_nodes(plan)
        self.scaled_nodes, self.softmaxes, self.index = _softmaxes(_softmax_temperatures(plan))
        self.cross_entropies: list[CrossEntropyTerm] = []
        self.edges: list[Edge] = []
        self.external_edges: list[ExternalEdge] = []
        self.normalized_edges: list[NormalizedEdge] = []
        self.prob_mixtures: list[ProbMixture] = []
        self.moments: list[Moment] = []
        self.external_moments: list[Moment] = []
        self.external_products: list[ExternalProduct] = []
        self.summed_nodes: set[int] = set()
        self.learning: set[int] = set()
        self.num_products = 0
        for number, term in enumerate(plan.terms):
            self._add(number, term)

    def _add(self, number: int, term: PlanTerm) -> None:
        student = self.index[term.student, term.temperature]
        self.learning.add(student)
        if term.kind == CROSS_ENTROPY:
            self.cross_entropies.append(CrossEntropyTerm(number, term.student, student))
        elif self.plan.is_external(term.teacher):
            self._add_external(number, term)
        elif self.plan.is_probability(term.teacher) or self._exact_eps(term):
            self._add_normalized(number, term)
        else:
            self._add_edge(number, term)

    @staticmethod
    def _exact_eps(term: PlanTerm) -> float:
        return term.eps if term.eps_mode == EPS_EXACT else 0.0

    def _add_external(self, number: int, term: PlanTerm) -> None:
        student = self.index[term.student, term.temperature]
        softmax = self.softmaxes[student]
        eps = self._exact_eps(term)
        student_first = term.direction == STUDENT_FIRST
        moment = product = -1
        if student_first:
            moment = len(self.external_moments)
            self.external_moments.append(
                Moment(student, softmax.scaled_node, softmax.ratio, -1, 1.0, term.teacher)
            )
        else:
            product = len(self.external_products)
            self.external_products.append(
                ExternalProduct(term.teacher, term.student, LOG2E / term.temperature, eps)
            )
        self.external_edges.append(
            ExternalEdge(
                term=number,
                scale=term.scale,
                temperature=term.temperature,
                student=term.student,
                student_softmax=student,
                teacher=term.teacher,
                student_first=student_first,
                eps=eps,
                moment=moment,
                product=product,
            )
        )

    def _add_normalized(self, number: int, term: PlanTerm) -> None:
        plan = self.plan
        from_mixture = plan.is_probability(term.teacher)
        mixture = self._prob_mixture(term.teacher) if from_mixture else -1
        self.normalized_edges.append(
            NormalizedEdge(
                term=number,
                scale=term.scale,
                temperature=term.temperature,
                student=term.student,
                student_softmax=self.index[term.student, term.temperature],
                teacher=term.teacher,
                teacher_softmax=-1 if from_mixture else self.index[term.teacher, term.temperature],
                teacher_learns=not term.detach,
                student_first=term.direction == STUDENT_FIRST,
                eps=self._exact_eps(term),
                prob_mixture=mixture,
                first_product=self.num_products,
            )
        )
        if not from_mixture:
            return
        self.num_products += len(self.prob_mixtures[mixture].inputs)
        if not term.detach:
            inputs = self.prob_mixtures[mixture].softmaxes
            self.learning.update(softmax for softmax in inputs if softmax >= 0)

    def _prob_mixture(self, node: int) -> int:
        """Number of a probability mixture, which is added if it is new."""
        for number, mixture in enumerate(self.prob_mixtures):
            if mixture.node == node:
                return number
        plan = self.plan
        derived = self.nodes[node - plan.first_derived]
        temperature = plan.nodes[node - plan.first_derived].temperature
        softmaxes = tuple(
            -1 if plan.is_external(k) else self.index[k, temperature] for k in derived.inputs
        )
        self.prob_mixtures.append(
            ProbMixture(
                node,
                derived.inputs,
                softmaxes,
                derived.first_weight,
                derived.constants,
                temperature,
            )
        )
        return len(self.prob_mixtures) - 1

    def _add_edge(self, number: int, term: PlanTerm) -> None:
        teacher_learns = not term.detach
        student = (term.student, self.index[term.student, term.temperature], True)
        teacher = (term.teacher, self.index[term.teacher, term.temperature], teacher_learns)
        first, second = (
            (student, teacher) if term.direction == STUDENT_FIRST else (teacher, student)
        )
        eps = term.eps if term.eps_mode == EPS_FIRST_ORDER else 0.0
        self.edges.append(Edge(number, term.scale, term.temperature, *first, *second, eps))
        first_softmax, second_softmax = self.softmaxes[first[1]], self.softmaxes[second[1]]
        self.moments.append(
            Moment(
                first[1],
                first_softmax.scaled_node,
                first_softmax.ratio,
                second_softmax.scaled_node,
                second_softmax.ratio,
                -1,
            )
        )
        if teacher_learns:
            self.learning.add(teacher[1])
        if eps and self.plan.kind(term.teacher) in (MINIMUM, SELECTION):
            self.summed_nodes.add(term.teacher)

    def main_pass(self) -> Pass:
        learning = self.learning | {self.softmaxes[number].base for number in self.learning}
        # Probability mixtures need normalized probabilities and so the normalized pass.
        return Pass(
            _without(self.nodes, PROBABILITY_MIXTURE),
            self.scaled_nodes,
            tuple(
                softmax._replace(learns=number in learning)
                for number, softmax in enumerate(self.softmaxes)
            ),
            tuple(self.moments + self.external_moments),
            tuple(self.external_products),
            tuple(sorted(self.summed_nodes)),
        )

    def numbered_external_edges(self) -> tuple[ExternalEdge, ...]:
        """The external edges, whose moments follow those of the edges between logits."""
        return tuple(
            edge._replace(moment=edge.moment + len(self.moments)) if edge.student_first else edge
            for edge in self.external_edges
        )


@lru_cache(maxsize=512)
def specialize(plan: Plan) -> Spec:
    """Return the kernels' constants for a plan."""
    builder = _Builder(plan)
    candidates = {k: {1.0} for node in plan.nodes if node.kind == SELECTION for k in node.inputs}
    scaled_nodes, softmaxes, _ = _softmaxes(candidates)
    first = Pass(
        _without(builder.nodes, PROBABILITY_MIXTURE, MINIMUM, SELECTION),
        scaled_nodes,
        tuple(softmaxes),
    )
    has_minimum = any(node.kind == MINIMUM for node in plan.nodes)
    return Spec(
        num_logits=plan.num_logits,
        num_externals=plan.num_externals,
        num_nodes=plan.first_derived + len(plan.nodes),
        num_terms=plan.num_terms,
        label_smoothing=plan.label_smoothing,
        widths=plan.weight_widths,
        use_label_logits=bool(builder.cross_entropies or has_minimum or candidates),
        use_row_sums=plan.label_smoothing > 0 or any(edge.eps for edge in builder.edges),
        passes=(first, builder.main_pass()),
        cross_entropies=tuple(builder.cross_entropies),
        edges=tuple(builder.edges),
        external_edges=builder.numbered_external_edges(),
        normalized_edges=tuple(builder.normalized_edges),
        prob_mixtures=tuple(builder.prob_mixtures),
        selections=tuple(j for j, node in enumerate(plan.nodes) if node.kind == SELECTION),
    )


def _derived_nodes(plan: Plan) -> tuple[DerivedNode, ...]:
    offsets = [sum(plan.weight_widths[:s]) for s in range(len(plan.weight_widths))]
    nodes: list[DerivedNode] = []
    num_selections = 0
    for j, node in enumerate(plan.nodes):
        first_weight = offsets[node.source] if node.source >= 0 else -1
        selection = num_selections if node.kind == SELECTION else -1
        num_selections += node.kind == SELECTION
        nodes.append(
            DerivedNode(
                plan.first_derived + j,
                node.kind,
                node.inputs,
                first_weight,
                node.constants,
                selection,
            )
        )
    return tuple(nodes)


def _without(nodes: tuple[DerivedNode, ...], *kinds: int) -> tuple[DerivedNode, ...]:
    """The nodes with those of some kinds replaced by skipped ones, so that positions stay."""
    return tuple(
        DerivedNode(node.node, SKIPPED, (), -1, (), -1) if node.kind in kinds else node
        for node in nodes
    )
