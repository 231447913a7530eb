"""The first lines of a run: its data, step, memory, teacher and loss."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset, explain_loader
from fastokd.train.describe import (
    describe_augmentation,
    describe_data,
    describe_late_teaching,
    describe_loss,
    describe_normalization,
    describe_stochastic_depth,
)
from fastokd.train.memory import describe_memory
from fastokd.train.step import TrainStep
from fastokd.train.teacher import Teacher


def introduction(
    config: TrainConfig,
    dataset: AnyDataset,
    step: TrainStep,
    teacher: Teacher | None,
    *,
    batches: Iterable[str],
    seen: Mapping[str, Any] | None = None,
    num_held_out: int = 0,
    with_memory: bool = True,
) -> Iterator[str]:
    """The lines, one after the other.

    Args:
        step: of the next epoch; before ``teach_from`` that of the student alone.
        batches: the lines of ``describe_batches``.
        seen: ``data_record`` from the checkpoint of a resumed run.
        num_held_out: training images that are held out for the loss.
        with_memory: estimate the memory, which takes a second.
    """
    yield describe_data(dataset)
    normalization = describe_normalization((dataset.mean, dataset.std))
    yield f"{normalization}; {describe_augmentation(config, dataset.augment)}"
    yield from describe_stochastic_depth(config)
    yield explain_loader(config, dataset, step.device, seen)
    steps, *advice = batches
    yield f"step: {step.options.describe()}; {step.share.describe()}; {steps}"
    yield from advice
    yield from step.notes
    if with_memory:
        yield from describe_memory(config, dataset, step.device, teacher)
    if teacher:
        line = f"teacher {teacher.description}"
        known = teacher.normalization
        yield f"{line}; {describe_normalization(known)}" if known else line
    if step.config is not config:
        yield describe_late_teaching(config)
    yield describe_loss(step.criterion, step.config)
    if num_held_out:
        yield f"{num_held_out} training images are held out for the loss and never trained on"
