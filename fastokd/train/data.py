"""The dataset and the loaders of a configuration."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastokd.data import (
    Dataset,
    DataSource,
    FileDataset,
    FileSplit,
    Loader,
    Split,
    list_files,
    list_source,
    made_of_files,
    make_loader,
    open_dataset,
)
from fastokd.data.decoding import parse_color
from fastokd.data.files import IMAGENET_MEAN, IMAGENET_STD, SMALL, check_headers, peek_sizes
from fastokd.data.images import MEMORY_FRACTION, Progress
from fastokd.data.loader import best_file_loader, file_loaders, get_loader_kind
from fastokd.errors import ConfigError
from fastokd.storage import available_memory
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import Ranks
from fastokd.train.precision import choose_precision, image_dtype

AnyDataset = Dataset | FileDataset


def open_data(
    config: TrainConfig,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    evaluation: DataSource[FileSplit] | None = None,
) -> AnyDataset:
    """The dataset of a configuration, checked: decoded if its loader is "resident", else a list of
    files.

    Args:
        seen: ``data_record`` of the dataset that the weights were trained on: images then get its
            size and normalization instead of this dataset's, and "auto" its loader.
        progress: called with (files done, files in all) while files are decoded.
        evaluation: of ``list_evaluation`` for the configuration's dataset: the images to open.

    Raises:
        ConfigError, DataError: no dataset is named, or it cannot be trained on.
    """
    if not config.data:
        raise ConfigError(
            "no dataset: pass --data FOLDER (with train/ and val/ or test/), --data cifar10:FOLDER"
            " or --data digits"
        )
    options: dict[str, Any]
    options = {name: getattr(config, name) for name in ("image_size", "val_split", "seed")}
    if config.background is not None:
        options["background"] = parse_color(config.background)
    if seen is not None:
        options |= {"mean": seen["mean"], "std": seen["std"]}
        height, width = seen["image_size"]
        if height == width:
            options["image_size"] = height
    spec: Any = config.data
    if evaluation is not None:
        spec = dataclasses.replace(evaluation, test=evaluation.train)
        options["val_split"] = 0.0
    loader = config.loader
    if loader == "auto" and not made_of_files(config.data):
        loader = "resident"
    elif loader == "auto" and seen is not None:
        loader = seen.get("loader", "resident")
    if loader == "auto":
        spec = list_source(config.data) if evaluation is None else spec
        listed = list_files(spec, **options)
        if not _is_small(listed, config.image_size, device):
            return _checked(listed)
    elif not get_loader_kind(loader).decoded:
        return _checked(list_files(spec, **options))
    return open_dataset(spec, **options, progress=progress, bad_images=config.bad_images)


def _checked(dataset: FileDataset) -> FileDataset:
    """The dataset, after ``check_headers``: before training rather than at some step of it."""
    check_headers(dataset.splits)
    return dataset


def with_augmentation(config: TrainConfig, dataset: AnyDataset) -> AnyDataset:
    """The dataset with the configuration's augmentation; padding replaces random resized crops.

    Raises:
        ConfigError: the padding is larger than the images, or views would be equal.
    """
    chosen = {"pad": config.pad, "flip": config.flip, "padding": config.padding}
    changes: dict[str, Any] = {name: each for name, each in chosen.items() if each is not None}
    changes |= {"policy": config.auto_augment, "policy_options": config.auto_augment_options}
    changes |= {"color_jitter": config.color_jitter, "erasing": config.random_erasing}
    if config.pad is not None:
        if config.pad > min(dataset.image_size):
            height, width = dataset.image_size
            images = f"the images, which are {height} x {width}"
            raise ConfigError(f"pad={config.pad}: it must not exceed {images}")
        changes["crop_scale"] = None
    augment = dataclasses.replace(dataset.augment, **changes)
    if config.branch_views and not augment.is_random:
        raise ConfigError(
            "branch_views=True: training images are not augmented, so all views are equal; pass"
            " e.g. --flip true or --auto-augment trivialaugment, or omit it"
        )
    return dataclasses.replace(dataset, augment=augment)


Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of pixels, as fractions of 255."""


def choose_normalization(
    config: TrainConfig, dataset: AnyDataset, of_weights: Normalization | None
) -> Normalization:
    """The normalization of a new run; ``of_weights`` is as for ``prepared``."""
    if config.normalization == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    if config.normalization == "weights" and of_weights is None:
        raise ConfigError(
            "normalization=weights: the file of weights does not state its normalization; use"
            " library, imagenet or data"
        )
    if config.normalization == "data" or of_weights is None:
        return dataset.mean, dataset.std
    return of_weights


def prepared(
    config: TrainConfig,
    dataset: AnyDataset,
    seen: Mapping[str, Any] | None = None,
    of_weights: Normalization | None = None,
) -> AnyDataset:
    """The dataset with the configuration's normalization and augmentation.

    Args:
        seen: ``data_record`` of the dataset that the weights were trained on. If the normalization
            is not the data's, it is the recorded one.
        of_weights: the normalization of the weights that a new run starts from, if known; for
            "library" that of the network's library.

    Raises:
        ConfigError: as ``with_augmentation``, or the normalization is not known.
    """
    starts_random = not (config.weights or config.pretrained)
    if seen is None:
        mean, std = choose_normalization(config, dataset, of_weights)
    elif config.normalization == "data" or (config.normalization == "auto" and starts_random):
        mean, std = dataset.mean, dataset.std
    else:
        mean, std = seen["mean"], seen["std"]
    dataset = dataclasses.replace(dataset, mean=tuple(mean), std=tuple(std))
    return with_augmentation(config, dataset)


def data_record(dataset: AnyDataset, loader: str) -> dict[str, Any]:
    """The record of a dataset, the preparation of its images and its loader in a checkpoint."""
    return {
        "fingerprint": dataset.fingerprint,
        "image_size": list(dataset.image_size),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "loader": loader,
    }


def loader_name(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
) -> str:
    """The loader for a dataset; "auto" is that of ``seen`` if it can run, see ``open_data``."""
    if config.loader != "auto":
        return config.loader
    if isinstance(dataset, Dataset):
        return "resident"
    if seen is not None:
        kind, splits = get_loader_kind(before := seen.get("loader", "resident")), dataset.splits
        if not kind.decoded and kind.reason_against(device, splits, config.auto_augment) is None:
            return before
    return best_file_loader(device, dataset.splits, config.auto_augment)


def explain_loader(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
) -> str:
    """One line with the loader and the reason for it."""
    name = loader_name(config, dataset, device, seen)
    if config.loader != "auto":
        return f"loader {name} (requested)"
    if isinstance(dataset, Dataset):
        small = "the images are small and fit in memory"
        reason = small if dataset.train.files else "the dataset is already decoded"
        return f"loader resident: {reason}; kept on {device}"
    reason = "the images are large or too many for memory"
    line = f"loader {name}: {reason}, so they are decoded while training"
    for other in itertools.takewhile(lambda other: other != name, file_loaders()):
        kind = get_loader_kind(other)
        if reason_against := kind.reason_against(device, dataset.splits, config.auto_augment):
            line += f"; {other} cannot run ({reason_against})"
    return line


def loader_for(
    config: TrainConfig,
    dataset: AnyDataset,
    split: Split | FileSplit,
    train: bool,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
) -> Loader:
    """The loader of this process's share of a split. Training images have the dtype of the step's
    forward pass, evaluation images are float32, which any deployed network takes.

    Raises:
        ConfigError: the loader cannot run here, or does not support an option such as a scheduled
            size.
    """
    ranks = Ranks.current()
    settings: dict[str, Any] = {}
    if train:
        settings = {"views": config.views(), "mixup": config.mixup, "cutmix": config.cutmix}
    if not isinstance(dataset, Dataset):
        settings |= {"bad_images": config.bad_images, "options": config.loader_options}
    elif config.loader_options:
        given = f"loader_options={dict(config.loader_options)}"
        raise ConfigError(f"{given}: loader resident takes no options; omit them")
    loader = make_loader(
        dataset,
        split,
        config.batch_size // ranks.size,
        loader=loader_name(config, dataset, device, seen),
        device=device,
        seed=config.seed,
        train=train,
        dtype=image_dtype(choose_precision(config, device)) if train else torch.float32,
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
        rank=ranks.rank,
        world_size=ranks.size,
        **settings,
    )
    if train:
        for size in config.resize_schedule.values():  # an unsupported size fails now, not later
            loader.set_size(size)
        loader.set_size(config.size_at(0))
    return loader


def _is_small(dataset: FileDataset, image_size: int | None, device: torch.device) -> bool:
    """True if "auto" decodes all images once and keeps them: they are small and fit in memory."""
    side = image_size or max((max(size) for size in peek_sizes(dataset.train)), default=0)
    if side > SMALL:
        return False
    needed = sum(len(split) for split in dataset.splits) * 3 * side**2
    free = [available_memory()]
    if device.type == "cuda":
        free.append(torch.cuda.mem_get_info(device)[0])
    return all(each is None or needed <= MEMORY_FRACTION * each for each in free)
