"""WebDataset shards: tar archives in which the files of one sample lie together, named alike up to the first dot.

A sample is an image and its label: ``.cls`` with a class number or name. The splits are told by the shards' names
(``train-000000.tar``) or folders (``train/000000.tar``), and class numbers mean the lines of ``classes.txt``.
"""

import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit, Members
from fastokd.data.folder import SPLITS
from fastokd.data.images import EXTENSIONS, first_of, show
from fastokd.data.registry import DatasetKind
from fastokd.errors import DataError

CLASSES_FILE = "classes.txt"
_SPLIT = re.compile(rf"({'|'.join(name for names in SPLITS.values() for name in names)})(?![a-z])", re.IGNORECASE)
_SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}


class Sample(NamedTuple):
    """An image in a shard: its member's name, where its bytes are, and its label as it is written."""

    name: str
    offset: int
    size: int
    label: str


def _find_shards(root: Path) -> list[str]:
    """The archives in the folder and in its split folders, relative to it, by name."""
    folders = [".", *(name for names in SPLITS.values() for name in names)]
    found = []
    for folder in folders:
        if os.path.isdir(root / folder):
            found += [os.path.normpath(f"{folder}/{name}") for name in os.listdir(root / folder) if name.endswith(".tar") and not name.startswith(".")]
    return sorted(found)


def _detect(path: Path) -> bool:
    try:
        return os.path.isdir(path) and bool(_find_shards(path))
    except OSError:  # reported by whoever reads the folder
        return False


def list_shards(path: Path | None) -> DataSource[FileSplit]:
    """List the samples of all shards, without decoding any image.

    Raises:
        DataError: no shards, one that is damaged or compressed, samples without image or label, or shards of which
            only some say their split.
    """
    if path is None:
        raise DataError("webdataset needs a folder: webdataset:PATH, with train-*.tar and val-*.tar in it")
    try:
        shards = _find_shards(path) if os.path.isdir(path) else []
    except OSError as error:
        raise DataError(f"{show(path)}: cannot be read: {error.strerror}; check its permissions") from error
    if not shards:
        raise DataError(f"{show(path)}: no .tar files there; give the folder that holds the shards")
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        by_split.setdefault(_split_of(shard), []).append(shard)
    if "" in by_split:
        if len(by_split) > 1:
            raise DataError(f"{show(path)}: shards that do not say their split: {first_of(by_split[''])}; call them train-, val- or test-NUMBER.tar")
        by_split = {"train": shards}
    samples = {split: [read_shard(path / shard) for shard in names] for split, names in by_split.items()}
    labels = {sample.label for parts in samples.values() for part in parts for sample in part}
    classes = _class_names(path, labels)
    number = {name: i for i, name in enumerate(classes)}
    if all(label.isdecimal() for label in labels):
        number = {label: int(label) for label in labels}
    splits = {}
    for split, parts in samples.items():
        flat = [(shard, sample) for shard, part in enumerate(parts) for sample in part]
        members = Members(
            tuple(by_split[split]), *(torch.tensor(column, dtype=torch.int64) for column in (
                [shard for shard, _ in flat], [sample.offset for _, sample in flat], [sample.size for _, sample in flat])))
        names = tuple(f"{by_split[split][shard]}/{sample.name}" for shard, sample in flat)
        splits[split] = FileSplit(split, path, names, torch.tensor([number[sample.label] for _, sample in flat], dtype=torch.int64), members)
    if "train" not in splits:
        raise DataError(f"{show(path)}: no training shards (found {first_of(shards)}); call them train-NUMBER.tar")
    test = splits.pop("test") if "test" in splits else splits.pop("val", None)
    return DataSource(path.resolve().name, classes, splits["train"], test, splits.get("val"), root=path.resolve())


def read_shard(file: Path) -> list[Sample]:
    """The samples of one shard, in its order.

    Raises:
        DataError: not an uncompressed tar archive, cut off, or a sample without image or label.
    """
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        _check_end(file)
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if member.isfile() and not name.startswith("."):
                    parts.setdefault(os.path.join(folder, stem), {})[extension.lower()] = member
            samples = []
            for key, members in parts.items():
                image = next((members[extension] for extension in members if f".{extension}" in EXTENSIONS), None)
                label = members.get("cls")
                if image is None or label is None:
                    raise DataError(f"{show(file)}: sample {show(key)} has no {'image' if image is None else '.cls file with its label'}; each needs both")
                text = archive.extractfile(label)
                assert text is not None, "a regular file"
                samples.append(Sample(image.name, image.offset_data, image.size, text.read().decode("utf-8", "surrogateescape").strip()))
            return samples
    except tarfile.TarError as error:
        raise DataError(f"{show(file)}: not an uncompressed tar archive, or cut off ({show(error)}); write or copy it again") from error
    except OSError as error:
        raise DataError(f"{show(file)}: cannot be read: {error.strerror or show(error)}") from error


def _check_end(file: Path) -> None:
    """Raise ``tarfile.ReadError`` unless the archive has its end, two blocks of zeros: it may be cut between two members."""
    with open(file, "rb") as archive:
        if archive.seek(0, os.SEEK_END) >= 2 * tarfile.BLOCKSIZE:
            archive.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
            if not archive.read().strip(b"\0"):
                return
    raise tarfile.ReadError("its end is missing")


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


WEBDATASET = DatasetKind(files=list_shards, detect=_detect)
