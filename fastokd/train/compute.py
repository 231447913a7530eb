"""Training compute of a configuration, and the student alone with as much of it.

The unit is a forward pass: forward and backward of a trained network count as 3 forward passes, the
forward pass of a frozen teacher as 1. ``training_flops`` is a third of this sum, so that it is the
forward FLOPs of the trained networks where there is no teacher. FLOPs are counted, not measured:
they are known before a run and do not depend on the machine.
"""

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastokd.models import create_model
from fastokd.models.summary import Cost, count_parameters, forward_flops, part_flops
from fastokd.train.build import before_teaching, model_layout
from fastokd.train.config import TrainConfig, fields_with_role
from fastokd.train.fields import Role
from fastokd.train.loss import reference_loss
from fastokd.train.param_groups import frozen_parts
from fastokd.train.teacher import teacher_network

ALONE = "baseline"
"""The method that trains the student alone."""


class NetworkCosts(NamedTuple):
    """Parameters and FLOPs of one image forward: of the student alone, and of all trained networks
    on all its views, without a frozen teacher. ``name`` is the student's network, ``parts`` has the
    FLOPs of the trained networks' "trunk" and "body".
    """

    name: str
    student: Cost
    training: Cost
    parts: Mapping[str, int]


def network_costs(config: TrainConfig, num_classes: int, image_size: Sequence[int]) -> NetworkCosts:
    """The costs of a configuration's networks.

    Args:
        image_size: height and width of the images in pixels.
    """
    layout = model_layout(config)
    options = layout.pop("options")
    size = (3, *image_size)
    return _costs(
        config.model,
        num_classes,
        size,
        tuple(layout.items()),
        tuple(options.items()),
        config.views(),
    )


@functools.cache
def _costs(
    name: str,
    num_classes: int,
    size: Sequence[int],
    layout: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    views: int,
) -> NetworkCosts:
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes, **dict(layout), options=dict(options))
    student, training = (
        Cost(count_parameters(network), forward_flops(network, size))
        for network in (model.student(), model)
    )
    parts = part_flops(model, size)
    if views > 1 and model.trunk is not None:  # it runs on the view of each branch
        training = replace(training, flops=training.flops + (views - 1) * parts["trunk"])
        parts["trunk"] *= views
    return NetworkCosts(model.name, student, training, parts)


def training_flops(config: TrainConfig, num_classes: int, image_size: Sequence[int]) -> float:
    """Forward FLOPs per training image of everything that is trained, plus a third of those of a
    frozen teacher's network: the mean over the epochs, also over those before ``teach_from``.

    The loss, the optimizer and evaluation are not counted, nor the network that computed stored
    rows. Images held out for the loss have a forward pass only, and so have frozen parts.

    Args:
        image_size: the data's height and width; scheduled sizes (``resize_schedule``) replace it.

    Raises:
        ConfigError, CheckpointError, MissingExtra: the teacher cannot be read.
    """
    return statistics.fmean(flops_by_epoch(config, num_classes, image_size))


def flops_by_epoch(config: TrainConfig, num_classes: int, image_size: Sequence[int]) -> list[float]:
    """``training_flops`` of each epoch."""
    teacher = teacher_network(config, num_classes)
    held_out = reference_loss(config).held_out_fraction

    @functools.cache
    def flops(side: int | None, is_taught: bool, frozen_now: frozenset[str]) -> float:
        size = (side, side) if side else tuple(image_size)
        trained_config = config if is_taught else before_teaching(config)
        costs = network_costs(trained_config, num_classes, size)
        without_backward = sum(costs.parts[part] for part in frozen_now) * (1 - held_out)
        frozen = forward_flops(teacher, (3, *size)) if teacher and is_taught else 0
        share = 1 - held_out * 2 / 3 if is_taught else 1 - held_out
        trained = share * costs.training.flops - without_backward * 2 / 3
        return trained + frozen / 3

    return [flops(*_kind_of_epoch(config, epoch)) for epoch in range(config.epochs)]


def _kind_of_epoch(config: TrainConfig, epoch: int) -> tuple[int | None, bool, frozenset[str]]:
    """The size of the images, True from ``teach_from`` on, and the frozen parts."""
    return config.size_at(epoch), epoch >= config.teach_epoch(), frozen_parts(config, epoch)


def epoch_costs(config: TrainConfig, num_classes: int, image_size: Sequence[int]) -> list[float]:
    """``flops_by_epoch`` to compare epochs with each other; empty if all epochs are alike, which
    needs no networks.
    """
    if len({_kind_of_epoch(config, epoch) for epoch in range(config.epochs)}) == 1:
        return []
    return flops_by_epoch(config, num_classes, image_size)


def total_training_flops(config: TrainConfig, flops: float, num_images: int) -> float:
    """The FLOPs of a run: three times ``flops`` for every image of all epochs.

    Args:
        flops: ``training_flops`` of the configuration.
        num_images: training images; those of an epoch that do not fill a batch are not trained on.
    """
    return 3 * flops * config.epochs * (num_images - num_images % config.batch_size)


def is_alone(config: TrainConfig) -> bool:
    """True if the student is trained alone, without branches and teacher."""
    return config.method == ALONE and not config.teacher


def student_network(config: TrainConfig) -> str:
    """The name of the student's network."""
    names = config.model_names()
    return names[0] if len(names) == 1 else names[config.kept_branch()]


def student_alone(config: TrainConfig) -> TrainConfig:
    """The configuration of the student alone: without the layout and the options of the method,
    except label smoothing, which needs no teacher. It starts from the same weights, and keeps the
    split if parts of the network are trained differently. All other fields are unchanged.
    """
    defaults: Mapping[str, Any] = vars(TrainConfig())
    own = fields_with_role(Role.TRAINED | Role.OF_METHOD)
    smoothing = {
        name: value for name, value in config.method_options.items() if name == "label_smoothing"
    }
    changes = {
        **{name: defaults[name] for name in own},
        "method": ALONE,
        "model": student_network(config),
        "method_options": smoothing,
    }
    if len(config.model_names()) > 1 and config.weights:
        changes["weights"] = config.weight_files()[config.kept_branch()]
    if config.freeze_epochs or config.trunk_lr != 1:
        changes["at"] = config.at
    return replace(config, **changes)


def scaled(config: TrainConfig, epochs: int) -> TrainConfig:
    """The configuration with another number of epochs. Ramp-up, warm-up, frozen epochs, scheduled
    image sizes and an epoch in ``teach_from`` are scaled with it; the learning rate's decay is in
    fractions of the epochs.
    """
    factor = epochs / config.epochs
    ramp = None if config.ramp_epochs is None else round(config.ramp_epochs * factor)
    warmup = None if config.warmup_epochs is None else config.warmup_epochs * factor
    sizes = {
        min(round(start * factor), epochs - 1): size
        for start, size in config.resize_schedule.items()
    }
    start, last = config.teach_from, epochs - 1
    return replace(
        config,
        epochs=epochs,
        freeze_epochs=min(round(config.freeze_epochs * factor), last),
        head_epochs=min(round(config.head_epochs * factor), last),
        ramp_epochs=ramp,
        warmup_epochs=warmup,
        resize_schedule=sizes,
        teach_from=start if start < 1 else min(max(1, round(start * factor)), last),
    )


def equal_compute_epochs(config: TrainConfig, num_classes: int, image_size: Sequence[int]) -> int:
    """The epochs of the student alone that cost as much as this run, rounded; see
    ``training_flops`` for the arguments and errors.
    """
    taught = training_flops(config, num_classes, image_size)
    alone = training_flops(student_alone(config), num_classes, image_size)
    return max(1, round(config.epochs * taught / alone))


def equal_compute_student(
    config: TrainConfig, num_classes: int, image_size: Sequence[int]
) -> TrainConfig:
    """The student alone with as much training compute as this run, its schedule stretched."""
    epochs = equal_compute_epochs(config, num_classes, image_size)
    return scaled(student_alone(config), epochs)
