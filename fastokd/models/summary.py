"""What a network costs: parameters and arithmetic."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
