"""The student as a file: safetensors with what is needed to run it, and back to a plain network.

``student.safetensors`` holds the weights and, in its metadata, the record; ``student.json`` repeats the record for
people and for programs that do not read safetensors. Nothing of the branches is in either.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastokd.data import Batch, Dataset, FileDataset
from fastokd.errors import CheckpointError, first_line
from fastokd.models import create_student
from fastokd.storage import write_atomically, write_json
from fastokd.version import __version__

FORMAT = 1
ENTRIES: dict[str, tuple[str, ...] | None] = {
    "architecture": ("name", "num_classes"), "classes": None, "preprocessing": ("image_size", "mean", "std"),
    "accuracy": ("top1", "data", "split", "num_images", "epoch"), "provenance": (),
}
"""What a record holds: mappings with at least these names, and the list of class names."""


def student_record(model: str, dataset: Dataset | FileDataset, *, accuracy: float, epoch: int, provenance: dict[str, Any]) -> dict[str, Any]:
    """What goes with a student's weights: architecture, classes, preprocessing, accuracy and where it comes from.

    Args:
        model: the backbone's name.
        dataset: what it was trained and evaluated on.
        accuracy: of the student, in [0, 1], on ``dataset.evaluation``.
        epoch: the number of finished epochs.
        provenance: method, preset, branches, seed.
    """
    height, width = dataset.image_size
    return {
        "format": FORMAT,
        "architecture": {"name": model, "num_classes": len(dataset.classes)},
        "classes": list(dataset.classes),
        "preprocessing": {
            "color": "RGB", "shorter_side": dataset.augment.evaluation_side(min(height, width)), "image_size": [height, width], "scale": "divide by 255",
            "mean": [float(value) for value in dataset.mean], "std": [float(value) for value in dataset.std],
        },
        "accuracy": {"top1": accuracy, "data": dataset.name, "split": dataset.evaluation.name, "num_images": len(dataset.evaluation), "epoch": epoch},
        "provenance": {"fastokd": __version__, **provenance},
    }


def write_student(path: Path, student: nn.Module, record: dict[str, Any]) -> None:
    """Write ``path`` (safetensors) and the record beside it (``.json``), each atomically.

    Raises:
        StorageError: the disk refused.
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    blob = save(tensors, metadata={"fastokd": json.dumps(record)})
    write_atomically(path, lambda file: file.write(blob))
    write_json(path.with_suffix(".json"), record)


def read_record(path: Path) -> dict[str, Any]:
    """The record inside a student's safetensors file.

    Raises:
        CheckpointError: missing, damaged, or not a student of fastokd.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no student at {path}; make one with 'fastokd export RUN'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        record = json.loads(metadata["fastokd"])
    except (KeyError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is not a student exported by fastokd (its metadata has no 'fastokd' entry)") from None
    except (SafetensorError, json.JSONDecodeError, struct.error, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({first_line(error)}); export it again") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise CheckpointError(f"{path} is damaged: its record has no format; export it again")
    if record["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {record['format']}, this fastokd reads up to {FORMAT}: install a newer fastokd")
    for entry, names in ENTRIES.items():
        part = record.get(entry)
        if not isinstance(part, list if names is None else dict) or any(name not in part for name in names or ()):
            raise CheckpointError(f"{path} is damaged: its record's entry '{entry}' is incomplete; export it again")
    return record


def load_student(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A student as a plain network in evaluation mode, and its record.

    Args:
        path: the safetensors file, or the folder that holds ``student.safetensors``.

    Raises:
        CheckpointError: missing, damaged, or of an architecture that this fastokd does not know.
    """
    from safetensors.torch import load_file

    path = student_file(Path(path))
    record = read_record(path)
    architecture = record["architecture"]
    try:
        student = create_student(architecture["name"], architecture["num_classes"])
        student.load_state_dict(load_file(path))
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit the architecture {architecture}: {first_line(error)}") from error
    return student.eval(), record


def student_file(path: Path) -> Path:
    """The safetensors file that a path means."""
    return path / "student.safetensors" if path.is_dir() else path


@torch.no_grad()
def measure_accuracy(student: nn.Module, batches: Iterable[Batch]) -> float:
    """The top-1 accuracy in [0, 1] of a plain network over all batches, each sample counted once."""
    right, count = torch.zeros((), dtype=torch.int64), 0
    for batch in batches:
        right = right.to(batch.target.device) + (student(batch.images).argmax(1) == batch.target).sum()
        count += batch.target.shape[0]
    return int(right) / count


@torch.no_grad()
def check_same_logits(first: nn.Module, second: nn.Module, batches: Iterable[Batch]) -> int:
    """Compare two networks' logits on real images bit by bit; returns how many images were compared.

    Raises:
        CheckpointError: they differ.
    """
    count = 0
    for batch in batches:
        left, right = first(batch.images), second(batch.images)
        if not torch.equal(left, right):
            raise CheckpointError(f"the exported student's logits differ by up to {(left - right).abs().max().item():g} from the trained branch's: the export is not good")
        count += batch.target.shape[0]
    return count
