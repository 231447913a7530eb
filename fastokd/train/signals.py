"""Signals that ask a run to stop: they are heard at once and followed where the run can be picked up again."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


class StopSignals:
    """Within it, SIGTERM and SIGUSR1 are noted in ``received`` and nothing else happens; another one ends the process.

    Outside the main thread, where Python has no signal handlers, it changes nothing.

    Args:
        patience: seconds after the first signal in which others are taken for the same: a scheduler signals every process of
            a job, and their launcher passes on what it got.
        label: what begins the lines on stderr, such as "rank 1: ".
    """

    def __init__(self, patience: float = 0.0, label: str = "") -> None:
        self.patience = patience
        self.label = label
        self.received = 0
        """The number of the first signal; 0 before."""
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None is a handler that was not set from Python, and cannot be set back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.received:
            self.received, self._at = number, time.monotonic()
            self._say(f"{name}: saving after this step, then stopping; another signal stops at once")
        elif time.monotonic() - self._at >= self.patience:
            self._say(f"{name}: stopping at once; the last checkpoint is intact")
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        # Not print: the signal may have come in the middle of one.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"fastokd: {self.label}{text}\n".encode())
