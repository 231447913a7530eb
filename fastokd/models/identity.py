"""Blocks that start as the identity because some of their parameters are zero."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@torch.no_grad()
def zeros_for_identity(
    block: nn.Module, x: Tensor, *others: Any, **options: Any
) -> list[str] | None:
    """The names of parameters whose zeros make a block the identity, whatever its other parameters
    are; None if there are none.

    Candidates, in this order: the last layer, as in residual blocks of convolutions (Goyal et al.
    2017); the last layer of each part with several layers, as attention and MLP of a transformer
    block; and the normalization layers between its parts, which follow them in Swin V2.

    Args:
        block: may be on the meta device; it is not changed.
        x: an input that the block meets, e.g. without negative values after a ReLU.
        others, options: further arguments of its forward.
    """
    trial = copy.deepcopy(block).eval()
    if any(value.is_meta for value in (*block.parameters(), *block.buffers())):
        trial.to_empty(device=x.device)
        for buffer in trial.buffers():
            buffer.fill_(1 if buffer.is_floating_point() else 0)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: 0.1 * torch.rand(each.shape, generator=generator).to(each) + 0.01
        for name, each in trial.named_parameters()
    }
    for names in _candidates(trial):
        for name, parameter in trial.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if name in names else values[name])
        output = trial(x.clone(), *others, **options)
        if isinstance(output, Tensor) and torch.equal(output, x):
            return names
    return None


def _candidates(block: nn.Module) -> Iterator[list[str]]:
    yield _last_layer(block, "")
    parts = {name: list(_layers(child)) for name, child in block.named_children()}
    several = [name for name, layers in parts.items() if len(layers) > 1]
    yield [each for name in several for each in _last_layer(block.get_submodule(name), f"{name}.")]
    yield [
        f"{name}.{each}"
        for name, child in block.named_children()
        if isinstance(child, NORMS)
        for each, _ in child.named_parameters()
    ]


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with parameters of their own, with their paths."""
    for path, each in module.named_modules():
        if next(each.parameters(recurse=False), None) is not None:
            yield path, each


def _last_layer(module: nn.Module, prefix: str) -> list[str]:
    """The names of the parameters of the last layer, after a prefix."""
    layers = list(_layers(module))
    if not layers:
        return []
    path, layer = layers[-1]
    inner = f"{prefix}{path}." if path else prefix
    return [f"{inner}{name}" for name, _ in layer.named_parameters(recurse=False)]
