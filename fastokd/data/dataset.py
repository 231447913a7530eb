"""What a dataset is: splits of images, the classes, and how the pixels are normalised.

A split holds decoded images (``Split``) or names of image files (``fastokd.data.files.FileSplit``);
what does not depend on that is written once, over either.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.images import first_of, show
from fastokd.errors import ConfigError, DataError

_CHUNK = 8192  # images at a time where a whole split would need a second copy of itself
_CHUNK_PIXELS = 2**18  # pixels at a time where the copy is several times wider


class AnySplit(Protocol):
    """What a split of decoded images and one of image files have in common."""

    name: str
    targets: Tensor

    def __len__(self) -> int: ...

    def select(self, index: Tensor, name: str | None = None) -> Self: ...


S = TypeVar("S", bound=AnySplit)


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a dataset.

    Args:
        name: "train", "val" or "test".
        images: uint8 [N, 3, H, W]; channels last in memory costs the loaders no copy.
        targets: int64 [N], class numbers.
        files: the N files the images came from, relative to the dataset's root; None where there
            are no such files.
        sums: ``image_sums`` of the images, where they are known already.
    """

    name: str
    images: Tensor
    targets: Tensor
    files: tuple[str, ...] | None = None
    sums: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise DataError(
                f"split '{self.name}': images are {self.images.dtype} {list(self.images.shape)};"
                " they must be uint8 [N, 3, H, W]"
            )
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            raise DataError(
                f"split '{self.name}': targets are {self.targets.dtype} {list(self.targets.shape)};"
                f" they must be int64 [{len(self.images)}], one per image"
            )
        if self.files is not None and len(self.files) != len(self.images):
            raise DataError(
                f"split '{self.name}': {len(self.files)} file names for {len(self.images)} images"
            )

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor, name: str | None = None) -> "Split":
        """A copy of the images of ``index``, int64 [K], under another name if one is given."""
        pixels = self.images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
        files = None if self.files is None else tuple(self.files[i] for i in index.tolist())
        sums = None if self.sums is None else self.sums.index_select(0, index)
        return Split(name or self.name, pixels, self.targets.index_select(0, index), files, sums)


@dataclass(frozen=True, eq=False)
class DataSource(Generic[S]):
    """What a dataset kind lists or reads: everything that does not depend on how a run wants to use
    it.

    Args:
        name: short name for tables and logs.
        classes: the class names; a target is an index into them.
        train: the training split.
        test: the evaluation split, never trained on (the ``val/`` folder where there is no
            ``test/``); None where all images are for training, and some must be held out.
        val: a validation split of its own, where the dataset has one besides ``test``.
        mean, std: the customary normalisation per channel, as fractions of 255; None to measure the
            training split.
        augment: the customary augmentation; None for the crop and flip that suit the images' size.
        root: the folder the data came from, if any.
        ignored_files: files in that folder that are no images.
        replaced_files: training images that cannot be decoded, for which others of their class
            stand.
        fingerprint: of the decoded images, where it is known already.

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
    ignored_files: int = 0
    replaced_files: int = 0
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DataError(
                f"{show(self.name)}: {len(self.classes)} class(es); a classifier needs two or more"
            )
        for name in self.classes:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DataError(
                    f"{show(self.name)}: the class name {show(name)} is not valid UTF-8; rename its"
                    " folder"
                ) from None
        for split in self.splits:
            if not len(split):
                raise DataError(
                    f"{show(self.name)}: split '{split.name}' is empty; put images in it"
                )
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high >= len(self.classes):
                wrong = low if low < 0 else high
                raise DataError(
                    f"{show(self.name)}: split '{split.name}' has label {wrong}, outside"
                    f" 0..{len(self.classes) - 1} of its {len(self.classes)} classes; correct the"
                    " labels or the class list"
                )
        counts = torch.bincount(self.train.targets, minlength=len(self.classes))
        unseen = [self.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
        if unseen:
            raise DataError(
                f"{show(self.name)}: no training images of {first_of(unseen)}; add some or drop the"
                " class"
            )

    @property
    def splits(self) -> tuple[S, ...]:
        """The splits there are, in the order train, test, val."""
        return tuple(split for split in (self.train, self.test, self.val) if split is not None)

    def carved(self, val_split: float, seed: int) -> tuple[S, S, S | None]:
        """The splits (train, test, val) after holding out ``val_split`` of every class of the
        training images.

        Where the source has no test split, the images held out take its place, as ``val/`` does
        without ``test/``.

        Raises:
            ConfigError: a fraction out of range.
            DataError: nothing to evaluate on, a class too small to be split, or a validation split
                is there already.
        """
        if not 0 <= val_split < 1:
            raise ConfigError(
                f"val_split={val_split}; it is the fraction of the training images held out, 0 <="
                " val_split < 1"
            )
        if not val_split:
            if self.test is None:
                raise DataError(
                    f"{show(self.root or self.name)}: no val/ or test/ images; hold some training"
                    " images out with --val-split, e.g. 0.1"
                )
            return self.train, self.test, self.val
        if self.val is not None:
            raise DataError(
                f"{show(self.name)} has a validation split of its own; leave --val-split at 0"
            )
        train, val = carve(self.train, self.classes, val_split, seed)
        return (train, val, None) if self.test is None else (train, self.test, val)


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitSet(Generic[S]):
    """A dataset as a run uses it: the splits with a validation split carved, and the normalisation
    settled.

    Every such class also has ``image_size``, height and width of the images its loaders give, and
    ``fingerprint``, a SHA-256 in hex: two runs with the same fingerprint saw the same data,
    wherever its files lay.
    """

    name: str
    classes: tuple[str, ...]
    train: S
    test: S
    val: S | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    root: Path | None = None
    ignored_files: int = 0
    replaced_files: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def splits(self) -> tuple[S, ...]:
        """The splits there are, in the order train, val, test."""
        return tuple(split for split in (self.train, self.val, self.test) if split is not None)

    @property
    def evaluation(self) -> S:
        """What a run is evaluated on: the validation split if there is one, else the test split."""
        return self.test if self.val is None else self.val

    def split(self, name: str) -> S:
        """The split "train", "val" or "test".

        Raises:
            ConfigError: there is none of that name here.
        """
        found = {"train": self.train, "val": self.val, "test": self.test}.get(name)
        if found is None:
            fix = (
                "; hold some training images out with --val-split"
                if name == "val"
                else "; use train, val or test"
            )
            raise ConfigError(f"{self.name} has no split '{name}'{fix}")
        return found

    def describe(self) -> dict[str, Any]:
        """What a run's environment record says about its data: plain numbers and strings."""
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
    """A dataset whose images are decoded, all to one size.

    Its fingerprint is of the decoded pixels, labels and class names of all splits before carving.
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
    """Carve the validation split off the training split and settle the normalisation.

    Args:
        val_split: fraction of every class's training images to hold out, 0 <= val_split < 1.
        seed: chooses which images are held out.
        mean, std: override the source's, both together; one number per channel, as fractions of
            255.
        augment: override the source's policy.

    Raises:
        ConfigError: a fraction, mean or std out of range.
        DataError: splits of different image sizes, a class too small to be split, or a dataset that
            has a validation split already.
    """
    size = source.train.images.shape[1:]
    for split in source.splits:
        if split.images.shape[1:] != size:
            raise DataError(
                f"{show(source.name)}: images of split '{split.name}' are"
                f" {list(split.images.shape[1:])} and those of '{source.train.name}' {list(size)};"
                " open the dataset with one image_size"
            )
    source = normalized_by(source, mean, std)
    train, test, val = source.carved(val_split, seed)
    if source.mean is None or source.std is None:
        measured_mean, measured_std = channel_statistics(train.images, train.sums)
    else:
        measured_mean, measured_std = source.mean, source.std
    return Dataset(
        name=source.name,
        classes=source.classes,
        train=train,
        test=test,
        val=val,
        mean=measured_mean,
        std=measured_std,
        augment=augment or source.augment or Augment(pad=min(size[1:]) // 8, flip=True),
        fingerprint=source.fingerprint or fingerprint(source),
        root=source.root,
        ignored_files=source.ignored_files,
        replaced_files=source.replaced_files,
    )


def normalized_by(
    source: DataSource[S], mean: Sequence[float] | None, std: Sequence[float] | None
) -> DataSource[S]:
    """The source with another normalisation, both given together or neither.

    Raises:
        ConfigError: only one of them, or numbers that are not finite.
    """
    if (mean is None) != (std is None):
        raise ConfigError("mean and std belong together; give both or neither")
    if mean is None or std is None:
        return source
    if (
        len(mean) != 3
        or len(std) != 3
        or not all(map(math.isfinite, mean))
        or not all(0 < s < math.inf for s in std)
    ):
        raise ConfigError(
            f"mean={list(mean)}, std={list(std)}; they are three finite numbers each, and std is"
            " positive"
        )
    return replace(source, mean=tuple(mean), std=tuple(std))


def carve(train: S, classes: Sequence[str], fraction: float, seed: int) -> tuple[S, S]:
    """Hold out ``fraction`` of every class, at least one image of each and never all; returns
    (train, val).

    Both keep the order the images had. The choice depends on nothing but the labels, the fraction
    and the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    for label, name in enumerate(classes):
        members = (train.targets == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(
                f"class '{show(name)}' has {len(members)} training image: too few to hold any out;"
                " add images or leave --val-split at 0"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    kept, out = (mask.nonzero().flatten() for mask in (~held_out, held_out))
    return train.select(kept), train.select(out, "val")


def image_sums(images: Tensor) -> Tensor:
    """Of every image and channel of uint8 [N, C, H, W] the sum of the pixels and that of their
    squares: int64 [N, 2, C].
    """
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
    fractions of 255.

    Exact up to one rounding: from sums of integers. A channel that never varies gets the deviation
    1, so that it normalises to zero. ``sums`` are ``image_sums`` of the images, if they are known
    already.
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
        digest.update(split.targets.contiguous().numpy())
        for part in split.images.permute(0, 2, 3, 1).split(_CHUNK):
            digest.update(part.contiguous().numpy())
    return digest.hexdigest()
