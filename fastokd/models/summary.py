"""What a network costs: parameters and arithmetic."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fastokd.errors import ConfigError, first_line
from fastokd.models.branched import BranchedModel


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, shared ones once; buffers such as running statistics are not
    parameters.
    """
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, input_size: Sequence[int]) -> int:
    """Floating-point operations of one forward pass in eval mode: 2 per multiply-add of
    convolutions and matrix products.

    Batch norm, activations, pooling and additions are not counted. Only shapes are propagated, on a
    copy: nothing is computed, and the module is left alone.

    Args:
        module: takes one tensor.
        input_size: its shape without the batch, such as (3, 32, 32).
    """
    return _count(module, input_size).get_total_flops()


def _count(module: nn.Module, input_size: Sequence[int]) -> FlopCounterMode:
    shapes = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
    for norm in shapes.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = _unchanged  # as far as shapes go; without values it is slow
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shapes(torch.empty(1, *input_size, device="meta"))
    return counter


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Cost:
    """What a network costs: parameters, and FLOPs of a forward pass of one image (see
    ``forward_flops``).
    """

    parameters: int
    flops: int


def model_costs(model: BranchedModel, image_size: int) -> dict[str, Cost]:
    """The costs of a branched model: of the ``student``, of all in ``training``, and of ``branch1``
    .. as plain networks.

    Args:
        model: on any device; on the meta device it is quick.
        image_size: height and width of an image.
    """
    size = (3, image_size, image_size)
    counts = {
        name: sum(kinds.values()) for name, kinds in _count(model, size).get_flop_counts().items()
    }
    kind = type(model).__name__
    trunk = (
        Cost(0, 0)
        if model.trunk is None
        else Cost(count_parameters(model.trunk), counts.get(f"{kind}.trunk", 0))
    )
    costs = {}
    for index, branch in enumerate(model.branches):
        name = f"{kind}.branches.{index}"
        # Branches that exchange features are run layer by layer, and counted alone.
        own = (
            counts[name]
            if name in counts
            else forward_flops(model.student(index), size) - trunk.flops
        )
        costs[f"branch{index + 1}"] = Cost(
            trunk.parameters + count_parameters(branch), trunk.flops + own
        )
    student = costs[f"branch{model.kept + 1}"]
    if model.has_custom_student:
        whole = model.student()
        student = Cost(count_parameters(whole), forward_flops(whole, size))
    return {
        "student": student,
        "training": Cost(count_parameters(model), counts["Global"]),
        **costs,
    }


def check_images(model: nn.Module, image_size: tuple[int, int], made_for: int) -> None:
    """Check that a network can take images of a height and width. Only shapes are propagated, as in
    ``forward_flops``.

    ``made_for`` is the height and width that it is made for, for the message.

    Raises:
        ConfigError: it cannot; the message says why in the network's own words.
    """
    height, width = image_size
    try:
        forward_flops(model, (3, height, width))
    except Exception as error:  # whatever a network's own operators raise
        raise ConfigError(
            f"the network cannot take images of {height} x {width} pixels ({first_line(error)}); it"
            f" is made for {made_for} x {made_for}: pass --image-size {made_for}, or another"
            " --model"
        ) from error
