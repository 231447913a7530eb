"""What a network costs: parameters and arithmetic."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastokd.errors import ConfigError, first_line


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, shared ones once; buffers such as running statistics are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, input_size: Sequence[int]) -> int:
    """Floating-point operations of one forward pass in eval mode: 2 per multiply-add of convolutions and matrix products.

    Batch norm, activations, pooling and additions are not counted. Only shapes are propagated, on a copy: nothing is
    computed, and the module is left alone.

    Args:
        module: takes one tensor.
        input_size: its shape without the batch, such as (3, 32, 32).
    """
    shapes = copy.deepcopy(module).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shapes(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops()


def check_images(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Check that a network can take images of a height and width. Only shapes are propagated, as in ``forward_flops``.

    Raises:
        ConfigError: it cannot; the message says why in the network's own words.
    """
    height, width = image_size
    try:
        forward_flops(model, (3, height, width))
    except Exception as error:  # whatever a network's own operators raise
        raise ConfigError(f"the network cannot take images of {height} x {width} pixels ({first_line(error)}); pass another --image-size, or another --model") from error
