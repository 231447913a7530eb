"""The parts of a branched model that fine-tuning trains differently."""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from fastokd.errors import ConfigError
from fastokd.models import BranchedModel
from fastokd.models.branched import Peer
from fastokd.train.config import TrainConfig


class Settings(NamedTuple):
    """Settings of a parameter in the optimizer.

    Attributes:
        part: "trunk", "body" or "head"; empty for the method's modules.
        lr_factor: of the learning rate.
        decays: False without weight decay.
    """

    part: str = ""
    lr_factor: float = 1.0
    decays: bool = True


def frozen_parts(config: TrainConfig, epoch: int) -> frozenset[str]:
    """The parts that are not trained in a 0-based epoch."""
    if epoch < config.head_epochs:
        return frozenset({"trunk", "body"})
    return frozenset({"trunk"} if epoch < config.freeze_epochs else ())


def parts(model: BranchedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with the names of their parts."""
    if model.trunk is not None:
        yield "trunk", model.trunk
    for branch in model.branches:
        part = branch
        if isinstance(branch, Peer):
            yield "trunk", branch.trunk
            part = branch.branch
        yield "body", part.get_submodule("body")
        yield "head", part.get_submodule("head")


def parameter_settings(
    config: TrainConfig, model: BranchedModel
) -> Mapping[nn.Parameter, Settings]:
    """The settings of a model's parameters.

    Raises:
        ConfigError: a part that is trained differently has no parameters.
    """
    _check_parts(config, model)
    factors = {"trunk": config.trunk_lr, "head": config.head_lr}
    depths = _depths(model) if config.layer_decay < 1 else {}
    freezes = config.freeze_epochs or config.head_epochs
    named = {each: part for part, module in parts(model) for each in module.parameters()}
    settings = {}
    for parameter in model.parameters():
        part = named.get(parameter, "")
        settings[parameter] = Settings(
            part if freezes else "",
            factors.get(part, 1.0) * config.layer_decay ** depths.get(parameter, 0),
            config.decay == "all" or _is_weight(parameter),
        )
    return settings


def _check_parts(config: TrainConfig, model: BranchedModel) -> None:
    """Refuse options for parts of a network that cannot be divided into them."""
    present = {part for part, module in parts(model) if any(True for _ in module.parameters())}
    for name, needed in (
        ("freeze_epochs", {"trunk"}),
        ("trunk_lr", {"trunk"}),
        ("head_epochs", {"trunk", "body"}),
        ("head_lr", {"trunk", "body"}),
    ):
        value = getattr(config, name)
        if value != getattr(TrainConfig, name) and not needed & present:
            raise ConfigError(
                f"{name}={value}: {model.name} cannot be divided into trunk and heads, since"
                " torch.fx cannot follow its forward; omit it"
            )


def _is_weight(parameter: nn.Parameter) -> bool:
    """False for one value per channel: biases, normalization and layer scales, such as [C, 1, 1] in
    torchvision's ConvNeXt.
    """
    return parameter.dim() > 1 and parameter.shape[1:].numel() > 1


def _depths(model: BranchedModel) -> dict[nn.Parameter, int]:
    """For each parameter the number of blocks after its own, in the plain network of a branch."""
    depths: dict[nn.Parameter, int] = {}
    order = sorted(range(model.num_branches), key=lambda index: index != model.kept)
    for index in order:  # the trunk counts the blocks of the student
        network = model.live_student(index)
        members = blocks(network)
        for depth, block in enumerate(reversed(members)):
            for parameter in block.parameters():
                depths.setdefault(parameter, depth)
        for parameter in network.parameters():  # outside of blocks: a class token, positions
            depths.setdefault(parameter, len(members) - 1)
    return depths


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network with parameters, in order.

    A module is divided into its children if these, or modules inside them, are a sequence with two
    neighbours of one class, such as residual blocks; the members of a sequence are blocks, if they
    are not sequences themselves. A network without such sequences (VGG) is divided into its
    children and those of its sequences.
    """
    if len(found := list(_blocks(network))) > 1:
        return found
    inner = (
        child.children() if isinstance(child, nn.Sequential) else (child,)
        for child in network.children()
    )
    return [each for each in itertools.chain(*inner) if list(each.parameters())]


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    children = [child for child in network.children() if list(child.parameters())]
    if isinstance(network, nn.Sequential | nn.ModuleList) and _repeats(network):
        for child in children:
            yield from _blocks(child) if isinstance(child, nn.Sequential) else (child,)
    elif any(map(_contains_repeats, children)):
        for child in children:
            yield from _blocks(child)
    else:
        yield network


def _repeats(sequence: nn.Module) -> bool:
    kinds = [type(child) for child in sequence.children()]
    return any(one is other for one, other in itertools.pairwise(kinds))


def _contains_repeats(module: nn.Module) -> bool:
    sequences = (
        each for each in module.modules() if isinstance(each, nn.Sequential | nn.ModuleList)
    )
    return any(map(_repeats, sequences))
