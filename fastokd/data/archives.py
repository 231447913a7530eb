"""Archives of samples: what tar shards, TFRecord and RecordIO files have in common.

The splits are told by a word in the archives' names (``train-000000.tar``, ``imagenet-val-0.tar``)
or folders (``train/000000.tar``), and class numbers mean the lines of ``classes.txt``. Nothing is
unpacked: an image is a place in an archive.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.data.cache import cache_folder
from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit, Members, check_finished
from fastokd.data.folder import SPLIT_OF
from fastokd.data.images import first_of, show
from fastokd.errors import DataError, StorageError
from fastokd.storage import write_json

CLASSES_FILE = "classes.txt"
INDEX_VERSION = 1
"""Raise it when reading an archive gives other samples than before."""

_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF)})(?![a-z])", re.IGNORECASE)
_WHOLE = re.compile(r"-?\d+")
_DIGITS = 18  # of a label that is a class number; what has more may not fit into int64


class Sample(NamedTuple):
    """An image in an archive: its name there, where its bytes are, and its label as it is
    written.
    """

    name: str
    offset: int
    size: int
    label: str


def find_archives(root: Path, named: re.Pattern[str]) -> list[str]:
    """The archives in the folder and in its split folders, relative to it, by name; ``named`` is
    found in each name.
    """
    found = []
    for folder in (".", *SPLIT_OF):
        if os.path.isdir(root / folder):
            found += [
                os.path.normpath(f"{folder}/{name}")
                for name in os.listdir(root / folder)
                if named.search(name) and not name.startswith(".")
            ]
    return sorted(found)


def holds_archives(named: re.Pattern[str], path: Path) -> bool:
    """Whether a path is a folder with archives of such names, for ``DatasetKind.detect``."""
    try:
        return os.path.isdir(path) and bool(find_archives(path, named))
    except OSError:  # reported by whoever reads the folder
        return False


def list_archives(
    kind: str,
    suffix: str,
    named: re.Pattern[str],
    path: Path | None,
    read: Callable[[Path], list[Sample]],
    from_one: bool = False,
) -> DataSource[FileSplit]:
    """List the samples of all archives in a folder, without decoding any image.

    Args:
        kind, suffix: the dataset kind and what its archives are called, for messages.
        named: found in the names of its archives.
        path: the folder.
        read: lists the samples of one archive, or raises ``DataError``.
        from_one: whether class numbers may begin with 1, as they do where 0 is kept for the
            background.

    Raises:
        DataError: no archives, one that ``read`` refuses, one whose name has the words of two
            splits, archives of which only some say their split, or a class number below 0 or beyond
            the classes there can be.
    """
    if path is None:
        raise DataError(
            f"{kind} needs a folder: {kind}:PATH, with train-*{suffix} and val-*{suffix} in it"
        )
    try:
        shards = find_archives(path, named) if os.path.isdir(path) else []
    except OSError as error:
        raise DataError(
            f"{show(path)}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    if not shards:
        raise DataError(
            f"{show(path)}: no {suffix} files there; give the folder that holds the shards"
        )
    check_finished(path)
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        by_split.setdefault(_split_of(path, shard), []).append(shard)
    if "" in by_split:
        if len(by_split) > 1:
            raise DataError(
                f"{show(path)}: shards that do not say their split: {first_of(by_split[''])}; call"
                f" them train-, val- or test-NUMBER{suffix}"
            )
        by_split = {"train": shards}
    samples = {split: [read(path / shard) for shard in names] for split, names in by_split.items()}
    by_shard = {
        shard: part
        for split, names in by_split.items()
        for shard, part in zip(names, samples[split], strict=True)
    }
    classes, number = _classes(path, by_shard, from_one)
    splits = {}
    for split, parts in samples.items():
        flat = [(shard, sample) for shard, part in enumerate(parts) for sample in part]
        members = Members(
            tuple(by_split[split]),
            *(
                torch.tensor(column, dtype=torch.int64)
                for column in (
                    [shard for shard, _ in flat],
                    [sample.offset for _, sample in flat],
                    [sample.size for _, sample in flat],
                )
            ),
        )
        names = tuple(f"{by_split[split][shard]}/{sample.name}" for shard, sample in flat)
        splits[split] = FileSplit(
            split,
            path,
            names,
            torch.tensor([number[sample.label] for _, sample in flat], dtype=torch.int64),
            members,
        )
    if "train" not in splits:
        raise DataError(
            f"{show(path)}: no training shards (found {first_of(shards)}); call them"
            f" train-NUMBER{suffix}"
        )
    test = splits.pop("test") if "test" in splits else splits.pop("val", None)
    return DataSource(
        path.resolve().name, classes, splits["train"], test, splits.get("val"), root=path.resolve()
    )


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
        identity = [
            INDEX_VERSION,
            read.__qualname__,
            os.path.abspath(file),
            status.st_size,
            status.st_ino,
            status.st_mtime_ns,
            status.st_ctime_ns,
        ]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        index = folder / "index" / f"{digest}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [Sample(*entry) for entry in json.loads(index.read_text())]
        samples = read(file)
        with contextlib.suppress(StorageError):  # the next start reads the archive again
            write_json(index, samples)
        return samples

    return find


def _split_of(root: Path, shard: str) -> str:
    """The split whose word is in a shard's name or folder, between what are no letters; "" if
    neither tells.
    """
    found = sorted({SPLIT_OF[word.lower()] for word in _SPLIT.findall(shard)})
    if len(found) > 1:
        raise DataError(
            f"{show(root / shard)}: its name says {' and '.join(found)}; leave the word of one"
            " split in it"
        )
    return found[0] if found else ""


def _classes(
    root: Path, shards: Mapping[str, Sequence[Sample]], from_one: bool
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names in the order of their numbers, and the number of every label that is written
    in the shards.

    The names are those of ``classes.txt``, else the numbers if all labels are whole, else the
    labels in order.
    """
    names = _listed_names(root / CLASSES_FILE)
    labels = {sample.label for part in shards.values() for sample in part}
    if not all(_WHOLE.fullmatch(label) for label in labels):
        unknown = sorted(labels.difference(names or labels))
        if unknown:
            raise DataError(
                f"{show(root / CLASSES_FILE)}: labels that it does not list: {first_of(unknown)}"
            )
        names = names or tuple(sorted(labels))
        return names, {name: i for i, name in enumerate(names)}
    numbers = {label: int(label) if len(label) <= _DIGITS else -1 for label in labels}
    low, high = (edge(numbers.values(), default=0) for edge in (min, max))
    first = int(from_one and low == 1 and (names is None or high == len(names)))
    # Every class has an image for training, so that no number reaches the number of images: found
    # before names are made of them.
    count = sum(map(len, shards.values())) if names is None else len(names)
    wrong = {label for label, number in numbers.items() if not first <= number < first + count}
    if wrong:
        shard, sample = next(
            (shard, sample)
            for shard, part in shards.items()
            for sample in part
            if sample.label in wrong
        )
        bound = f"{count} images" if names is None else f"the {count} names in {CLASSES_FILE}"
        raise DataError(
            f"{show(root / shard)}: sample {show(sample.name)} has the class number"
            f" {show(sample.label[:_DIGITS])}, outside {first}..{first + count - 1} for {bound};"
            f" number the classes from {first} on, and leave out what has no class"
        )
    return names or tuple(str(i) for i in range(first, high + 1)), {
        label: number - first for label, number in numbers.items()
    }


def _listed_names(file: Path) -> tuple[str, ...] | None:
    """The lines of ``classes.txt``; None if there is none, or nothing in it."""
    if not os.path.isfile(file):
        return None
    try:
        return (
            tuple(
                line.strip()
                for line in file.read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            )
            or None
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{show(file)}: cannot be read:"
            f" {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from None
