"""The schedule of a run's checks, checkpoints and stops."""

import math
import time
from enum import IntEnum

from fastokd.train.distributed import Agreement
from fastokd.train.signals import StopSignals

CHECK_SECONDS = 5.0
"""Longest time between two checks for non-finite losses; each check waits for the device."""


class Due(IntEnum):
    """The work due after a step. Each level includes a check."""

    NOTHING = 0
    CHECK = 1
    SAVE = 2
    STOP = 3


class Cadence:
    """Decides after each step what is due; all processes get the same answer.

    There are ``save_minutes`` between checkpoints within an epoch; 0 for none.
    """

    def __init__(self, save_minutes: float, signals: StopSignals) -> None:
        self._save_seconds = 60 * save_minutes or math.inf
        self._signals = signals
        self._agreement = Agreement()
        self.start()

    def start(self) -> None:
        """Start the clocks, before the first step of an epoch."""
        self._checked = self._saved = time.monotonic()

    def due(self, now: float, report: bool = False) -> Due:
        """The work due at a time of the monotonic clock; ``report`` asks for a check."""
        wanted = Due.NOTHING
        if self._signals.received:
            wanted = Due.STOP
        elif now - self._saved > self._save_seconds:
            wanted = Due.SAVE
        elif report or now - self._checked > CHECK_SECONDS:
            wanted = Due.CHECK
        due = Due(self._agreement.exchange(wanted))
        if due:
            self._checked = now
        if due == Due.SAVE:
            self._saved = now
        return due

    def must_stop(self) -> bool:
        """True if a signal stops the run here, outside of the training steps."""
        return bool(self._agreement.exchange(Due.STOP if self._signals.received else Due.NOTHING))

    def settle(self) -> None:
        """Complete the last exchange between processes, after the last step of a loop."""
        self._agreement.settle()
