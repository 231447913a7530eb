"""The branched network: a trunk, M branches, the method's modules, and the exported student."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.methods.modules import BranchOutput, BranchPass, BranchSpec, MethodModules


class Branch(nn.Module):
    """The part of a network that each branch owns.

    Args:
        body: trunk maps to feature maps [B, channels, H, W].
        head: feature maps to logits [B, C].
        channels: channels of the feature maps, which determine the size of gates.
    """

    def __init__(self, body: nn.Module, head: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head, self.channels = body, head, channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Trunk maps [B, c, H, W] to feature maps [B, channels, H', W'] and logits [B, C]."""
        return self.finish(self.body(x))

    def finish(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The result of ``forward`` from the output of the body."""
        return features, self.head(features)


class PlainNetwork(nn.Sequential):
    """A network for deployment: named children run in order, images to logits [B, C].

    Subclasses add a name and no constructor, which keeps slicing (``net[:-1]``) working.
    """

    @classmethod
    def join(cls, trunk: nn.Module, branch: Branch) -> "PlainNetwork":
        """The network of this trunk followed by this branch; the modules are not copied."""
        network = cls()
        for part in (trunk, branch.body, branch.head):
            for name, module in part.named_children():
                network.add_module(name, module)
        return network


@dataclass(frozen=True)
class Backbone:
    """A network that can be split. A family's module has them, by name, in ``BACKBONES``.

    ``build_branch(num_classes, level, aux_blocks)`` builds the branch of hierarchy level 1, 2, ...:
    level 1 is the plain network's, each further level has ``aux_blocks`` more auxiliary blocks.
    ``join`` makes the plain network of a trunk and a branch. ``image_size`` is the height and width
    of the images that the network is designed for. ``compressed(num_branches)``, if supported, is
    the network split for compression (AHBF Table 5): level M of M is the plain network's branch,
    and each lower level has ``aux_blocks`` fewer blocks. ``whole``: the network cannot be split, so
    its branch is all of it, and its feature maps are the images.
    """

    name: str
    build_trunk: Callable[[], nn.Module]
    build_branch: Callable[[int, int, int], Branch]
    join: Callable[[nn.Module, Branch], nn.Module]
    image_size: int = 32
    compressed: Callable[[int], "Backbone"] | None = None
    whole: bool = False


class Peer(nn.Module):
    """A whole network trained together with others: its own trunk and its own branch."""

    def __init__(self, trunk: nn.Module, branch: Branch) -> None:
        super().__init__()
        self.trunk, self.branch, self.channels = trunk, branch, branch.channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] to feature maps [B, channels, H', W'] and logits [B, C]."""
        return self.branch(self.trunk(x))


class FrozenTeacher(nn.Module):
    """A trained network that always runs in evaluation mode on the student's images.

    It is an input of the run, like the images: it is in no checkpoint, and its parameters are not
    the model's.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # A list registers nothing: not in state_dict(), parameters(), train() or student().
        self._network: list[Any] = [network.eval().requires_grad_(False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, dtype or memory format."""
        super()._apply(fn, recurse)
        self._network[0]._apply(fn, recurse)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, C], without gradient."""
        with torch.no_grad():
            return self._network[0](images)


def one_by_one(
    branches: Sequence[nn.Module], inputs: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Each branch's feature maps and logits from its input."""
    return [branch(x) for branch, x in zip(branches, inputs, strict=True)]


class BranchedModel(nn.Module):
    """A network whose last stages exist M times on a shared trunk, or M whole networks (peers).

    Built by ``fastokd.models.create_model``.

    Args:
        names: the network of each branch; equal unless peers differ.
        num_classes: C.
        trunk: images to trunk maps; None for peers.
        branches: M modules that map the trunk's output (peers: images) to feature maps and logits.
        joins: for each branch, what makes the plain network of a trunk and a branch.
        kept: index of the branch that ``student`` keeps; -1 is the last.
        build_companion: builds the method's own modules from a ``BranchSpec``.
        teacher: a frozen teacher; its logits are the output's extra ``teacher``.
        method: the method's name.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_classes: int,
        trunk: nn.Module | None,
        branches: Sequence[Branch | Peer],
        joins: Sequence[Callable[[nn.Module, Branch], nn.Module]],
        kept: int = 0,
        build_companion: Callable[[BranchSpec], MethodModules] | None = None,
        teacher: nn.Module | None = None,
        method: str = "baseline",
    ) -> None:
        super().__init__()
        self.names, self.num_classes, self.method = tuple(names), num_classes, method
        self.kept = range(len(branches))[kept]
        self.trunk = trunk
        self.branches = nn.ModuleList(branches)
        self.companion: MethodModules | None = None
        if build_companion:
            channels = tuple(branch.channels for branch in branches)
            spec = BranchSpec(channels, trunk_channels(trunk), num_classes, branches)
            self.companion = build_companion(spec)
        self.teacher = None if teacher is None else FrozenTeacher(teacher)
        self._joins = tuple(joins)
        self.run_branches = one_by_one
        """Runs branches that do not depend on each other; replaceable, e.g. by CUDA streams."""
        self.frozen: tuple[nn.Module, ...] = ()
        """Modules that stay in evaluation mode while the model is trained."""
        self.detach_trunk = False
        """No gradient reaches the trunk."""

    @property
    def num_branches(self) -> int:
        """M."""
        return len(self.branches)

    @property
    def name(self) -> str:
        """The name of the student's network, as ``create_student`` takes it."""
        if self.has_custom_student:
            return f"{','.join(self.names)}@{self.method}"
        return self.names[self.kept]

    @property
    def has_custom_student(self) -> bool:
        """True if the method exports its own network instead of a plain branch."""
        modules = self.companion
        return modules is not None and type(modules).student is not MethodModules.student

    def forward(self, x: Tensor) -> BranchOutput:
        """Every branch's logits, features and what the method's modules add, for images [B, 3, H,
        W] in any memory format, or for one view of each image per branch, [M, B, 3, H, W].

        The trunk runs on all views as one batch. The method's modules and a frozen teacher get the
        images of the kept branch.
        """
        modules, branches = self.companion, tuple(self.branches)
        has_views = x.dim() == 5
        images = x[self.kept] if has_views else x
        if self.trunk is None:
            inputs = x.unbind(0) if has_views else (x,) * self.num_branches
        else:
            maps = self.trunk(as_one_batch(x) if has_views else x)
            if self.detach_trunk:
                maps = maps.detach()
            if modules is not None:
                maps = modules.at_split(maps)
            inputs = maps.chunk(len(x)) if has_views else (maps,) * self.num_branches
        shared = inputs[self.kept]
        if modules is not None and self.overrides_forward:
            logits, features, _, context = modules.run(inputs, branches)
        else:
            features, logits = zip(*self.run_branches(branches, inputs), strict=True)
            context = None
        extras = {}
        if modules is not None:
            extras = modules(BranchPass(images, shared, features, logits, branches, context))
        if self.teacher is not None:
            extras = {**extras, "teacher": self.teacher(images)}
        return BranchOutput(logits, features, extras)

    def train(self, mode: bool = True) -> "BranchedModel":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def compile_parts(self, options: dict[str, Any] | None = None) -> None:
        """Compile every part separately, at its first call; ``options`` of ``torch.compile``."""
        for part in (self.trunk, self.companion, self.teacher, *self.branches):
            if part is not None:
                part.compile(options=options)
        if self.companion is not None and self.overrides_forward:
            vars(self.companion)["run"] = torch.compile(self.companion.run, options=options)

    @property
    def overrides_forward(self) -> bool:
        """True if the method runs the branches itself, because they exchange features."""
        return self.companion is not None and type(self.companion).run is not MethodModules.run

    def student(self, branch: int | None = None) -> nn.Module:
        """A branch as a plain network: images [B, 3, H, W] to logits [B, C].

        A deep copy with the same weights, device, dtype and train/eval mode; its state dict is the
        plain network's.

        Args:
            branch: index of the branch; None for what the method keeps, with AFID more than one.

        Raises:
            ConfigError: there is no such branch.
        """
        return copy.deepcopy(self.live_student(branch))

    def live_student(self, branch: int | None = None) -> nn.Module:
        """``student``, made of the model's own modules: its weights change with training."""
        index = self.kept if branch is None else branch
        if index not in range(self.num_branches):
            last = self.num_branches - 1
            raise ConfigError(f"branch {index}: this model has the branches 0 to {last}")
        own: Any = self.branches[index]
        student = None
        if branch is None and self.companion is not None:
            student = self.companion.student(tuple(self.branches), self.kept)
        if student is None:
            trunk, own = (own.trunk, own.branch) if self.trunk is None else (self.trunk, own)
            student = self._joins[index](trunk, own)
        # Not .train(), which would also unfreeze layers that are held in eval mode
        student.training = self.training
        return student


def as_one_batch(views: Tensor) -> Tensor:
    """Views [M, B, 3, H, W] as images [M * B, 3, H, W] in their memory format, copied if the views
    are not one after the other in memory.
    """
    follow = views.stride(0) == views.shape[1] * views.stride(1)
    return views.flatten(0, 1) if follow else torch.cat(views.unbind(0))


def trunk_channels(trunk: nn.Module | None) -> int:
    """Output channels of a trunk, 3 without one. Only shapes are propagated."""
    if trunk is None:
        return 3
    if isinstance(channels := getattr(trunk, "channels", None), int):
        return channels
    with torch.no_grad():
        shapes = copy.deepcopy(trunk).to("meta").eval()
        maps: Tensor = shapes(torch.empty(1, 3, 64, 64, device="meta"))
        return maps.shape[1]
