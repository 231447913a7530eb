"""The network of a configuration."""

from typing import Any

import torch
from torch import nn

from fastokd.models import BranchedModel, create_model
from fastokd.train.config import TrainConfig


def model_layout(config: TrainConfig) -> dict[str, Any]:
    """The keywords of ``create_model`` for a configuration, except classes and teacher."""
    return {
        "method": config.method,
        "num_branches": config.num_branches(),
        "aux_blocks": config.aux_blocks,
        "at": config.at,
        "topology": config.topology,
        "options": config.model_options(),
        "compression": config.compression,
    }


def build_model(
    config: TrainConfig, num_classes: int, device: torch.device, teacher: nn.Module | None = None
) -> BranchedModel:
    """The branched model of a configuration, initialised from its seed, on the device in its memory
    format.

    Only training needs the frozen ``teacher`` of methods that have one.

    Raises:
        ConfigError: as ``create_model``.
    """
    torch.manual_seed(config.seed)
    model = create_model(
        config.model, num_classes=num_classes, teacher=teacher, **model_layout(config)
    )
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=memory_format)
