"""What a part is made of, and what every part is given."""

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
    """A row was stopped where a later call can go on; the message says how far it is."""


class Refused(ConfigError):
    """What was asked for does not go with the rows that are there; no row is measured."""


@dataclass(frozen=True)
class Context:
    """What every part is given.

    Attributes:
        device: where it measures.
        label: of the device, the end of every result file's name.
        out: the folder of the result files.
        runs: the folder for what is large and may be lost: run folders, pictures.
        deadline: when the minutes are spent, by ``time.monotonic``.
        dry: whether sizes are tiny and everything runs on the CPU.
        data: the dataset of the accuracy part, as ``fastokd train --data`` takes it.
        pictures: a tree of large JPEG files for the data part; None to draw some.
        epochs, seeds: of the accuracy part; None for the plan's own.
    """

    device: torch.device
    label: str
    out: Path
    runs: Path
    deadline: float
    dry: bool
    data: str | None = None
    pictures: Path | None = None
    epochs: int | None = None
    seeds: int | None = None

    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def needs(self, minutes: float) -> float:
        """The minutes that something must have left to be begun; tiny sizes need next to none."""
        return 0.0 if self.dry else minutes

    def not_compiled(self) -> contextlib.AbstractContextManager[Any]:
        """Within it nothing is compiled where sizes are tiny: that takes minutes, and tests of
        their own do it.
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
    """One thing to measure.

    Attributes:
        name: unique in its part; a row of this name that is in the result file already is not
            measured again.
        minutes: with fewer left it is not begun.
        measure: gives the row's entries. May raise ``OutOfMinutes``.
    """

    name: str
    minutes: float
    measure: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part: a result file, and the rows that belong into it.

    Attributes:
        name: on the command line, and the start of the result file's name.
        minutes: with fewer left it is not begun.
        rows: the rows in the order of their worth, made while they are asked for, so that none is
            prepared in vain.
        line: a row's entries in a few words.
        refusal: why it cannot run as things are; None if it can.
        entries: what the list of rows is called in the result file.
        sources: files and folders that decide what the rows say, beside the part's own file and
            what all parts share.
    """

    name: str
    minutes: float
    rows: Callable[[Context, Results], Iterable[Row]]
    line: Callable[[dict[str, Any]], str]
    refusal: Callable[[Context], str | None] = lambda context: None
    entries: str = "rows"
    sources: tuple[str, ...] = ()

    def code(self) -> tuple[str, ...]:
        """All sources that are this part's own."""
        return (f"bench/gpu/{self.name}.py", *self.sources)
