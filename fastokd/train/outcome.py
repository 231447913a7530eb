"""The result of a run, and the errors that end one."""

from dataclasses import dataclass

from fastokd.errors import ConfigError, FastOKDError


class NonFiniteLoss(FastOKDError, ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint was written before."""


class RunIsFinished(ConfigError):
    """The run already finished all its epochs; the message says how to extend it."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; the message says how to resume it."""


@dataclass(frozen=True)
class Summary:
    """The result of a run: accuracies in [0, 1] per branch and mixture, of the last epoch and of
    the student's best epoch. The best epoch is optimistic if it is selected on a test set.
    """

    epochs: int
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    seconds: float
    images_per_second: float
    student: str
