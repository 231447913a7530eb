"""WebDataset shards: tar archives in which the files of one sample share a name up to the first
dot.

A sample is an image and its label: ``.cls`` with a class number or name. A word in the shards'
names (``train-000000.tar``, ``imagenet-val-0.tar``) or folders (``train/000000.tar``) tells the
split; class numbers index the lines of ``classes.txt``. Shards are not unpacked: an image is a byte
range in a shard.
"""

import copy
import itertools
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.data import files
from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit, Members, cannot_read
from fastokd.data.folder import entries, is_folder, split_folders
from fastokd.data.images import EXTENSIONS
from fastokd.data.kinds import DatasetKind
from fastokd.data.split_names import files_by_split
from fastokd.errors import DataError, escape, summarize

CLASSES_FILE = "classes.txt"

_INTEGER = re.compile(r"-?\d+")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # binary numbers, and other encodings
_DIGITS = 18  # longer class numbers may not fit into int64


class Sample(NamedTuple):
    """An image: its shard, its name and byte range there, and its label as written."""

    shard: str
    name: str
    offset: int
    size: int
    label: str


def list_shards(path: Path) -> DataSource[FileSplit]:
    """List the samples of all shards in a folder, without decoding any image.

    Raises:
        DataError: no shards, a shard that ``read_shard`` refuses, shards without a clear split, or
            a class number outside the classes.
    """
    by_split = _shards_by_split(path)
    files.check_finished(path)
    samples = {
        split: list(itertools.chain(*(read_shard(path, shard) for shard in shards)))
        for split, shards in by_split.items()
    }
    classes, number = _classes(path, list(itertools.chain(*samples.values())))
    splits = {}
    for split, shards in by_split.items():
        shard_index = {shard: i for i, shard in enumerate(shards)}
        columns = [
            (shard_index[sample.shard], sample.offset, sample.size, number[sample.label])
            for sample in samples[split]
        ]
        table = torch.tensor(columns, dtype=torch.int64).view(-1, 4)
        shard, offset, size, targets = table.unbind(1)
        names = tuple(f"{sample.shard}/{sample.name}" for sample in samples[split])
        members = Members(tuple(shards), shard, offset, size)
        splits[split] = FileSplit(split, path, names, targets, members)
    root = path.resolve()
    return files.from_splits(root.name, classes, splits, root)


def read_shard(root: Path, shard: str) -> list[Sample]:
    """The samples of one shard, in its order.

    Raises:
        DataError: not an uncompressed tar archive, truncated, a sample without image or label, or
            two files of one name.
    """
    file = root / shard
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    samples = []
    try:
        _check_end(file)
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if name.startswith(".") or not (member.isfile() or member.islnk()):
                    continue
                if member.islnk():  # another name of an earlier member
                    linked, member = member, copy.copy(archive.getmember(member.linkname))
                    member.name = linked.name
                key, extension = os.path.join(folder, stem), extension.lower()
                if parts.setdefault(key, {}).setdefault(extension, member) is not member:
                    second = f"sample {escape(key)} has a second .{escape(extension)} file"
                    raise invalid(file, f"{second}; give every sample its own name")
            for key, members in parts.items():
                images = [members[ext] for ext in members if f".{ext}" in EXTENSIONS]
                if len(images) > 1:
                    listed = summarize([each.name for each in images])
                    several = f"sample {escape(key)} has {len(images)} images ({listed})"
                    raise invalid(file, f"{several}; keep one")
                image = images[0] if images else None
                label = archive.extractfile(members["cls"]) if "cls" in members else None
                if image is None or label is None:
                    missing = "image" if image is None else ".cls file with its label"
                    raise invalid(file, f"sample {escape(key)} has no {missing}; each needs both")
                text = label.read().decode("utf-8", "surrogateescape").strip()
                if not text or _NO_TEXT.search(text):
                    given = f"sample {escape(key)} has the label '{escape(text)}' in its .cls file"
                    raise invalid(file, f"{given}; write a class number or name in UTF-8")
                samples.append(Sample(shard, image.name, image.offset_data, image.size, text))
    except (tarfile.TarError, KeyError) as error:  # KeyError: a link to a missing member
        problem = f"not an uncompressed tar archive, or truncated ({escape(error)})"
        raise invalid(file, f"{problem}; write or copy it again") from error
    except OSError as error:
        raise cannot_read(file, error) from error
    return samples


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
        for folder in (".", *split_folders(root).folders.values())
        if os.path.isdir(root / folder)
        for name in os.listdir(root / folder)
        if name.endswith(".tar") and not name.startswith(".")
    )


def _detect(path: Path) -> bool:
    """True for a folder of shards, unless its split folders hold class folders."""
    try:
        if not _find_shards(path):
            return False
        splits = split_folders(path).folders.values()
        return not any(is_folder(entry) for name in splits for entry in entries(path / name))
    except (OSError, DataError):  # reported when the folder is read
        return False


def _shards_by_split(path: Path) -> dict[str, list[str]]:
    """The shards of each split; all are for training where no name tells a split."""
    try:
        shards = _find_shards(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    if not shards:
        raise invalid(path, "no .tar files there; pass the folder that holds the shards")
    return files_by_split(path, shards, "shard", ".tar")


def _classes(root: Path, samples: Sequence[Sample]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names in the order of their numbers, and the number of every label.

    The names are those of ``classes.txt``, else the numbers if all labels are whole, else the
    sorted labels.
    """
    file = root / CLASSES_FILE
    names = tuple(files.read_lines(file)) if os.path.isfile(file) else ()
    labels = {sample.label for sample in samples}
    if not all(_INTEGER.fullmatch(label) for label in labels):
        if unknown := sorted(labels.difference(names or labels)):
            raise invalid(file, f"labels that it does not list: {summarize(unknown)}")
        names = names or tuple(sorted(labels))
        return names, {name: i for i, name in enumerate(names)}
    number = {label: int(label) if len(label) <= _DIGITS else -1 for label in labels}
    # Every class has a training image, so class numbers stay below the number of images. Checked
    # before names are made of the numbers.
    count = len(names or samples)
    for sample in samples:
        if not 0 <= number[sample.label] < count:
            of = f"the {count} names in {CLASSES_FILE}" if names else f"{count} images"
            given = f"sample {escape(sample.name)} has the class number"
            given = f"{given} {escape(sample.label[:_DIGITS])}, outside 0..{count - 1} for {of}"
            raise invalid(root / sample.shard, f"{given}; number the classes from 0")
    if not names and samples and 0 not in number.values():
        raise invalid(root, f"class numbers from {min(number.values())} on; number them from 0")
    return names or tuple(str(i) for i in range(max(number.values(), default=-1) + 1)), number


WEBDATASET = DatasetKind(files=list_shards, detect=_detect, layout="train-*.tar and val-*.tar")
