"""Stochastic depth (Huang et al., ECCV 2016): residual blocks are skipped at random for each image
in training, the deeper the more often.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastokd.errors import ConfigError
from fastokd.models.branch_out import AddedBlock
from fastokd.models.branched import Backbone, BranchedModel, Peer
from fastokd.models.residual import ResidualBlock

HAVE_IT = (
    "these networks have it: the ResNets, wide ResNets and ResNeXt-50; torchvision's convnext,"
    " efficientnet, swin and maxvit; timm's with drop_path_rate"
)


def check_has_drop_path(backbone: Backbone) -> None:
    """Raise ``ConfigError`` unless the network, which is not a library's, has residual blocks of
    ``ResidualBlock``.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        has_blocks = any(True for _ in _blocks(backbone.build_trunk()))
    if not has_blocks:
        raise ConfigError(f"drop_path: {backbone.name} has no stochastic depth; {HAVE_IT}")


def set_drop_path(model: BranchedModel, rate: float) -> None:
    """Set the rates of a model's residual blocks, in place: ``rate * l / (L - 1)`` for the block at
    position l of 0 to L - 1 on the path through the student, as in timm.

    Positions in a branch count from the images, through the trunk. Blocks beyond the student's
    depth have the full rate, as have the blocks that ``branch_out`` adds to networks of libraries,
    whose other blocks have rates already.
    """
    trunk = [] if model.trunk is None else list(_blocks(model.trunk))
    depth = len(trunk) + len(list(_blocks(model.branches[model.kept])))
    for branch in model.branches:
        path = [*trunk, *_blocks(branch)]
        last = len(path) - 1 if isinstance(branch, Peer) else depth - 1
        for position, block in enumerate(path):
            block.set_drop_path(rate * min(position / max(last, 1), 1.0))
        for module in branch.modules():
            if isinstance(module, AddedBlock):
                module.set_drop_path(rate)


def library_drop_path(
    name: str, build: Callable[..., nn.Module], rate: float
) -> Callable[..., nn.Module]:
    """The constructor of a library's network with stochastic depth of that rate.

    Raises:
        ConfigError: by the constructor, if the network has no stochastic depth.
    """
    option = "drop_path_rate" if name.startswith("timm:") else "stochastic_depth_prob"

    def build_with(num_classes: int) -> nn.Module:
        try:
            return build(num_classes=num_classes, **{option: rate})
        except TypeError as error:
            if rate and "multiple values" not in str(error):
                reason = f"{name} has no stochastic depth; {HAVE_IT}"
                raise ConfigError(f"drop_path={rate:g}: {reason}") from error
        return _rescaled(build(num_classes=num_classes), rate)

    return build_with


def _rescaled(network: nn.Module, rate: float) -> nn.Module:
    """A network of torchvision whose constructor sets the rate itself, with another rate."""
    from torchvision.ops import StochasticDepth

    layers = [layer for layer in network.modules() if isinstance(layer, StochasticDepth)]
    largest = max((layer.p for layer in layers), default=0.0)
    for layer in layers:
        layer.p *= rate / largest
    return network


def _blocks(module: nn.Module) -> Iterator[ResidualBlock]:
    return (
        block
        for block in module.modules()
        if isinstance(block, ResidualBlock) and not isinstance(block, AddedBlock)
    )
