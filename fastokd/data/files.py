"""Splits of encoded image files: every layout made of image files is listed into one before any
image is decoded.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastokd.data import dataset
from fastokd.data.augment import Augment
from fastokd.data.cache import Cache, Entry
from fastokd.data.dataset import DataSource, Split, SplitSet, invalid
from fastokd.data.decoding import Color, decode, open_image
from fastokd.data.images import Progress, corrupt_files_error, try_decode_all
from fastokd.data.text import check_class_names, decode_text, readable
from fastokd.errors import ConfigError, DataError, did_you_mean, escape, summarize

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The customary normalization of large images, as fractions of 255 (He et al. 2016)."""

BAD_IMAGES = ("fail", "replace")
MAX_REPLACED = 0.01
"""The largest share of a split's images that ``bad_images="replace"`` may replace."""

DEFAULT_SIZE = 224
SMALL = 128
"""Images up to this side are cropped after padding; larger ones get random resized crops."""

_PROBED = 16
MOST_HEADERS = 4096
_PLAIN_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

CONVERSION_FILE = "fastokd-convert.json"
"""The record of ``fastokd data convert`` in its output folder, written first and marked as finished
last.
"""


@dataclass(frozen=True, eq=False)
class Members:
    """Positions of a split's images inside uncompressed tar archives.

    Args:
        shards: the archives, relative to the split's root, sorted by name.
        shard: int64 [N], the archive of each image.
        offset, size: int64 [N], the byte range of each image within its archive.
    """

    shards: tuple[str, ...]
    shard: Tensor
    offset: Tensor
    size: Tensor


@dataclass(frozen=True, eq=False)
class FileSplit:
    """One split of encoded images; no file is opened before ``read``.

    Args:
        name: "train", "val" or "test".
        root: the folder that ``files`` are relative to.
        files: the N names; "archive/member" for an image in an archive.
        targets: int64 [N], class numbers.
        members: positions in archives; None if every image is a separate file.
        background: the color behind transparent pixels, see ``decode``.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    targets: Tensor
    members: Members | None = None
    background: Color | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def where(self) -> str:
        """The split and its folder, for messages."""
        return f"split '{self.name}' of {escape(self.root)}"

    def location(self, index: int) -> tuple[str, int, int]:
        """The file of an image, its first byte there and its size; 0 and -1 for a whole file."""
        members = self.members
        if members is None:
            return os.path.join(self.root, self.files[index]), 0, -1
        path = os.path.join(self.root, members.shards[int(members.shard[index])])
        return path, int(members.offset[index]), int(members.size[index])

    def path(self, index: int) -> str:
        """The image's file, or the archive that contains it."""
        return self.location(index)[0]

    def num_bytes(self, index: int) -> int:
        """The size of an image's encoding; -1 if its file is missing, which ``read`` reports."""
        path, _, size = self.location(index)
        with contextlib.suppress(OSError):
            return os.path.getsize(path) if size < 0 else size
        return -1

    def read(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            OSError: the file cannot be read.
        """
        return read_bytes(*self.location(index))

    def decode(self, index: int) -> "Image.Image":
        """An image in upright 8-bit RGB.

        Raises:
            Exception: as ``fastokd.data.decoding.decode``.
        """
        return decode(BytesIO(self.read(index)), self.background)

    def select(self, index: Tensor, name: str | None = None) -> "FileSplit":
        """The files of ``index``, int64 [K], optionally under another name."""
        members = self.members
        if members is not None:
            columns = (members.shard, members.offset, members.size)
            members = Members(members.shards, *(part.index_select(0, index) for part in columns))
        files = tuple(self.files[i] for i in index.tolist())
        targets = self.targets.index_select(0, index)
        return replace(self, name=name or self.name, files=files, targets=targets, members=members)


def read_bytes(path: str, offset: int, size: int) -> bytes:
    """The bytes at a ``FileSplit.location``; an ``OSError`` if the file cannot be read."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True, eq=False, kw_only=True)
class FileDataset(SplitSet[FileSplit]):
    """A dataset of encoded image files, for loaders that decode while training.

    Its fingerprint covers class names, labels, file names and file sizes, so that no file is read.

    Args:
        image_size: height and width of the images that loaders return.
    """

    image_size: tuple[int, int]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(list(self.classes)).encode())
        # Sorted over all splits, so that holding out images does not change it.
        records = sorted(
            (split.files[i], label, split.num_bytes(i))
            for split in self.splits
            for i, label in enumerate(split.targets.tolist())
        )
        for record in records:
            digest.update(json.dumps(record).encode())
        return digest.hexdigest()


def from_splits(
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, FileSplit],
    root: Path,
    skipped: Sequence[str] = (),
) -> DataSource[FileSplit]:
    """The dataset of these splits. Without "test", runs are evaluated on "val"."""
    test, val = splits.get("test"), splits.get("val")
    if test is None:
        test, val = val, None
    train = splits["train"]
    check_class_names(classes, root)
    classes, skipped = tuple(classes), tuple(skipped)
    return DataSource(name, classes, train, test, val, root=root, skipped=skipped)


def with_background(
    source: DataSource[FileSplit], background: Color | None
) -> DataSource[FileSplit]:
    """The dataset with a color behind transparent pixels."""
    if background is None:
        return source
    parts = {id(split): replace(split, background=background) for split in source.splits}
    test, val = (None if part is None else parts[id(part)] for part in (source.test, source.val))
    train = parts[id(source.train)]
    return replace(source, train=train, test=test, val=val, background=background)


def cannot_read(path: Path | str, error: OSError) -> DataError:
    """The error for a file or folder of a dataset that cannot be read."""
    reason = error.strerror or escape(error)
    return invalid(path, f"cannot be read: {reason}; check its permissions and links")


def read_lines(file: Path) -> list[str]:
    """The lines of a text that are not empty, stripped.

    Raises:
        DataError: it cannot be read or decoded.
    """
    try:
        text = decode_text(file.read_bytes(), file)
    except OSError as error:
        raise cannot_read(file, error) from error
    return [line for line in map(str.strip, readable(text, file).splitlines()) if line]


def check_finished(root: Path) -> None:
    """Raise ``DataError`` for a folder in which ``fastokd data convert`` has not finished."""
    try:
        finished = json.loads((root / CONVERSION_FILE).read_text()).get("finished", False)
    except (OSError, ValueError, AttributeError):  # not written by convert
        return
    if not finished:
        fix = "run the same 'fastokd data convert' again to continue it"
        raise invalid(root, f"its conversion is not finished; {fix}")


def check_bad_images(policy: str) -> None:
    """Raise ``ConfigError`` for a policy that is not one of ``BAD_IMAGES``."""
    if policy not in BAD_IMAGES:
        raise ConfigError(f"unknown bad_images '{policy}'{did_you_mean(policy, BAD_IMAGES)}")


def decode_files(
    source: DataSource[FileSplit],
    image_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    bad_images: str = "fail",
) -> DataSource[Split]:
    """Decode every image of a listed dataset, or load the decoded images from the cache.

    Args:
        image_size, workers, progress: as for ``try_decode_all``.
        bad_images: the policy for training images that cannot be decoded: "fail", or "replace" each
            by another image of its class, with a warning, up to 1 %. Evaluation images are never
            replaced.

    Raises:
        ConfigError: an unknown ``bad_images``.
        DataError: as ``try_decode_all``; files that cannot be decoded (the first ten are named) and
            must not be replaced, or a class without a valid image.
    """
    check_bad_images(bad_images)
    splits = source.splits
    positions = [(split, i) for split in splits for i in range(len(split))]
    names = [file for split in splits for file in split.files]
    listed = [
        (s.name, s.files, s.targets.tolist(), s.members and s.members.offset.tolist())
        for s in splits
    ]
    paths = list(dict.fromkeys(split.path(i) for split, i in positions))
    background = source.background
    where: list[object] = [source.train.root.absolute(), image_size]
    where += [split.name for split in splits] + ([] if background is None else [background])
    cache = Cache(where, [source.classes, listed], paths)
    entry = cache.find()
    if entry is not None:
        decoded = _split_images(source, entry.images, entry.sums)
        return replace(decoded, fingerprint=entry.fingerprint)

    def read(position: int) -> bytes:
        split, i = positions[position]
        return split.read(i)

    started = time.monotonic()
    images, corrupt = try_decode_all(
        source.train.root, names, read, image_size, workers, progress, background
    )
    if corrupt:
        _replace_corrupt(source, images, corrupt, names, bad_images)
    sums = dataset.image_sums(images)
    decoded = _split_images(source, images, sums)
    if corrupt:
        return replace(decoded, replaced_files=len(corrupt))
    entry = Entry(images, sums, dataset.fingerprint(decoded))
    cache.keep(entry, time.monotonic() - started)
    return replace(decoded, fingerprint=entry.fingerprint)


def _split_images(source: DataSource[FileSplit], images: Tensor, sums: Tensor) -> DataSource[Split]:
    counts = [len(split) for split in source.splits]
    parts = zip(source.splits, images.split(counts), sums.split(counts), strict=True)
    decoded = {
        split.name: Split(split.name, part, split.targets, split.files, part_sums)
        for split, part, part_sums in parts
    }
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    for name in ("train", "test", "val"):
        fields[name] = fields[name] and decoded[fields[name].name]
    return DataSource(**fields)


def _replace_corrupt(
    source: DataSource[FileSplit],
    images: Tensor,
    corrupt: Mapping[int, str],
    names: Sequence[str],
    policy: str,
) -> None:
    """Overwrite each corrupt training image with another of its class; ``images`` starts with those
    for training.
    """
    root, targets = source.train.root, source.train.targets

    def error(fix: str, files: Mapping[int, str] = corrupt) -> DataError:
        return corrupt_files_error(root, names, files, fix)

    listing = "'fastokd data check --write-list'"
    if policy == "fail":
        fix = "replace or delete what 'fastokd data check' finds, or pass --bad-images replace"
        raise error(fix)
    if elsewhere := {i: reason for i, reason in corrupt.items() if i >= len(targets)}:
        fix = f"evaluation images are never replaced; fix them, or list the others with {listing}"
        raise error(fix, elsewhere)
    allowed = math.ceil(MAX_REPLACED * len(targets))
    if len(corrupt) > allowed:
        raise error(f"--bad-images replace takes at most {allowed}; list the others with {listing}")
    for i in corrupt:
        images[i] = images[replacement_index(source.train, i, corrupt)]
    listed = summarize([f"{names[i]} ({reason})" for i, reason in corrupt.items()])
    warnings.warn(
        f"{len(corrupt)} of {len(targets)} training images cannot be decoded and were replaced by"
        f" others of their class: {listed}",
        stacklevel=2,
    )


def replacement_index(split: FileSplit, index: int, corrupt: Container[int]) -> int:
    """The next image of the same class that is not corrupt, continuing at the first after the last.

    Raises:
        DataError: all are corrupt.
    """
    same_class = (split.targets == split.targets[index]).nonzero().flatten().tolist()
    position = same_class.index(index)
    for other in same_class[position + 1 :] + same_class[:position]:
        if other not in corrupt:
            return int(other)
    images = f"the {len(same_class)} images of the class of {escape(split.files[index])}"
    raise DataError(
        f"{split.where}: none of {images} can be decoded; fix what 'fastokd data check' finds"
    )


def peek_sizes(split: FileSplit) -> set[tuple[int, int]]:
    """The sizes (height, width) of a few images of a split, from their headers."""

    sizes = set()
    for i in torch.linspace(0, len(split) - 1, min(_PROBED, len(split))).long().tolist():
        # A damaged file is reported when it is decoded.
        with contextlib.suppress(Exception), open_image(split.read(i)) as image:
            sizes.add((image.height, image.width))
    return sizes


def check_headers(splits: Sequence[FileSplit]) -> None:
    """Raise ``DataError`` for images in formats of many pixel types whose type has no conversion to
    8-bit RGB. It reads the headers of up to ``MOST_HEADERS`` files of a split; usually a whole
    dataset has the same type.
    """

    for split in splits:
        names = enumerate(split.files)
        suspects = [i for i, name in names if not name.lower().endswith(_PLAIN_TYPES)]
        step = -(-len(suspects) // MOST_HEADERS) or 1
        refused = {}
        for i in suspects[::step]:
            # A damaged file is reported when it is decoded.
            with contextlib.suppress(Exception), open_image(split.read(i)) as image:
                is_deep = image.mode == "I" and image.format != "PPM"
                if is_deep or image.mode in ("F", "LAB"):
                    refused[i] = f"{image.mode}-mode pixels have no defined 8-bit RGB values"
        if refused:
            raise corrupt_files_error(split.root, split.files, refused, "convert them to RGB")


def default_size(split: FileSplit) -> tuple[int, int]:
    """The common size of a few images if it is at most ``SMALL``, else ``DEFAULT_SIZE``."""
    sizes = peek_sizes(split)
    size = sizes.pop() if len(sizes) == 1 else (DEFAULT_SIZE, DEFAULT_SIZE)
    return size if max(size) <= SMALL else (DEFAULT_SIZE, DEFAULT_SIZE)


def customary_augment(size: tuple[int, int]) -> Augment:
    """Horizontal flips and the crop that suits the size: padded for small images, else resized."""
    if max(size) <= SMALL:
        return Augment(pad=min(size) // 8, flip=True)
    return Augment(flip=True, crop_scale=(0.08, 1.0))
