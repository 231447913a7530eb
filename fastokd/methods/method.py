"""The description of a method: its loss, modules and schedule, and the layout of its networks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fastokd._moved import moved_names
from fastokd.losses.method_loss import MethodLoss
from fastokd.losses.options import Option, OptionValue, options_of
from fastokd.methods.modules import BranchOutput, MethodModules

Topology = Literal["branches", "peers"]
"""``branches`` share a trunk; ``peers`` are whole networks that share nothing."""
MAX_BRANCHES = 8
"""The most branches of methods whose loss has no own limit."""


def ramp_up(epoch: int, length: int) -> float:
    """``kd_weight`` in a 0-based epoch e, ``exp(-5 (1 - min(e, E) / E)^2)`` with ``length`` E (AHBF
    eq. 13); 1 if E is 0.
    """
    if length < 0 or epoch < 0:
        raise ValueError(f"ramp_up(epoch={epoch}, length={length}): both must be at least 0")
    if length == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


Ramp = tuple[int, int]
"""A number of epochs and the number of epochs of the published run it was used in."""


@dataclass(frozen=True)
class Schedule:
    """The factor ``kd_weight`` of the distillation terms over a run.

    Attributes:
        ramp: the published length of the ramp, which is scaled to the run; a mapping from presets
            that have one; or a function of the number of epochs and the preset.
        kd_weight: ``kd_weight`` in a 0-based epoch, from the epoch and the ramp's length.
        min_epochs: the shortest ramp.
    """

    ramp: Ramp | Mapping[str, Ramp] | Callable[[int, str], int] = (0, 1)
    kd_weight: Callable[[int, int], float] = ramp_up
    min_epochs: int = 0

    def ramp_epochs(self, epochs: int, preset: str) -> int:
        """The length of the ramp in a run of this many epochs."""
        if callable(self.ramp):
            return self.ramp(epochs, preset)
        ramp = self.ramp if isinstance(self.ramp, tuple) else self.ramp.get(preset, (0, 1))
        return max(round(epochs * ramp[0] / ramp[1]), self.min_epochs)


@dataclass(frozen=True)
class MethodBatch:
    """The part of a batch that a loss sees."""

    target: Tensor
    """int64 [B], or floating [B, C] class probabilities."""
    index: Tensor | None = None
    """int64 [B], the samples' positions in the training split."""
    teacher: Tensor | None = None
    """[B, C], stored rows of a frozen teacher."""


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name, summary: for the command line.
        loss_class: ``loss_class(num_branches=..., **options)`` builds the loss, whose ``presets``
            name bundles of options.
        branch_range, default_branches: the numbers of branches M that it supports; by default those
            of the loss's option ``num_branches``, at most 8.
        build_companion: ``build_companion(spec, **options)`` builds the method's modules; None for
            none. It raises a ValueError with the reason for networks that the method cannot train.
        model_options: the options of ``build_companion``, ``views`` and the teacher, by name.
        topologies: the supported layouts of the networks, the default first.
        hierarchical: whether branch m gets the auxiliary blocks of hierarchy level m.
        kept: index of the branch that becomes the student; -1 is the last.
        reports_mean: the published number is the mean accuracy over the branches, which is then
            measured too (``branch_mean``).
        needs_index: the loss needs the samples' positions in the training split.
        needs_teacher: there is always a frozen teacher, named by the option ``teacher``. The loss
            takes its rows as ``teacher``; the loss's option ``teacher_rows`` states what they are.
        views: the name of the model option that gives every peer its own augmented view of an
            image, as ``branch_views`` of a run does for any method; empty for none.
        schedule: ``kd_weight`` over a run.
    """

    name: str
    summary: str
    loss_class: type[MethodLoss]
    branch_range: tuple[int, int] = (0, 0)
    default_branches: int = 0
    build_companion: Callable[..., MethodModules] | None = None
    model_options: Mapping[str, Option] = field(default_factory=dict)
    topologies: tuple[Topology, ...] = ("branches",)
    hierarchical: bool = False
    kept: int = 0
    reports_mean: bool = False
    needs_index: bool = False
    needs_teacher: bool = False
    views: str = ""
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if not self.default_branches:
            option = options_of(self.loss_class)["num_branches"]
            limits = int(option.ge or 1), int(option.le or MAX_BRANCHES)
            object.__setattr__(self, "branch_range", limits)
            object.__setattr__(self, "default_branches", option.default)

    def default_model_options(self) -> dict[str, OptionValue]:
        """The default values of ``model_options``."""
        return {name: option.default for name, option in self.model_options.items()}

    def loss(
        self,
        criterion: MethodLoss,
        output: BranchOutput,
        batch: MethodBatch,
        *,
        kd_weight: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss of a model's output for a batch, see ``GraphLoss.forward``."""
        inputs = self._loss_inputs(output, batch)
        loss: Tensor = criterion(output.logits, batch.target, kd_weight=kd_weight, **inputs)
        return loss

    def forward_backward(
        self,
        criterion: MethodLoss,
        output: BranchOutput,
        batch: MethodBatch,
        *,
        kd_weight: float | Tensor = 1.0,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its backward pass, see ``GraphLoss.forward_backward``."""
        inputs = self._loss_inputs(output, batch)
        return criterion.forward_backward(
            output.logits, batch.target, kd_weight=kd_weight, scale=scale, **inputs
        )

    def named_logits(self, criterion: MethodLoss, output: BranchOutput) -> dict[str, Tensor]:
        """The rows whose accuracy is measured, see ``GraphLoss.named_logits``."""
        return criterion.named_logits(output.logits, **output.extras)

    def mixing_weights(
        self, criterion: MethodLoss, output: BranchOutput, target: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """The weights of the gates, see ``GraphLoss.mixing_weights``."""
        return criterion.mixing_weights(output.logits, target, **output.extras)

    def _loss_inputs(self, output: BranchOutput, batch: MethodBatch) -> dict[str, Any]:
        """The keywords of the loss's ``graph_inputs``."""
        inputs = dict(output.extras)
        if self.needs_index:
            inputs["index"] = batch.index
        if batch.teacher is not None:
            inputs["teacher"] = batch.teacher
        return inputs


def _run_result(
    features: tuple[Tensor, ...], logits: tuple[Tensor, ...], passed_on: Any = None
) -> BranchOutput:
    """The former constructor of ``MethodModules.run``'s result."""
    return BranchOutput(logits, features, context=passed_on)


__getattr__ = moved_names(
    __name__,
    {
        "fastokd.methods.modules": (
            "BranchPass",
            "Companion=MethodModules",
            "Layout=BranchSpec",
            "ParameterGroup",
        ),
        "fastokd.losses.graph_loss": ("ExtraTerm", "GraphInputs"),
        "fastokd.losses.method_loss": ("Presets",),
        "fastokd.losses": ("GraphLoss",),
        "fastokd.methods.method": ("RunResult=_run_result",),
    },
)
