"""The networks of a configuration, in both phases of a run with late teaching."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastokd.models import BranchedModel, create_model
from fastokd.models.layout import to_memory_format, unsafe_channels_last
from fastokd.train.config import TEACHER, TrainConfig, fields_with_role
from fastokd.train.fields import Role


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
        "drop_path": config.drop_path,
    }


def build_model(
    config: TrainConfig, num_classes: int, device: torch.device, teacher: nn.Module | None = None
) -> BranchedModel:
    """The branched model of a configuration, initialised from its seed, on the device in its memory
    format.

    Only training needs the frozen ``teacher``.

    Raises:
        ConfigError: as ``create_model``.
    """
    torch.manual_seed(config.seed)
    model = create_model(
        config.model, num_classes=num_classes, teacher=teacher, **model_layout(config)
    )
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device)
    to_memory_format(model, memory_format)
    return model


def meta_model(
    config: TrainConfig, num_classes: int, teacher: nn.Module | None = None
) -> BranchedModel:
    """The model of ``build_model`` on the meta device: shapes without values."""
    with torch.device("meta"):
        return create_model(
            config.model,
            num_classes=num_classes,
            teacher=None if teacher is None else copy.deepcopy(teacher).to("meta"),
            **model_layout(config),
        )


def with_safe_layout(
    config: TrainConfig, num_classes: int, device: torch.device, report: Callable[[str], object]
) -> TrainConfig:
    """The configuration, without channels-last where it would crash (``unsafe_channels_last``)."""
    if not config.channels_last or device.type != "cpu":
        return config
    unsafe = unsafe_channels_last(meta_model(config, num_classes), device)
    if unsafe is None:
        return config
    report(
        f"channels-last is off: on this CPU, the gradient of {unsafe} (a strided 1 x 1 convolution"
        " of few channels) would crash with it"
    )
    return dataclasses.replace(config, channels_last=False)


def before_teaching(config: TrainConfig) -> TrainConfig:
    """The configuration of the epochs before ``teach_from``: the method "baseline", no teacher."""
    defaults: dict[str, Any] = vars(TrainConfig())
    changes = {name: defaults[name] for name in (*fields_with_role(Role.OF_METHOD), *TEACHER)}
    # A single branch has no other stream to run on, which is an error where it is requested.
    return dataclasses.replace(config, **{**changes, "method": "baseline", "streams": None})


def is_before_teaching(config: TrainConfig, state: Mapping[str, Any]) -> bool:
    """True if a checkpoint of a run with this configuration is of the epochs before
    ``teach_from``, and so has no other branches.
    """
    start = config.teach_epoch()
    within = bool(state["loader"])
    return state["epoch"] < start or (state["epoch"] == start > 0 and not within)
