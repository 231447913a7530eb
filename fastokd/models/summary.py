"""Costs of a network: parameters and arithmetic."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fastokd.errors import ConfigError, first_line
from fastokd.models.branched import BranchedModel


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, shared ones once, without buffers such as running statistics."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, input_size: Sequence[int]) -> int:
    """Floating-point operations of one forward pass in eval mode: 2 per multiply-add of
    convolutions and matrix products. Batch norm, activations, pooling and additions are not
    counted. Only shapes are propagated, on a copy.

    Args:
        module: takes one tensor.
        input_size: its shape without the batch, such as (3, 32, 32).
    """
    return _count(module, input_size).get_total_flops()


def part_flops(model: BranchedModel, input_size: Sequence[int]) -> dict[str, int]:
    """The FLOPs (see ``forward_flops``) of the "trunk" and of the "body" of all branches or peers;
    0 for parts that the method runs layer by layer.
    """
    counts = _count(model, input_size).get_flop_counts()
    return {
        part: sum(
            sum(kinds.values())
            for name, kinds in counts.items()
            if re.fullmatch(rf"\w+(\.branches\.\d+(\.branch)?)?\.{part}", name)
        )
        for part in ("trunk", "body")
    }


def _count(module: nn.Module, input_size: Sequence[int]) -> FlopCounterMode:
    shapes = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
    for norm in shapes.modules():
        if isinstance(norm, _BatchNorm):
            setattr(norm, "forward", nn.Identity().forward)  # noqa: B010  # same shapes, faster
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(torch.empty(1, *input_size, device="meta"))
    return counter


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and FLOPs of a forward pass of one image (see ``forward_flops``)."""

    parameters: int
    flops: int


def model_costs(model: BranchedModel, image_size: int) -> dict[str, Cost]:
    """The costs of the ``student``, of all in ``training``, and of ``branch1``, ... on their own.

    The model may be on any device; the meta device is fastest.
    """
    size = (3, image_size, image_size)
    by_kind = _count(model, size).get_flop_counts()
    counts = {name: sum(kinds.values()) for name, kinds in by_kind.items()}
    kind = type(model).__name__
    shared = 0 if model.trunk is None else count_parameters(model.trunk)
    costs = {}
    for index, branch in enumerate(model.branches):
        name = f"{kind}.branches.{index}"
        if name in counts:
            flops = counts.get(f"{kind}.trunk", 0) + counts[name]
        else:  # branches that exchange features are run layer by layer
            flops = forward_flops(model.student(index), size)
        costs[f"branch{index + 1}"] = Cost(shared + count_parameters(branch), flops)
    student = costs[f"branch{model.kept + 1}"]
    if model.has_custom_student:
        whole = model.student()
        student = Cost(count_parameters(whole), forward_flops(whole, size))
    training = Cost(count_parameters(model), counts["Global"])
    return {"student": student, "training": training, **costs}


def check_images(model: nn.Module, image_size: tuple[int, int], made_for: int) -> None:
    """Check that a network can take images of a height and width, by propagating shapes.

    ``made_for`` is the height and width that it is designed for, for the message.

    Raises:
        ConfigError: it cannot; the message has the network's error.
    """
    height, width = image_size
    try:
        forward_flops(model, (3, height, width))
    except Exception as error:  # operators of a network raise any exception
        reason = f"cannot take images of {height} x {width} pixels ({first_line(error)})"
        fix = f"pass --image-size {made_for}, or another --model"
        made = f"it is made for {made_for} x {made_for}"
        raise ConfigError(f"the network {reason}; {made}: {fix}") from error
