"""What the kernels must compute for a plan, as nested tuples of numbers that are constants while
they compile.

Nothing here needs Triton or torch. Names: a *soft* is a pair (node, temperature) whose exponentials
are summed; its node's *base* temperature is the largest the node is softened with, and softs at a
whole fraction of it (up to 1/4) are powers of the base exponential, ``exp(z) = exp(z / T)^T``, so
that a node costs one exponential per column however many temperatures it has.
"""

import math
from dataclasses import dataclass, replace
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
)
from fastokd.kernels.triton.constant import Constant

LOG2E = math.log2(math.e)
MAX_POWER = 4
SKIPPED = -1
"""Kind of a derived node that a pass over the columns does not need: its row is never read."""


class Pass(NamedTuple):
    """One pass over the columns that gathers maxima and sums of exponentials.

    ``nodes``: derived nodes as (kind, inputs, first weight or -1, constants). ``slots``: softened
    nodes as (node, log2(e) / base temperature). ``softs``: (slot, power of the base exponential or
    0, ratio base temperature / temperature). ``moments``: sums weighted with a soft's exponential,
    as (soft, slot, ratio, other slot or -1, its ratio, external row or -1): of the log-probability
    of a row minus that of another row, both without the logarithms of their sums. ``crosses``:
    plain sums ``(x + eps) (log2(x + eps) - v_student * factor)`` as (external row, student, factor,
    eps). ``summed``: nodes besides the logits rows whose sums over the classes are needed.
    """

    nodes: tuple
    slots: tuple
    softs: tuple
    moments: tuple
    crosses: tuple
    summed: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Spec(Constant):
    """All a kernel knows about a plan while it compiles. One object per plan.

    ``passes`` are the pass before the main one (the cross-entropies among which selections choose;
    without slots if there is none) and the main one. ``entropies``: (term, soft, node). The edges
    all begin with (term, scale, temperature): ``edges`` go on with (soft and node whose
    probabilities weigh the difference, soft and node of the other side, gradients of either side,
    first-order eps); ``outer``, from external rows, with (student soft and node, external row,
    student first, eps, moment or cross); ``normal``, which need normalised probabilities, with
    (student soft and node, teacher node, teacher soft or -1, student first, eps, teacher gradient,
    blend or -1). ``blends`` are the probability mixtures as (node, inputs, their softs or -1, first
    weight or -1, constants, temperature). ``pulls`` tells for each soft whether a gradient flows
    through it. ``layout``: see ``_layout``.
    """

    num_logits: int
    num_externals: int
    num_terms: int
    label_smoothing: float
    widths: tuple[int, ...]
    learning: tuple[int, ...]
    use_labels: int
    use_sums: int
    passes: tuple[Pass, Pass]
    entropies: tuple
    edges: tuple
    outer: tuple
    normal: tuple
    blends: tuple
    choices: tuple[int, ...]
    pulls: tuple[int, ...]
    layout: tuple[int, ...] = ()

    @cached_property
    def bases(self) -> tuple[int, ...]:
        """For each soft the one whose power it is: itself if it has an exponential of its own."""
        return tuple(_base(self.passes[1].softs, soft) for soft in range(len(self.pulls)))

    @property
    def num_stats(self) -> int:
        return self.layout[-1]

    @property
    def first_outer(self) -> int:
        """Where the masses of external rows begin among the plain sums of the main pass (without a
        target's).
        """
        return self.num_logits * self.use_sums + len(self.passes[1].summed)

    @property
    def num_plain(self) -> int:
        """Plain sums of the main pass: of rows, then masses of external rows and crosses if there
        are any.
        """
        crosses = len(self.passes[1].crosses)
        return self.first_outer + (self.num_externals + crosses if crosses else 0)

    @property
    def num_normal(self) -> int:
        """Sums of the pass with normalised probabilities."""
        return self.layout[-1] - self.layout[-4]

    @cached_property
    def products(self) -> tuple[int, ...]:
        """For each normal edge where its products begin among those of all."""
        counts = [len(self.blends[edge[-1]][1]) if edge[-1] >= 0 else 0 for edge in self.normal]
        return tuple(sum(counts[:e]) for e in range(len(counts)))

    @property
    def num_weights(self) -> int:
        return sum(self.widths)

    def first_weight(self, source: int) -> int:
        """The position of a source's first column among all weights."""
        return sum(self.widths[: int(source)])

    @property
    def has_entropy(self) -> bool:
        return bool(self.entropies)

    @cached_property
    def mixtures(self) -> tuple:
        """The mixtures as (node, inputs, first weight or -1, constants), users before their
        inputs.
        """
        first = len(self.learning) - len(self.passes[0].nodes)
        found = [
            (first + j, *node[1:])
            for j, node in enumerate(self.passes[0].nodes)
            if node[0] == MIXTURE
        ]
        return tuple(reversed(found))

    def looks_ahead(self, soft_target: bool) -> bool:
        """Whether the main pass needs what only a pass over all columns before it can tell."""
        return bool(self.choices) or (bool(soft_target) and self.has_minimum)

    def first_partial(self, stage: int, soft_target: bool) -> int:
        """Where the sums of a pass begin among those that a program keeps for its part of a row: of
        the pass ahead (0), the main pass (1: maxima, weighted sums, plain sums), that with
        normalised probabilities (2); 3: their number.
        """
        ahead, main = self.passes
        early = self.looks_ahead(soft_target)
        dots = (self.num_logits + 1) * bool(soft_target)
        sizes = (
            (len(ahead.slots) + len(ahead.softs) + dots) * early,
            len(main.slots)
            + len(main.softs)
            + len(main.moments)
            + dots * self.use_labels * (not early)
            + self.num_plain,
            self.num_normal,
        )
        return sum(sizes[: int(stage)])

    @property
    def has_minimum(self) -> bool:
        return any(node[0] == MINIMUM for node in self.passes[1].nodes)


def _softened(plan: Plan) -> dict[int, set[float]]:
    """The temperatures with which each row of logits is softened."""
    found: dict[int, set[float]] = {}
    blends = set()
    for term in plan.terms:
        found.setdefault(term.student, set()).add(term.temperature)
        if term.kind != CROSS_ENTROPY:
            if not plan.is_probability(term.teacher):
                found.setdefault(term.teacher, set()).add(term.temperature)
            elif not plan.is_external(term.teacher):
                blends.add(term.teacher)
    for blend in blends:
        node = plan.nodes[blend - plan.first_derived]
        for k in node.inputs:
            if not plan.is_external(k):
                found.setdefault(k, set()).add(node.temperature)
    return found


def _slots_and_softs(
    found: dict[int, set[float]],
) -> tuple[tuple, tuple, dict[tuple[int, float], int]]:
    slots, softs, index = [], [], {}
    for node in sorted(found):
        base = max(found[node])
        for temperature in sorted(found[node], reverse=True):
            ratio = base / temperature
            power = (
                round(ratio)
                if abs(ratio - round(ratio)) < 1e-12 and ratio <= MAX_POWER + 0.5
                else 0
            )
            index[node, temperature] = len(softs)
            softs.append((len(slots), power, ratio))
        slots.append((node, LOG2E / base))
    return tuple(slots), tuple(softs), index


def _base(softs: tuple, soft: int) -> int:
    slot, power, _ = softs[soft]
    return (
        next(other for other, row in enumerate(softs) if row[:2] == (slot, 1))
        if power > 1
        else soft
    )


@lru_cache(maxsize=512)
def specialise(plan: Plan) -> Spec:
    """The kernels' constants for a plan."""
    nodes = _derived(plan)
    slots, softs, index = _slots_and_softs(_softened(plan))
    entropies, edges, outer, normal, blends = [], [], [], [], []
    moments, outer_moments, crosses, summed, pulls = [], [], [], set(), set()
    for number, term in enumerate(plan.terms):
        student = index[term.student, term.temperature]
        factor = LOG2E / term.temperature
        common = (number, term.scale, term.temperature)
        if term.kind == CROSS_ENTROPY:
            entropies.append((number, student, term.student))
            pulls.add(student)
            continue
        reverse = int(term.direction == STUDENT_FIRST)
        exact = term.eps if term.eps_mode == EPS_EXACT else 0.0
        pulls.add(student)
        if plan.is_external(term.teacher):
            outer.append(
                (
                    *common,
                    student,
                    term.student,
                    term.teacher,
                    reverse,
                    exact,
                    len(outer_moments) if reverse else len(crosses),
                )
            )
            if reverse:
                outer_moments.append(
                    (student, softs[student][0], softs[student][2], -1, 1.0, term.teacher)
                )
            else:
                crosses.append((term.teacher, term.student, factor, exact))
            continue
        gradient = int(not term.detach)
        teacher = -1 if plan.is_probability(term.teacher) else index[term.teacher, term.temperature]
        if teacher < 0 or exact:
            if teacher < 0 and term.teacher not in blends:
                blends.append(term.teacher)
            blend = blends.index(term.teacher) if teacher < 0 else -1
            normal.append(
                (
                    *common,
                    student,
                    term.student,
                    term.teacher,
                    teacher,
                    reverse,
                    exact,
                    gradient,
                    blend,
                )
            )
            if teacher < 0 and gradient:
                row = plan.nodes[term.teacher - plan.first_derived]
                pulls.update(
                    index[k, row.temperature] for k in row.inputs if not plan.is_external(k)
                )
            continue
        # The row whose probabilities weigh the difference comes first.
        sides = ((teacher, term.teacher, gradient), (student, term.student, 1))
        (soft, node, pull), (other_soft, other, other_pull) = reversed(sides) if reverse else sides
        first_order = term.eps if term.eps_mode == EPS_FIRST_ORDER else 0.0
        edges.append((*common, soft, node, other_soft, other, pull, other_pull, first_order))
        moments.append(
            (soft, softs[soft][0], softs[soft][2], softs[other_soft][0], softs[other_soft][2], -1)
        )
        if gradient:
            pulls.add(teacher)
        if first_order and plan.kind(term.teacher) in (MINIMUM, SELECTION):
            summed.add(term.teacher)

    # Rows of probability mixtures need normalised probabilities: they belong to neither of these
    # passes.
    main = Pass(
        _without(nodes, PROBABILITY_MIXTURE),
        slots,
        softs,
        tuple(moments + outer_moments),
        tuple(crosses),
        tuple(sorted(summed)),
    )
    candidates = {k: {1.0} for node in plan.nodes if node.kind == SELECTION for k in node.inputs}
    first = Pass(
        _without(nodes, PROBABILITY_MIXTURE, MINIMUM, SELECTION),
        *_slots_and_softs(candidates)[:2],
        (),
        (),
        (),
    )
    spec = Spec(
        num_logits=plan.num_logits,
        num_externals=plan.num_externals,
        num_terms=plan.num_terms,
        label_smoothing=plan.label_smoothing,
        widths=plan.weight_widths,
        learning=tuple(
            int(plan.is_learning(k)) for k in range(plan.first_derived + len(plan.nodes))
        ),
        use_labels=int(
            bool(entropies) or any(node.kind == MINIMUM for node in plan.nodes) or bool(candidates)
        ),
        use_sums=int(plan.label_smoothing > 0 or any(edge[-1] for edge in edges)),
        passes=(first, main),
        entropies=tuple(entropies),
        edges=tuple(edges),
        outer=tuple((*edge[:-1], edge[-1] + len(moments) * edge[6]) for edge in outer),
        normal=tuple(normal),
        blends=tuple(_blend(plan, nodes, node, index) for node in blends),
        choices=tuple(j for j, node in enumerate(plan.nodes) if node.kind == SELECTION),
        pulls=tuple(
            int(soft in pulls or any(_base(softs, other) == soft for other in pulls))
            for soft in range(len(softs))
        ),
    )
    return replace(spec, layout=_layout(spec))


def _derived(plan: Plan) -> tuple[tuple, ...]:
    """The derived nodes as (kind, inputs, first weight, constants); for a selection its number
    instead of the weight.
    """
    offsets = [sum(plan.weight_widths[:s]) for s in range(len(plan.weight_widths))]
    selections = [j for j, node in enumerate(plan.nodes) if node.kind == SELECTION]
    nodes = []
    for j, node in enumerate(plan.nodes):
        first = offsets[node.source] if node.source >= 0 else -1
        nodes.append(
            (
                node.kind,
                node.inputs,
                selections.index(j) if j in selections else first,
                node.constants,
            )
        )
    return tuple(nodes)


def _without(nodes: tuple, *kinds: int) -> tuple:
    return tuple((SKIPPED, (), -1, ()) if node[0] in kinds else node for node in nodes)


def _blend(plan: Plan, nodes: tuple, blend: int, index: dict[tuple[int, float], int]) -> tuple:
    _, inputs, first, constants = nodes[blend - plan.first_derived]
    temperature = plan.nodes[blend - plan.first_derived].temperature
    softs = tuple(-1 if plan.is_external(k) else index[k, temperature] for k in inputs)
    return blend, inputs, softs, first, constants, temperature


def _layout(spec: Spec) -> tuple[int, ...]:
    """Where each group of a row's statistics begins, and their number.

    The groups: scaled maxima by slot; sums by soft; moments, divided by their sums; label logits by
    logits row; sums over the classes by logits row, then of the rows in ``summed``; the mass of the
    target (NaN for a label out of range); choices; masses of external rows; for each normal edge
    its value and the mean of its teacher side; masses of blends; and for each normal edge with a
    gradient into its blend one product per input.
    """
    main = spec.passes[1]
    products = sum(len(spec.blends[edge[-1]][1]) for edge in spec.normal if edge[-1] >= 0)
    sizes = (
        len(main.slots),
        len(main.softs),
        len(main.moments),
        spec.num_logits * spec.use_labels,
        spec.num_logits * spec.use_sums,
        len(main.summed),
        1,
        len(spec.choices),
        spec.num_externals * bool(main.crosses),
        2 * len(spec.normal),
        len(spec.blends),
        products,
    )
    return tuple(sum(sizes[:k]) for k in range(len(sizes) + 1))
