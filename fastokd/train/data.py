"""From a configuration to its dataset and loaders."""

import dataclasses
import itertools
from collections.abc import Mapping
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
from fastokd.data.files import SMALL, peek_sizes
from fastokd.data.images import MEMORY_FRACTION, Progress, available_memory
from fastokd.data.loader import best_file_loader, file_loaders, get_loader_kind
from fastokd.errors import ConfigError
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import Ranks
from fastokd.train.precision import choose_precision, image_dtype

AnyDataset = Dataset | FileDataset


def open_data(
    config: TrainConfig,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> AnyDataset:
    """The dataset of a configuration, checked; decoded if its loader is "resident", else a list of
    files.

    Args:
        config: names the data and the loader.
        device: where the run computes.
        seen: ``data_record`` of the dataset that the weights were trained on: images are then
            brought to its size and normalised as it was, whatever this dataset's own statistics
            are, and "auto" decides as it did.
        progress: called with (files done, files in all) while files are decoded.

    Raises:
        ConfigError: no dataset is named, or a loader that does not go with it.
        DataError: it cannot be trained on.
    """
    if not config.data:
        raise ConfigError(
            "no dataset: pass --data FOLDER (with train/ and val/ or test/), --data cifar10:FOLDER"
            " or --data digits"
        )
    given: dict[str, Any] = {
        "image_size": config.image_size,
        "val_split": config.val_split,
        "seed": config.seed,
    }
    if seen is not None:
        height, width = seen["image_size"]
        given |= {
            "image_size": height if height == width else config.image_size,
            "mean": seen["mean"],
            "std": seen["std"],
        }
    spec: str | DataSource[FileSplit] = config.data
    if config.loader != "auto":
        decoded = get_loader_kind(config.loader).decoded
    elif not made_of_files(config.data):
        decoded = True
    elif seen is not None:
        decoded = get_loader_kind(_loader_before(seen)).decoded
    else:
        spec = list_source(config.data)
        listed = list_files(spec, **given)
        if not _is_small(listed, config.image_size, device):
            return listed
        decoded = True
    if decoded:
        return open_dataset(spec, **given, progress=progress, bad_images=config.bad_images)
    return list_files(spec, **given)


def with_augmentation(config: TrainConfig, dataset: AnyDataset) -> AnyDataset:
    """The dataset with what the configuration changes of its augmentation; padding takes the place
    of random resized crops.

    Raises:
        ConfigError: the padding is larger than the images.
    """
    given: dict[str, Any] = {
        name: value
        for name in ("pad", "flip", "padding")
        if (value := getattr(config, name)) is not None
    }
    if config.pad is not None:
        if config.pad > min(dataset.image_size):
            raise ConfigError(
                f"pad={config.pad}: it must not exceed the images, which are"
                f" {dataset.image_size[0]} x {dataset.image_size[1]}"
            )
        given["crop_scale"] = None
    return dataclasses.replace(dataset, augment=dataclasses.replace(dataset.augment, **given))


def data_record(dataset: AnyDataset, loader: str) -> dict[str, Any]:
    """What a checkpoint keeps of its data: the fingerprint, how images must be prepared for the
    weights, and the loader's name.
    """
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
    """The loader that a configuration means for a dataset; "auto" goes on with that of ``seen``
    where it can run, see ``open_data``.
    """
    if config.loader != "auto":
        return config.loader
    if isinstance(dataset, Dataset):
        return "resident"
    if seen is not None:
        kind = get_loader_kind(before := _loader_before(seen))
        if not kind.decoded and kind.reason_against(device, dataset.splits) is None:
            return before
    return best_file_loader(device, dataset.splits)


def explain_loader(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
) -> str:
    """Which loader is used, and why, in one line."""
    name = loader_name(config, dataset, device, seen)
    if config.loader != "auto":
        return f"loader {name}, as chosen"
    if isinstance(dataset, Dataset):
        reason = (
            "the images are small and fit" if dataset.train.files else "the dataset comes decoded"
        )
        return f"loader resident: {reason}, so they lie on {device}"
    better = itertools.takewhile(lambda other: other != name, file_loaders())
    others = [
        f"{other} cannot run ({reason})"
        for other in better
        if (reason := get_loader_kind(other).reason_against(device, dataset.splits))
    ]
    return "; ".join(
        [
            (
                f"loader {name}: the images are large or too many for memory, so they are decoded"
                " while training"
            ),
            *others,
        ]
    )


def loader_for(
    config: TrainConfig,
    dataset: AnyDataset,
    split: Split | FileSplit,
    train: bool,
    device: torch.device,
    seen: Mapping[str, Any] | None = None,
) -> Loader:
    """The loader of this process's share of a split as the configuration wants it, and "auto" as
    ``loader_name`` does.

    Training images have the dtype of the step's forward pass. For evaluation they are float32,
    which any deployed network takes.

    Raises:
        ConfigError: a loader that cannot run here, or that cannot do what is asked for, such as a
            scheduled size.
    """
    ranks = Ranks.current()
    settings: dict[str, Any] = (
        {"views": config.views(), "mixup": config.mixup, "cutmix": config.cutmix} if train else {}
    )
    if not isinstance(dataset, Dataset):
        settings |= {"bad_images": config.bad_images, "options": config.loader_options}
    elif config.loader_options:
        raise ConfigError(
            f"loader_options={dict(config.loader_options)}: the resident loader has none; leave"
            " them out, or use another --loader"
        )
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
        for size in config.resize_schedule.values():
            loader.set_size(
                size
            )  # now, so that a size it cannot give is refused before the first epoch
        loader.set_size(config.size_at(0))
    return loader


def _loader_before(seen: Mapping[str, Any]) -> str:
    return seen.get("loader", "resident")


def _is_small(dataset: FileDataset, image_size: int | None, device: torch.device) -> bool:
    """Whether "auto" decodes all images once and keeps them: they are small, and fit into the
    memory there is.
    """
    sides = (
        [image_size]
        if image_size
        else [side for size in peek_sizes(dataset.train) for side in size]
    )
    if max(sides, default=0) > SMALL:
        return False
    needed = sum(len(split) for split in dataset.splits) * 3 * max(sides, default=0) ** 2
    rooms = [
        available_memory(),
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    ]
    return all(room is None or needed <= MEMORY_FRACTION * room for room in rooms)
