"""What a method is: its loss, the modules it trains beside the network, and how its networks are
laid out.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastokd.errors import did_you_mean
from fastokd.graph import Graph, draw_text
from fastokd.methods.base import GraphLoss, Impl, Reduction, as_rows

Topology = Literal["branches", "peers"]
"""``branches`` share a trunk; ``peers`` are whole networks that share nothing."""

OptionValue = float | int | bool | str
Presets = Mapping[str, Mapping[str, Any]]
"""Bundles of loss options by name."""


def ramp_up(epoch: int, length: int) -> float:
    """The weight of the distillation terms in a 0-based epoch: ``exp(-5 (1 - min(e, E) / E)^2)``
    (AHBF eq. 13).

    1 if ``length`` (E) is 0.
    """
    if length < 0 or epoch < 0:
        raise ValueError(f"ramp_up(epoch={epoch}, length={length}): both must be at least 0")
    if length == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


class ExtraTerm(NamedTuple):
    """A term of a loss that is no function of rows of logits, such as one on feature maps or on
    weights.

    ``coefficient`` is what its value is multiplied with, times ``kd_weight`` where ``scheduled``.
    """

    coefficient: float
    scheduled: bool = False


class GraphInputs(NamedTuple):
    """What a loss hands to its graph for one batch."""

    logits: Sequence[Tensor]
    """The graph's rows of logits in their order, each [B, C]."""
    weights: Mapping[str, Tensor] = {}
    externals: Mapping[str, Tensor] = {}
    extras: Mapping[str, Tensor] = {}
    """The 0-d value of every extra term."""


class MethodLoss(nn.Module):
    """The loss of a method: a distillation graph, and what makes the graph's inputs of a model's
    result.

    A method's loss states its arguments beside ``branch_logits`` and ``target`` as the keywords of
    its ``graph_inputs``.

    Args:
        graph: the distillation graph.
        num_branches: M, the rows of ``branch_logits``; they are the graph's first M rows of logits.
        reduction, impl: as in ``GraphLoss``.
        labels: what error messages call a logits row or a weight source.
        extra_terms: terms that are not in the graph, by name; they need ``reduction="mean"``.
    """

    presets: ClassVar[Presets] = {"paper": {}}
    held_out: float = 0.0
    """The fraction of every class's training images that the trainer holds out for
    ``see_held_out``.
    """

    def __init__(
        self,
        graph: Graph,
        num_branches: int,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        labels: Mapping[str, str] | None = None,
        extra_terms: Mapping[str, ExtraTerm] | None = None,
    ) -> None:
        super().__init__()
        if extra_terms and reduction != "mean":
            raise ValueError(
                f"reduction={reduction!r}: the terms {', '.join(extra_terms)} are means over the"
                " batch, use reduction='mean'"
            )
        rows = {
            name: f"branch_logits[{index}]"
            for index, name in enumerate(graph.logits[:num_branches])
        }
        self.num_branches = num_branches
        self.graph_loss = GraphLoss(graph, reduction, impl, {**rows, **(labels or {})})
        self.extra_terms = dict(extra_terms or {})

    @classmethod
    def preset(cls, name: str, num_branches: int | None = None, **overrides: Any) -> "MethodLoss":
        """The loss with a named bundle of options; ``overrides`` are constructor arguments.

        Raises:
            ValueError: there is no such preset; the message suggests the closest name.
        """
        if name not in cls.presets:
            raise ValueError(f"unknown preset '{name}'{did_you_mean(name, cls.presets)}")
        count = {} if num_branches is None else {"num_branches": num_branches}
        return cls(**count, **{**cls.presets[name], **overrides})

    @property
    def graph(self) -> Graph:
        """The distillation graph."""
        return self.graph_loss.graph

    @property
    def ensemble_members(self) -> tuple[str, ...]:
        """The rows that ``ensemble`` is made of: the inputs of the graph's mixture of that name,
        such as a leader's peers, or else all branches.
        """
        node = self.graph.by_name.get("ensemble")
        return self.graph.logits[: self.num_branches] if node is None else node.inputs

    def draw(self) -> str:
        """The graph and the terms beside it as lines of text, every coefficient multiplied out."""
        lines = [draw_text(self.graph)]
        if self.extra_terms:
            lines.append("terms that are not in the graph")
        lines += [
            f"  {term.coefficient:>16.6g}{' * kd_weight' if term.scheduled else ''}  {name}"
            for name, term in self.extra_terms.items()
        ]
        return "\n".join(lines)

    def prepare(self, num_samples: int, num_classes: int, device: torch.device) -> str:
        """Make room for what a loss remembers of every training sample. Called once, before the
        first step.

        Returns:
            How much that takes, for a run's first lines; empty if it is nothing.
        """
        return ""

    def see_held_out(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Look at the logits and labels of the images that are held out; called before every epoch
        if there are any.
        """

    def graph_inputs(
        self, branch_logits: Sequence[Tensor] | Tensor, target: Tensor | None
    ) -> GraphInputs:
        """What the graph needs, from M tensors [B, C] (or one [M, B, C]) and the target.

        ``target`` is None where rows are only measured (``named_rows``).
        """
        return GraphInputs(as_rows(branch_logits, self.num_branches, "branch_logits"))

    def _graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> GraphInputs:
        """``graph_inputs``, with an error in the loss's name for inputs that are missing or
        unknown.
        """
        try:
            return self.graph_inputs(branch_logits, target, **inputs)
        except TypeError:
            signature = inspect.signature(self.graph_inputs)
            try:
                signature.bind(branch_logits, target, **inputs)
            except TypeError as error:
                raise TypeError(
                    f"{type(self).__name__}: {error}; this loss takes"
                    f" {', '.join(signature.parameters)}"
                ) from None
            raise

    def forward(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        *,
        kd_weight: float | Tensor = 1.0,
        return_terms: bool = False,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of B samples with C classes.

        Args:
            branch_logits: M tensors [B, C], or one [M, B, C].
            target: int64 [B], or floating [B, C] class probabilities.
            kd_weight: factor of the scheduled terms: a float, or a 0-d tensor on the logits'
                device.
            return_terms: also return each term's mean over the batch before its weight, as detached
                0-d tensors.
            inputs: the keywords of ``graph_inputs``.

        Raises:
            TypeError, ValueError: an argument's type, dtype, shape, device or label is wrong; the
                message names it.
        """
        given = self._graph_inputs(branch_logits, target, inputs)
        loss, terms = self.graph_loss(
            given.logits,
            target,
            weights=given.weights,
            externals=given.externals,
            kd_weight=kd_weight,
            return_terms=True,
        )
        if given.extras:
            loss = loss + self._extra_loss(given.extras, kd_weight)
        return (loss, {**terms, **_detached(given.extras)}) if return_terms else loss

    def forward_backward(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        *,
        kd_weight: float | Tensor = 1.0,
        scale: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``forward`` and ``loss.backward()`` at once, see ``GraphLoss.forward_backward``; returns
        the loss and the terms, detached.
        """
        given = self._graph_inputs(branch_logits, target, inputs)
        extra = self._extra_loss(given.extras, kd_weight) if given.extras else None
        loss, terms = self.graph_loss.forward_backward(
            given.logits,
            target,
            weights=given.weights,
            externals=given.externals,
            kd_weight=kd_weight,
            extra=extra,
            scale=scale,
        )
        return loss, {**terms, **_detached(given.extras)}

    def _extra_loss(self, values: Mapping[str, Tensor], kd_weight: float | Tensor) -> Tensor:
        assert values.keys() == self.extra_terms.keys()
        parts = []
        for name, (coefficient, scheduled) in self.extra_terms.items():
            part = values[name] * coefficient
            parts.append(part * kd_weight if scheduled else part)
        return torch.stack(parts).sum()

    @torch.no_grad()
    def named_rows(
        self, branch_logits: Sequence[Tensor] | Tensor, **inputs: Any
    ) -> dict[str, Tensor]:
        """The logits [B, C] of every branch, head and mixture by name, for measuring their
        accuracy.

        With two or more branches there is the row ``ensemble``: the graph's mixture of that name,
        or else the mean of the logits of ``ensemble_members``.
        """
        given = self._graph_inputs(branch_logits, None, inputs)
        rows = {
            **dict(zip(self.graph.logits, given.logits, strict=True)),
            **self.graph_loss.mixtures(given.logits, given.weights),
        }
        if self.num_branches > 1 and "ensemble" not in rows:
            rows["ensemble"] = torch.stack([rows[name] for name in self.ensemble_members]).mean(0)
        return rows

    @torch.no_grad()
    def mixing_weights(
        self, branch_logits: Sequence[Tensor] | Tensor, target: Tensor | None, **inputs: Any
    ) -> dict[str, dict[str, Tensor]]:
        """For each mixture whose weights are given at run time, such as by a gate, the weight [B]
        of each of its inputs.

        Both by their names in the graph: ``{"ta2": {"branch2": ..., "branch1": ...}}``; empty for a
        graph without such a mixture. ``target`` is for losses that find the weights with it.
        """
        if not self.graph.mixed_at_run_time:
            return {}
        given = self._graph_inputs(branch_logits, target, inputs)
        batch = given.logits[0].shape[0]
        found = {}
        for node in self.graph.mixed_at_run_time:
            weights = given.weights[node.weights]
            found[node.name] = dict(
                zip(node.inputs, weights.expand(batch, -1).unbind(1), strict=True)
            )
        return found


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


class BranchPass(NamedTuple):
    """A forward pass of a branched model, as a method's modules see it."""

    images: Tensor
    """[B, 3, H, W]."""
    shared: Tensor
    """The trunk's output [B, c, H, W]; the images themselves for peers."""
    features: tuple[Tensor, ...]
    """M feature maps [B, c_m, H, W] before pooling."""
    logits: tuple[Tensor, ...]
    """M tensors [B, C]."""
    branches: Sequence[nn.Module]
    """The M branches that computed them."""
    passed_on: Any = None
    """What ``Companion.run`` passed on."""


class RunResult(NamedTuple):
    """What running the branches gives."""

    features: tuple[Tensor, ...]
    """M feature maps [B, c_m, H, W] before pooling."""
    logits: tuple[Tensor, ...]
    """M tensors [B, C]."""
    passed_on: Any = None
    """What ``Companion.run`` passes on to ``Companion.forward``."""


class ParameterGroup(NamedTuple):
    """Parameters that a method trains otherwise than the run's configuration says."""

    parameters: list[nn.Parameter]
    weight_decay: float | None = None
    """None is the run's; Adam's groups have none."""
    optimizer: Literal["run", "adam"] = "run"
    """The optimizer that the run is configured with, or Adam."""
    lr: float | None = None
    """Adam's constant learning rate; the run's groups follow the run's."""


class Companion(nn.Module):
    """What a method trains beside trunk and branches: gates, fusion heads, decoders, or a frozen
    teacher.

    No part of it is in the student. The default does nothing.
    """

    def at_split(self, shared: Tensor) -> Tensor:
        """What the branches receive, from the trunk's output [B, c, H, W]."""
        return shared

    def run(self, inputs: Sequence[Tensor], branches: Sequence[nn.Module]) -> RunResult:
        """Feature maps and logits of the M branches from their M inputs; overridden where branches
        exchange features, and called only then.
        """
        features, logits = zip(
            *[branch(x) for branch, x in zip(branches, inputs, strict=True)], strict=True
        )
        return RunResult(features, logits)

    def forward(self, seen: BranchPass) -> dict[str, Any]:
        """What the loss takes beside logits and target, by the keywords of its ``graph_inputs``."""
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The companion's parameters that are not trained as the run's configuration says."""
        return []

    def student(self, branches: Sequence[nn.Module], kept: int) -> nn.Module | None:
        """The network to hand over, where that is not the plain one of the kept branch: images to
        logits [B, C]; of the model's own modules.
        """
        return None


class Layout(NamedTuple):
    """What a method's modules are sized by."""

    channels: tuple[int, ...]
    """Channels of the M branches' feature maps."""
    trunk_channels: int
    """Channels of the trunk's output (3, the image's, for peers)."""
    num_classes: int
    branches: Sequence[nn.Module]
    """The M branches, to look at and not to keep."""
    teacher: nn.Module | None = None
    """The frozen teacher of methods that have one."""


class BranchResult(Protocol):
    """What a method needs of a branched model's result; ``fastokd.models.BranchOutput`` is one."""

    logits: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    extras: Mapping[str, Any]


def _gather_inputs(result: BranchResult) -> dict[str, Any]:
    return {**({"scores": result.scores} if result.scores else {}), **result.extras}


@dataclass(frozen=True)
class Method:
    """A training method: its loss, its own modules, and how its networks are laid out.

    Attributes:
        name, summary: for the command line.
        loss_class: ``loss_class(num_branches=..., **options)`` builds the loss, whose ``presets``
            name bundles of options.
        branch_range, default_branches: which M it takes.
        build_companion: ``build_companion(layout, **options)`` builds the method's own modules;
            None for none. It raises a ValueError that says why for networks that the method cannot
            train.
        model_options: the options of ``build_companion`` and ``views`` with their defaults; the
            loss's are its constructor's.
        choices: for each of these options that is one of several words, the words.
        topologies: how the networks may be laid out, the default first.
        hierarchical: whether branch m gets the auxiliary blocks of hierarchy level m.
        kept: index of the branch that becomes the student; -1 is the last.
        reports_mean: the published number is the mean accuracy over the branches, which is then
            measured too (``branch_mean``).
        loss_inputs: what the loss takes beside logits and target, from a model's result.
        needs_index: the loss takes the samples' positions in the training split as ``index``.
        needs_teacher: there is a frozen teacher, named by the option ``teacher``. It is
            ``Layout.teacher``, or stored rows that the loss takes as ``teacher``; the loss's option
            ``teacher_rows`` says what they are.
        views: whether every peer gets its own augmented view of an image, from the method's
            options; it raises for a value of the wrong type.
        schedule: ``kd_weight`` in a 0-based epoch, from the epoch and the ramp's length.
        ramp_epochs: the default length of the ramp, from the number of epochs and the preset.
    """

    name: str
    summary: str
    loss_class: type[MethodLoss]
    branch_range: tuple[int, int]
    default_branches: int
    build_companion: Callable[..., Companion] | None = None
    model_options: Mapping[str, OptionValue] = field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    topologies: tuple[Topology, ...] = ("branches",)
    hierarchical: bool = False
    kept: int = 0
    reports_mean: bool = False
    loss_inputs: Callable[[BranchResult], dict[str, Any]] = _gather_inputs
    needs_index: bool = False
    needs_teacher: bool = False
    views: Callable[[Mapping[str, Any]], bool] = lambda options: False
    schedule: Callable[[int, int], float] = ramp_up
    ramp_epochs: Callable[[int, str], int] = lambda epochs, preset: 0
