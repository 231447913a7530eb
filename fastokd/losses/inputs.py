"""A loss's graph, and its inputs for a batch."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastokd.graph import DKD, Graph, Plan, lower
from fastokd.losses import checks
from fastokd.losses.dense import DenseLayout
from fastokd.ops.inputs import is_transformed

MOST_SIGNATURES = 1000


class ExtraTerm(NamedTuple):
    """A term that is not computed from logits, but for example from feature maps or weights."""

    coefficient: float
    """Factor by which the term's value is multiplied."""
    scheduled: bool = False
    """True if the value is also multiplied by ``kd_weight``."""


class LoweredGraph(NamedTuple):
    """A graph, its plan, and the names of its inputs in error messages."""

    graph: Graph
    plan: Plan
    unsmoothed: Plan
    """The plan without label smoothing, for targets that contain it."""
    row_labels: tuple[str, ...]
    weight_labels: Mapping[str, str]
    checked: set[Any]
    """Signatures of inputs that have passed ``check``."""

    @classmethod
    def of(cls, graph: Graph, labels: Mapping[str, str]) -> "LoweredGraph":
        """Lower a graph; ``labels`` replace the default names of logits rows and weights."""
        labels = {**labels, graph.teacher: "teacher"}
        rows = tuple(labels.get(name, f"logits[{i}]") for i, name in enumerate(graph.logits))
        weights = {name: labels.get(name, f"weights['{name}']") for name in graph.weight_sources}
        plan = lower(graph)
        return cls(graph, plan, plan._replace(label_smoothing=0.0), rows, weights, set())

    def with_teacher(
        self, change: Callable[[Graph], Graph], *arguments: Any, **options: Any
    ) -> "LoweredGraph":
        """The graph with a frozen teacher, see ``Graph.with_teacher``, after ``change``."""
        labels = dict(zip(self.graph.logits, self.row_labels, strict=True))
        graph = change(self.graph.with_teacher(*arguments, **options))
        return self.of(graph, {**labels, **self.weight_labels})

    def check(self, given: "GraphInputs", target: Tensor) -> Tensor:
        """Check everything that the operator receives, and return the first row of logits.

        All checks but that of labels depend on shapes, dtypes and devices alone, and are skipped
        for those that have passed before.
        """
        signature = None if is_transformed() else self._signature(given, target)
        if signature is not None and signature in self.checked:
            checks.check_labels(target, given.logits[0])
            return given.logits[0]
        first = checks.check_rows(given.logits, self.row_labels)
        widths = self.graph.weight_sources
        checks.check_weights(given.weights, widths, first, self.weight_labels)
        for name in self.graph.externals:
            checks.check_external(name, given.externals, first)
        checks.check_target(target, first)
        if self.plan.needs_labels and target.is_floating_point():
            terms = ", ".join(term.name for term in self.graph.terms if isinstance(term, DKD))
            raise ValueError(
                f"target has class probabilities, but the graph's terms {terms} need labels:"
                " decoupled distillation separates the label's class from the others"
            )
        if signature is not None and len(self.checked) < MOST_SIGNATURES:
            self.checked.add(signature)
        return first

    def _signature(self, given: "GraphInputs", target: Tensor) -> Hashable:
        """The properties that ``check`` depends on; None if they cannot be compared."""
        try:
            weights = [given.weights[name] for name in self.weight_labels]
            externals = [given.externals[name] for name in self.graph.externals]
            tensors = *given.logits, *weights, *externals, target
            signature = tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors])
            hash(signature)
        except (AttributeError, KeyError, TypeError):
            return None
        return signature, target.requires_grad


class GraphInputs(NamedTuple):
    """The inputs of a loss's graph for one batch."""

    logits: Sequence[Tensor]
    """The graph's rows of logits in their order, each [B, C]."""
    weights: Mapping[str, Tensor] = {}
    """Weights by source name: [B, K], or [K] for the same weights in every row."""
    externals: Mapping[str, Tensor] = {}
    """Probabilities [B, C] by the name of the external node."""
    extras: Mapping[str, Tensor] = {}
    """The 0-d value of every extra term."""
    lowered: LoweredGraph | None = None
    """The graph to run if the loss has several with the same terms; None for ``self.lowered``."""

    def as_rows(self, layout: DenseLayout, lowered: LoweredGraph) -> "GraphInputs":
        """The inputs with those of a dense layout as rows."""

        def rows(value: Tensor, label: str) -> Tensor:
            is_dense = isinstance(value, Tensor) and value.dim() > 2
            return layout.rows(value, label) if is_dense else value

        logits = [
            rows(row, label) for row, label in zip(self.logits, lowered.row_labels, strict=False)
        ]
        weights = {
            name: layout.weights(value, lowered.weight_labels.get(name, name))
            for name, value in self.weights.items()
        }
        externals = {
            name: rows(value, f"externals['{name}']") for name, value in self.externals.items()
        }
        return self._replace(logits=logits, weights=weights, externals=externals)
