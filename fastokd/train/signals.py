"""Signals that ask a run to stop: they are heard at once and followed where the run can be picked
up again.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fastokd.train.launch import launched

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""
LAUNCHER_PATIENCE = 10.0
"""Seconds in which a launcher's further signals are taken for the first: a scheduler signals every
process of a job, and the launcher passes on what it got.
"""
PATIENCE_VARIABLE = "FASTOKD_SIGNAL_PATIENCE"
"""The environment variable with the seconds for a run that something else than a launcher started
and signals.
"""


class StopSignals:
    """Within it, SIGTERM and SIGUSR1 are noted in ``received`` and nothing else happens; another
    one ends the process.

    It may be entered again inside. Outside the main thread, where Python has no signal handlers, it
    changes nothing.

    Args:
        patience: seconds after the first signal in which others are taken for the same; None for
            ``LAUNCHER_PATIENCE`` where a launcher started this process, and else for those of
            ``PATIENCE_VARIABLE``, or none.
    """

    def __init__(self, patience: float | None = None) -> None:
        self._patience = (
            patience
            if patience is not None
            else LAUNCHER_PATIENCE
            if launched()
            else float(os.environ.get(PATIENCE_VARIABLE, "0"))
        )
        self._label = f"rank {os.environ['RANK']}: " if launched() else ""
        self._depth = 0
        self.heard = 0
        """The number of the first signal; 0 before."""
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> int:
        """The number of the signal that is to be followed; 0 for none."""
        return self.heard

    def __enter__(self) -> "StopSignals":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            # None is a handler that was not set from Python, and cannot be set back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.heard:
            self.heard, self._at = number, time.monotonic()
            self._say(
                f"{name}: saving after this step, then stopping; another signal stops at once"
            )
        elif time.monotonic() - self._at >= self._patience:
            self._say(f"{name}: stopping at once; the last checkpoint is intact")
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        # Not print: the signal may have come in the middle of one.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ is not None else 2,
            f"fastokd: {self._label}{text}\n".encode(),
        )
