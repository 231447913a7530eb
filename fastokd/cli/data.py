"""Commands for datasets."""

import json as json_format
from pathlib import Path
from typing import Any

from fastokd.cli.options import Positional, print_table, progress_bar, say
from fastokd.data.check import PROBLEMS, REMARKS, check_dataset
from fastokd.data.convert import convert_dataset
from fastokd.errors import ConfigError, DataError, summarize


def check(
    data: Positional[str],
    write_list: Path | None = None,
    json: bool = False,
    workers: int | None = None,
) -> None:
    """Check every image, and report damaged and misnamed files, classes and duplicates. Exit code 3
    if there are problems.

    Args:
        write_list: Write the images without problems to this .csv file, for --data
        json: Print JSON, with every file that has a problem
    """
    if write_list is not None and write_list.suffix.lower() != ".csv":
        raise ConfigError(f"--write-list {write_list}: the name must end in .csv")
    with progress_bar("checking images") as progress:
        report = check_dataset(data, workers, progress)
    if write_list is not None:
        report.write_clean(write_list)
    if json:
        print(json_format.dumps(report.as_json(), indent=2))
    else:
        _print_report(report)
        if write_list is not None:
            count = len(report.clean)
            text = f"wrote {write_list}: {count} images without problems"
            say(f"{text}; train with --data {write_list}")
    if report.problems:
        count = sum(map(len, report.problems.values()))
        hint = "--json names every file, --write-list FILE.csv writes a list without them"
        raise DataError(f"{count} problems; {hint}")


def _print_report(report: Any) -> None:
    counts = ", ".join(
        f"{count} {split or 'training'} images in {report.classes[split]} classes"
        for split, count in report.images.items()
    )
    say(f"{report.root}: {counts}")
    if report.sizes:
        small, large = report.sizes
        formats = ", ".join(f"{count} {name}" for name, count in report.formats.items())
        colors = ", ".join(f"{count} {name}" for name, count in report.modes.items())
        sizes = f"{small[0]} x {small[1]} to {large[0]} x {large[1]}"
        say(f"sizes {sizes}; {formats}; colors: {colors}")
    for title, findings, meaning in (
        ("problem", report.problems, PROBLEMS),
        ("remark", report.remarks, REMARKS),
    ):
        if findings:
            rows = [(name, str(len(files)), meaning[name]) for name, files in findings.items()]
            print_table((title, "number", "meaning"), rows, texts=(2,))
            for name, files in findings.items():
                say(f"  {name}: {summarize(files, 3)}")


def convert(
    data: Positional[str], out: Path, shorter_side: int, workers: int | None = None
) -> None:
    """Write a dataset again, scaled down, as a tree of class folders. After an interruption, the
    same command continues.

    Args:
        out: New folder
        shorter_side: Scale images down to this shorter side in pixels
    """
    with progress_bar("converting") as progress:
        outcome = convert_dataset(data, out, shorter_side, workers, progress)
    existing = f"; {outcome.kept} were there already" if outcome.kept else ""
    text = f"wrote {outcome.written} images to {outcome.out}{existing}"
    say(f"{text}; train with --data {outcome.out}")
