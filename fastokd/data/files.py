"""Splits of encoded image files: what is listed before anything is decoded, for every layout made
of image files.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.cache import Cache, Entry
from fastokd.data.dataset import DataSource, Split, SplitSet, fingerprint, image_sums, normalized_by
from fastokd.data.images import (
    Progress,
    bad_files_error,
    check_image_size,
    first_of,
    show,
    try_decode_all,
)
from fastokd.errors import ConfigError, DataError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The customary normalisation of large pictures, as fractions of 255 (He et al. 2016 and everybody
since).
"""

BAD_IMAGES = ("fail", "replace")
MAX_REPLACED = 0.01
"""The share of a split's images that ``bad_images="replace"`` may replace before the run is stopped
all the same.
"""

DEFAULT_SIZE = 224
SMALL = 128
"""Images up to this side are of the kind that is kept decoded, and cropped after padding."""

_PEEKED = 16


CONVERSION_FILE = "fastokd-convert.json"
"""What ``fastokd data convert`` writes first into its output, and marks as finished last."""


@dataclass(frozen=True, eq=False)
class Members:
    """Where the images of a split lie inside uncompressed tar archives.

    Args:
        shards: the archives, relative to the split's root, in the order of their names.
        shard: int64 [N], the archive of each image.
        offset, size: int64 [N], the bytes of each image within its archive.
    """

    shards: tuple[str, ...]
    shard: Tensor
    offset: Tensor
    size: Tensor


@dataclass(frozen=True, eq=False)
class FileSplit:
    """One split of encoded images; nothing is opened until ``read``.

    Args:
        name: "train", "val" or "test".
        root: the folder that ``files`` are relative to.
        files: the N names; of an image in an archive "archive/member".
        targets: int64 [N], class numbers.
        members: where the images lie in archives; None if every image is a file of its own.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    targets: Tensor
    members: Members | None = None

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """The image's file, or the archive it lies in."""
        name = (
            self.files[index]
            if self.members is None
            else self.members.shards[int(self.members.shard[index])]
        )
        return os.path.join(self.root, name)

    def num_bytes(self, index: int) -> int:
        """The size of an image's encoding; -1 if its file is not there, which whoever reads it then
        says.
        """
        if self.members is not None:
            return int(self.members.size[index])
        try:
            return os.path.getsize(self.path(index))
        except OSError:
            return -1

    def read(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.path(index), "rb") as file:
            if self.members is None:
                return file.read()
            file.seek(int(self.members.offset[index]))
            return file.read(int(self.members.size[index]))

    def select(self, index: Tensor, name: str | None = None) -> "FileSplit":
        """The files of ``index``, int64 [K], under another name if one is given."""
        members = self.members
        if members is not None:
            members = Members(
                members.shards,
                *(
                    part.index_select(0, index)
                    for part in (members.shard, members.offset, members.size)
                ),
            )
        files = tuple(self.files[i] for i in index.tolist())
        return FileSplit(
            name or self.name, self.root, files, self.targets.index_select(0, index), members
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class FileDataset(SplitSet[FileSplit]):
    """A dataset of encoded image files, for loaders that decode while training.

    Its fingerprint is of class names, labels, file names and file sizes: of what can be known
    without reading all of it.

    Args:
        image_size: height and width of the images that loaders give.
    """

    image_size: tuple[int, int]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(list(self.classes)).encode())
        # Carving moves images between splits; what is there does not depend on it.
        everything = sorted(
            (split.files[i], label, split.num_bytes(i))
            for split in self.splits
            for i, label in enumerate(split.targets.tolist())
        )
        for record in everything:
            digest.update(json.dumps(record).encode())
        return digest.hexdigest()


def check_finished(root: Path) -> None:
    """Refuse a folder that ``fastokd data convert`` has not filled to the end.

    Raises:
        DataError: the conversion was interrupted, or is going on.
    """
    try:
        finished = json.loads((root / CONVERSION_FILE).read_text()).get("finished", False)
    except (OSError, ValueError, AttributeError):  # not written by convert
        return
    if not finished:
        raise DataError(
            f"{show(root)}: its conversion is not finished; run the same 'fastokd data convert'"
            " again, which goes on where it stopped"
        )


def prepare_files(
    source: DataSource[FileSplit],
    image_size: int | None = None,
    val_split: float = 0.0,
    seed: int = 0,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> FileDataset:
    """Carve the validation split off the training split and settle size and normalisation, decoding
    nothing.

    Args:
        image_size: side of the square that loaders give; by default the size of the images if they
            are all small and of one size, as far as a few of them tell, else 224.
        val_split, seed: as for ``prepare``; the same images are held out.
        mean, std: override the source's, both together; without either, ImageNet's.
        augment: override the source's policy.

    Raises:
        ConfigError: a fraction, mean, std or size out of range.
        DataError: a class too small to be split, or a dataset that has a validation split already.
    """
    check_image_size(image_size)
    source = normalized_by(source, mean, std)
    train, test, val = source.carved(val_split, seed)
    size = (image_size, image_size) if image_size else _guess_size(train)
    return FileDataset(
        name=source.name,
        classes=source.classes,
        train=train,
        test=test,
        val=val,
        mean=source.mean or IMAGENET_MEAN,
        std=source.std or IMAGENET_STD,
        augment=augment or source.augment or _customary_augment(size),
        image_size=size,
        root=source.root,
        ignored_files=source.ignored_files,
    )


def decode_files(
    source: DataSource[FileSplit],
    image_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    bad_images: str = "fail",
) -> DataSource[Split]:
    """Decode every image of a listed dataset, or find it decoded in the cache.

    Args:
        image_size, workers, progress: as for ``decode_all``.
        bad_images: what to do about training images that cannot be decoded: "fail", or "replace"
            each by another one of its class, with a warning, up to one in a hundred. Evaluation
            images are never replaced.

    Raises:
        ConfigError: an unknown ``bad_images``.
        DataError: as ``decode_all``; too many bad images, or a class without a good one.
    """
    if bad_images not in BAD_IMAGES:
        raise ConfigError(
            f"unknown bad_images '{bad_images}'{did_you_mean(bad_images, BAD_IMAGES)}"
        )
    splits = source.splits
    places = [(split, i) for split in splits for i in range(len(split))]
    names = [file for split in splits for file in split.files]

    def read(place: int) -> bytes:
        split, i = places[place]
        return split.read(i)

    recipe = {
        "image_size": image_size,
        "classes": source.classes,
        "splits": [
            [
                s.name,
                s.files,
                s.targets.tolist(),
                None if s.members is None else s.members.offset.tolist(),
            ]
            for s in splits
        ],
    }
    cache = Cache(
        recipe, list(dict.fromkeys(split.path(i) for split, i in places)), read, len(places)
    )
    entry = cache.find()
    bad: dict[int, str] = {}
    if entry is None:
        started = time.monotonic()
        images, bad = try_decode_all(
            source.train.root, names, image_size, workers, progress, cache.checked_read
        )
        if bad:
            _replace_bad(source, images, bad, names, bad_images)
        decoded = _split_images(source, images, image_sums(images))
        if not bad:
            decoded = replace(decoded, fingerprint=fingerprint(decoded))
            cache.keep(
                Entry(
                    images, torch.cat([split.sums for split in decoded.splits]), decoded.fingerprint
                ),
                time.monotonic() - started,
            )
        return replace(decoded, replaced_files=len(bad))
    return replace(_split_images(source, entry.images, entry.sums), fingerprint=entry.fingerprint)


def _split_images(source: DataSource[FileSplit], images: Tensor, sums: Tensor) -> DataSource[Split]:
    counts = [len(split) for split in source.splits]
    parts = zip(source.splits, images.split(counts), sums.split(counts), strict=True)
    decoded = {
        files.name: Split(files.name, part, files.targets, files.files, part_sums)
        for files, part, part_sums in parts
    }
    return replace(
        source,
        train=decoded["train"],
        **{
            field: decoded[files.name]
            for field in ("test", "val")
            if (files := getattr(source, field)) is not None
        },
    )


def _replace_bad(
    source: DataSource[FileSplit],
    images: Tensor,
    bad: Mapping[int, str],
    names: Sequence[str],
    policy: str,
) -> None:
    """Write another image of the same class over each bad training image of ``images``, whose first
    are those of training.
    """
    root, targets = source.train.root, source.train.targets
    if policy == "fail":
        raise bad_files_error(
            root,
            names,
            bad,
            "replace or delete them, or pass --bad-images replace; 'fastokd data check' finds"
            " them all",
        )
    elsewhere = {i: reason for i, reason in bad.items() if i >= len(targets)}
    if elsewhere:
        raise bad_files_error(
            root,
            names,
            elsewhere,
            "evaluation images are never replaced; mend them, or leave them out with 'fastokd data"
            " check --write-list'",
        )
    allowed = math.ceil(MAX_REPLACED * len(targets))
    if len(bad) > allowed:
        raise bad_files_error(
            root,
            names,
            bad,
            f"--bad-images replace takes at most {allowed}; leave them out with 'fastokd data check"
            " --write-list'",
        )
    for i in bad:
        others = [j for j in (targets == targets[i]).nonzero().flatten().tolist() if j not in bad]
        if not others:
            raise bad_files_error(
                root,
                names,
                bad,
                f"class '{show(source.classes[int(targets[i])])}' has no other image to replace"
                " them by",
            )
        images[i] = images[next((j for j in others if j > i), others[0])]
    listed = first_of([f"{names[i]} ({reason})" for i, reason in bad.items()])
    warnings.warn(
        f"{len(bad)} of {len(targets)} training images cannot be decoded and were replaced by"
        f" others of their class: {listed}",
        stacklevel=2,
    )


def peek_sizes(split: FileSplit) -> set[tuple[int, int]]:
    """The sizes (height, width) of a few images all over a split, from their headers alone."""
    from io import BytesIO

    from PIL import Image

    sizes = set()
    for i in torch.linspace(0, len(split) - 1, min(_PEEKED, len(split))).long().tolist():
        try:
            with Image.open(BytesIO(split.read(i))) as image:
                sizes.add((image.height, image.width))
        except Exception:  # a damaged file is reported where it is decoded
            continue
    return sizes


def _guess_size(split: FileSplit) -> tuple[int, int]:
    """The one size of a few images, if it is small; else the customary one."""
    sizes = peek_sizes(split)
    size = sizes.pop() if len(sizes) == 1 else (DEFAULT_SIZE, DEFAULT_SIZE)
    return size if max(size) <= SMALL else (DEFAULT_SIZE, DEFAULT_SIZE)


def _customary_augment(size: tuple[int, int]) -> Augment:
    """Mirroring, after the crop that suits the size: out of the padded image for small ones,
    randomly resized for others.
    """
    return (
        Augment(pad=min(size) // 8, flip=True)
        if max(size) <= SMALL
        else Augment(flip=True, crop_scale=(0.08, 1.0))
    )
