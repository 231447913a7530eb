"""Progress of a run: a bar on a terminal, plain lines elsewhere and in ``log.txt``."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from fastokd._moved import moved_names
from fastokd.storage import format_bytes

T = TypeVar("T")

LIVE_INTERVAL = 1.0
"""Seconds between new numbers next to the bar."""

PLAIN_INTERVAL = 30.0
"""Seconds between plain progress lines within an epoch."""

WINDOW = 30.0
"""Seconds over which throughput is measured, so that a slow first step is soon forgotten."""

__getattr__ = moved_names(__name__, {__name__: ("Pace=Throughput",)})


class OutputConsole(Console):
    """A console for standard output and error. If the reader is gone, as after ``| head``, it
    raises ``BrokenPipeError``, where rich would end the process with exit code 1.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Counter:
    """Progress over items: a bar on a terminal until all are done, plain lines elsewhere."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or OutputConsole(file=sys.stderr, soft_wrap=True, highlight=False)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._progress.add_task(title)
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._console.is_terminal:
            self._progress.start()
            self._progress.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._printed > PLAIN_INTERVAL / 3:
            self._printed = time.monotonic()
            self._console.print(f"{self._title}: {done} of {total}", markup=False)
        if done >= total:
            self.close()
            self._progress.reset(self._task)  # for the images of the next split

    def close(self) -> None:
        """Remove the bar."""
        if self._progress.live.is_started:  # otherwise it prints an empty line into a pipe
            self._progress.stop()


@dataclass(frozen=True)
class EpochProgress:
    """Numbers of an epoch so far."""

    means: Mapping[str, float]
    """Means over the samples: "loss", each term by its name, and "accuracy/NAME" in [0, 1]."""
    images_per_second: float
    """Recent throughput over all processes."""
    waiting_share: float
    """The fraction of that time, in [0, 1], in which the host waited for a batch. A GPU still has
    queued work then, so it waits less.
    """
    seconds_left_epoch: float
    seconds_left_run: float
    """Including evaluations and checkpoints."""
    lr: float
    kd_weight: float
    memory: int | None = None
    """Peak bytes of GPU memory; None on a CPU."""

    def describe(self, student: str) -> str:
        """One line; ``student`` is the name of the student's accuracy."""
        accuracy = self.means.get(f"accuracy/{student}")
        right = [] if accuracy is None else [f"{student} {100 * accuracy:.1f} %"]
        memory = [] if self.memory is None else [f"GPU {format_bytes(self.memory)}"]
        epoch, run = duration(self.seconds_left_epoch), duration(self.seconds_left_run)
        parts = [
            f"loss {self.means['loss']:.4f}",
            *right,
            f"epoch {epoch} left, run {run} left",
            f"{self.images_per_second:.0f} img/s",
            f"waiting for data {100 * self.waiting_share:.0f} %",
            f"lr {self.lr:.4g}",
            f"kd_weight {self.kd_weight:.3g}",
            *memory,
        ]
        return "  ".join(parts)


class Throughput:
    """Images per second, the time spent waiting for data, and the time left, by the host's clock,
    in a run of ``epochs`` epochs with ``batch_size`` images per step of all processes.

    ``costs`` are the costs of a step in each epoch relative to each other, for the time left: those
    of epochs before ``teach_from`` are lower. By default they are equal.
    """

    def __init__(
        self,
        epochs: int,
        batch_size: int,
        clock: Callable[[], float] = time.monotonic,
        costs: Sequence[float] = (),
    ) -> None:
        self._costs, self._batch_size, self._clock = costs or [1.0] * epochs, batch_size, clock
        self._after = 0.0  # seconds between the last step of an epoch and the first of the next

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """Start a 0-based epoch, of which ``done`` of ``steps`` steps are done already."""
        self._epoch, self._steps, self._first = epoch, steps, done
        self._waited = 0.0
        self._started = self._finished = self._clock()
        self._looks: deque[tuple[float, int, float]] = deque([(self._started, done, 0.0)])

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; measures the time until each is available."""
        self._finished = self._clock()
        for batch in batches:
            self._waited += self._clock() - self._finished
            yield batch
            self._finished = self._clock()  # of the step

    def look(
        self,
        done: int,
        means: Mapping[str, float],
        lr: float,
        kd_weight: float,
        memory: int | None = None,
    ) -> EpochProgress:
        """The progress after ``done`` steps; reading ``means`` must have waited for the device."""
        now = self._clock()
        while len(self._looks) > 1 and now - self._looks[1][0] >= WINDOW:
            self._looks.popleft()
        then, before, waited = self._looks[0]
        self._looks.append((now, done, self._waited))
        seconds = max(now - then, 1e-9)
        per_step = seconds / max(done - before, 1)
        left = per_step * (self._steps - done)
        later = len(self._costs) - self._epoch - 1
        return EpochProgress(
            means=means,
            images_per_second=(done - before) * self._batch_size / seconds,
            waiting_share=(self._waited - waited) / seconds,
            seconds_left_epoch=left,
            seconds_left_run=left + self._later(per_step) + (later + 1) * self._after,
            lr=lr,
            kd_weight=kd_weight,
            memory=memory,
        )

    def device_is_done(self) -> None:
        """Mark the end of the epoch's steps: the device has done all that the host gave it."""
        self._finished = self._clock()

    def waiting_share(self) -> float:
        """The fraction of the epoch's steps in which the host waited for a batch."""
        return self._waited / max(self._finished - self._started, 1e-9)

    def end_epoch(self) -> float:
        """The seconds left in the run, when the epoch is evaluated and saved."""
        self._after = self._clock() - self._finished
        per_step = (self._finished - self._started) / max(self._steps - self._first, 1)
        return self._later(per_step) + (len(self._costs) - self._epoch - 1) * self._after

    def _later(self, per_step: float) -> float:
        """The seconds of the steps of later epochs, from the seconds of a step in this one."""
        costs = sum(self._costs[self._epoch + 1 :]) / self._costs[self._epoch]
        return per_step * self._steps * costs


class Reporter:
    """Shows the progress of a run: a bar on a terminal, plain lines elsewhere and in ``log.txt``.

    Args:
        label: a prefix of every epoch, where there are several runs.
        quiet: show only what ``print`` prints; the log has the rest.
        lines: if False, print no lines but those of ``print``; a terminal still has the bar.
        silent: nothing on the screen and no log, for all processes of a run but the first.
        console: None for stdout.
    """

    def __init__(
        self,
        label: str = "",
        quiet: bool = False,
        *,
        lines: bool = True,
        silent: bool = False,
        console: Console | None = None,
    ) -> None:
        stdout = OutputConsole(file=sys.stdout, soft_wrap=True, highlight=False)
        self.console = Console(quiet=True) if silent else console or stdout
        self._label = f"{label}: " if label else ""
        self._silent = silent
        shows = not (quiet or silent)
        self._lines = lines and shows
        # FORCE_COLOR makes rich take a pipe for a terminal; a bar would fill a CI log.
        self._live = shows and self.console.is_interactive and self.console.file.isatty()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._title, self._steps = "", 0
        self._student = "branch1"
        self._best: float | None = None
        self._decoded = Counter("reading images", self.console)
        self._log: Path | None = None
        self._noted = self._printed = time.monotonic()

    @property
    def shows_info(self) -> bool:
        """True if ``info`` prints its lines."""
        return self._lines

    def print(self, text: str) -> None:
        """Print a line, and log it."""
        self.console.print(text, markup=False)
        self.log(text)

    def info(self, text: str) -> None:
        """Print a line unless quiet, and log it."""
        if self._lines:
            self.console.print(text, markup=False)
        self.log(text)

    def attach_log(self, path: Path) -> None:
        """Append every line to this file too from now on, with the time."""
        if not self._silent:
            self._log = path
            if path.exists():
                self.log("--- resumed ---")

    def log(self, text: str) -> None:
        """Log a line. A log that cannot be written is reported once and does not stop the run."""
        if self._log is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with open(self._log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{now} {line}\n" for line in text.splitlines()))
        except OSError as error:
            path, self._log = self._log, None
            self.print(f"cannot write {path}: {error.strerror}; continuing without it")

    def decoding(self, done: int, total: int) -> None:
        """Show the progress of reading image files."""
        if self._lines or self._live:
            self._decoded(done, total)

    def start_run(self, student: str, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start a run: the name of the student's row, and the records of earlier epochs."""
        self._student, self._best = student, None
        for record in records:
            self._remember(record)

    def _remember(self, record: Mapping[str, Any]) -> None:
        """Keep the student's best accuracy; epochs before ``--ema`` changed the student lack it."""
        accuracy = record["eval"].get(self._student)
        if accuracy is not None and (self._best is None or accuracy > self._best):
            self._best = accuracy

    def start_epoch(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        """Start a 0-based epoch, of which ``done`` of ``steps`` steps are done already."""
        self._printed = time.monotonic()
        self._title, self._steps = f"{self._label}epoch {epoch + 1}/{epochs}", steps
        if not self._live:
            return
        if self._bar is None:
            one_line = Column(no_wrap=True, overflow="ellipsis")
            numbers = TextColumn("{task.fields[numbers]}", table_column=one_line)
            columns = ("{task.description}", BarColumn(20), MofNCompleteColumn(), numbers)
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(self._title, numbers="")
            self._bar.start()
        self._bar.reset(self._task, description=self._title, total=steps, completed=done)

    def should_report(self) -> bool:
        """True if ``step`` would show numbers now; reading the loss waits for the device."""
        now = time.monotonic()
        return (self._live and now - self._noted > LIVE_INTERVAL) or (
            (self._lines or self._log is not None) and now - self._printed > PLAIN_INTERVAL
        )

    def step(self, done: int, progress: EpochProgress | None = None) -> None:
        """Report ``done`` steps of the epoch, with numbers if ``should_report`` asked for them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        if progress is None:
            return
        self._noted = now = time.monotonic()
        line = progress.describe(self._student)
        if self._bar is not None:
            best = "" if self._best is None else f"best {100 * self._best:.2f} %  "
            self._bar.update(self._task, numbers=best + line, refresh=True)
        if now - self._printed > PLAIN_INTERVAL:
            self._printed = now
            text = f"{self._title}  step {done}/{self._steps}  {line}"
            # On a terminal the numbers are next to the bar already.
            self.log(text) if self._live else self.info(text)

    def evaluating(self) -> None:
        """Report that the steps of the epoch are done and its evaluation starts."""
        if self._bar is not None:
            self._bar.update(self._task, numbers="evaluating", refresh=True)

    def end_epoch(self, record: Mapping[str, Any], seconds_left: float = 0.0) -> None:
        """Report the epoch's record and the seconds left."""
        self._remember(record)
        parts = [
            f"{self._title}  loss {record['train']['loss']:.4f}  lr {record['lr']:g}",
            f"{record['images_per_second']:.0f} img/s",
        ]
        if "waiting_share" in record:
            parts.append(f"waiting for data {100 * record['waiting_share']:.0f} %")
        if seconds_left:
            parts.append(f"run {duration(seconds_left)} left")
        accuracies = [f"{name} {100 * value:.2f}" for name, value in record["eval"].items()]
        self.info("  ".join([*parts, f"accuracy %: {accuracies[0]}", *accuracies[1:]]))

    def close(self) -> None:
        """Remove the bar, which hides the cursor; call it however a run ends."""
        self._decoded.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Seconds as minutes, hours and days: 0:07, 1:02:03, 2d 03:04:05."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
