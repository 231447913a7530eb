"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 30.0
"""Seconds between plain progress lines within an epoch."""


class Counter:
    """How many of a number of things are done: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._console.is_terminal:
            if self._progress is None:
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
                self._progress = Progress(*columns, console=self._console, transient=True)
                self._progress.start()
                self._task = self._progress.add_task(self._title, total=total)
            assert self._task is not None
            self._progress.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._printed > PLAIN_INTERVAL / 3:
            self._printed = time.monotonic()
            self._console.print(f"{self._title}: {done} of {total}", markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Reporter:
    """Prints the progress of a run. Everything goes to stdout; ``quiet`` prints nothing but ``say``."""

    def __init__(self, label: str = "", quiet: bool = False) -> None:
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.label = f"{label}: " if label else ""
        self.quiet = quiet
        self.live = self.console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._decoded: Counter | None = None
        self._printed = time.monotonic()
        self._started = 0.0

    def say(self, text: str) -> None:
        """A line that always appears."""
        self.console.print(text, markup=False)

    def decoding(self, done: int, total: int) -> None:
        """Progress of reading the image files; called for each."""
        if self.quiet:
            return
        if self._decoded is None:
            self._decoded = Counter("reading images", self.console)
        self._decoded(done, total)
        if done >= total:
            self.end_epoch()

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        self._title, self._steps = f"{self.label}epoch {epoch + 1}/{epochs}", steps
        self._started = self._printed = time.monotonic()
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.fields[note]}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=steps, note="")

    def wants_note(self) -> bool:
        """Whether ``step`` would show a note now: reading the loss waits for the device, so ask first."""
        if self.quiet:
            return False
        return time.monotonic() - self._printed > (1.0 if self.live else PLAIN_INTERVAL)

    def step(self, done: int, note: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, **({"note": note} if note else {}))
            if note:
                self._printed = time.monotonic()
        elif note and not self.quiet:
            self._printed = time.monotonic()
            self.say(f"{self._title}  step {done}/{self._steps}  {note}")

    def end_epoch(self, record: Mapping[str, Any] | None = None) -> None:
        """Close the bar; with a record print the epoch's line."""
        if self._decoded is not None:
            self._decoded.close()
            self._decoded = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
        if record is not None and not self.quiet:
            accuracy = "  ".join(f"{name} {100 * value:.2f}" for name, value in record["eval"].items())
            self.say(f"{self._title}  loss {record['train']['loss']:.4f}  lr {record['lr']:g}  "
                     f"{record['images_per_second']:.0f} img/s  accuracy %: {accuracy}")
