"""The learning rate over a run, as a function of how many epochs of it are done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastokd.train.config import TrainConfig

ONECYCLE_RISE = 0.3
"""The fraction of a run in which a one-cycle schedule rises, unless its warm-up is given."""
ONECYCLE_START = 1 / 25
"""The fraction of its learning rate that a one-cycle schedule begins with."""


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The learning rate when ``epoch`` epochs are done, which need not be a whole number.

    It rises linearly over the warm-up: from 0, and for "onecycle" from ``ONECYCLE_START`` (Smith
    and Topin 2019). After that "step" follows the whole run, and "cosine" (Loshchilov and Hutter
    2017, eq. 5, without restarts) and "onecycle" go along half a cosine from the end of the warm-up
    to the end of the run.
    """
    peak = scaled_rate(config)
    rise = warmup(config)
    if epoch < rise:
        start = ONECYCLE_START if config.schedule == "onecycle" else 0.0
        return peak * (start + (1 - start) * epoch / rise)
    return peak * _SHAPES[config.schedule](config, epoch, rise)


def warmup(config: TrainConfig) -> float:
    """The length of the warm-up in epochs, the default filled in."""
    if config.warmup_epochs is not None:
        return config.warmup_epochs
    return ONECYCLE_RISE * config.epochs if config.schedule == "onecycle" else 0.0


def scaled_rate(config: TrainConfig) -> float:
    """The learning rate for the batch size of the run."""
    ratio = config.batch_size / config.lr_batch_size
    return config.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def _step(config: TrainConfig, epoch: float, rise: float) -> float:
    # Whole epochs, as the papers count; rounded, because 0.28 * 200 is a little more than 56.
    return config.lr_gamma ** sum(
        math.floor(epoch) >= round(fraction * config.epochs, 6) for fraction in config.lr_decay_at
    )


def _cosine(config: TrainConfig, epoch: float, rise: float) -> float:
    done = min((epoch - rise) / (config.epochs - rise), 1.0)
    return config.lr_final + (1 - config.lr_final) * (1 + math.cos(math.pi * done)) / 2


_SHAPES: dict[str, Callable[[TrainConfig, float, float], float]] = {
    "step": _step,
    "cosine": _cosine,
    "onecycle": _cosine,
}
