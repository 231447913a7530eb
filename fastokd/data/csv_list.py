"""A CSV list of images: each line has a path and a label, and optionally a split.

Paths are relative to the list's folder. A header line with the names of the columns allows any
order.
"""

import csv
import os
from pathlib import Path

import torch

from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit, cannot_read, from_splits
from fastokd.data.kinds import DatasetKind
from fastokd.data.split_names import SPLIT_OF, SPLITS
from fastokd.errors import DataError, escape

SUFFIXES = (".csv", ".tsv")
COLUMNS = {
    "path": ("path", "file", "filename", "filepath", "image", "image_path"),
    "label": ("label", "class", "class_name", "target", "category"),
    "split": ("split", "set", "subset"),
}
"""The names that each column may have."""

_FORM = "write path,label or path,label,split in each line"


def _detect(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and os.path.isfile(path)


def list_csv(path: Path) -> DataSource[FileSplit]:
    """List the images of a CSV file, without opening any of them.

    Classes are sorted by name, as for a tree, numbers too: "10" comes before "2". Without a split
    column, every image is for training until some are held out.

    Raises:
        DataError: a file that cannot be read or has no such columns, an unknown split, or an image
            listed twice with different labels or splits; the message names the line.
    """
    listed = _read_entries(path)
    classes = tuple(sorted({label for _, label, _ in listed}))
    number = {name: i for i, name in enumerate(classes)}
    root = path.absolute().parent
    splits: dict[str, FileSplit] = {}
    for split in SPLITS:
        entries = [(file, number[label]) for file, label, name in listed if name == split]
        if entries:
            files, targets = zip(*entries, strict=True)
            splits[split] = FileSplit(split, root, files, torch.tensor(targets))
    if "train" not in splits:
        raise invalid(path, "no training images in it; lines with the split train are needed")
    return from_splits(path.stem, classes, splits, root)


def _read_entries(path: Path) -> list[tuple[str, str, str]]:
    """File, label and split of every line."""
    rows = _read_rows(path)
    columns, first = _find_columns(path, rows[0][1])
    known: dict[str, tuple[str, str]] = {}
    entries = []
    for line, row in rows[first:]:
        where = f"{escape(path)}: line {line}"
        if len(row) <= max(columns.values()):
            needed = max(columns.values()) + 1
            raise DataError(f"{where} has {len(row)} columns, and column {needed} is needed")
        file, label = (row[columns[name]].strip() for name in ("path", "label"))
        word = row[columns["split"]].strip().lower() if "split" in columns else "train"
        if not file or not label:
            raise DataError(f"{where} has an empty {'label' if file else 'path'}")
        if word not in SPLIT_OF:
            raise DataError(f"{where} has the split '{escape(word)}'; use train, val or test")
        split = SPLIT_OF[word]
        before = known.setdefault(file, (label, split))
        if before != (label, split):
            one, other = (f"'{escape(name)}' in {part}" for name, part in ((label, split), before))
            raise DataError(f"{where} lists {escape(file)} as {one}, an earlier line as {other}")
        entries.append((file, label, split))
    return entries


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, with their numbers."""
    try:
        # File names may be any bytes; they are kept unchanged.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = ";" if ";" in head and "," not in head else ","
            delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter
            reader = csv.reader(file, delimiter=delimiter)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise cannot_read(path, error) from error
    except csv.Error as error:
        raise invalid(path, f"not a CSV file ({escape(error)})") from error
    if not rows:
        raise invalid(path, f"empty; {_FORM}")
    return rows


def _find_columns(path: Path, first_row: list[str]) -> tuple[dict[str, int], int]:
    """The index of each column, and the number of header lines."""
    head = [cell.strip().lower() for cell in first_row]
    named = {
        column: next((i for i, cell in enumerate(head) if cell in names), -1)
        for column, names in COLUMNS.items()
    }
    if min(named["path"], named["label"]) >= 0:
        return {column: i for column, i in named.items() if i >= 0}, 1
    if len(head) not in (2, 3):
        unnamed = f"{len(head)} columns without names"
        raise invalid(path, f"{unnamed}; {_FORM}, or name the columns in the first line")
    return dict(zip(COLUMNS, range(len(head)), strict=False)), 0


CSV = DatasetKind(files=list_csv, detect=_detect, layout="lines of path,label or path,label,split")
