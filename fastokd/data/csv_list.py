"""A CSV list of images: a path and a label a line, and in a third column, if there is one, the
split.

Paths are relative to the list's folder. A first line with the names of the columns may say which is
which, in any order.
"""

import csv
import os
from pathlib import Path

import torch

from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit
from fastokd.data.folder import SPLIT_OF, SPLITS
from fastokd.data.images import show
from fastokd.data.kinds import DatasetKind
from fastokd.errors import DataError

SUFFIXES = (".csv", ".tsv")
COLUMNS = {
    "path": ("path", "file", "filename", "filepath", "image", "image_path"),
    "label": ("label", "class", "class_name", "target", "category"),
    "split": ("split", "set", "subset"),
}
"""What columns may be called."""


def _detect(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and os.path.isfile(path)


def list_csv(path: Path | None) -> DataSource[FileSplit]:
    """List the images of a CSV file, without opening any of them.

    The classes are in the order of their names, as a tree's are, numbers too: "10" comes before
    "2". Without a split column every image is for training until some are held out.

    Raises:
        DataError: a file that cannot be read or has no such columns, an unknown split, or an image
            listed twice with different labels or splits; the message names the line.
    """
    if path is None:
        raise DataError(
            "csv needs a file: csv:PATH, with path,label or path,label,split in each line"
        )
    rows = _read_rows(path)
    columns, first = _find_columns(path, rows)
    seen: dict[str, tuple[str, str]] = {}
    listed: list[tuple[str, str, str]] = []
    for line, row in rows[first:]:
        if len(row) <= max(columns.values()):
            raise DataError(
                f"{show(path)}: line {line} has {len(row)} columns, and column"
                f" {max(columns.values()) + 1} is needed"
            )
        file, label = (row[columns[name]].strip() for name in ("path", "label"))
        split = row[columns["split"]].strip().lower() if "split" in columns else "train"
        if not file or not label:
            raise DataError(f"{show(path)}: line {line} has an empty {'label' if file else 'path'}")
        if split not in SPLIT_OF:
            raise DataError(
                f"{show(path)}: line {line} has the split '{show(split)}'; use train, val or test"
            )
        split = SPLIT_OF[split]
        if seen.setdefault(file, (label, split)) != (label, split):
            before = seen[file]
            raise DataError(
                f"{show(path)}: line {line} lists {show(file)} as '{show(label)}' in {split}, a"
                f" line before as '{show(before[0])}' in {before[1]}"
            )
        listed.append((file, label, split))
    labels = {label for _, label, _ in listed}
    classes = tuple(sorted(labels))
    number = {name: i for i, name in enumerate(classes)}
    root = path.absolute().parent
    splits: dict[str, FileSplit] = {}
    for split in SPLITS:
        entries = [(file, number[label]) for file, label, name in listed if name == split]
        if entries:
            splits[split] = FileSplit(
                split,
                root,
                tuple(file for file, _ in entries),
                torch.tensor([target for _, target in entries]),
            )
    if "train" not in splits:
        raise DataError(
            f"{show(path)}: no training images in it; lines with the split train are needed"
        )
    test = splits.pop("test") if "test" in splits else splits.pop("val", None)
    return DataSource(path.stem, classes, splits["train"], test, splits.get("val"), root=root)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, with their numbers."""
    try:
        # File names may be any bytes; they come back as they are.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = (
                "\t"
                if path.suffix.lower() == ".tsv"
                else ";"
                if ";" in head and "," not in head
                else ","
            )
            reader = csv.reader(file, delimiter=delimiter)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise DataError(f"{show(path)}: cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise DataError(f"{show(path)}: not a CSV file ({show(error)})") from error
    if not rows:
        raise DataError(f"{show(path)}: empty; write path,label or path,label,split in each line")
    return rows


def _find_columns(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[dict[str, int], int]:
    """The place of each column, and how many lines of heading there are."""
    head = [cell.strip().lower() for cell in rows[0][1]]
    named = {
        column: next((i for i, cell in enumerate(head) if cell in names), None)
        for column, names in COLUMNS.items()
    }
    if named["path"] is not None and named["label"] is not None:
        return {column: i for column, i in named.items() if i is not None}, 1
    if len(head) not in (2, 3):
        raise DataError(
            f"{show(path)}: {len(head)} columns without names; write path,label or path,label,split"
            " in each line, or name the columns in the first line"
        )
    return dict(zip(COLUMNS, range(len(head)), strict=False)), 0


CSV = DatasetKind(files=list_csv, detect=_detect)
