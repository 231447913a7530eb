"""The base class of the methods' losses: a graph loss that is built from options."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from fastokd.errors import did_you_mean
from fastokd.graph import KL, Graph, with_divergence
from fastokd.losses import options
from fastokd.losses.checks import as_rows
from fastokd.losses.graph_loss import ExtraTerm, GraphInputs, GraphLoss, Rows, overridable
from fastokd.losses.options import (
    COMMON,
    Impl,
    Option,
    Reduction,
    keyword,
    loss_options,
    options_of,
)

Presets = Mapping[str, Mapping[str, Any]]
"""Values of a loss's options by the name of the preset."""
_NO_PARAMETERS = {"alpha": None, "beta": None}


@loss_options
class MethodLoss(GraphLoss):
    """The loss of a method. It adds only the construction to ``GraphLoss``.

    There are two ways to write one. A class under ``loss_options`` declares its options as
    attributes and overrides ``build_graph``, and ``labels`` and ``build_extra_terms`` where it
    needs to. A class with its own constructor passes a graph to this constructor, whose arguments
    are those of ``GraphLoss``; the first ``num_branches`` rows of logits are ``branch_logits``.
    """

    presets: ClassVar[Presets] = {"paper": {}}

    # Values that ``teach`` uses for losses without these options.
    temperature = 1.0
    detach_teacher = True
    teacher_eps = 0.0

    label_smoothing: float = keyword(default=options.label_smoothing(), kw_only=True)
    reduction: Reduction = keyword(default=options.reduction(), kw_only=True)
    impl: Impl = keyword(default=options.impl(), kw_only=True)
    ignore_index: int | None = keyword(default=options.ignore_index(), kw_only=True)
    class_weight: Tensor | None = keyword(default=options.class_weight(), kw_only=True)
    class_dim: int = keyword(default=options.class_dim(), kw_only=True)
    divergence: str = keyword(default=options.divergence(), kw_only=True)
    divergence_alpha: float | None = keyword(
        default=options.divergence_parameter("alpha", '"dkd"'), kw_only=True
    )
    divergence_beta: float | None = keyword(
        default=options.divergence_parameter("beta", '"dkd" or "js"'), kw_only=True
    )
    standardize: bool = keyword(default=options.standardize(), kw_only=True)

    def __init__(
        self,
        graph: Graph,
        num_branches: int,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        labels: Mapping[str, str] | None = None,
        extra_terms: Mapping[str, ExtraTerm] | None = None,
        **row_options: Any,
    ) -> None:
        branches, others = graph.logits[:num_branches], graph.logits[num_branches:]
        names = {name: f"branch_logits[{index}]" for index, name in enumerate(branches)}
        names.update({name: f"{name}_logits" for name in others})
        names.update({name: name for name in graph.weight_sources})
        names.update(labels or {})
        sizes: dict[str, Any] = {"num_branches": num_branches, "extra_terms": extra_terms}
        super().__init__(graph, reduction, impl, names, **sizes, **row_options)

    def __post_init__(self) -> None:
        """The constructor of classes under ``loss_options``, after their options are set."""
        for name, option in options_of(type(self)).items():
            option.check(name, getattr(self, name))
        common = {name: getattr(self, name) for name in COMMON}
        names, extra = self.labels(), self.build_extra_terms()
        graph = self.with_divergence(self.build_graph())
        MethodLoss.__init__(self, graph, **common, labels=names, extra_terms=extra)

    def build_graph(self) -> Graph:
        """The graph of these options."""
        raise NotImplementedError(f"{type(self).__name__} does not build a graph")

    def with_divergence(self, graph: Graph) -> Graph:
        """The graph with the divergence of the options in its KL terms."""
        parameters = {"alpha": self.divergence_alpha, "beta": self.divergence_beta}
        if self.divergence == "kl" and not self.standardize and parameters == _NO_PARAMETERS:
            return graph
        return with_divergence(graph, self.divergence, **parameters, standardize=self.standardize)

    def labels(self) -> Mapping[str, str]:
        """Names of rows and weights in messages that are not ``NAME_logits`` and ``NAME``."""
        return {}

    def build_extra_terms(self) -> Mapping[str, ExtraTerm]:
        """The terms of these options that are not in the graph."""
        return {}

    @classmethod
    def preset(cls, name: str, num_branches: int | None = None, **overrides: Any) -> Self:
        """The loss with the options of a preset; ``overrides`` are constructor arguments.

        Raises:
            ValueError: there is no such preset; the message suggests the closest name.
        """
        if name not in cls.presets:
            raise ValueError(f"unknown preset '{name}'{did_you_mean(name, cls.presets)}")
        count = {} if num_branches is None else {"num_branches": num_branches}
        arguments: dict[str, Any] = {**count, **cls.presets[name], **overrides}
        return cls(**arguments)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The loss's options by name, without those that every loss has."""
        declared = options_of(cls)
        return {
            name: declared.get(name) or Option(parameter.default, "")
            for name, parameter in inspect.signature(cls).parameters.items()
            if name not in COMMON
        }

    @classmethod
    def make_graph(cls, *arguments: Any, **options: Any) -> Graph:
        """The graph of the loss with these constructor arguments."""
        return cls(*arguments, **options).graph

    def teach(self, teacher: str, student: str, weight: float, **options: Any) -> KL:
        """The KL term from a teacher to a student with the loss's temperature and options."""
        detach, eps = self.detach_teacher, self.teacher_eps
        return KL(teacher, student, weight, self.temperature, detach=detach, eps=eps, **options)

    def branch_names(self) -> tuple[str, ...]:
        """``branch1`` .. ``branchM``, for ``build_graph``."""
        return tuple(f"branch{m}" for m in range(1, self.num_branches + 1))

    @overridable
    def graph_inputs(self, branch_logits: Rows, target: Tensor | None = None) -> GraphInputs:
        """The graph's inputs for a batch, see ``GraphLoss``; ``branch_logits`` are the M rows."""
        return GraphInputs([*branch_logits])

    def _rows(self, branch_logits: Rows) -> list[Tensor]:
        return as_rows(branch_logits, self.num_branches, "branch_logits")
