"""Splits of encoded image files: what is listed before anything is decoded, for every layout made of image files."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource, Split, SplitSet, normalized_by
from fastokd.data.images import Progress, check_image_size, decode_all

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The customary normalisation of large pictures, as fractions of 255 (He et al. 2016 and everybody since)."""

MAX_REPLACED = 0.01
"""The share of a split's images that ``bad_images="replace"`` may replace before the run is stopped all the same."""

DEFAULT_SIZE = 224
SMALL = 128
"""Images up to this side are of the kind that is kept decoded, and cropped after padding."""

_PEEKED = 16


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
        name = self.files[index] if self.members is None else self.members.shards[int(self.members.shard[index])]
        return os.path.join(self.root, name)

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
            members = Members(members.shards, *(part.index_select(0, index) for part in (members.shard, members.offset, members.size)))
        files = tuple(self.files[i] for i in index.tolist())
        return FileSplit(name or self.name, self.root, files, self.targets.index_select(0, index), members)


@dataclass(frozen=True, eq=False, kw_only=True)
class FileDataset(SplitSet[FileSplit]):
    """A dataset of encoded image files, for loaders that decode while training.

    Its fingerprint is of class names, labels, file names and file sizes: of what can be known without reading all of it.

    Args:
        image_size: height and width of the images that loaders give.
    """

    image_size: tuple[int, int]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(list(self.classes)).encode())
        # Carving moves images between splits; what is there does not depend on it.
        everything = sorted(
            (split.files[i], label, int(split.members.size[i]) if split.members else os.path.getsize(split.path(i)))
            for split in (self.train, self.test, self.val) if split is not None
            for i, label in enumerate(split.targets.tolist()))
        for record in everything:
            digest.update(json.dumps(record).encode())
        return digest.hexdigest()


def prepare_files(source: DataSource[FileSplit], image_size: int | None = None, val_split: float = 0.0, seed: int = 0, *,
                  mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                  augment: Augment | None = None) -> FileDataset:
    """Carve the validation split off the training split and settle size and normalisation, decoding nothing.

    Args:
        image_size: side of the square that loaders give; by default the size of the images if they are all small and
            of one size, as far as a few of them tell, else 224.
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
        name=source.name, classes=source.classes, train=train, test=test, val=val, mean=source.mean or IMAGENET_MEAN,
        std=source.std or IMAGENET_STD, augment=augment or source.augment or _customary_augment(size), image_size=size,
        root=source.root, ignored_files=source.ignored_files,
    )


def decode_files(source: DataSource[FileSplit], image_size: int | None = None, workers: int | None = None,
                 progress: Progress | None = None) -> DataSource[Split]:
    """Decode every image of a listed dataset.

    Args:
        image_size, workers, progress: as for ``decode_all``.

    Raises:
        DataError: as ``decode_all``.
    """
    splits = source.splits
    places = [(split, i) for split in splits for i in range(len(split))]

    def read(place: int) -> bytes:
        split, i = places[place]
        return split.read(i)

    names = [file for split in splits for file in split.files]
    images = decode_all(source.train.root, names, image_size, workers, progress, read)
    parts = iter(images.split([len(split) for split in splits]))
    train, test, val = (
        None if split is None else Split(split.name, next(parts), split.targets, split.files)
        for split in (source.train, source.test, source.val)
    )
    return replace(source, train=train, test=test, val=val)


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
    """Mirroring, after the crop that suits the size: out of the padded image for small ones, randomly resized for others."""
    return Augment(pad=min(size) // 8, flip=True) if max(size) <= SMALL else Augment(flip=True, crop_scale=(0.08, 1.0))
