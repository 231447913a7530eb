"""Checkpoints: tensors and plain values only, written atomically, loaded without running any code from the file."""

import pickle
from pathlib import Path
from typing import Any

import torch

from fastokd.errors import CheckpointError
from fastokd.storage import write_atomically

FORMAT = 2
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "model": dict, "optimizer": dict, "criterion": dict, "epoch": int, "last": dict, "best": dict, "best_epoch": int, "seconds": (int, float),
    "classes": list, "data": dict, "config": str,
}
"""What a checkpoint holds: weights, optimizer state, what the method's loss remembers, finished epochs, accuracies of the last and the best epoch and which
that was, seconds of training, class names, what was read of the data, and the configuration as YAML."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before stays until this one is on the disk.

    Raises:
        StorageError: the disk refused; the old checkpoint is untouched.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint of fastokd, or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: the run has not finished its first epoch, or this is not a run folder")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint; restore it or start the run again") from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(f"{path} is not a checkpoint of fastokd")
    if state["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}, this fastokd reads up to {FORMAT}: install a newer fastokd")
    if state["format"] == 1:
        # Methods of that time remembered nothing and had one optimizer.
        state["criterion"], state["optimizer"] = {}, {"sgd": state.get("optimizer")}
    for name, kind in ENTRIES.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path} is damaged: its entry '{name}' is missing or of the wrong kind")
    return state
