"""Commands for datasets."""

import json as json_format
from pathlib import Path
from typing import Any

import tyro

from fastokd.cli.options import make_table, print_table, progress_bar, say
from fastokd.data.check import PROBLEMS, REMARKS, check_dataset
from fastokd.data.convert import convert_dataset
from fastokd.data.decoding import parse_color
from fastokd.errors import ConfigError, DataError, summarize


def check(
    data: tyro.conf.Positional[str],
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
        raise ConfigError(f"--write-list {write_list}: the name must end in .csv, as --data needs")
    with progress_bar("checking images") as progress:
        report = check_dataset(data, workers, progress)
    if write_list is not None:
        report.write_clean(write_list)
    if json:
        print(json_format.dumps(report.as_json(), indent=2))
    else:
        _print_report(report)
        if write_list is not None:
            say(
                f"wrote {write_list}: {len(report.clean)} images without problems; train with"
                f" --data {write_list}"
            )
    if report.problems:
        raise DataError(
            f"{sum(map(len, report.problems.values()))} problems; --json names every file,"
            " --write-list FILE.csv writes a list without them"
        )


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
        say(
            f"sizes {small[0]} x {small[1]} to {large[0]} x {large[1]}; {formats}; colors: {colors}"
        )
    for title, findings, meaning in (
        ("problem", report.problems, PROBLEMS),
        ("remark", report.remarks, REMARKS),
    ):
        if findings:
            table = make_table(title, "number")
            table.add_column("meaning")
            for name, files in findings.items():
                table.add_row(name, str(len(files)), meaning[name])
            print_table(table)
            for name, files in findings.items():
                say(f"  {name}: {summarize(files, 3)}")


def convert(
    data: tyro.conf.Positional[str],
    out: Path,
    shorter_side: int,
    workers: int | None = None,
    background: str | None = None,
) -> None:
    """Write a dataset again, scaled down, as a tree of class folders. After an interruption, the
    same command continues.

    Args:
        out: New folder
        shorter_side: Scale images down to this shorter side in pixels
        background: Color behind transparent pixels, such as white or #ff8000 (default: drop the
            transparency of images that are not copied)
    """
    color = None if background is None else parse_color(background)
    with progress_bar("converting") as progress:
        outcome = convert_dataset(data, out, shorter_side, workers, progress, color)
    existing = f"; {outcome.kept} were there already" if outcome.kept else ""
    say(
        f"wrote {outcome.written} images to {outcome.out}{existing}; train with --data"
        f" {outcome.out}"
    )
