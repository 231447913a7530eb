"""Archives of samples: what tar shards, TFRecord and RecordIO files have in common.

The splits are told by the archives' names (``train-000000.tar``) or folders (``train/000000.tar``), and class numbers mean
the lines of ``classes.txt``. Nothing is unpacked: an image is a place in an archive.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.data.cache import cache_folder
from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit, Members, check_finished
from fastokd.data.folder import SPLITS
from fastokd.data.images import first_of, show
from fastokd.errors import DataError, StorageError
from fastokd.storage import write_json

CLASSES_FILE = "classes.txt"
_SPLIT = re.compile(rf"({'|'.join(name for names in SPLITS.values() for name in names)})(?![a-z])", re.IGNORECASE)
_SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}


class Sample(NamedTuple):
    """An image in an archive: its name there, where its bytes are, and its label as it is written."""

    name: str
    offset: int
    size: int
    label: str


def find_archives(root: Path, suffix: str) -> list[str]:
    """The archives in the folder and in its split folders, relative to it, by name."""
    folders = [".", *(name for names in SPLITS.values() for name in names)]
    found = []
    for folder in folders:
        if os.path.isdir(root / folder):
            found += [os.path.normpath(f"{folder}/{name}") for name in os.listdir(root / folder) if name.endswith(suffix) and not name.startswith(".")]
    return sorted(found)


def holds_archives(suffix: str, path: Path) -> bool:
    """Whether a path is a folder with archives of that suffix, for ``DatasetKind.detect``."""
    try:
        return os.path.isdir(path) and bool(find_archives(path, suffix))
    except OSError:  # reported by whoever reads the folder
        return False


def list_archives(kind: str, suffix: str, path: Path | None, read: Callable[[Path], list[Sample]], from_one: bool = False) -> DataSource[FileSplit]:
    """List the samples of all archives in a folder, without decoding any image.

    Args:
        kind, suffix: the dataset kind and what its archives are called.
        path: the folder.
        read: lists the samples of one archive, or raises ``DataError``.
        from_one: whether class numbers may begin with 1, as they do where 0 is kept for the background.

    Raises:
        DataError: no archives, one that ``read`` refuses, or archives of which only some say their split.
    """
    if path is None:
        raise DataError(f"{kind} needs a folder: {kind}:PATH, with train-*{suffix} and val-*{suffix} in it")
    try:
        shards = find_archives(path, suffix) if os.path.isdir(path) else []
    except OSError as error:
        raise DataError(f"{show(path)}: cannot be read: {error.strerror}; check its permissions") from error
    if not shards:
        raise DataError(f"{show(path)}: no {suffix} files there; give the folder that holds the shards")
    check_finished(path)
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        by_split.setdefault(_split_of(shard), []).append(shard)
    if "" in by_split:
        if len(by_split) > 1:
            raise DataError(f"{show(path)}: shards that do not say their split: {first_of(by_split[''])}; call them train-, val- or test-NUMBER{suffix}")
        by_split = {"train": shards}
    samples = {split: [read(path / shard) for shard in names] for split, names in by_split.items()}
    labels = {sample.label for parts in samples.values() for part in parts for sample in part}
    classes = _class_names(path, labels)
    number = {name: i for i, name in enumerate(classes)}
    if all(label.isdecimal() for label in labels):
        first = _first_number(labels, len(classes), os.path.isfile(path / CLASSES_FILE)) if from_one else 0
        number = {label: int(label) - first for label in labels}
        classes = classes if os.path.isfile(path / CLASSES_FILE) else classes[first:]
    splits = {}
    for split, parts in samples.items():
        flat = [(shard, sample) for shard, part in enumerate(parts) for sample in part]
        members = Members(
            tuple(by_split[split]), *(torch.tensor(column, dtype=torch.int64) for column in (
                [shard for shard, _ in flat], [sample.offset for _, sample in flat], [sample.size for _, sample in flat])))
        names = tuple(f"{by_split[split][shard]}/{sample.name}" for shard, sample in flat)
        splits[split] = FileSplit(split, path, names, torch.tensor([number[sample.label] for _, sample in flat], dtype=torch.int64), members)
    if "train" not in splits:
        raise DataError(f"{show(path)}: no training shards (found {first_of(shards)}); call them train-NUMBER{suffix}")
    test = splits.pop("test") if "test" in splits else splits.pop("val", None)
    return DataSource(path.resolve().name, classes, splits["train"], test, splits.get("val"), root=path.resolve())


def indexed(read: Callable[[Path], list[Sample]]) -> Callable[[Path], list[Sample]]:
    """Keep what ``read`` finds in an archive in the cache folder, so that it is read through once.

    What is kept counts as long as the archive's size, inode and times stay the same.
    """

    def find(file: Path) -> list[Sample]:
        try:
            status = os.stat(file)
        except OSError:  # reported by ``read``
            return read(file)
        folder = cache_folder()
        if folder is None:
            return read(file)
        identity = [read.__qualname__, os.path.abspath(file), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        index = folder / "index" / f"{digest}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [Sample(*entry) for entry in json.loads(index.read_text())]
        samples = read(file)
        with contextlib.suppress(StorageError):  # the next start reads the archive again
            write_json(index, samples)
        return samples

    return find


def _split_of(shard: str) -> str:
    """The split that a shard's folder or name begins with; "" if neither tells."""
    for part in Path(shard).parts:
        found = _SPLIT.match(part)
        if found:
            return _SPLIT_NAMES[found[1].lower()]
    return ""


def _class_names(root: Path, labels: set[str]) -> tuple[str, ...]:
    """The class names in the order of their numbers: of ``classes.txt``, else the numbers, else the names in order."""
    file = root / CLASSES_FILE
    whole = all(label.isdecimal() for label in labels)
    if os.path.isfile(file):
        try:
            names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{show(file)}: cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
        unknown = sorted(label for label in labels if not whole and label not in names)
        if unknown:
            raise DataError(f"{show(file)}: labels that it does not list: {first_of(unknown)}")
        return names
    if whole:
        return tuple(str(i) for i in range(max(map(int, labels), default=-1) + 1))
    return tuple(sorted(labels))


def _first_number(labels: set[str], count: int, named: bool) -> int:
    """1 if the class numbers ``labels`` begin with 1, else 0; ``count`` classes, which are ``named`` or counted from 0."""
    low, high = (edge(map(int, labels), default=0) for edge in (min, max))
    return int(low == 1 and (high == count or not named))
