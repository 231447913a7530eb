"""The lines that a run prints at its start."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastokd.losses.method_loss import MethodLoss
from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset, explain_loader
from fastokd.train.memory import describe_memory
from fastokd.train.step import TrainStep
from fastokd.train.teacher import Teacher


def describe_run(
    config: TrainConfig,
    data: AnyDataset,
    device: torch.device,
    step: TrainStep,
    teacher: Teacher | None,
    seen: Mapping[str, Any] | None,
    with_memory: bool,
) -> Iterator[str]:
    """Lines about data, loader, step, teacher and loss; and about memory, which takes a second."""
    yield (
        f"data {data.name}: {len(data.classes)} classes, {len(data.train)} training and"
        f" {len(data.evaluation)} {data.evaluation.name} images"
    )
    yield explain_loader(config, data, device, seen)
    yield f"step: {step.options.describe()}; {step.share.describe()}"
    if with_memory:
        yield from describe_memory(config, data, device, teacher.network if teacher else None)
    if teacher:
        yield f"teacher {teacher.description}"
    yield (
        "loss (T^2 and weights multiplied out):"
        f" {_describe_loss(step.criterion)}{_describe_ramp(config)}"
    )


def _describe_loss(criterion: MethodLoss) -> str:
    terms = [(term.name, term.coefficient, term.scheduled) for term in criterion.graph.terms]
    terms += [(name, *term) for name, term in criterion.extra_terms.items()]
    return ", ".join(
        f"{coefficient:g}{'*kd_weight' if scheduled else ''} {name}"
        for name, coefficient, scheduled in terms
    )


def _describe_ramp(config: TrainConfig) -> str:
    if not (length := config.ramp_length()):
        return ""
    return (
        f"; kd_weight is {config.kd_weight_at(0):.3g} in epoch 1,"
        f" {config.kd_weight_at(length - 1):.3g} in epoch {length} and 1 after it"
    )


def describe_extension(before: TrainConfig, config: TrainConfig, epoch: int) -> str:
    """One line about a run that is resumed at an epoch with another number of epochs."""
    last, following = (
        f"lr {each.lr_at(at):g}, kd_weight {each.kd_weight_at(at):.4g}"
        for each, at in ((before, max(epoch - 1, 0)), (config, epoch))
    )
    return (
        f"the run now has {config.epochs} epochs instead of {before.epochs}: learning-rate decay"
        f" and ramp-up follow the new number (epoch {max(epoch, 1)} ran with {last}; epoch"
        f" {epoch + 1} continues with {following})"
    )
