"""Result files of benchmarks, and two of them side by side (``fastokd bench compare``)."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastokd.errors import ConfigError, first_line

Kind = Literal["suite", "ladder", "kernels part"]
SPREADS: Mapping[Kind, str] = {
    "suite": "the middle half of the rounds",
    "ladder": "the fastest to the slowest window",
    "kernels part": "the fastest to the slowest sample",
}
"""What the spread of a row is, in each kind of file."""
_MACHINE = ("device", "cpu", "threads", "python", "torch", "triton", "fastokd", "commit")


class Times(NamedTuple):
    """Seconds that one row took: the median, and the two ends of its spread."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class ResultFile:
    """The rows of one file by name, and the machine, the versions and the commit that it was made
    with.
    """

    path: Path
    kind: Kind
    machine: Mapping[str, str]
    rows: Mapping[str, Times]


@dataclass(frozen=True)
class ComparedRow:
    """One row of two files."""

    name: str
    before: Times
    after: Times

    @property
    def ratio(self) -> float:
        """The second median over the first: below 1 is faster."""
        return self.after.median / self.before.median

    @property
    def verdict(self) -> Literal["faster", "slower", "within the spread"]:
        """Whether the two spreads lie apart."""
        if self.after.high < self.before.low:
            return "faster"
        return "slower" if self.after.low > self.before.high else "within the spread"


@dataclass(frozen=True)
class Comparison:
    """Two result files, row by row."""

    before: ResultFile
    after: ResultFile
    rows: tuple[ComparedRow, ...]

    def slower_than(self, ratio: float) -> list[ComparedRow]:
        """The rows that take more than ``ratio`` times as long, outside the spread of both."""
        return [row for row in self.rows if row.ratio > ratio and row.verdict == "slower"]

    def lines(self) -> list[str]:
        """What differs in machine, versions and commit, the rows of both files, and those that only
        one has.
        """
        one, other = self.before.machine, self.after.machine
        differs = [
            f"{name}: {one.get(name, 'not said')} -> {other.get(name, 'not said')}"
            for name in _MACHINE
            if one.get(name) != other.get(name)
        ]
        cells = [("row", "before", "spread", "after", "spread", "ratio", "")]
        for row in self.rows:
            cells.append(
                (row.name, *_cells(row.before), *_cells(row.after), f"{row.ratio:.2f}", row.verdict)
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            f"before: {self.before.path}",
            f"after:  {self.after.path}",
            *(differs or ["the same machine, versions and commit"]),
        ]
        lines += [
            "",
            *(
                "  ".join(
                    cell.rjust(width) if 0 < place < 6 else cell.ljust(width)
                    for place, (cell, width) in enumerate(zip(row, widths, strict=True))
                ).rstrip()
                for row in cells
            ),
            "",
        ]
        for mine, others in ((self.before, self.after), (self.after, self.before)):
            lines += [
                f"only in {mine.path}: {name}" for name in mine.rows if name not in others.rows
            ]
        return [
            *lines,
            (
                f"Medians and spread ({SPREADS[self.before.kind]}) in milliseconds; ratio: the"
                " median after over that before. Faster and slower: the spreads lie apart."
            ),
        ]


def _cells(times: Times) -> tuple[str, str]:
    median, low, high = (f"{1000 * value:.4g}" for value in times)
    return median, f"{low}-{high}"


def compare_files(before: Path, after: Path) -> Comparison:
    """Compare two result files of one kind: of pytest-benchmark, of ``fastokd bench step`` or the
    ``step`` part of ``bench.gpu``, or of its ``kernels`` part.

    Raises:
        ConfigError: a file is missing, damaged or none of these, or the two are of different kinds
            or have no row in common.
    """
    one, other = read_results(before), read_results(after)
    if one.kind != other.kind:
        raise ConfigError(
            f"{before} is a {one.kind}'s result and {after} is a {other.kind}'s; give two files"
            " that the same command has made"
        )
    rows = tuple(
        ComparedRow(name, times, other.rows[name])
        for name, times in one.rows.items()
        if name in other.rows
    )
    if not rows:
        raise ConfigError(
            f"{before} and {after} have no row in common (the first has '{next(iter(one.rows))}',"
            f" the second '{next(iter(other.rows))}'); give two files that the same command has"
            " made"
        )
    return Comparison(one, other, rows)


def read_results(path: Path) -> ResultFile:
    """Read a result file.

    Raises:
        ConfigError: it is missing, damaged, or not of a kind that can be compared.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}; give a result file of a benchmark"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged or no JSON file ({first_line(error)}); make it anew"
        ) from error
    kind: Kind
    try:
        if "benchmarks" in found:
            kind, about = "suite", found["machine_info"]
            machine, rows = (
                {"python": about.get("python_version"), **about},
                dict(_suite_rows(found)),
            )
        elif "ladders" in found or "teaching_costs" in found:
            kind, ladders = (
                "ladder",
                [ladder for ladder in found.get("ladders", [found]) if "error" not in ladder],
            )
            machine, rows = (
                _machine(found if "environment" in found else ladders[0]),
                {name: times for ladder in ladders for name, times in _ladder_rows(ladder)},
            )
        elif found.get("part") == "kernels":
            kind, machine, rows = "kernels part", _machine(found), dict(_kernel_rows(found))
        else:
            raise ConfigError(
                f"{path} is no result file that can be compared; choices: what pytest-benchmark"
                " writes (make bench), step-ladder.json of 'fastokd bench step', and the step and"
                " kernels parts of bench.gpu"
            )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is damaged: it lacks what a benchmark writes ({type(error).__name__}:"
            f" {first_line(error)}); make it anew"
        ) from error
    if not rows:
        raise ConfigError(f"{path} has no row that was measured; make it anew")
    return ResultFile(
        path,
        kind,
        {name: str(machine[name]) for name in _MACHINE if machine.get(name) is not None},
        rows,
    )


def _machine(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"cpu": found["processor"], **found["environment"]}


def _suite_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, Times]]:
    for benchmark in found["benchmarks"]:
        stats = benchmark["stats"]
        # The file's name, but not where it lies: tests of two suites may have one name.
        yield (
            benchmark["fullname"].rpartition("/")[2],
            _times(stats["median"], stats["q1"], stats["q3"]),
        )


def _ladder_rows(ladder: Mapping[str, Any]) -> Iterator[tuple[str, Times]]:
    """Rows by name and setting, so that those of another network or batch are not taken for the
    same.
    """
    side = "x".join(map(str, ladder["image_size"]))
    setting = (
        f"{ladder['model']}, {ladder['method']}, {ladder['branches']} branches, batch"
        f" {ladder['batch_size']} of {side}"
    )
    for row in ladder["rows"]:
        if not row["reason"]:
            yield (
                f"{setting}: {row['name']}",
                _times(
                    *(ladder["batch_size"] / row["images_per_second"][place] for place in (0, 2, 1))
                ),
            )


def _kernel_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, Times]]:
    """A row a case: eager, compiled, fused, each in a graph or not, forward or with gradients."""
    for row in found["rows"]:
        for case, (low, high) in row.get("spread", {}).items():
            yield f"{row['row']}: {case}", _times(row[case], low, high)


def _times(median: float, low: float, high: float) -> Times:
    if not all(
        isinstance(value, (int, float)) and 0 < value < math.inf for value in (median, low, high)
    ):
        raise ValueError(f"{median}, {low}, {high} are no times")
    return Times(median, low, high)
