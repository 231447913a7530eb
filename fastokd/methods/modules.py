"""The modules that a method trains in addition to trunk and branches, and their interface."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn


class BranchOutput(NamedTuple):
    """The output of a branched model for a batch of B images."""

    logits: tuple[Tensor, ...]
    """M tensors [B, C]; AHBF's student is the first."""
    features: tuple[Tensor, ...]
    """M feature maps [B, c_m, H, W] before pooling."""
    extras: Mapping[str, Any] = {}
    """The output of the method's modules, by the keywords of the method's loss."""
    context: Any = None
    """Data of ``MethodModules.run`` for ``MethodModules.forward``; None in a model's output."""

    @property
    def scores(self) -> tuple[Tensor, ...]:
        """The output of the gates, for AHBF M-1 tensors [B, 2]; empty for methods without gates."""
        scores: tuple[Tensor, ...] = self.extras.get("scores", ())
        return scores


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
    context: Any = None
    """As in ``BranchOutput``."""


class BranchSpec(NamedTuple):
    """The sizes and networks that a method's modules are built for."""

    channels: tuple[int, ...]
    """Channels of the M branches' feature maps."""
    trunk_channels: int
    """Channels of the trunk's output (3, the image's, for peers)."""
    num_classes: int
    branches: Sequence[nn.Module]
    """The M branches, to inspect and not to keep."""


class ParameterGroup(NamedTuple):
    """Parameters that are not trained as the run's configuration says."""

    parameters: list[nn.Parameter]
    weight_decay: float | None = None
    """None for the run's; Adam's groups have none."""
    optimizer: Literal["run", "adam"] = "run"
    """The optimizer that the run is configured with, or Adam."""
    lr: float | None = None
    """Adam's constant learning rate; the run's groups follow the run's."""


class MethodModules(nn.Module):
    """Gates, fusion heads or decoders, which are not part of the student.

    The default does nothing.
    """

    def at_split(self, shared: Tensor) -> Tensor:
        """The branches' input, from the trunk's output [B, c, H, W]."""
        return shared

    def run(self, inputs: Sequence[Tensor], branches: Sequence[nn.Module]) -> BranchOutput:
        """Run M branches on M inputs; called only if overridden, to exchange features."""
        pairs = [branch(x) for branch, x in zip(branches, inputs, strict=True)]
        return BranchOutput(tuple(row for _, row in pairs), tuple(maps for maps, _ in pairs))

    def forward(self, seen: BranchPass) -> dict[str, Any]:
        """The loss's further inputs, by the keywords of its ``graph_inputs``."""
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters that are not trained as the run's configuration says."""
        return []

    def student(self, branches: Sequence[nn.Module], kept: int) -> nn.Module | None:
        """The network to export, images to logits [B, C]; None for the plain kept branch."""
        return None
