"""The parts of ``bench.gpu``: their rows and their context."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.results import Results
from fastokd.errors import ConfigError
from fastokd.experiments.timing import median_and_range, sample_seconds


class OutOfMinutes(Exception):
    """A row was stopped and a later call can continue it; the message has its progress."""


class Refused(ConfigError):
    """The options contradict the existing rows; no row is measured."""


@dataclass(frozen=True)
class Context:
    """The settings of a call.

    Attributes:
        device: where it measures.
        label: of the device, the end of every result file's name.
        out: the folder of the result files.
        runs: the folder for large files that may be lost: run folders, images.
        deadline: the end of the minutes, by ``time.monotonic``.
        dry: whether sizes are tiny and everything runs on the CPU.
        data: the dataset of the accuracy part, as ``fastokd train --data`` takes it.
        images: a folder of large JPEG files for the data part; None to generate some.
        epochs, seeds: of the accuracy part; None for those of the plan.
    """

    device: torch.device
    label: str
    out: Path
    runs: Path
    deadline: float
    dry: bool
    data: str | None = None
    images: Path | None = None
    epochs: int | None = None
    seeds: int | None = None

    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def needs(self, minutes: float) -> float:
        """The minutes that must be left to start a measurement; 0 in a dry run."""
        return 0.0 if self.dry else minutes

    def not_compiled(self) -> contextlib.AbstractContextManager[Any]:
        """A context without compilation in a dry run; compilation takes minutes and has separate
        tests.
        """
        return torch.compiler.set_stance("force_eager") if self.dry else contextlib.nullcontext()

    def seconds(self, call: Callable[[], Any], graph: bool) -> tuple[float, float, float]:
        """The time of a call: the median, the shortest and the longest; see ``sample_seconds``."""
        if self.dry:
            return median_and_range(sample_seconds(call, self.device, graph, 3, 1))
        (about,) = sample_seconds(call, self.device, False, 1, 1)
        # Each sample takes some milliseconds, whatever the call takes: the launch of a graph is in
        # it too.
        return median_and_range(
            sample_seconds(call, self.device, graph, 25, max(1, min(200, int(0.005 / about))))
        )


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: unique in its part; a row whose name is in the result file is not measured again.
        minutes: with fewer left it is not started.
        measure: returns the row's entries. May raise ``OutOfMinutes``.
    """

    name: str
    minutes: float
    measure: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part: a result file and its rows.

    Attributes:
        name: on the command line, and the start of the result file's name.
        minutes: with fewer left it is not started.
        rows: the rows by decreasing value, created on demand.
        line: a summary of a row's entries.
        refusal: the reason why it cannot run; None if it can.
        entries: the name of the list of rows in the result file.
        sources: files and folders that the results depend on, in addition to the part's file and
            ``MEASURED_CODE``.
    """

    name: str
    minutes: float
    rows: Callable[[Context, Results], Iterable[Row]]
    line: Callable[[dict[str, Any]], str]
    refusal: Callable[[Context], str | None] = lambda context: None
    entries: str = "rows"
    sources: tuple[str, ...] = ()

    def code(self) -> tuple[str, ...]:
        """The sources that only this part depends on."""
        return (f"bench/gpu/{self.name}.py", *self.sources)
