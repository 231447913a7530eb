"""Signals that stop a run, obeyed at a point from which it can be resumed."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from fastokd.train.launch import handling, launched

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals that schedulers send before they take a machine away."""
LAUNCHER_PATIENCE = 10.0
"""Seconds in which further signals count as the first: scheduler and launcher both send them."""
INTERRUPT_PATIENCE = 1.0
"""The same for Ctrl-C, which a terminal and a launcher both send."""
PATIENCE_VARIABLE = "FASTOKD_SIGNAL_PATIENCE"
"""The environment variable with these seconds, for a run that another program starts."""


def signal_name(number: int) -> str:
    """The name of a signal in messages: "Ctrl-C" or e.g. "SIGTERM"."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignals:
    """A context in which SIGTERM and SIGUSR1 (in ``interrupts`` also SIGINT) only set ``received``;
    a second one ends the process, unless it comes within ``patience`` seconds: by default
    ``LAUNCHER_PATIENCE`` under a launcher, else the value of ``PATIENCE_VARIABLE``, or 0.

    It may be nested. Outside the main thread, where Python has no signal handlers, it has no
    effect.
    """

    def __init__(self, patience: float | None = None) -> None:
        default = LAUNCHER_PATIENCE if launched() else float(os.environ.get(PATIENCE_VARIABLE, "0"))
        self._patience = default if patience is None else patience
        self._label = f"rank {os.environ['RANK']}: " if launched() else ""
        self._depth = 0
        self.heard = 0
        """The number of the first signal; 0 before."""
        self._at = 0.0
        self._handlers = contextlib.ExitStack()

    @property
    def received(self) -> int:
        """The number of the signal to obey; 0 for none. A subclass may add other reasons."""
        return self.heard

    def __enter__(self) -> "StopSignals":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            handlers = handling(STOP_SIGNALS, self._handle, ignored_too=True)
            self._handlers.enter_context(handlers)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._handlers.close()

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Obey Ctrl-C too, unless the process was started to ignore it. Outside of this context,
        where there is nothing to save, it raises ``KeyboardInterrupt``.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with handling((signal.SIGINT,), self._handle):
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_interrupt = number == signal.SIGINT
        name = signal_name(number)
        patience = min(self._patience, INTERRUPT_PATIENCE) if is_interrupt else self._patience
        if not self.heard:
            self.heard, self._at = number, time.monotonic()
            another = "a second Ctrl-C" if is_interrupt else "another signal"
            self._print(f"{name}: saving after this step, then stopping; {another} stops at once")
        elif time.monotonic() - self._at >= patience:
            self._print(f"{name}: stopping at once; the last checkpoint is intact")
            os._exit(128 + number)

    def _print(self, text: str) -> None:
        # Not print: the signal may have interrupted one.
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.write(descriptor, f"fastokd: {self._label}{text}\n".encode())
