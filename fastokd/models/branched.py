"""The branched network: one trunk, M branches that share it, the method's gates, and the student it yields."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from fastokd.models.merge import MergedFirstConvs


class BranchOutput(NamedTuple):
    """What a branched model computes for a batch of B images."""

    logits: tuple[Tensor, ...]
    """M tensors [B, C]; AHBF's student is the first."""
    features: tuple[Tensor, ...]
    """M feature maps [B, c_m, H, W] before pooling."""
    scores: tuple[Tensor, ...]
    """What the gates say, for AHBF M-1 tensors [B, 2]; empty for methods without gates."""


class Branch(nn.Module):
    """The part of a network that a branch has to itself.

    Args:
        body: trunk maps to feature maps [B, channels, H, W].
        head: feature maps to logits [B, C].
        channels: channels of the feature maps; the gates are sized by it.
    """

    def __init__(self, body: nn.Sequential, head: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.channels = channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Trunk maps [B, c, H, W] to feature maps [B, channels, H', W'] and logits [B, C]."""
        return self.finish(self.body(x))

    def finish(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the body computes to what ``forward`` gives."""
        return features, self.head(features)


class PlainNetwork(nn.Sequential):
    """A network as it is deployed: named children run in order, images to logits [B, C].

    There is no other forward, so trunk and branch compute what the plain network computes by construction. Subclasses
    add a name and no constructor, which keeps slicing (``net[:-1]``) working.
    """

    @classmethod
    def join(cls, trunk: nn.Sequential, branch: Branch) -> "PlainNetwork":
        """The network that is this trunk followed by this branch; the modules are used, not copied."""
        network = cls()
        for part in (trunk, branch.body, branch.head):
            for name, module in part.named_children():
                network.add_module(name, module)
        return network


@dataclass(frozen=True)
class Backbone:
    """How one network is split. A family's module holds them in the constant ``BACKBONES``, by name.

    ``build_branch(num_classes, level, aux_blocks)`` builds the branch of hierarchy level 1, 2, ...: level 1 is the plain
    network's own, each further level has ``aux_blocks`` auxiliary blocks more. ``join`` makes the plain network of a
    trunk and a branch.
    """

    name: str
    build_trunk: Callable[[], nn.Sequential]
    build_branch: Callable[[int, int, int], Branch]
    join: Callable[[nn.Sequential, Branch], nn.Module]


class BranchedModel(nn.Module):
    """A network whose last stage exists M times on one shared trunk.

    Args:
        backbone: where the trunk and the branches come from.
        num_classes: C.
        levels: the hierarchy level of each of the M branches; (1, 2, 3, 4) gets deeper, (1, 1, 1) does not.
        aux_blocks: auxiliary blocks a level has more than the one before.
        build_gates: the feature channels of the M branches to a module that maps the M feature maps to scores.
        kept: index of the branch that ``student`` keeps.
    """

    def __init__(self, backbone: Backbone, num_classes: int, levels: Sequence[int], aux_blocks: int,
                 build_gates: Callable[[Sequence[int]], nn.Module] | None = None, kept: int = 0) -> None:
        super().__init__()
        self.name = backbone.name
        self.num_classes = num_classes
        self.kept = kept
        # Built in the order of the plain network, so one seed gives the student's part the same initial weights
        # with and without its teachers.
        self.trunk = backbone.build_trunk()
        self.branches = nn.ModuleList(backbone.build_branch(num_classes, level, aux_blocks) for level in levels)
        self.gates = build_gates([branch.channels for branch in self.branches]) if build_gates else None
        self._join = backbone.join
        self._merged: MergedFirstConvs | None = None

    @property
    def num_branches(self) -> int:
        """M."""
        return len(self.branches)

    @property
    def merged_first_conv(self) -> bool:
        """Whether the branches' first convolutions run as one, see ``MergedFirstConvs``: the same values up to rounding.

        Setting it raises a ConfigError where they cannot be merged, and says why.
        """
        return self._merged is not None

    @merged_first_conv.setter
    def merged_first_conv(self, merged: bool) -> None:
        self._merged = MergedFirstConvs(self.branches) if merged else None

    def forward(self, x: Tensor) -> BranchOutput:
        """Images [B, 3, H, W] in any memory format to every branch's logits, features and the scores."""
        shared = self.trunk(x)
        results = self._merged(shared) if self._merged is not None else [branch(shared) for branch in self.branches]
        features, logits = zip(*results, strict=True)
        scores = self.gates(features) if self.gates is not None else ()
        return BranchOutput(logits, features, scores)

    def student(self) -> nn.Module:
        """The kept branch as a plain network: images [B, 3, H, W] to logits [B, C].

        A deep copy with the same weights, device, dtype and train/eval mode; its state dict is the plain network's.
        """
        student = self._join(*copy.deepcopy((self.trunk, self.branches[self.kept])))
        student.training = self.training  # not .train(), which would also unfreeze layers that are held in eval mode
        return student
