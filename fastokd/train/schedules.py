"""The learning rate as a function of the finished epochs."""

import math
from dataclasses import dataclass

ONECYCLE_RISE = 0.3
"""The fraction of a run in which a one-cycle schedule rises, unless its warm-up is given."""
ONECYCLE_START = 1 / 25
"""The fraction of its learning rate that a one-cycle schedule starts with."""


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule.

    The rate rises linearly over the warm-up: from 0, or for "onecycle" from ``ONECYCLE_START``
    (Smith and Topin 2019). Afterwards "step" counts epochs from the start of the run, and "cosine"
    (Loshchilov and Hutter 2017, eq. 5, without restarts) and "onecycle" follow half a cosine from
    the end of the warm-up to the end of the run.

    Attributes:
        shape: "step", "cosine" or "onecycle".
        peak: the learning rate after the warm-up.
        epochs: the length of the run.
        warmup_epochs: the length of the warm-up; None for 0, or ``ONECYCLE_RISE`` of the epochs for
            "onecycle".
        decay_at, gamma: of "step": fractions of the epochs at which the rate is multiplied by
            ``gamma``.
        final: of "cosine" and "onecycle": the fraction of ``peak`` at the end.
    """

    shape: str
    peak: float
    epochs: int
    warmup_epochs: float | None
    decay_at: tuple[float, ...]
    gamma: float
    final: float

    def rate(self, epoch: float) -> float:
        """The learning rate after ``epoch`` epochs, which may be a fraction."""
        warmup = self.warmup()
        if epoch < warmup:
            start = ONECYCLE_START if self.shape == "onecycle" else 0.0
            return self.peak * (start + (1 - start) * epoch / warmup)
        if self.shape == "step":
            return self.peak * self._step(epoch)
        return self.peak * self._cosine(epoch, warmup)

    def warmup(self) -> float:
        """The length of the warm-up in epochs, with the default filled in."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return ONECYCLE_RISE * self.epochs if self.shape == "onecycle" else 0.0

    def _step(self, epoch: float) -> float:
        # Whole epochs, as in the papers; rounded, because 0.28 * 200 is slightly above 56.
        return self.gamma ** sum(
            math.floor(epoch) >= round(fraction * self.epochs, 6) for fraction in self.decay_at
        )

    def _cosine(self, epoch: float, warmup: float) -> float:
        done = min((epoch - warmup) / (self.epochs - warmup), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


def scaled_rate(lr: float, scaling: str, batch_size: int, lr_batch_size: int) -> float:
    """The learning rate for a batch size, by the rule "none", "linear" or "sqrt"."""
    ratio = batch_size / lr_batch_size
    return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]
