"""The constants of the kernels for one plan. No Triton, no torch.

Glossary. ``kernels/cpu`` uses the same words (see ``program.hpp``).

- *Node*: a row of values per sample: logits, an external row of probabilities, or a derived node.
- *Softmax*: one node at one temperature. Its exponentials are summed over the classes.
- *Base*: a softmax whose exponentials are computed. The exponentials of a *derived* softmax of the
  same node are their second, third or fourth power: ``exp(z) = exp(z / T)^T``. So a node usually
  takes one exponential per column, however many temperatures it has.
- *Scaled node*: a node times ``log2(e) / T`` with its highest temperature T.
- *Edge*: a KL term ``sum_c p_first (log p_first - log p_second)``. *First* is the
  teacher, or the student if the term's direction is student first.
- *Moment*: the mean of ``log p_first - log p_second`` under ``p_first``, without the logarithms of
  the two sums. An edge between two rows of logits needs no more than its moment.
- *External edge*: an edge whose teacher is an external row.
- *Normalized edge*: an edge that needs normalized probabilities, because its teacher is a
  probability mixture, because an exact eps is added to the teacher's probabilities, or because it
  is a Jensen-Shannon divergence. It takes a separate pass over the columns, after the sums are
  known.
- *Non-target node*: a row of logits without the label's class.
- *Target edge*: the KL divergence of the pairs (probability of the label, of all other classes) of
  two rows of logits.
- *Error*: the mean squared or absolute difference of two rows of logits.
- *Output*: a term of the graph, the sum of one or two terms here, which name it ``term``.
- *Statistics*: the values per row that the forward pass keeps for the backward pass.
- *Pass*: one reading of all columns. The *main pass* takes the sums. The *first pass* runs before
  it where selections or minima need it, the *normalized pass* after it where edges need it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fastokd.graph.plan import MINIMUM, MIXTURE, NON_TARGET
from fastokd.kernels.triton.constant import Constant

FIRST_PASS, MAIN_PASS, NORMALIZED_PASS = 0, 1, 2
SKIPPED = -1
"""Kind of a derived node that a pass does not need: its row is never read."""


class DerivedNode(NamedTuple):
    """A mixture, minimum, selection or non-target node."""

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


class Error(NamedTuple):
    """An error between two rows of logits."""

    term: int
    scale: float
    slope: float
    """The scale of the gradient"""
    student: int
    teacher: int
    teacher_learns: bool
    squared: bool


class Pass(NamedTuple):
    """One pass over the columns that takes maxima and sums of exponentials."""

    nodes: tuple[DerivedNode, ...]
    scaled_nodes: tuple[ScaledNode, ...]
    softmaxes: tuple[Softmax, ...]
    moments: tuple[Moment, ...] = ()
    external_products: tuple[ExternalProduct, ...] = ()
    summed_nodes: tuple[int, ...] = ()
    """Derived nodes whose values are summed over the classes"""
    errors: tuple[Error, ...] = ()


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
    """-1 if the teacher is a row of probabilities"""
    teacher_learns: bool
    student_first: bool
    eps: float
    prob_mixture: int
    """-1 if the teacher is another row"""
    first_product: int
    """Position of its first sum for the mixture's inputs among those of all edges"""
    external: int
    """-1 if the teacher is another row"""
    beta: float
    """Of a Jensen-Shannon divergence; 0 for others"""


class TargetEdge(NamedTuple):
    """A target edge. Nodes are the rows of logits, softmaxes those of their non-target nodes."""

    term: int
    scale: float
    temperature: float
    student: int
    student_softmax: int
    teacher: int
    teacher_softmax: int
    teacher_learns: bool


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
    """Value and mean of the teacher's side, by normalized edge; of a Jensen-Shannon divergence the
    parts of the student and the teacher"""
    prob_masses: Span
    """By probability mixture"""
    products: Span
    """By normalized edge from a probability mixture and its input"""
    target_slopes: Span
    """By target edge, for the student's and the teacher's logit of the label's probability"""


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
    target_edges: tuple[TargetEdge, ...]
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
            2 * len(self.target_edges),
        )
        return StatsLayout(*(Span(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))))

    @property
    def num_stats(self) -> int:
        return self.layout.target_slopes.stop

    @property
    def first_external_sum(self) -> int:
        """Number of plain sums of the main pass before the masses of external rows."""
        return self.num_logits * self.use_row_sums + len(self.main.summed_nodes)

    @property
    def first_error(self) -> int:
        """Number of plain sums of the main pass before the errors."""
        products = len(self.main.external_products)
        return self.first_external_sum + (self.num_externals + products if products else 0)

    @property
    def num_plain(self) -> int:
        """Number of plain sums of the main pass: of rows, then masses of external rows and
        external products if there are any, then errors.
        """
        return self.first_error + len(self.main.errors)

    @property
    def use_target_coefs(self) -> bool:
        """True if the label's logit has a separate gradient."""
        return bool(self.cross_entropies or self.target_edges)

    @property
    def non_target(self) -> tuple[int, ...]:
        """The non-target nodes."""
        return tuple(node.node for node in self.main.nodes if node.kind == NON_TARGET)

    @property
    def num_running_sums(self) -> int:
        """Number of maxima and weighted sums of the main pass."""
        main = self.main
        return len(main.scaled_nodes) + len(main.softmaxes) + len(main.moments)

    @property
    def num_normalized(self) -> int:
        """Number of sums of the normalized pass."""
        return self.layout.products.stop - self.layout.normalized.start

    @property
    def num_weights(self) -> int:
        return sum(self.widths)

    def first_weight(self, source: int) -> int:
        """Position of a source's first column among all weights."""
        return sum(self.widths[: int(source)])

    @cached_property
    def mixtures(self) -> tuple[DerivedNode, ...]:
        """Mixtures of logits and non-target nodes, each before its inputs."""
        kinds = MIXTURE, NON_TARGET
        return tuple(node for node in reversed(self.first.nodes) if node.kind in kinds)

    def input_learns(self, mixture: int, position: int) -> bool:
        """True if a gradient flows through an input of a probability mixture."""
        softmax = self.prob_mixtures[int(mixture)].softmaxes[int(position)]
        return softmax >= 0 and self.main.softmaxes[softmax].learns

    def needs_first_pass(self, soft_target: bool) -> bool:
        """True if the main pass depends on a pass over all columns before it."""
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
