"""The dataset kinds, one file each, and the choice of a kind by name or by a folder's content."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastokd.data import files
from fastokd.data.augment import Augment
from fastokd.data.containers import conversion
from fastokd.data.dataset import Dataset, DataSource, Split, invalid, normalized_by, prepare
from fastokd.data.decoding import Color
from fastokd.data.files import FileDataset, FileSplit, decode_files, with_background
from fastokd.data.images import Progress, check_image_size
from fastokd.data.kinds import DatasetKind, ReadOptions
from fastokd.errors import ConfigError, DataError, did_you_mean, escape
from fastokd.registry import Registry

_FALLBACK = "folder"
_datasets: Registry[DatasetKind] = Registry(
    "dataset",
    "DATASET",
    {
        "digits": "fastokd.data.digits:DIGITS",
        "cifar10": "fastokd.data.cifar:CIFAR10",
        "cifar100": "fastokd.data.cifar:CIFAR100",
        "cinic10": "fastokd.data.cinic10:CINIC10",
        "svhn": "fastokd.data.svhn:SVHN",
        "idx": "fastokd.data.idx:IDX",
        "parquet": "fastokd.data.parquet:PARQUET",
        "csv": "fastokd.data.csv_list:CSV",
        "webdataset": "fastokd.data.webdataset:WEBDATASET",
        "folder": "fastokd.data.folder:FOLDER",
    },
    has_plugins=True,
)


def register_dataset(name: str, target: str) -> None:
    """Add a dataset kind: ``"package.module:CONSTANT"`` names its ``DatasetKind``, which is
    imported when it is first requested.
    """
    if ":" not in target:
        raise ConfigError(f"dataset '{name}': '{target}' must read 'package.module:CONSTANT'")
    _datasets.register(name, target)


def list_datasets() -> list[str]:
    """The names of all dataset kinds."""
    return sorted(_datasets)


def get_dataset_kind(name: str) -> DatasetKind:
    """The dataset kind of that name; a ``ConfigError`` suggests the closest one."""
    return _datasets.get(name)


def list_source(spec: str | Path) -> DataSource[FileSplit]:
    """List the image files of a dataset once; ``list_files`` and ``open_dataset`` take the result
    instead of a path. ``spec`` is as for ``open_dataset``.

    Raises:
        ConfigError: an unknown kind.
        DataError: invalid data, or data that is not made of image files.
    """
    kind, path = resolve(spec)
    if kind.files is None:
        raise DataError(f"{escape(spec)} is not made of image files; use --loader resident")
    return kind.files(path)


def open_dataset(
    spec: str | Path | DataSource[FileSplit],
    image_size: int | None = None,
    val_split: float = 0.0,
    seed: int = 0,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    bad_images: str = "fail",
    background: Color | None = None,
) -> Dataset:
    """Open a dataset, check it, and decode it into memory. Nothing is ever downloaded.

    Args:
        spec: "digits" (in the package), a folder, a CSV list, or "kind:path"; ``docs/data.md`` has
            all layouts. Or the result of ``list_source``.
        image_size: side of the square that all images are fitted to; None keeps the size that they
            must share.
        val_split: fraction of every class's training images to hold out for validation, in [0, 1).
        seed: selects the held-out images.
        mean, std: normalization per channel, as fractions of 255; the default is the dataset's
            customary one, or computed from the training split.
        augment: training augmentation; the default is the dataset's customary one.
        workers: decoding threads; None for one per usable CPU core.
        progress: called with (files done, files in all) while files are decoded.
        bad_images: "fail" or "replace", see ``decode_files``.
        background: the color behind transparent pixels of image files, red, green and blue from 0
            to 255; None drops the transparency.

    Raises:
        ConfigError: a setting out of range, or an unknown kind.
        DataError: invalid data; the message is one line with the problem, the file and the fix.
    """
    check_image_size(image_size)
    decoding = (image_size, workers, progress)
    if isinstance(spec, DataSource):
        source = decode_files(with_background(spec, background), *decoding, bad_images)
    else:
        kind, path = resolve(spec)
        if kind.files is not None:
            listed = with_background(kind.files(path), background)
            source = decode_files(listed, *decoding, bad_images)
        else:
            assert kind.read is not None, "a kind has read or files"
            source = kind.read(path, ReadOptions(*decoding))
    return prepare(source, val_split=val_split, seed=seed, mean=mean, std=std, augment=augment)


def list_files(
    spec: str | Path | DataSource[FileSplit],
    val_split: float = 0.0,
    seed: int = 0,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
    background: Color | None = None,
) -> FileDataset:
    """Open a dataset made of image files and check its structure, without decoding.

    Args:
        spec, val_split, seed, augment, background: as for ``open_dataset``, with the same labels
            and held-out images.
        image_size: side of the square that loaders return. Default: the images' size if a sample of
            them has one size of at most 128, else 224.
        mean, std: normalization per channel, as fractions of 255; the default is the dataset's
            customary one, or ImageNet's.

    Raises:
        ConfigError: a setting out of range, or an unknown kind.
        DataError: invalid data, or data that is not made of image files.
    """
    source = spec if isinstance(spec, DataSource) else list_source(spec)
    source = with_background(source, background)
    check_image_size(image_size)
    source = normalized_by(source, mean, std)
    train, test, val = source.hold_out(val_split, seed)
    size = (image_size, image_size) if image_size else files.default_size(train)
    return FileDataset(
        name=source.name,
        classes=source.classes,
        train=train,
        test=test,
        val=val,
        mean=source.mean or files.IMAGENET_MEAN,
        std=source.std or files.IMAGENET_STD,
        augment=augment or source.augment or files.customary_augment(size),
        image_size=size,
        root=source.root,
        skipped=source.skipped,
        background=source.background,
    )


class EvaluationSet(NamedTuple):
    """Images to evaluate a trained network on."""

    name: str
    classes: tuple[str, ...]
    images: Split | FileSplit


def list_evaluation(spec: str | Path, split: str | None) -> DataSource[FileSplit] | None:
    """List the images to evaluate a trained network on as the only split of their source: one split
    of a folder, which need not have ``train/``, or all images of a folder or list without splits.
    None for other data, whose splits are opened together.

    Args:
        spec, split: as in ``open_evaluation``.

    Raises:
        ConfigError, DataError: as ``open_evaluation``.
    """
    kind, path = resolve(spec)
    if path is not None and kind.list_split is not None:
        return kind.list_split(path, split)
    source = None if kind.files is None or split is not None else kind.files(path)
    if source is None or len(source.splits) > 1:
        return None
    return replace(source, train=replace(source.train, name=source.name))


def open_evaluation(
    spec: str | Path,
    split: str | None = None,
    image_size: int | None = None,
    *,
    decoded: bool = True,
    progress: Progress | None = None,
    background: Color | None = None,
) -> EvaluationSet:
    """Open one split of a dataset for a trained network; the other splits of a folder are not read.

    Args:
        spec: as in ``open_dataset``; a folder needs no ``train/``, and may hold the class folders
            themselves; a list needs no splits.
        split: "train", "val" or "test"; None for the split that runs are evaluated on.
        image_size: as in ``open_dataset``.
        decoded: decode the images; otherwise return files, for a loader that decodes.
        progress, background: as in ``open_dataset``.

    Raises:
        ConfigError: a setting out of range, an unknown kind or split.
        DataError: images that cannot be read, or that are not files.
    """
    check_image_size(image_size)
    source = list_evaluation(spec, split)
    if source is not None:
        source = with_background(source, background)
        images: Split | FileSplit = source.train
        if decoded:
            images = decode_files(source, image_size, None, progress).train
        return EvaluationSet(source.name, source.classes, images)
    dataset: Dataset | FileDataset
    if decoded:
        dataset = open_dataset(spec, image_size, progress=progress, background=background)
    else:
        dataset = list_files(spec, image_size=image_size, background=background)
    images = dataset.evaluation if split is None else dataset.split(split)
    return EvaluationSet(dataset.name, dataset.classes, images)


def made_of_files(spec: str | Path) -> bool:
    """True if a dataset is made of image files, which ``list_files`` can list.

    Raises:
        ConfigError, DataError: as ``open_dataset``, for an unknown kind or a missing folder.
    """
    return resolve(spec)[0].files is not None


def absolute_spec(spec: str) -> str:
    """The spec with its folder made absolute, so that it is valid in any working folder."""
    name, _, rest = spec.partition(":")
    if name in _datasets:
        return f"{name}:{Path(rest).expanduser().absolute()}" if rest else spec
    path = Path(spec).expanduser()
    return str(path.absolute()) if path.exists() else spec


def resolve(spec: str | Path) -> tuple[DatasetKind, Path | None]:
    """The kind of dataset that a spec names, and its path.

    Raises:
        ConfigError: an unknown kind.
        DataError: a missing folder, or one that matches several kinds.
    """
    name, colon, rest = str(spec).partition(":")
    if isinstance(spec, str) and name in _datasets:
        kind = get_dataset_kind(name)
        if kind.layout and not rest:
            raise DataError(f"{name} needs a path: {name}:PATH, where PATH holds {kind.layout}")
        return kind, Path(rest).expanduser() if rest else None
    path = Path(spec).expanduser()
    if os.path.exists(path):  # unlike pathlib's tests, False where permission is missing
        kinds = {name: get_dataset_kind(name) for name in list_datasets()}
        matches = [name for name, kind in kinds.items() if kind.detect and kind.detect(path)]
        if len(matches) > 1:
            choice = f"{' and '.join(matches)}; select one: {matches[0]}:{escape(path)}"
            raise invalid(path, f"it holds {choice}")
        if matches or os.path.isdir(path):
            return kinds[matches[0] if matches else _FALLBACK], path
        fix = conversion(path) or "pass the dataset's folder, or a .csv list"
        raise invalid(path, f"it is a file; {fix}")
    if colon and not Path(name).is_absolute():
        get_dataset_kind(name)
    hint = did_you_mean(str(spec), _datasets)
    raise invalid(path.absolute(), f"no readable folder, and no dataset of that name{hint}")
