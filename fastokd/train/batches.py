"""The number of steps that a batch size leaves, advice about it, and the defaults of small data."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch

from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset
from fastokd.train.distributed import BatchShare, Ranks
from fastokd.train.memory import fit_batch_size
from fastokd.train.teacher import Teacher

BatchChoice = int | Literal["data", "split"] | None
"""How a new run chooses its batch size, see ``choose_batch``."""

BATCH_FIELDS = frozenset({"batch_size", "lr", "lr_scaling", "device_batch"})
"""Fields that turn the defaults of small data off if one of them is given; after ``lr`` alone, the
batch size still fits a small split.
"""
FEW_STEPS = 20
"""Fewer steps per epoch train slowly: the learning rate decays before the weights have moved."""
FEW_IMAGES = 16
"""Fewer images give batch norm noisy statistics."""
LITTLE_TEACHING = 0.1
"""A largest ``kd_weight`` below this leaves the branches nearly untaught."""


def choose_batch(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    teacher: Teacher | None,
    choice: BatchChoice,
) -> tuple[TrainConfig, str]:
    """The configuration with the chosen batch size, and a line about it or "".

    Args:
        choice: a number: the largest batch up to this that fits the memory, see ``fit_batch_size``;
            "data": see ``small_data_defaults``; "split": the same for the batch size alone, if the
            training images do not fill one batch; None: the configuration's.
    """
    if choice is None:
        return config, ""
    if choice == "data":
        return small_data_defaults(config, len(dataset.train))
    if choice == "split":
        if len(dataset.train) >= config.batch_size:
            return config, ""
        smaller, _ = small_data_defaults(config, len(dataset.train))
        line = f"few images: the default batch size is {smaller.batch_size}"
        config = dataclasses.replace(config, batch_size=smaller.batch_size)
        return config, f"{line} instead of {TrainConfig().batch_size}"
    size, reason = fit_batch_size(config, dataset, device, teacher, choice)
    return dataclasses.replace(config, batch_size=size), reason


def small_data_defaults(config: TrainConfig, num_images: int) -> tuple[TrainConfig, str]:
    """The configuration with a smaller batch size for few images, and a line about it.

    The batch is halved, to 16 at least, until an epoch has 20 steps; the learning rate is scaled
    with it. Both stay, and the line is "", if there are enough images or the processes do not
    divide the smaller batch.
    """
    size = _smaller_batch(config.batch_size, num_images, Ranks.current().size)
    if size == config.batch_size:
        return config, ""
    lr = config.lr * size / config.batch_size
    return (
        dataclasses.replace(config, batch_size=size, lr=lr),
        f"few images: the default batch size is {size} and the default learning rate {lr:g} instead"
        f" of {config.batch_size} and {config.lr:g}",
    )


def _smaller_batch(size: int, num_images: int, processes: int) -> int:
    """The batch halved until an epoch has ``FEW_STEPS`` steps, as long as it has ``FEW_IMAGES``
    images, and each process the same number of two or more; all images if these are fewer.
    """
    while num_images // size < FEW_STEPS and size % 2 == 0 and size // 2 >= FEW_IMAGES:
        if size // 2 % processes or size // 2 // processes < 2:
            break
        size //= 2
    return min(size, num_images) if processes == 1 and num_images > 1 else size


def describe_batches(
    config: TrainConfig, num_images: int, steps: int, share: BatchShare
) -> Iterator[str]:
    """The steps per epoch and dropped images, and advice where the batch, the learning rate or the
    ramp-up does not suit the run.

    Args:
        num_images: training images.
        steps: steps per epoch.
        share: of the process in a batch.
    """
    dropped = num_images - steps * config.batch_size
    images = f"; each epoch drops {dropped} of {num_images} images, drawn at random"
    images *= dropped > 0
    yield f"{steps} step{'s' * (steps != 1)} per epoch{images}"
    if steps < FEW_STEPS:
        smaller = _smaller_batch(config.batch_size, num_images, share.processes)
        fix = "train more --epochs"
        if smaller < config.batch_size:
            lr = config.lr * smaller / config.batch_size
            fix = f"try --batch-size {smaller} --lr {lr:.3g}, and more --epochs"
        yield f"advice: an epoch has fewer than {FEW_STEPS} steps; {fix} (docs/small-data.md)"
    per_default_batch = config.lr * TrainConfig().batch_size / config.batch_size
    trained = config.weights or config.pretrained
    if trained and config.optimizer == "sgd" and per_default_batch >= TrainConfig().lr:
        yield (
            f"advice: lr {config.lr:g} suits fresh weights; trained ones need less, often a tenth:"
            f" --lr {config.lr / 10:g} (docs/fine-tuning.md)"
        )
    largest = config.kd_weight_at(config.epochs - 1)
    if config.ramp_length() and largest < LITTLE_TEACHING:
        yield (
            f"advice: kd_weight only reaches {largest:.2g} in {config.epochs} epoch"
            f"{'s' * (config.epochs > 1)}, so the branches hardly teach; train more --epochs, or"
            " pass --ramp-epochs 0"
        )
    if share.device_batch < FEW_IMAGES and not (config.sync_bn and share.processes > 1):
        whose = "each process normalizes" if share.processes > 1 else "batch norm normalizes"
        several = "pass --sync-bn True, or " if share.processes > 1 else "use "
        part = "--device-batch" if share.accumulate > 1 else "--batch-size"
        yield (
            f"advice: {whose} over {share.device_batch} images, which is few; {several}a larger"
            f" {part}"
        )
