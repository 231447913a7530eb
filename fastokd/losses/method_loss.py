"""The base class of the methods' losses: a graph loss that is built from options."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from fastokd.errors import did_you_mean
from fastokd.graph import KL, Graph
from fastokd.losses.checks import as_rows
from fastokd.losses.graph_loss import ExtraTerm, GraphInputs, GraphLoss, Rows, overridable
from fastokd.losses.options import COMMON, Impl, Option, Reduction, options_of

Presets = Mapping[str, Mapping[str, Any]]
"""Values of a loss's options by the name of the preset."""


class MethodLoss(GraphLoss):
    """The loss of a method. It adds only the construction to ``GraphLoss``.

    There are two ways to write one. A class with its own constructor passes a graph to this
    constructor. A class under ``loss_options`` declares its options as attributes and overrides
    ``build_graph``, and ``labels`` and ``build_extra_terms`` where it needs to.

    Args:
        graph: the distillation graph.
        num_branches: M, the number of rows in ``branch_logits``; they are the graph's first M rows
            of logits.
        reduction, impl, labels, extra_terms: as in ``GraphLoss``.
    """

    presets: ClassVar[Presets] = {"paper": {}}

    # What ``teach`` uses for losses that do not declare these options.
    temperature: float = 1.0
    detach_teacher: bool = True
    teacher_eps: float = 0.0

    def __init__(
        self,
        graph: Graph,
        num_branches: int,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        labels: Mapping[str, str] | None = None,
        extra_terms: Mapping[str, ExtraTerm] | None = None,
    ) -> None:
        branches = graph.logits[:num_branches]
        names = {name: f"branch_logits[{index}]" for index, name in enumerate(branches)}
        names.update(labels or {})
        super().__init__(
            graph, reduction, impl, names, num_branches=num_branches, extra_terms=extra_terms
        )

    def __post_init__(self) -> None:
        """The constructor of classes under ``loss_options``, after their options are set."""
        options = options_of(type(self))
        for name, option in options.items():
            option.check(name, getattr(self, name))
        values = {name: getattr(self, name) for name in COMMON}
        MethodLoss.__init__(
            self,
            self.build_graph(),
            **values,
            labels=self.labels(),
            extra_terms=self.build_extra_terms(),
        )

    def build_graph(self) -> Graph:
        """The graph of these options."""
        raise NotImplementedError(f"{type(self).__name__} does not build a graph")

    def labels(self) -> Mapping[str, str]:
        """The names of rows and weights in error messages, by their names in the graph."""
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
        parameters = inspect.signature(cls).parameters
        declared = options_of(cls) or {
            name: Option(parameter.default, "") for name, parameter in parameters.items()
        }
        return {name: option for name, option in declared.items() if name not in COMMON}

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
        return GraphInputs(as_rows(branch_logits, self.num_branches, "branch_logits"))
