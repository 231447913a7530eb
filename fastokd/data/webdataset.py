"""WebDataset shards: tar archives in which the files of one sample share a name up to the first
dot.

A sample is an image and its label: ``.cls`` with a class number or name. A word in the shards'
names (``train-000000.tar``, ``imagenet-val-0.tar``) or folders (``train/000000.tar``) tells the
split; class numbers index the lines of ``classes.txt``. Shards are not unpacked: an image is a byte
range in a shard.
"""

import itertools
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit, Members, check_finished
from fastokd.data.folder import SPLIT_OF
from fastokd.data.images import EXTENSIONS
from fastokd.data.kinds import DatasetKind
from fastokd.errors import DataError, escape, summarize

CLASSES_FILE = "classes.txt"

_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF)})(?![a-z])", re.IGNORECASE)
_INTEGER = re.compile(r"-?\d+")
_DIGITS = 18  # longer class numbers may not fit into int64


class Sample(NamedTuple):
    """An image in a shard: its name there, its byte range, and its label as written."""

    name: str
    offset: int
    size: int
    label: str


def list_shards(path: Path | None) -> DataSource[FileSplit]:
    """List the samples of all shards in a folder, without decoding any image.

    Raises:
        DataError: no shards, a shard that ``read_shard`` refuses, shards without a clear split, or
            a class number outside the classes.
    """
    if path is None:
        raise DataError(
            "webdataset needs a folder: webdataset:PATH, with train-*.tar and val-*.tar in it"
        )
    by_split = _shards_by_split(path)
    check_finished(path)
    samples = {
        split: [(shard, read_shard(path / shard)) for shard in shards]
        for split, shards in by_split.items()
    }
    classes, number = _classes(path, dict(itertools.chain.from_iterable(samples.values())))
    splits = {split: _file_split(split, path, shards, number) for split, shards in samples.items()}
    test = splits.pop("test") if "test" in splits else splits.pop("val", None)
    root = path.resolve()
    return DataSource(root.name, classes, splits["train"], test, splits.get("val"), root=root)


def read_shard(file: Path) -> list[Sample]:
    """The samples of one shard, in its order.

    Raises:
        DataError: not an uncompressed tar archive, truncated, a sample without image or label, or
            two files of one name.
    """
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        _check_end(file)
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if not member.isfile() or name.startswith("."):
                    continue
                key, extension = os.path.join(folder, stem), extension.lower()
                if parts.setdefault(key, {}).setdefault(extension, member) is not member:
                    raise DataError(
                        f"{escape(file)}: sample {escape(key)} has a second .{escape(extension)}"
                        " file; give every sample its own name"
                    )
            return [_sample(file, archive, key, members) for key, members in parts.items()]
    except tarfile.TarError as error:
        raise DataError(
            f"{escape(file)}: not an uncompressed tar archive, or truncated ({escape(error)});"
            " write or copy it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{escape(file)}: cannot be read: {error.strerror or escape(error)}"
        ) from error


def _sample(
    file: Path, archive: tarfile.TarFile, key: str, members: Mapping[str, tarfile.TarInfo]
) -> Sample:
    image = next((members[ext] for ext in members if f".{ext}" in EXTENSIONS), None)
    label = members.get("cls")
    if image is None or label is None:
        missing = "image" if image is None else ".cls file with its label"
        raise DataError(f"{escape(file)}: sample {escape(key)} has no {missing}; each needs both")
    content = archive.extractfile(label)
    assert content is not None, "a regular file"
    text = content.read().decode("utf-8", "surrogateescape").strip()
    return Sample(image.name, image.offset_data, image.size, text)


def _check_end(file: Path) -> None:
    """Raise ``tarfile.ReadError`` unless the archive ends in two blocks of zeros: ``tarfile``
    accepts one that was cut between two members.
    """
    with open(file, "rb") as archive:
        if archive.seek(0, os.SEEK_END) >= 2 * tarfile.BLOCKSIZE:
            archive.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
            if not archive.read().strip(b"\0"):
                return
    raise tarfile.ReadError("its end is missing")


def _find_shards(root: Path) -> list[str]:
    """The shards in a folder and in its split folders, relative to it, by name."""
    return sorted(
        os.path.normpath(f"{folder}/{name}")
        for folder in (".", *SPLIT_OF)
        if os.path.isdir(root / folder)
        for name in os.listdir(root / folder)
        if name.endswith(".tar") and not name.startswith(".")
    )


def _detect(path: Path) -> bool:
    try:
        return os.path.isdir(path) and bool(_find_shards(path))
    except OSError:  # reported when the folder is read
        return False


def _shards_by_split(path: Path) -> dict[str, list[str]]:
    """The shards of each split; all are for training where no name tells a split."""
    try:
        shards = _find_shards(path)
    except OSError as error:
        raise DataError(
            f"{escape(path)}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    if not shards:
        raise DataError(
            f"{escape(path)}: no .tar files there; pass the folder that holds the shards"
        )
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        by_split.setdefault(_split_of(path, shard), []).append(shard)
    unnamed = by_split.get("")
    if unnamed and len(by_split) > 1:
        raise DataError(
            f"{escape(path)}: shards whose split is unknown: {summarize(unnamed)}; name them"
            " train-, val- or test-NUMBER.tar"
        )
    if unnamed:
        return {"train": shards}
    if "train" not in by_split:
        raise DataError(
            f"{escape(path)}: no training shards (found {summarize(shards)}); name them"
            " train-NUMBER.tar"
        )
    return by_split


def _split_of(root: Path, shard: str) -> str:
    """The split named by a word in a shard's name or folder; "" if no word does."""
    words = sorted({SPLIT_OF[word.lower()] for word in _SPLIT.findall(shard)})
    if len(words) > 1:
        raise DataError(
            f"{escape(root / shard)}: its name says {' and '.join(words)}; keep one of these words"
        )
    return words[0] if words else ""


def _file_split(
    split: str, root: Path, shards: Sequence[tuple[str, list[Sample]]], number: Mapping[str, int]
) -> FileSplit:
    flat = [(i, shard, sample) for i, (shard, part) in enumerate(shards) for sample in part]
    members = Members(
        tuple(shard for shard, _ in shards),
        torch.tensor([i for i, _, _ in flat], dtype=torch.int64),
        torch.tensor([sample.offset for _, _, sample in flat], dtype=torch.int64),
        torch.tensor([sample.size for _, _, sample in flat], dtype=torch.int64),
    )
    names = tuple(f"{shard}/{sample.name}" for _, shard, sample in flat)
    targets = torch.tensor([number[sample.label] for _, _, sample in flat], dtype=torch.int64)
    return FileSplit(split, root, names, targets, members)


def _classes(
    root: Path, shards: Mapping[str, Sequence[Sample]]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names in the order of their numbers, and the number of every label.

    The names are those of ``classes.txt``, else the numbers if all labels are whole, else the
    sorted labels.
    """
    names = _listed_names(root / CLASSES_FILE)
    labels = {sample.label for part in shards.values() for sample in part}
    if not all(_INTEGER.fullmatch(label) for label in labels):
        unknown = sorted(labels.difference(names or labels))
        if unknown:
            raise DataError(
                f"{escape(root / CLASSES_FILE)}: labels that it does not list: {summarize(unknown)}"
            )
        names = names or tuple(sorted(labels))
        return names, {name: i for i, name in enumerate(names)}
    number = {label: int(label) if len(label) <= _DIGITS else -1 for label in labels}
    # Every class has a training image, so class numbers stay below the number of images. Checked
    # before names are made of the numbers.
    count = sum(map(len, shards.values())) if names is None else len(names)
    for shard, part in shards.items():
        for sample in part:
            if not 0 <= number[sample.label] < count:
                of = f"{count} images" if names is None else f"the {count} names in {CLASSES_FILE}"
                raise DataError(
                    f"{escape(root / shard)}: sample {escape(sample.name)} has the class number"
                    f" {escape(sample.label[:_DIGITS])}, outside 0..{count - 1} for {of}; number"
                    " the classes from 0, and omit images without a class"
                )
    return names or tuple(str(i) for i in range(max(number.values(), default=-1) + 1)), number


def _listed_names(file: Path) -> tuple[str, ...] | None:
    """The lines of ``classes.txt``; None if it is missing or empty."""
    if not os.path.isfile(file):
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"{escape(file)}: cannot be read: {reason}") from None
    return tuple(line.strip() for line in lines if line.strip()) or None


WEBDATASET = DatasetKind(files=list_shards, detect=_detect)
