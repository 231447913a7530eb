"""The dataset kinds, one file each, and how a user's words choose among them."""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastokd.data.augment import Augment
from fastokd.data.dataset import Dataset, DataSource, Split, prepare
from fastokd.data.files import SMALL, FileDataset, FileSplit, decode_files, guess_size, prepare_files
from fastokd.data.images import MEMORY_FRACTION, Progress, available_memory, check_image_size, show
from fastokd.data.loader import best_file_loader, get_loader_kind
from fastokd.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True)
class ReadOptions:
    """How to read a dataset.

    Args:
        image_size: side of the square all images are fitted to (shorter side scaled, centre cut); None: as they are.
        workers: decoding threads; None for one per usable CPU core.
        progress: called with (files done, files in all) while files are decoded.
    """

    image_size: int | None = None
    workers: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class DatasetKind:
    """A kind of dataset: decoded while it is read, or a list of image files; one of ``read`` and ``files``.

    Args:
        read: reads one, from a path or (given None) from the package itself; raises ``DataError``.
        detect: whether a path holds this kind; None for kinds that are only opened by name.
        files: lists the image files of one without decoding any; raises ``DataError``.
        walked: whether those are a tree of class folders, that ``fastokd data check`` can walk when it is not sound.
    """

    read: Callable[[Path | None, ReadOptions], DataSource[Split]] | None = None
    detect: Callable[[Path], bool] | None = None
    files: Callable[[Path | None], DataSource[FileSplit]] | None = None
    walked: bool = False


_FALLBACK = "folder"
_targets = {
    "digits": "fastokd.data.digits:DIGITS",
    "cifar10": "fastokd.data.cifar:CIFAR10",
    "cifar100": "fastokd.data.cifar:CIFAR100",
    "cinic10": "fastokd.data.cinic10:CINIC10",
    "svhn": "fastokd.data.svhn:SVHN",
    "csv": "fastokd.data.csv_list:CSV",
    "webdataset": "fastokd.data.webdataset:WEBDATASET",
    "folder": "fastokd.data.folder:FOLDER",
}


def register_dataset(name: str, target: str) -> None:
    """Add a dataset kind: ``"package.module:CONSTANT"`` names its ``DatasetKind``, imported when it is needed."""
    if ":" not in target:
        raise ConfigError(f"dataset '{name}': '{target}' must read 'package.module:CONSTANT'")
    _targets[name] = target


def list_datasets() -> list[str]:
    """The names of all dataset kinds."""
    return sorted(_targets)


def get_dataset_kind(name: str) -> DatasetKind:
    """The dataset kind of that name.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    if name not in _targets:
        raise ConfigError(f"unknown dataset '{show(name)}'{did_you_mean(name, _targets)}")
    module, constant = _targets[name].split(":")
    return getattr(importlib.import_module(module), constant)


def open_dataset(spec: str | Path, image_size: int | None = None, val_split: float = 0.0, seed: int = 0, *,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 augment: Augment | None = None, workers: int | None = None,
                 progress: Progress | None = None, bad_images: str = "fail") -> Dataset:
    """Open a dataset, check it, and decode it into memory once. Nothing is ever downloaded.

    Args:
        spec: "digits" (in the package), a folder, a CSV list, or "kind:path". ``docs/data.md`` has all the layouts.
        image_size: side of the square all images are fitted to; None keeps the size they all share.
        val_split: fraction of every class's training images to hold out for validation.
        seed: chooses the images held out.
        mean, std: normalisation per channel, as fractions of 255; by default the dataset's customary values, or
            measured over the training split.
        augment: training augmentation; by default the dataset's customary one.
        workers: decoding threads; None for one per usable CPU core.
        progress: called with (files done, files in all) while files are decoded.
        bad_images: "fail" or "replace", see ``decode_files``.

    Raises:
        ConfigError: a setting out of range, or a kind that does not exist.
        DataError: data that cannot be trained on; the message is one line: what, where, and how to mend it.
    """
    check_image_size(image_size)
    kind, path = resolve(spec)
    if kind.files is None:
        source = kind.read(path, ReadOptions(image_size, workers, progress))
    else:
        source = decode_files(kind.files(path), image_size, workers, progress, bad_images)
    return prepare(source, val_split=val_split, seed=seed, mean=mean, std=std, augment=augment)


def list_files(spec: str | Path, val_split: float = 0.0, seed: int = 0, *, image_size: int | None = None,
               mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
               augment: Augment | None = None) -> FileDataset:
    """Open a dataset made of image files and check its structure, without decoding anything.

    Args:
        spec, val_split, seed: as for ``open_dataset``, and with the same labels and the same images held out.
        image_size: side of the square that loaders give; see ``prepare_files`` for the default.
        mean, std: normalisation per channel, as fractions of 255; by default the dataset's customary values, or ImageNet's.
        augment: training augmentation; by default the dataset's customary one.

    Raises:
        ConfigError: a setting out of range, or a kind that does not exist.
        DataError: data that cannot be trained on, or that is not made of image files.
    """
    kind, path = resolve(spec)
    if kind.files is None:
        raise DataError(f"{show(spec)} is not made of image files; it is small, so use --loader resident")
    return prepare_files(kind.files(path), image_size, val_split, seed, mean=mean, std=std, augment=augment)


@dataclass(frozen=True)
class OpenedData:
    """A dataset, and the loader that gives it.

    Args:
        dataset: decoded for the resident loader, files for the others.
        loader: the loader's name.
        reason: why that loader, in words.
    """

    dataset: Dataset | FileDataset
    loader: str
    reason: str


def opened(dataset: Dataset | FileDataset, loader: str, device: torch.device) -> OpenedData:
    """A dataset that is open already, with the loader asked for, or for "auto" the one that goes with it."""
    if loader != "auto":
        return OpenedData(dataset, loader, "as asked for")
    if isinstance(dataset, Dataset):
        return OpenedData(dataset, "resident", "the images are decoded already")
    return OpenedData(dataset, best_file_loader(device), "the images are files")


def open_for_loader(spec: str | Path, loader: str = "auto", device: torch.device | str = "cpu", *, image_size: int | None = None,
                    val_split: float = 0.0, seed: int = 0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                    bad_images: str = "fail", progress: Progress | None = None) -> OpenedData:
    """Open a dataset as a loader wants it: decoded, or as files.

    Args:
        spec: as for ``open_dataset``, and so are the arguments that are not described here.
        loader: the loader's name. "auto" takes the resident loader for small images that fit on the device and in memory,
            else the best loader of files that can run here.
        device: where the images are wanted.

    Raises:
        ConfigError: an unknown loader, or one that cannot give this dataset.
        DataError: as ``open_dataset`` and ``list_files``.
    """
    check_image_size(image_size)
    kind, path = resolve(spec)
    wanted = None if loader == "auto" else get_loader_kind(loader)
    if kind.files is None:
        if wanted is not None and not wanted.decoded:
            raise ConfigError(f"loader '{loader}' takes image files, and {show(spec)} is not made of them; use --loader resident")
        source = kind.read(path, ReadOptions(image_size, None, progress))
        return OpenedData(prepare(source, val_split=val_split, seed=seed, mean=mean, std=std), "resident" if wanted is None else loader,
                          "a small set that is not made of image files" if wanted is None else "as asked for")
    listed = kind.files(path)
    if wanted is None:
        loader, reason = _choose_loader(listed, image_size, torch.device(device))
    else:
        reason = "as asked for"
    if not get_loader_kind(loader).decoded:
        return OpenedData(prepare_files(listed, image_size, val_split, seed, mean=mean, std=std), loader, reason)
    decoded = decode_files(listed, image_size, None, progress, bad_images)
    return OpenedData(prepare(decoded, val_split=val_split, seed=seed, mean=mean, std=std), loader, reason)


def _choose_loader(source: DataSource[FileSplit], image_size: int | None, device: torch.device) -> tuple[str, str]:
    """The loader for a set of image files, and why."""
    height, width = guess_size(source.train, image_size)
    count = sum(map(len, source.splits))
    needed = count * height * width * 3
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    takes = f"{count} images of {height} x {width} take {needed / 2**30:.3g} GiB decoded"
    if max(height, width) > SMALL:
        against = f"images of {height} x {width} are cropped from larger pictures while training"
    elif free is not None and needed > MEMORY_FRACTION * free:
        against = f"{takes}, more than half of the {free / 2**30:.3g} GiB that are free on {device}"
    else:
        return "resident", f"{takes}, which fit on {device}"
    try:
        return best_file_loader(device), against
    except ConfigError as error:
        return "resident", f"{against}, but {error}"


def absolute_spec(spec: str) -> str:
    """The same dataset whatever the working folder: the folder in ``spec`` made absolute."""
    name, _, rest = spec.partition(":")
    if name in _targets:
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
    if isinstance(spec, str) and name in _targets:
        return get_dataset_kind(name), Path(rest).expanduser() if rest else None
    path = Path(spec).expanduser()
    if os.path.exists(path):  # unlike pathlib's tests, False where permission is missing
        kinds = {name: get_dataset_kind(name) for name in list_datasets()}
        matches = [name for name, kind in kinds.items() if kind.detect is not None and kind.detect(path)]
        if len(matches) > 1:
            raise DataError(f"{show(path)} holds {' and '.join(matches)}; say which: {matches[0]}:{show(path)}")
        if matches or os.path.isdir(path):
            return kinds[matches[0] if matches else _FALLBACK], path
        raise DataError(f"{show(path)} is a file; give the folder that holds the dataset, or a .csv list of path and label")
    if colon and not Path(name).is_absolute():
        get_dataset_kind(name)
    raise DataError(f"{show(path.absolute())}: no folder that can be read, and no dataset of that name{did_you_mean(str(spec), _targets)}")
