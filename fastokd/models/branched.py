"""The branched network: one trunk, M branches that share it, the method's gates, and the student it yields."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from fastokd.errors import ConfigError


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
        features = self.body(x)
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
    trunk and a branch. ``image_size`` is the height and width of the images that the network is made for.

    ``compressed(num_branches)``, where there is one, is the same network split for compression (AHBF Table 5): level M of
    M is the plain network's own branch, and each level below has ``aux_blocks`` blocks fewer.
    """

    name: str
    build_trunk: Callable[[], nn.Sequential]
    build_branch: Callable[[int, int, int], Branch]
    join: Callable[[nn.Sequential, Branch], nn.Module]
    image_size: int = 32
    compressed: Callable[[int], "Backbone"] | None = None


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
        self.kept = range(len(levels))[kept]
        # Built in the order of the plain network, so one seed gives the student's part the same initial weights
        # with and without its teachers.
        self.trunk = backbone.build_trunk()
        self.branches = nn.ModuleList(backbone.build_branch(num_classes, level, aux_blocks) for level in levels)
        self.gates = build_gates([branch.channels for branch in self.branches]) if build_gates else None
        self._join = backbone.join

    @property
    def num_branches(self) -> int:
        """M."""
        return len(self.branches)

    def forward(self, x: Tensor) -> BranchOutput:
        """Images [B, 3, H, W] in any memory format to every branch's logits, features and the scores."""
        shared = self.trunk(x)
        features, logits = zip(*[branch(shared) for branch in self.branches], strict=True)
        scores = self.gates(features) if self.gates is not None else ()
        return BranchOutput(logits, features, scores)

    def student(self, branch: int | None = None) -> nn.Module:
        """A branch as a plain network: images [B, 3, H, W] to logits [B, C].

        A deep copy with the same weights, device, dtype and train/eval mode; its state dict is the plain network's.

        Args:
            branch: index of the branch; None is the one that the method keeps.

        Raises:
            ConfigError: there is no such branch.
        """
        index = self.kept if branch is None else branch
        if index not in range(self.num_branches):
            raise ConfigError(f"branch {index}: this model has the branches 0 to {self.num_branches - 1}")
        student = self._join(*copy.deepcopy((self.trunk, self.branches[index])))
        student.training = self.training  # not .train(), which would also unfreeze layers that are held in eval mode
        return student
