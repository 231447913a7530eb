"""The dataset kinds, one file each, and how a user's words choose among them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastokd.data.augment import Augment
from fastokd.data.dataset import Dataset, DataSource, Split, prepare
from fastokd.data.files import FileDataset, FileSplit, decode_files, prepare_files
from fastokd.data.images import Progress, check_image_size, show
from fastokd.data.kinds import DatasetKind, ReadOptions
from fastokd.errors import ConfigError, DataError, did_you_mean
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
        "csv": "fastokd.data.csv_list:CSV",
        "webdataset": "fastokd.data.webdataset:WEBDATASET",
        "folder": "fastokd.data.folder:FOLDER",
    },
)


def register_dataset(name: str, target: str) -> None:
    """Add a dataset kind: ``"package.module:CONSTANT"`` names its ``DatasetKind``, imported when it
    is needed.
    """
    if ":" not in target:
        raise ConfigError(f"dataset '{name}': '{target}' must read 'package.module:CONSTANT'")
    _datasets.register(name, target)


def list_datasets() -> list[str]:
    """The names of all dataset kinds."""
    return sorted(_datasets)


def get_dataset_kind(name: str) -> DatasetKind:
    """The dataset kind of that name.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    return _datasets.get(name)


def list_source(spec: str | Path) -> DataSource[FileSplit]:
    """List the image files of a dataset once, for ``list_files`` and ``open_dataset``, which take
    it in the place of a path.

    Args:
        spec: as for ``open_dataset``.

    Raises:
        ConfigError: a kind that does not exist.
        DataError: data that cannot be trained on, or that is not made of image files.
    """
    kind, path = resolve(spec)
    if kind.files is None:
        raise DataError(
            f"{show(spec)} is not made of image files; it is small, so use --loader resident"
        )
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
) -> Dataset:
    """Open a dataset, check it, and decode it into memory once. Nothing is ever downloaded.

    Args:
        spec: "digits" (in the package), a folder, a CSV list, or "kind:path"; ``docs/data.md`` has
            all the layouts. Or what ``list_source`` listed.
        image_size: side of the square all images are fitted to; None keeps the size they all share.
        val_split: fraction of every class's training images to hold out for validation.
        seed: chooses the images held out.
        mean, std: normalisation per channel, as fractions of 255; by default the dataset's
            customary values, or measured over the training split.
        augment: training augmentation; by default the dataset's customary one.
        workers: decoding threads; None for one per usable CPU core.
        progress: called with (files done, files in all) while files are decoded.
        bad_images: "fail" or "replace", see ``decode_files``.

    Raises:
        ConfigError: a setting out of range, or a kind that does not exist.
        DataError: data that cannot be trained on; the message is one line: what, where, and how to
            mend it.
    """
    check_image_size(image_size)
    if isinstance(spec, DataSource):
        source = decode_files(spec, image_size, workers, progress, bad_images)
    else:
        kind, path = resolve(spec)
        if kind.files is None:
            source = kind.read(path, ReadOptions(image_size, workers, progress))
        else:
            source = decode_files(kind.files(path), image_size, workers, progress, bad_images)
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
) -> FileDataset:
    """Open a dataset made of image files and check its structure, without decoding anything.

    Args:
        spec, val_split, seed: as for ``open_dataset``, and with the same labels and the same images
            held out.
        image_size: side of the square that loaders give; see ``prepare_files`` for the default.
        mean, std: normalisation per channel, as fractions of 255; by default the dataset's
            customary values, or ImageNet's.
        augment: training augmentation; by default the dataset's customary one.

    Raises:
        ConfigError: a setting out of range, or a kind that does not exist.
        DataError: data that cannot be trained on, or that is not made of image files.
    """
    source = spec if isinstance(spec, DataSource) else list_source(spec)
    return prepare_files(source, image_size, val_split, seed, mean=mean, std=std, augment=augment)


class EvaluationSet(NamedTuple):
    """Images to measure a trained network on."""

    name: str
    classes: tuple[str, ...]
    images: Split | FileSplit


def open_evaluation(
    spec: str | Path,
    split: str | None = None,
    image_size: int | None = None,
    *,
    decoded: bool = True,
    progress: Progress | None = None,
) -> EvaluationSet:
    """Open one split of a dataset for a network that is trained already; of a folder nothing else
    is read.

    Args:
        spec: as in ``open_dataset``; a folder needs no ``train/``, and may hold the class folders
            themselves.
        split: "train", "val" or "test"; by default what a run is evaluated on.
        image_size: as in ``open_dataset``.
        decoded: decode the images; else they are files, for a loader that decodes.
        progress: as in ``open_dataset``.

    Raises:
        ConfigError: a setting out of range, a kind or a split that does not exist.
        DataError: images that cannot be read, or that are not files.
    """
    check_image_size(image_size)
    kind, path = resolve(spec)
    if path is None or kind.list_split is None:
        dataset = (
            open_dataset(spec, image_size, progress=progress)
            if decoded
            else list_files(spec, image_size=image_size)
        )
        return EvaluationSet(
            dataset.name,
            dataset.classes,
            dataset.evaluation if split is None else dataset.split(split),
        )
    found = kind.list_split(path, split)
    images: Split | FileSplit = found.train
    if decoded:
        alone = dataclasses.replace(found, train=dataclasses.replace(found.train, name="train"))
        images = dataclasses.replace(
            decode_files(alone, image_size, progress=progress).train, name=found.train.name
        )
    return EvaluationSet(found.name, found.classes, images)


def made_of_files(spec: str | Path) -> bool:
    """Whether a dataset is made of image files, which ``list_files`` can list.

    Raises:
        ConfigError, DataError: as ``open_dataset``, for a kind or folder that does not exist.
    """
    return resolve(spec)[0].files is not None


def absolute_spec(spec: str) -> str:
    """The same dataset whatever the working folder: the folder in ``spec`` made absolute."""
    name, _, rest = spec.partition(":")
    if name in _datasets:
        return f"{name}:{Path(rest).expanduser().absolute()}" if rest else spec
    path = Path(spec).expanduser()
    return str(path.absolute()) if path.exists() else spec


def resolve(spec: str | Path) -> tuple[DatasetKind, Path | None]:
    """The kind of dataset that a user's words mean, and where it is.

    Raises:
        ConfigError: a kind that does not exist.
        DataError: no such folder, or one that is more than one kind.
    """
    name, colon, rest = str(spec).partition(":")
    if isinstance(spec, str) and name in _datasets:
        return get_dataset_kind(name), Path(rest).expanduser() if rest else None
    path = Path(spec).expanduser()
    if os.path.exists(path):  # unlike pathlib's tests, False where permission is missing
        kinds = {name: get_dataset_kind(name) for name in list_datasets()}
        matches = [
            name for name, kind in kinds.items() if kind.detect is not None and kind.detect(path)
        ]
        if len(matches) > 1:
            raise DataError(
                f"{show(path)} holds {' and '.join(matches)}; say which: {matches[0]}:{show(path)}"
            )
        if matches or os.path.isdir(path):
            return kinds[matches[0] if matches else _FALLBACK], path
        raise DataError(
            f"{show(path)} is a file; give the folder that holds the dataset, or a .csv list of"
            " path and label"
        )
    if colon and not Path(name).is_absolute():
        get_dataset_kind(name)
    raise DataError(
        f"{show(path.absolute())}: no folder that can be read, and no dataset of that"
        f" name{did_you_mean(str(spec), _datasets)}"
    )
