"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere and in
``log.txt``.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

LIVE_INTERVAL = 1.0
"""Seconds between new numbers in the live table."""

PLAIN_INTERVAL = 30.0
"""Seconds between plain progress lines within an epoch."""

WINDOW = 30.0
"""Seconds over which speed is measured: compiling in the first step is soon forgotten."""


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
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.completed}/{task.total}"),
                    TimeRemainingColumn(),
                )
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


@dataclass(frozen=True)
class EpochProgress:
    """Where an epoch stands.

    Attributes:
        means: means over the epoch's samples so far: "loss", each term by its name, and
            "accuracy/NAME" in [0, 1].
        images_per_second: speed of late, over all processes.
        waiting_share: the share of that time in which the host waited for the next batch, in [0,
            1]. A GPU has work queued when the host begins to wait, so it waits no longer than that.
        seconds_left_epoch: until the last step of the epoch, at that speed.
        seconds_left_run: until the end of the run, with what comes after each epoch's steps
            (evaluation, checkpoint).
        lr, kd_weight: of the step.
        memory: bytes of GPU memory at the peak; None on a CPU.
    """

    means: Mapping[str, float]
    images_per_second: float
    waiting_share: float
    seconds_left_epoch: float
    seconds_left_run: float
    lr: float
    kd_weight: float
    memory: int | None = None


class Throughput:
    """How fast a run goes, how much of the time it waits for data, and how long it will take: by
    the host's clock alone.

    Args:
        epochs: of the whole run.
        batch_size: images per step, over all processes.
        clock: seconds from any moment on.
    """

    def __init__(
        self, epochs: int, batch_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._epochs, self._batch_size, self._clock = epochs, batch_size, clock
        self._after = 0.0  # seconds between the last step of an epoch and the first of the next

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """A 0-based epoch of ``steps`` steps begins, of which a checkpoint within the epoch may
        hold some already.
        """
        self._epoch, self._steps, self._first = epoch, steps, done
        self._waited = 0.0
        self._started = self._finished = self._clock()
        self._looks: deque[tuple[float, int, float]] = deque([(self._started, done, 0.0)])

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there is taken."""
        iterator = iter(batches)
        while True:
            self._finished = self._clock()  # the step before, that is
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += self._clock() - self._finished
            yield batch

    def look(
        self,
        done: int,
        means: Mapping[str, float],
        lr: float,
        kd_weight: float,
        memory: int | None = None,
    ) -> EpochProgress:
        """Where the epoch stands after ``done`` steps; on a GPU call it when ``means`` has waited
        for the device.
        """
        now = self._clock()
        while len(self._looks) > 1 and now - self._looks[1][0] >= WINDOW:
            self._looks.popleft()
        then, before, waited = self._looks[0]
        self._looks.append((now, done, self._waited))
        seconds = max(now - then, 1e-9)
        per_step = seconds / max(done - before, 1)
        left = per_step * (self._steps - done)
        later = self._epochs - self._epoch - 1
        return EpochProgress(
            means=means,
            images_per_second=(done - before) * self._batch_size / seconds,
            waiting_share=(self._waited - waited) / seconds,
            seconds_left_epoch=left,
            seconds_left_run=left + later * per_step * self._steps + (later + 1) * self._after,
            lr=lr,
            kd_weight=kd_weight,
            memory=memory,
        )

    def device_is_done(self) -> None:
        """The device has done all steps that the host gave it: that is when an epoch's steps
        end.
        """
        self._finished = self._clock()

    def waiting_share(self) -> float:
        """The share of the epoch's steps in which the host waited for the next batch."""
        return self._waited / max(self._finished - self._started, 1e-9)

    def end_epoch(self) -> float:
        """The epoch is evaluated and saved; the seconds that the rest of the run will take."""
        self._after = self._clock() - self._finished
        steps = (self._finished - self._started) * self._steps / max(self._steps - self._first, 1)
        return (self._epochs - self._epoch - 1) * (steps + self._after)


class Reporter:
    """Shows the progress of a run: on a terminal a live table, elsewhere plain lines, and in
    ``log.txt`` plain lines too.

    Args:
        label: what stands before every epoch, where there are several runs.
        quiet: show nothing but what ``print`` prints; the log has the rest.
        lines: with False no line is printed but those of ``print``; a terminal still has the live
            table.
        silent: nothing on the screen and nothing in a log: for all processes of a run but the
            first.
        console: where to; stdout by default.
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
        self.console = (
            Console(quiet=True)
            if silent
            else console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        )
        self._label = f"{label}: " if label else ""
        self._silent = silent
        shows = not (quiet or silent)
        self._lines = lines and shows
        # FORCE_COLOR makes rich take a pipe for a terminal; a table that is drawn over itself would
        # fill a log of CI.
        self._live = shows and self.console.is_interactive and self.console.file.isatty()
        self._display: Live | None = None
        self._table: _EpochTable | None = None
        self._decoded: Counter | None = None
        self._student, self._last, self._best, self._best_epoch = "branch1", {}, {}, -1
        self._log: Path | None = None
        self._log_failed = False
        self._noted = self._printed = time.monotonic()

    @property
    def shows_info(self) -> bool:
        """Whether anybody sees what ``info`` says while the run goes on; what takes time to find
        out need not be found out else.
        """
        return self._lines

    def print(self, text: str) -> None:
        """A line that always appears."""
        self.console.print(text, markup=False)
        self.log(text)

    def info(self, text: str) -> None:
        """A line that ``quiet`` leaves to the log."""
        if self._lines:
            self.console.print(text, markup=False)
        self.log(text)

    def attach_log(self, path: Path) -> None:
        """From now on append every line to this file too, with the time."""
        if self._silent:
            return
        self._log = path
        if path.exists():
            self.log("--- resumed ---")

    def log(self, text: str) -> None:
        """A line for the log alone.

        A log that cannot be written is said once and does not stop the run: nothing is read from
        it. On a full disk the records and the checkpoint, which are, fail with the reason.
        """
        if self._log is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with open(self._log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{now} {line}\n" for line in text.splitlines()))
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                self.console.print(
                    f"cannot write {self._log}: {error.strerror}; the run goes on without those"
                    " lines",
                    markup=False,
                )

    def decoding(self, done: int, total: int) -> None:
        """Progress of reading the image files; called for each."""
        if not (self._lines or self._live):
            return
        if self._decoded is None:
            self._decoded = Counter("reading images", self.console)
        self._decoded(done, total)
        if done >= total:
            self._end_decoding()

    def start_run(self, student: str, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """What the table is of: the student's row by its name, and the records of the epochs before
        a resume.
        """
        self._student, self._last, self._best, self._best_epoch = student, {}, {}, -1
        for record in records:
            self._remember(record)

    def start_epoch(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        """A 0-based epoch begins, of which a checkpoint within the epoch may hold some steps
        already.
        """
        self._title, self._steps = f"{self._label}epoch {epoch + 1}/{epochs}", steps
        self._printed = time.monotonic()
        if self._live:
            before = self._table.progress if self._table is not None else None
            self._table = _EpochTable(
                self._title,
                steps,
                done,
                self._student,
                self._last,
                self._best,
                self._best_epoch,
                before,
            )
            if self._display is None:
                self._display = Live(
                    console=self.console,
                    get_renderable=lambda: self._table or "",
                    refresh_per_second=2,
                    transient=True,
                )
                self._display.start()

    def should_report(self) -> bool:
        """Whether ``step`` would show numbers now: reading the loss waits for the device, so ask
        first.
        """
        now = time.monotonic()
        return (self._live and now - self._noted > LIVE_INTERVAL) or (
            (self._lines or self._log is not None) and now - self._printed > PLAIN_INTERVAL
        )

    def step(self, done: int, progress: EpochProgress | None = None) -> None:
        """``done`` steps of the epoch are done; numbers where ``should_report`` asked for them."""
        if self._table is not None:
            self._table.done = done
        if progress is None:
            return
        now = time.monotonic()
        self._noted = now
        if self._table is not None:
            self._table.progress, self._table.fresh = progress, True
        if now - self._printed > PLAIN_INTERVAL:
            self._printed = now
            line = f"{self._title}  step {done}/{self._steps}  {_plain(progress, self._student)}"
            # On a terminal the table says it, and lines would only push it down.
            self.log(line) if self._live else self.info(line)

    def evaluating(self) -> None:
        """The steps of the epoch are done, and its evaluation begins."""
        if self._table is not None:
            self._table.evaluating = True

    def end_epoch(
        self, record: Mapping[str, Any] | None = None, seconds_left: float | None = None
    ) -> None:
        """With the epoch's record its line, and how long the rest of the run will take; without one
        the table is taken away.
        """
        if record is None:
            self.close()
            return
        self._remember(record)
        if self._table is not None and self._table.progress is not None:
            self._table.progress = replace(
                self._table.progress, means=record["train"], seconds_left_run=seconds_left or 0.0
            )
        accuracy = "  ".join(f"{name} {100 * value:.2f}" for name, value in record["eval"].items())
        waiting = (
            f"  waiting for data {100 * record['waiting_share']:.0f} %"
            if "waiting_share" in record
            else ""
        )
        left = f"  run {duration(seconds_left)} left" if seconds_left else ""
        self.info(
            f"{self._title}  loss {record['train']['loss']:.4f}  lr {record['lr']:g} "
            f" {record['images_per_second']:.0f} img/s{waiting}{left}  accuracy %: {accuracy}"
        )

    def close(self) -> None:
        """Take the live table away. To be called however a run ends: the table hides the terminal's
        cursor.
        """
        self._end_decoding()
        if self._display is not None:
            self._display.stop()
            self._display = self._table = None

    def _end_decoding(self) -> None:
        if self._decoded is not None:
            self._decoded.close()
            self._decoded = None

    def _remember(self, record: Mapping[str, Any]) -> None:
        # The best epoch is the student's, for all rows, as in summary.json.
        self._last = record["eval"]
        if self._student not in self._last:
            return  # an epoch before the run's student was what it is now
        if self._best_epoch < 0 or self._last[self._student] > self._best[self._student]:
            self._best, self._best_epoch = self._last, record["epoch"]


class _EpochTable:
    """The live table of an epoch, laid out anew for the terminal's size whenever it is drawn.

    Until the epoch's first numbers it shows those of the epoch before: short epochs would have it
    jump.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        done: int,
        student: str,
        last: Mapping[str, float],
        best: Mapping[str, float],
        best_epoch: int,
        progress: EpochProgress | None = None,
    ) -> None:
        self.title, self.steps, self.done = title, steps, done
        self.student, self.last, self.best, self.best_epoch = student, last, best, best_epoch
        self.progress, self.fresh = progress, False
        self.evaluating = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One line stays free for the cursor.
        for line in self.lines(options.max_width, max(console.height - 1, 1), options.ascii_only):
            line.truncate(options.max_width)
            yield line

    def lines(self, width: int, height: int, ascii_only: bool = False) -> list[Text]:
        """At most ``height`` lines of at most ``width`` columns: what matters least is what is left
        out.
        """
        status = self._status(width)
        room = max(height - 1 - len(status), 0)
        means = self.progress.means if self.progress else {}
        losses = [
            (name, value) for name, value in means.items() if not name.startswith("accuracy/")
        ]
        rows = self._rows(width, room - bool(losses))
        longest = max((len(name) for name, _ in losses), default=0)
        terms = _grid(
            [f"{name:<{longest}} {value:>8.4f}" for name, value in losses], width, room - len(rows)
        )
        return [self._bar(width, ascii_only), *rows, *terms, *status][:height]

    def _bar(self, width: int, ascii_only: bool) -> Text:
        right = f" {self.done}/{self.steps}"
        if self.evaluating:
            right += "  evaluating"
        elif self.progress and self.fresh:
            right += f"  {duration(self.progress.seconds_left_epoch)} left"
        if self.progress:
            right += f"  run {duration(self.progress.seconds_left_run)} left"
        length = min(width - len(self.title) - 1 - len(right), 40)
        bar = Text(self.title, style="bold", no_wrap=True)
        if length >= 4:
            full = length * self.done // max(self.steps, 1)
            done, rest = ("#", "-") if ascii_only else ("━", "─")
            bar.append(" ").append(done * full, "green").append(rest * (length - full), "dim")
        return bar.append(right, "not bold")

    def _rows(self, width: int, room: int) -> list[Text]:
        """Accuracies in percent by row, in as many blocks side by side as the height asks for and
        the width allows.
        """
        means = self.progress.means if self.progress else {}
        train = {
            name.removeprefix("accuracy/"): value
            for name, value in means.items()
            if name.startswith("accuracy/")
        }
        names = list(dict.fromkeys([*train, *self.last]))
        if not names or room < 2:
            return []
        labels = {name: f"{name} (student)" if name == self.student else name for name in names}
        titles = (
            "train",
            "eval",
            f"best (epoch {self.best_epoch + 1})" if self.best and width >= 50 else "best",
        )
        wide = [max(len(title), 6) for title in titles]
        numbers = sum(wide) + 2 * len(wide)
        name_width = max(min(max(map(len, (*labels.values(), "accuracy %"))), width - numbers), 4)
        blocks = max(
            min(-(-len(names) // (room - 1)), (width + 3) // (name_width + numbers + 3)), 1
        )
        per_block = min(-(-len(names) // blocks), room - 1)
        cells = []
        for name in names:
            values = [
                f"{100 * found[name]:.2f}" if name in found else "-"
                for found in (train, self.last, self.best)
            ]
            cells.append(
                (
                    _cells(labels[name], name_width, values, wide),
                    "bold" if name == self.student else "",
                )
            )
        if len(cells) > blocks * per_block:
            kept = blocks * per_block - 1
            cells = [*cells[:kept], (f"... {len(cells) - kept} more", "dim")]
        lines = [Text(no_wrap=True) for _ in range(per_block)]
        for index, (cell, style) in enumerate(cells):
            lines[index % per_block].append("   " if index >= per_block else "").append(cell, style)
        return [
            Text(
                "   ".join([_cells("accuracy %", name_width, titles, wide)] * blocks),
                style="dim",
                no_wrap=True,
            ),
            *lines,
        ]

    def _status(self, width: int) -> list[Text]:
        if self.progress is None:
            return []
        at = self.progress
        parts = [
            f"{at.images_per_second:.0f} img/s",
            f"waiting for data {100 * at.waiting_share:.0f} %",
            f"lr {at.lr:.4g}",
            f"kd_weight {at.kd_weight:.3g}",
        ]
        if at.memory is not None:
            parts.append(f"GPU {at.memory / 2**30:.2f} GiB")
        lines = [parts[0]]
        for part in parts[1:]:
            if len(lines[-1]) + 2 + len(part) <= width:
                lines[-1] += f"  {part}"
            else:
                lines.append(part)
        return [Text(line, no_wrap=True) for line in lines]


def _cells(label: str, label_width: int, values: Iterable[str], widths: Iterable[int]) -> str:
    if len(label) > label_width:
        label = label[: label_width - 1] + "~"
    return f"{label:<{label_width}}" + "".join(
        f"  {value:>{wide}}" for value, wide in zip(values, widths, strict=True)
    )


def _grid(cells: list[str], width: int, room: int) -> list[Text]:
    """Cells in columns of one width, in at most ``room`` lines; the last cell says how many are
    left out.
    """
    if not cells or room < 1:
        return []
    wide = max(map(len, cells))
    columns = max((width + 2) // (wide + 2), 1)
    if len(cells) > columns * room:
        kept = max(columns * room - 1, 1)
        cells = [
            *cells[:kept],
            *([f"... {len(cells) - kept} more"] if kept < columns * room else []),
        ]
    return [
        Text(
            "  ".join(f"{cell:<{wide}}" for cell in cells[start : start + columns]).rstrip(),
            no_wrap=True,
        )
        for start in range(0, len(cells), columns)
    ]


def _plain(progress: EpochProgress, student: str) -> str:
    """The numbers as one line."""
    accuracy = progress.means.get(f"accuracy/{student}")
    parts = [f"loss {progress.means['loss']:.4f}"]
    if accuracy is not None:
        parts.append(f"{student} {100 * accuracy:.1f} %")
    parts += [
        f"{progress.images_per_second:.0f} img/s",
        f"waiting for data {100 * progress.waiting_share:.0f} %",
    ]
    if progress.memory is not None:
        parts.append(f"GPU {progress.memory / 2**30:.2f} GiB")
    return "  ".join(
        [
            *parts,
            (
                f"epoch {duration(progress.seconds_left_epoch)} left, run"
                f" {duration(progress.seconds_left_run)} left"
            ),
        ]
    )


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
