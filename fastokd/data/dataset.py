"""Datasets: splits of images, classes, and the normalization of pixels.

A split holds decoded images (``Split``) or names of image files (``fastokd.data.files.FileSplit``).
Code that needs neither is written for both.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.decoding import Color
from fastokd.errors import ConfigError, DataError, escape, summarize

_CHUNK = 8192  # images at a time where a whole split would need a second copy of itself
_CHUNK_PIXELS = 2**18  # pixels at a time where the copy is several times wider


class AnySplit(Protocol):
    """The interface that ``Split`` and ``FileSplit`` share."""

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def select(self, index: Tensor, name: str | None = None) -> Self: ...


S = TypeVar("S", bound=AnySplit)


def invalid(where: object, problem: str) -> DataError:
    """The error for a file, a folder or a split of a dataset."""
    return DataError(f"{escape(where)}: {problem}")


@dataclass(frozen=True, eq=False)
class Split:
    """One split of decoded images.

    Args:
        name: "train", "val" or "test".
        images: uint8 [N, 3, H, W]; channels-last memory saves the loaders a copy.
        targets: int64 [N], class numbers.
        files: the N files of the images, relative to the dataset's root; None if there are no
            files.
        sums: ``image_sums`` of the images, if known.
    """

    name: str
    images: Tensor
    targets: Tensor
    files: tuple[str, ...] | None = None
    sums: Tensor | None = None

    def __post_init__(self) -> None:
        images, targets, where = self.images, self.targets, f"split '{self.name}'"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            given = f"{images.dtype} {list(images.shape)}"
            raise invalid(where, f"images are {given}; they must be uint8 [N, 3, H, W]")
        if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
            given = f"{targets.dtype} {list(targets.shape)}"
            raise invalid(where, f"targets are {given}; they must be int64 [{len(images)}]")
        if self.files is not None and len(self.files) != len(images):
            raise invalid(where, f"{len(self.files)} file names for {len(images)} images")

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor, name: str | None = None) -> "Split":
        """A copy of the images of ``index``, int64 [K], optionally under another name."""
        pixels = self.images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
        files = None if self.files is None else tuple(self.files[i] for i in index.tolist())
        sums = None if self.sums is None else self.sums.index_select(0, index)
        return Split(name or self.name, pixels, self.targets.index_select(0, index), files, sums)


def _distinct(*splits: S | None) -> tuple[S, ...]:
    return tuple({id(split): split for split in splits if split is not None}.values())


@dataclass(frozen=True, eq=False)
class DataSource(Generic[S]):
    """A dataset as its kind lists or reads it, independent of the settings of a run.

    Args:
        name: short name for tables and logs.
        classes: the class names; a target is an index into them.
        train: the training split.
        test: the evaluation split, never trained on (``val/`` if there is no ``test/``). None if
            all images are for training, so that some must be held out.
        val: the validation split, if the dataset has one in addition to ``test``.
        mean, std: the customary normalization per channel, as fractions of 255; None to compute it
            from the training split.
        augment: the customary augmentation; None for the crop and flip that suit the image size.
        root: the dataset's folder, if any.
        skipped: the files in that folder that are not images, and its unused folders, with "/".
        replaced_files: number of corrupt training images replaced by others of their class.
        fingerprint: of the decoded images, if known.
        background: the color behind transparent pixels, red, green and blue from 0 to 255; None
            drops the transparency.

    Raises:
        DataError: fewer than two classes, a class without training images, an empty split, or a
            target outside the classes.
    """

    name: str
    classes: tuple[str, ...]
    train: S
    test: S | None
    val: S | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment | None = None
    root: Path | None = None
    skipped: tuple[str, ...] = ()
    replaced_files: int = 0
    fingerprint: str | None = None
    background: Color | None = None

    def __post_init__(self) -> None:
        name, count = self.name, len(self.classes)
        if count < 2:
            raise invalid(name, f"{count} class(es); a classifier needs two or more")
        for label in self.classes:
            try:
                label.encode()
            except UnicodeEncodeError:
                fault = f"the class name {escape(label)} is not valid UTF-8; rename its folder"
                raise invalid(name, fault) from None
        for split in self.splits:
            if not len(split):
                raise invalid(name, f"split '{split.name}' is empty; put images in it")
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high >= count:
                found = f"split '{split.name}' has label {low if low < 0 else high}"
                raise invalid(name, f"{found}, outside 0..{count - 1} of its {count} classes")
        counts = torch.bincount(self.train.targets, minlength=count)
        unseen = [self.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
        if unseen:
            problem = f"no training images of {summarize(unseen)}; add some or drop the class"
            raise invalid(name, problem)

    @property
    def splits(self) -> tuple[S, ...]:
        """All splits, in the order train, test, val; one that serves as several once."""
        return _distinct(self.train, self.test, self.val)

    def hold_out(self, val_split: float, seed: int) -> tuple[S, S, S | None]:
        """The splits (train, test, val) after holding out ``val_split`` of every class of the
        training images. Without a test split, the held-out images become the test split.

        Raises:
            ConfigError: a fraction out of range.
            DataError: no evaluation images, a class too small to be split, or a dataset that has a
                validation split.
        """
        if not 0 <= val_split < 1:
            raise ConfigError(f"val_split={val_split}: must be a fraction in [0, 1)")
        if not val_split:
            if self.test is None:
                folders = [name for name in self.skipped if name.endswith("/")]
                unused = f" (unused folders: {summarize(folders)})" if folders else ""
                problem = f"no val/ or test/ images{unused}"
                fix = "hold out training images, e.g. --val-split 0.1"
                raise invalid(self.root or self.name, f"{problem}; {fix}")
            return self.train, self.test, self.val
        if self.val is not None:
            raise invalid(self.name, "already has a validation split; leave --val-split at 0")
        train, val = split_off(self.train, self.classes, val_split, seed)
        return (train, val, None) if self.test is None else (train, self.test, val)


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitSet(Generic[S]):
    """A dataset as a run uses it: validation split held out, normalization decided."""

    name: str
    classes: tuple[str, ...]
    train: S
    test: S
    val: S | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    root: Path | None = None
    skipped: tuple[str, ...] = ()
    replaced_files: int = 0
    background: Color | None = None

    if TYPE_CHECKING:  # subclasses have them as fields or as properties

        @property
        def image_size(self) -> tuple[int, int]:
            """Height and width of the images that the loaders return."""

        @property
        def fingerprint(self) -> str:
            """A SHA-256 in hex. Runs with equal fingerprints saw the same data, independent of
            where its files are.
            """

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def ignored_files(self) -> int:
        """The number of files in the dataset's folder that are not images."""
        return sum(not name.endswith("/") for name in self.skipped)

    @property
    def splits(self) -> tuple[S, ...]:
        """All splits, in the order train, val, test; one that serves as several once."""
        return _distinct(self.train, self.val, self.test)

    @property
    def evaluation(self) -> S:
        """The split a run is evaluated on: validation if present, else test."""
        return self.test if self.val is None else self.val

    def split(self, name: str) -> S:
        """The split "train", "val" or "test".

        Raises:
            ConfigError: the dataset has no split of that name.
        """
        found = {"train": self.train, "val": self.val, "test": self.test}.get(name)
        if found is None:
            fix = "use train, val or test"
            if name == "val":
                fix = "hold out training images, e.g. --val-split 0.1"
            raise ConfigError(f"{self.name} has no split '{name}'; {fix}")
        return found

    def describe(self) -> dict[str, Any]:
        """The dataset in a run's environment record: plain numbers and strings."""
        return {
            "name": self.name,
            "root": None if self.root is None else str(self.root),
            "num_classes": self.num_classes,
            "image_size": list(self.image_size),
            "num_images": {s.name: len(s) for s in self.splits},
            "mean": list(self.mean),
            "std": list(self.std),
            "ignored_files": self.ignored_files,
            "replaced_files": self.replaced_files,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(SplitSet[Split]):
    """A dataset of decoded images of one size.

    Its fingerprint covers the pixels, labels and class names of all splits before any images are
    held out.
    """

    fingerprint: str

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[2], self.train.images.shape[3]


def prepare(
    source: DataSource[Split],
    *,
    val_split: float = 0.0,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Dataset:
    """Split the validation images off the training split and decide the normalization; arguments as
    for ``open_dataset``.

    Raises:
        ConfigError: a fraction, mean or std out of range.
        DataError: splits of different image sizes, a class too small to be split, or a dataset that
            already has a validation split.
    """
    size = source.train.images.shape[1:]
    for split in source.splits:
        other = split.images.shape[1:]
        if other != size:
            sizes = f"'{split.name}' are {list(other)}, of '{source.train.name}' {list(size)}"
            raise invalid(source.name, f"images of {sizes}; open it with one image_size")
    source = normalized_by(source, mean, std)
    train, test, val = source.hold_out(val_split, seed)
    mean, std = source.mean, source.std
    if mean is None or std is None:
        mean, std = channel_statistics(train.images, train.sums)
    return Dataset(
        name=source.name,
        classes=source.classes,
        train=train,
        test=test,
        val=val,
        mean=tuple(mean),
        std=tuple(std),
        augment=augment or source.augment or Augment(pad=min(size[1:]) // 8, flip=True),
        fingerprint=source.fingerprint or fingerprint(source),
        root=source.root,
        skipped=source.skipped,
        replaced_files=source.replaced_files,
        background=source.background,
    )


def normalized_by(
    source: DataSource[S], mean: Sequence[float] | None, std: Sequence[float] | None
) -> DataSource[S]:
    """The source with another normalization; both or neither must be given.

    Raises:
        ConfigError: only one is given, or non-finite numbers.
    """
    if (mean is None) != (std is None):
        raise ConfigError("mean and std belong together; give both or neither")
    if mean is None or std is None:
        return source
    finite = all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)
    if len(mean) != 3 or len(std) != 3 or not finite:
        given = f"mean={list(mean)}, std={list(std)}"
        raise ConfigError(f"{given}: must be three finite numbers each, and std is positive")
    return replace(source, mean=tuple(mean), std=tuple(std))


def split_off(train: S, classes: Sequence[str], fraction: float, seed: int) -> tuple[S, S]:
    """Hold out ``fraction`` of every class, at least one image of each and never all; returns
    (train, val), in the order of the images. The choice depends only on labels, fraction and seed.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    for label, name in enumerate(classes):
        members = (train.targets == label).nonzero().flatten()
        if len(members) < 2:
            few = f"{len(members)} training image: too few to hold any out; add images"
            raise DataError(f"class '{escape(name)}' has {few} or leave --val-split at 0")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    kept, out = (mask.nonzero().flatten() for mask in (~held_out, held_out))
    return train.select(kept), train.select(out, "val")


def image_sums(images: Tensor) -> Tensor:
    """Sums of the pixels and of their squares, int64 [N, 2, C], of images uint8 [N, C, H, W]."""
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H * W, C]
    out = torch.empty(len(images), 2, images.shape[1], dtype=torch.int64)
    per_chunk = max(1, _CHUNK_PIXELS // max(1, pixels.shape[1]))
    for part, row in zip(pixels.split(per_chunk), out.split(per_chunk), strict=True):
        numbers = part.int()
        row[:, 0] = numbers.sum(1)
        row[:, 1] = numbers.square_().sum(1)
    return out


def channel_statistics(
    images: Tensor, sums: Tensor | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of uint8 [N, C, H, W], as
    fractions of 255, exact up to one rounding. A channel that never varies gets the deviation 1.
    ``sums`` are ``image_sums`` of the images, if known.
    """
    totals, squares = (image_sums(images) if sums is None else sums).sum(0).tolist()
    count = images.shape[0] * images.shape[2] * images.shape[3]
    means = tuple(total / (count * 255) for total in totals)
    variances = [
        count * square - total * total for total, square in zip(totals, squares, strict=True)
    ]
    return means, tuple(math.sqrt(v) / (count * 255) if v else 1.0 for v in variances)


def fingerprint(source: DataSource[Split]) -> str:
    """SHA-256, in hex, of the class names and of every split's name, shape, labels and pixels."""
    digest = hashlib.sha256()
    header = [list(source.classes), [[s.name, list(s.images.shape)] for s in source.splits]]
    digest.update(json.dumps(header).encode())
    for split in source.splits:
        digest.update(split.targets.contiguous().numpy().data)
        for part in split.images.permute(0, 2, 3, 1).split(_CHUNK):
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()
