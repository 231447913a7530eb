"""Metrics of an exported student, with the preprocessing that its record describes."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastokd.data import Augment, FileSplit, open_evaluation
from fastokd.data.loader import best_file_loader, get_loader_kind
from fastokd.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    class_differences,
    escape,
    summarize,
)
from fastokd.export.check import measure_metrics
from fastokd.export.files import open_export
from fastokd.export.preprocessing import background_of


class ExportAccuracy(NamedTuple):
    """The metrics of an export on a split of a dataset."""

    file: Path
    record: dict[str, Any]
    data: str
    split: str
    num_images: int
    accuracy: float
    """Top-1 in [0, 1]."""
    metrics: dict[str, float]
    """Those of ``metrics_of``."""


def evaluate_export(
    path: Path, data: str | None, split: str | None, device: torch.device
) -> ExportAccuracy:
    """Measure an exported student of any format on a dataset.

    Args:
        path: the file, or a folder that holds one export.
        data: the dataset, as ``--data`` takes it.
        split: "train", "val" or "test"; None for the data's evaluation split.
        device: where to run it.

    Raises:
        CheckpointError: no export is there, or its classes are not those of the data.
        ConfigError: there is no dataset.
        DataError: the images do not have the size that the student takes.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; pass a run folder or an exported student")
    file, record, runtime = open_export(path, device)
    preprocessing, classes = record["preprocessing"], record["classes"]
    if data is None:
        stored = record["accuracy"]
        raise ConfigError(
            f"{file}: an export does not contain the path of its data, {escape(stored['data'])};"
            f" pass --data FOLDER, with the {len(classes)} classes of the student"
        )
    height, width = preprocessing["image_size"]
    side = min(height, width)
    # The student was trained on random resized crops: evaluate center crops of larger images.
    cropped = preprocessing.get("shorter_side", side) > side
    opened = open_evaluation(
        data,
        split,
        height if height == width else None,
        decoded=not cropped,
        background=background_of(record),
    )
    if list(opened.classes) != classes:
        known = f"{len(classes)} classes ({summarize(classes, 3)})"
        given = f"{len(opened.classes)} ({summarize(opened.classes, 3)})"
        which = class_differences(classes, opened.classes)
        raise CheckpointError(f"the student knows {known}, the data has {given}{which}")
    images = opened.images
    settings: dict[str, Any] = {
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "num_classes": len(classes),
        "augment": Augment(crop_scale=(0.08, 1.0)) if cropped else Augment(),
    }
    name = "resident"
    if isinstance(images, FileSplit):
        name = best_file_loader(runtime.device, [images])
        settings["size"] = (height, width)
    elif images.images.shape[2:] != (height, width):
        size = " x ".join(map(str, images.images.shape[2:]))
        sizes = f"the images are {size}, the student takes {height} x {width}"
        raise DataError(f"{opened.name}: {sizes}; scale them to that size")
    loader = get_loader_kind(name).make(images, 256, False, runtime.device, 0, **settings)
    metrics = measure_metrics(runtime.run, loader)
    where = opened.name, images.name, len(images)
    return ExportAccuracy(file, record, *where, metrics["accuracy"], metrics)
