"""The network of a configuration."""

import torch
from torch import nn

from fastokd.models import BranchedModel, create_model
from fastokd.train.config import TrainConfig


def build_model(config: TrainConfig, num_classes: int, device: torch.device, teacher: nn.Module | None = None) -> BranchedModel:
    """The branched model of a configuration, initialised from its seed, on the device in its memory format.

    Only training needs the frozen ``teacher`` of methods that have one.
    """
    torch.manual_seed(config.seed)
    model = create_model(config.model, config.method, num_classes, config.num_branches(), config.aux_blocks, at=config.at,
                         topology=config.topology, options=config.model_options(), teacher=teacher, compression=config.compression)
    return model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
