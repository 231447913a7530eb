"""The loss of a configuration."""

import inspect

from fastokd.errors import ConfigError, did_you_mean
from fastokd.losses.method_loss import MethodLoss
from fastokd.losses.options import COMMON
from fastokd.train.config import TrainConfig, method_of


def check_method(config: TrainConfig) -> None:
    """Check the method, its layout and its options, on which its graph depends.

    Raises:
        ConfigError: names the field, its value and the fix.
    """
    from fastokd.models import check_layout, companion_builder, find_backbone

    method = method_of(config)
    topology = check_layout(method, config.model_names(), config.topology, config.num_branches())
    for name in config.model_names():
        split = topology == "branches" and config.num_branches() > 1
        find_backbone(name, config.at, split=split, drop_path=config.drop_path)
    loss = reference_loss(config)
    for field in ("mixup", "cutmix"):
        if getattr(config, field) and loss.plan.needs_labels:
            raise ConfigError(
                f"{field} makes class probabilities, but divergence 'dkd' needs labels; set"
                f" {field}=0 or choose another divergence"
            )
    companion_builder(method, config.model_options())


def build_loss(config: TrainConfig, impl: str | None = None) -> MethodLoss:
    """The loss of a configuration: that of its method, with its preset and options, and the terms
    of a frozen teacher.

    Args:
        impl: another executor than the configuration's.

    Raises:
        ConfigError: the preset or an option is unknown, or a value is out of range.
    """
    method = method_of(config)
    presets, given = method.loss_class.presets, f"method '{config.method}'"
    if config.preset not in presets:
        hint = did_you_mean(config.preset, presets)
        raise ConfigError(f"unknown preset '{config.preset}' of {given}{hint}")
    arguments = set(inspect.signature(method.loss_class).parameters)
    allowed = (arguments - set(COMMON)) | set(method.model_options)
    for name in config.method_options:
        if name not in allowed:
            raise ConfigError(f"unknown option '{name}' of {given}{did_you_mean(name, allowed)}")
    options = config.loss_options() | ({"impl": impl} if impl else {})
    try:
        loss = method.loss_class(num_branches=config.num_branches(), **options)
        loss.ignore_index = None  # a dataset's labels are classes
        if config.teacher and not method.needs_teacher:
            branches = loss.graph.logits[: config.num_branches()]
            student = branches[config.kept_branch()]
            loss.add_teacher(
                branches if config.teacher_to == "branches" else student,
                config.teacher_weight,
                config.teacher_temperature,
                rows=config.teacher_rows,
            )
        return loss
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{given}: {error}") from error


def reference_loss(config: TrainConfig) -> MethodLoss:
    """``build_loss`` on the executor "reference", which runs everywhere."""
    return build_loss(config, "reference")
