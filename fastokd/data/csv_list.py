"""A CSV list of images: path, label and optionally the split, in that order.

Paths are relative to the list. Files with spaces in their names and numeric labels are valid, a
heading is optional and columns may be separated by commas, semicolons, tabs or bars. A heading with
the names of the columns allows any order.
"""

import csv
import functools
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit, cannot_read, from_splits
from fastokd.data.folder import LISTS, is_folder
from fastokd.data.images import EXTENSIONS
from fastokd.data.kinds import DatasetKind
from fastokd.data.split_names import SPLIT_OF, SPLITS
from fastokd.data.text import COLUMNS, SPLIT_COLUMNS, decode_text, plain, readable
from fastokd.errors import DataError, escape, summarize

_FORM = "write path,label or path,label,split in each line"
_FLAGS = {"isvalid": "val", "istest": "test"}
_FLAG_VALUES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_MARKS = ",;\t|"


def _detect(path: Path) -> bool:
    return path.suffix.lower() in LISTS and os.path.isfile(path)


def list_csv(path: Path) -> DataSource[FileSplit]:
    """List the images of a CSV file, without opening any of them.

    Classes are sorted by name, as for a tree, numbers too: "10" comes before "2". Without a split
    column, every image is for training until some are held out.

    Raises:
        DataError: a file that cannot be read or has no such columns, an unknown split, or an image
            listed twice with different labels or splits, also by two paths; the message names the
            line.
    """
    listed = _with_whole_numbers(_read_entries(path), path)
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
    find = Finder(path.absolute().parent)
    if not first and len(rows) > 1:
        _check_heading(path, rows, columns["path"], find)
    flag = _FLAGS.get(plain(rows[0][1][columns["split"]])) if first and "split" in columns else None
    known: dict[object, tuple[str, str, str]] = {}
    entries = []
    for line, row in rows[first:]:
        where = f"{escape(path)}: line {line}"
        if any(cell.strip() for cell in row[len(rows[0][1]) :]):
            more = f"{len(row)} columns, and the first line {len(rows[0][1])}"
            raise DataError(f"{where} has {more}; quote values that contain the separator")
        if len(row) <= max(columns.values()):
            needed = max(columns.values()) + 1
            raise DataError(f"{where} has {len(row)} columns, and column {needed} is needed")
        if any("\n" in row[column] for column in columns.values()):
            raise DataError(f"{where} ends a value of several lines; check the quotes")
        file, label = (row[columns[name]].strip() for name in ("path", "label"))
        word = row[columns["split"]].strip().lower() if "split" in columns else "train"
        if "\0" in file:
            raise DataError(f"{where} has a path with a zero byte")
        if not file or not label:
            raise DataError(f"{where} has an empty {'label' if file else 'path'}")
        if flag is not None and word in _FLAG_VALUES:
            word = flag if _FLAG_VALUES[word] else "train"
        if word not in SPLIT_OF:
            raise DataError(f"{where} has the split '{escape(word)}'; use train, val or test")
        label, split = readable(label, path), SPLIT_OF[word]
        try:
            found, identity = find(file)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        before = known.setdefault(identity, (label, split, file))
        if before[:2] != (label, split):
            one, other = (
                f"'{escape(name)}' in {part}" for name, part in ((label, split), before[:2])
            )
            by = f" (by the path {escape(before[2])})" if before[2] != file else ""
            raise DataError(
                f"{where} lists {escape(file)} as {one}, an earlier line as {other}{by}"
            )
        entries.append((found, label, split))
    if entries and not any(isinstance(identity, tuple) for identity in known):
        missing = f"none of its {len(known)} files exists, for example {escape(entries[0][0])}"
        raise invalid(path, f"{missing}; paths are relative to {find.place_of(entries[0][0])}")
    return entries


def _with_whole_numbers(
    entries: list[tuple[str, str, str]], path: Path
) -> list[tuple[str, str, str]]:
    """The entries with "0" for labels "0.0" if both occur, as after a merge of pandas, with a
    warning.
    """
    labels = {label for _, label, _ in entries}
    whole = {
        label: match[1]
        for label in labels
        if (match := re.fullmatch(r"(-?\d+)\.0+", label)) and match[1] in labels
    }
    if not whole:
        return entries
    listed = summarize([f"{label} as {whole[label]}" for label in sorted(whole)])
    warnings.warn(f"{escape(path)}: some whole numbers have decimals; read {listed}", stacklevel=2)
    return [(file, whole.get(label, label), split) for file, label, split in entries]


class Finder:
    """The files that the paths of a list mean."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names = functools.cache(_images_by_name)

    def __call__(self, file: str) -> tuple[str, object]:
        """The path unchanged, or that of the one file that differs from it by backslashes, case,
        encoding or a missing extension; and an identity, equal for all paths of a file.

        Raises:
            DataError: several files match.
        """
        spellings = [file, file.replace("\\", "/")]
        raw = os.fsencode(file)
        if not file.isascii():
            for encoding in ("utf-8", "cp1252"):
                try:
                    spellings.append(raw.decode(encoding))
                except UnicodeDecodeError:
                    continue
        for spelling in spellings:
            if (identity := self._identity(spelling)) is not None:
                return spelling, identity
        folder, name = os.path.split(spellings[1])
        matches = self._names(os.path.join(self.root, folder)).get(name.lower(), ())
        if len(matches) > 1:
            several = f"{escape(file)} may be {summarize(matches)}"
            raise DataError(f"{several}; write the name with its extension")
        if matches:
            found = os.path.join(folder, matches[0])
            return found, self._identity(found) or found
        return file, os.path.normpath(file)  # reported when it is decoded

    def place_of(self, file: str) -> str:
        """The folder of the list in words, and the subfolders that hold a missing file."""
        name = os.path.basename(file).lower()
        folders = [entry.name for entry in os.scandir(self.root) if is_folder(entry)]
        holders = [f for f in sorted(folders) if self._names(os.path.join(self.root, f)).get(name)]
        hint = f", and {summarize([f'{f}/' for f in holders])} holds it" if holders else ""
        return f"{escape(self.root)}{hint}"

    def _identity(self, file: str) -> tuple[int, int] | None:
        try:
            status = os.stat(os.path.join(self.root, file))
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino


def _images_by_name(folder: str) -> Mapping[str, list[str]]:
    """The images in a folder by name and by name without extension, in lower case."""
    names: dict[str, list[str]] = {}
    try:
        present = sorted(os.listdir(folder))
    except OSError:
        return names
    for name in present:
        stem, extension = os.path.splitext(name)
        if extension.lower() in EXTENSIONS:
            names.setdefault(name.lower(), []).append(name)
            names.setdefault(stem.lower(), []).append(name)
    return names


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, with their numbers."""
    try:
        # File names may be any bytes; they are kept unchanged.
        text = decode_text(path.read_bytes(), path)
    except OSError as error:
        raise cannot_read(path, error) from error
    lines = io.StringIO(text, newline="").readlines()
    head, skipped = lines[0] if lines else "", 0
    if declared := re.fullmatch(r'"?sep=(.)"?', head.strip("\r\n"), re.IGNORECASE):  # by Excel
        skipped, delimiter = 1, declared[1]
    else:
        marks = sorted(_MARKS, key=lambda mark: -head.count(mark))
        delimiter = marks[0] if head.count(marks[0]) else ","
        if path.suffix.lower() == ".tsv" and "\t" in head:
            delimiter = "\t"
    try:
        reader = csv.reader(
            lines[skipped:], delimiter=delimiter, skipinitialspace=True, strict=True
        )
        rows = [(reader.line_num + skipped, row) for row in reader]
    except csv.Error as error:
        fault = f"not a CSV file: {escape(error)} before line {reader.line_num + skipped + 1}"
        raise invalid(path, f"{fault}; check the quotes") from error
    rows = [(line, row) for line, row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise invalid(path, f"empty; {_FORM}")
    if several := [line for line, row in rows if any("\n" in cell for cell in row)]:
        lines_of = f"quoted values extend over several lines, the first until line {several[0]}"
        warnings.warn(f"{escape(path)}: {lines_of}; check the quotes", stacklevel=2)
    return rows


def _find_columns(path: Path, first_row: Sequence[str]) -> tuple[dict[str, int], int]:
    """The index of each column, and the number of header lines."""
    head = [plain(cell) for cell in first_row]
    named = {
        column: next((head.index(name) for name in names if name in head), -1)
        for column, names in COLUMNS.items()
    }
    telling = [cell for cell, name in zip(first_row, head, strict=True) if name in SPLIT_COLUMNS]
    if min(named["path"], named["label"]) >= 0 and len(telling) > 1:
        several = f"several columns tell the split: {summarize(telling)}"
        raise invalid(path, f"{several}; keep one, with the values train, val and test")
    if min(named["path"], named["label"]) >= 0:
        return {column: i for column, i in named.items() if i >= 0}, 1
    if named["path"] >= 0 and len(head) > 2:
        found = f"no column of labels (found {summarize([cell.strip() for cell in first_row])})"
        fix = "name it label; a column of 0 and 1 for each class is not read"
        raise invalid(path, f"{found}; {fix}")
    if len(head) not in (2, 3):
        unnamed = f"{len(head)} columns without names"
        raise invalid(path, f"{unnamed}; {_FORM}, or name the columns in the first line")
    return dict(zip(COLUMNS, range(len(head)), strict=False)), 0


def _check_heading(
    path: Path, rows: Sequence[tuple[int, list[str]]], column: int, find: Finder
) -> None:
    """Raise ``DataError`` if the first line is a heading with unknown names."""
    first, second = (row[column].strip() if len(row) > column else "" for _, row in rows[:2])
    root = find.root
    exists = [os.path.exists(os.path.join(root, find(name)[0])) for name in (first, second)]
    is_name = not os.path.splitext(first)[1]
    if is_name and (exists == [False, True] or plain(first) in COLUMNS["path"]):
        names = summarize([cell.strip() for cell in rows[0][1]])
        fix = "name them path and label, or delete the line"
        raise invalid(path, f"the heading has unknown names of columns ({names}); {fix}")


CSV = DatasetKind(files=list_csv, detect=_detect, layout="lines of path,label or path,label,split")
