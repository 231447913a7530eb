"""From a plan to the constants of the kernels. No Triton, no torch."""

import math
from functools import lru_cache

from fastokd.graph.plan import (
    CROSS_ENTROPY,
    EPS_EXACT,
    EPS_FIRST_ORDER,
    JENSEN_SHANNON,
    MINIMUM,
    NON_TARGET,
    PROBABILITY_MIXTURE,
    SELECTION,
    SQUARED_ERROR,
    STUDENT_FIRST,
    TARGET_KL,
    Plan,
    PlanTerm,
)
from fastokd.kernels.triton.spec import (
    SKIPPED,
    CrossEntropyTerm,
    DerivedNode,
    Edge,
    Error,
    ExternalEdge,
    ExternalProduct,
    Moment,
    NormalizedEdge,
    Pass,
    ProbMixture,
    ScaledNode,
    Softmax,
    Spec,
    TargetEdge,
)

LOG2E = math.log2(math.e)
MAX_POWER = 4

_Temperatures = dict[int, set[float]]
_Index = dict[tuple[int, float], int]


def _softmax_temperatures(plan: Plan) -> _Temperatures:
    """Temperatures of the softmaxes of each node in the main pass."""
    temperatures: _Temperatures = {}
    mixtures = set()
    for term in plan.terms:
        if term.kind >= SQUARED_ERROR:
            continue
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
        self.target_edges: list[TargetEdge] = []
        self.errors: list[Error] = []
        self.prob_mixtures: list[ProbMixture] = []
        self.moments: list[Moment] = []
        self.external_moments: list[Moment] = []
        self.external_products: list[ExternalProduct] = []
        self.summed_nodes: set[int] = set()
        self.learning: set[int] = set()
        self.num_products = 0
        for term in plan.terms:
            self._add(term.output, term)

    def _add(self, number: int, term: PlanTerm) -> None:
        if term.kind >= SQUARED_ERROR:
            pair, squared = (term.student, term.teacher), term.kind == SQUARED_ERROR
            slope = term.scale * (2.0 if squared else 1.0)
            self.errors.append(Error(number, term.scale, slope, *pair, not term.detach, squared))
            return
        student = self.index[term.student, term.temperature]
        self.learning.add(student)
        if term.kind == CROSS_ENTROPY:
            self.cross_entropies.append(CrossEntropyTerm(number, term.student, student))
        elif term.kind == TARGET_KL:
            self._add_target(number, term)
        elif self.plan.is_external(term.teacher) and term.direction != JENSEN_SHANNON:
            self._add_external(number, term)
        elif (
            term.direction == JENSEN_SHANNON
            or self.plan.is_probability(term.teacher)
            or self._exact_eps(term)
        ):
            self._add_normalized(number, term)
        else:
            self._add_edge(number, term)

    @staticmethod
    def _exact_eps(term: PlanTerm) -> float:
        return term.eps if term.eps_mode == EPS_EXACT else 0.0

    def _add_target(self, number: int, term: PlanTerm) -> None:
        teacher = self.index[term.teacher, term.temperature]
        if not term.detach:
            self.learning.add(teacher)
        inputs = [
            self.nodes[k - self.plan.first_derived].inputs for k in (term.student, term.teacher)
        ]
        self.target_edges.append(
            TargetEdge(
                term=number,
                scale=term.scale,
                temperature=term.temperature,
                student=inputs[0][0],
                student_softmax=self.index[term.student, term.temperature],
                teacher=inputs[1][0],
                teacher_softmax=teacher,
                teacher_learns=not term.detach,
            )
        )

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
        from_external = plan.is_external(term.teacher)
        from_mixture = plan.is_probability(term.teacher) and not from_external
        from_logits = not (from_external or from_mixture)
        mixture = self._prob_mixture(term.teacher) if from_mixture else -1
        self.normalized_edges.append(
            NormalizedEdge(
                term=number,
                scale=term.scale,
                temperature=term.temperature,
                student=term.student,
                student_softmax=self.index[term.student, term.temperature],
                teacher=term.teacher,
                teacher_softmax=self.index[term.teacher, term.temperature] if from_logits else -1,
                teacher_learns=not term.detach,
                student_first=term.direction == STUDENT_FIRST,
                eps=self._exact_eps(term),
                prob_mixture=mixture,
                first_product=self.num_products,
                external=term.teacher if from_external else -1,
                beta=term.beta,
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
            tuple(self.errors),
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
        use_label_logits=bool(
            builder.cross_entropies or builder.target_edges or has_minimum or candidates
        ),
        use_row_sums=plan.label_smoothing > 0 or any(edge.eps for edge in builder.edges),
        passes=(first, builder.main_pass()),
        cross_entropies=tuple(builder.cross_entropies),
        edges=tuple(builder.edges),
        external_edges=builder.numbered_external_edges(),
        normalized_edges=tuple(builder.normalized_edges),
        target_edges=tuple(builder.target_edges),
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
                # A non-target node passes its gradient on like a mixture of one input.
                (1.0,) if node.kind == NON_TARGET else node.constants,
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
