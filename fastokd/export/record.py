"""The record of every exported student, in the file's metadata and in a separate JSON file."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastokd.data import Dataset, FileDataset
from fastokd.errors import CheckpointError
from fastokd.version import __version__

FORMAT = 1
KEY = "fastokd"
"""The name of the record's JSON in a file's metadata."""


def student_record(
    model: str,
    dataset: Dataset | FileDataset,
    *,
    accuracy: float,
    epoch: int,
    provenance: dict[str, Any],
    layout: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a student: architecture, classes, preprocessing, accuracy and provenance.

    Args:
        model: the network's name, as for ``create_student``.
        dataset: the data of training and evaluation.
        accuracy: of the student, in [0, 1], on ``dataset.evaluation``.
        epoch: the number of finished epochs.
        provenance: method, preset, branches, seed, commit.
        layout: further keywords of ``create_student``, for a branch other than the plain network.
    """
    evaluation = dataset.evaluation
    return {
        "format": FORMAT,
        # The keywords of ``create_student``.
        "architecture": {"name": model, "num_classes": len(dataset.classes), **(layout or {})},
        "classes": list(dataset.classes),
        "preprocessing": {
            "color": "RGB",
            "background": None if dataset.background is None else list(dataset.background),
            "shorter_side": dataset.augment.evaluation_side(min(dataset.image_size)),
            "image_size": list(dataset.image_size),
            "scale": "divide by 255",
            "mean": [float(value) for value in dataset.mean],
            "std": [float(value) for value in dataset.std],
        },
        "accuracy": {
            "top1": accuracy,
            "data": dataset.name,
            "split": evaluation.name,
            "num_images": len(evaluation),
            "epoch": epoch,
        },
        "provenance": {"fastokd": __version__, **provenance},
        "export": {"to": "safetensors"},
    }


def _numbers(value: Any, count: int, kinds: tuple[type, ...]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(item) in kinds and math.isfinite(item) for item in value)
    )


def _sound_preprocessing(part: dict[str, Any]) -> bool:
    if not _numbers(part.get("image_size"), 2, (int,)):
        return False
    side = min(part["image_size"])
    # Both are missing in records of early versions.
    scaled, background = part.get("shorter_side", side), part.get("background")
    return (
        side > 0
        and type(scaled) is int
        and scaled >= side
        and (background is None or _numbers(background, 3, (int,)))
        and all(_numbers(part.get(name), 3, (int, float)) for name in ("mean", "std"))
        and min(part["std"]) > 0
    )


def _fields(**kinds: type | tuple[type, ...]) -> Callable[[dict[str, Any]], bool]:
    """A check that a mapping has these entries, of these types."""

    def is_sound(part: dict[str, Any]) -> bool:
        values = ((part.get(name), kind) for name, kind in kinds.items())
        return all(isinstance(x, kind) and not isinstance(x, bool) for x, kind in values)

    return is_sound


_SOUND: Mapping[str, Callable[[dict[str, Any]], bool]] = {
    "architecture": _fields(name=str, num_classes=int),
    "preprocessing": _sound_preprocessing,
    "accuracy": _fields(top1=(int, float), data=str, split=str, num_images=int, epoch=int),
    "provenance": _fields(),
    "export": _fields(to=str),
}
"""The mappings in a record, and a check of the entries that are used."""


def parse_record(text: str | bytes | None, where: str) -> dict[str, Any]:
    """Parse a record from the JSON in a file's metadata; ``where`` names the file in messages.

    Raises:
        CheckpointError: no record, a damaged one, or one of a newer fastokd.
    """
    if text is None:
        reason = f"is not a student exported by fastokd (its metadata has no '{KEY}' entry)"
        raise CheckpointError(f"{where} {reason}; make one with 'fastokd export RUN'")
    try:
        record = json.loads(text)
    except ValueError:  # not JSON, or not UTF-8
        record = None
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        raise CheckpointError(f"{where} is damaged: its record has no format; export it again")
    if record["format"] > FORMAT:
        known = f"this fastokd reads up to {FORMAT}: install a newer fastokd"
        raise CheckpointError(f"{where} has format {record['format']}, {known}")
    wrong = [
        name
        for name, is_sound in _SOUND.items()
        if not isinstance(record.get(name), dict) or not is_sound(record[name])
    ]
    classes: Any = record.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        wrong.append("classes")
    if wrong:
        reason = f"its record's entry '{wrong[0]}' is incomplete"
        raise CheckpointError(f"{where} is damaged: {reason}; export it again")
    count = record["architecture"]["num_classes"]
    if len(classes) != count:
        reason = f"its record has {len(classes)} class names for a network of {count} classes"
        raise CheckpointError(f"{where} is damaged: {reason}; export it again")
    return record
