"""Checkpoints: tensors and plain values only, written atomically, verified by checksums when they
are read, and loaded without running any code from the file.
"""

import contextlib
import copy
import io
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastokd.errors import CheckpointError, first_line
from fastokd.storage import check_space, remove_temporaries, write_atomically

FORMAT = 3
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "criterion": dict,  # the state of the loss
    "epoch": int,  # finished epochs
    "last": dict,  # accuracies of the last epoch
    "best": dict,
    "best_epoch": int,
    "seconds": (int, float),  # of training
    "classes": list,
    "data": dict,  # ``data_record``
    "config": str,  # YAML
}
"""The entries of every checkpoint and their types."""

ADDED: dict[str, Any] = {
    "step": 0,  # of the optimizer
    "loader": {},  # its ``state_dict`` within an epoch
    "sums": {},  # the seconds of an unfinished epoch
    "ema": {},
    "scaler": {},
    "ranks": [],  # for each process its random state and, within an epoch, sums and statistics
    "config_hash": "",
}
"""The entries that format 3 added, with their defaults for older files."""

_PLAIN = (str, int, float, bool, type(None))


class DamagedCheckpoint(CheckpointError):
    """A file that is not a complete checkpoint, or cannot be read; an older one may be fine."""


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of this or an older format; its entry "format" says which.

    Raises:
        CheckpointError: missing, damaged, not a fastokd checkpoint, or of a newer format.
    """
    if not os.path.lexists(path):
        raise CheckpointError(
            f"there is no checkpoint at {path}: none was written yet, or this is no run folder"
        )
    state = _read(path, device)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise DamagedCheckpoint(f"{path} is not a fastokd checkpoint")
    if state["format"] > FORMAT:
        version = f"format {state['format']}, this fastokd reads up to {FORMAT}"
        raise CheckpointError(f"{path} has {version}: install a newer fastokd")
    if state["format"] == 1:
        # Losses had no state then, and there was one optimizer.
        state["criterion"], state["optimizer"] = {}, {"sgd": state.get("optimizer")}
    state = {**copy.deepcopy(ADDED), **state}
    if wrong := _wrong_entry(state):
        raise DamagedCheckpoint(f"{path} is damaged: '{wrong}' is missing or of the wrong type")
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """The newest complete checkpoint of a folder: its content, its path, and an error message for
    each newer checkpoint that is damaged.

    Raises:
        CheckpointError: no checkpoint exists, all are damaged, or the newest has a newer format.
    """
    complaints: list[str] = []
    for path in checkpoint_files(folder):
        try:
            return load_checkpoint(path), path, complaints
        except DamagedCheckpoint as error:
            complaints.append(str(error))
    if not complaints:
        load_checkpoint(folder / "last.pt")  # raises an error: it is missing
    best, hint = folder / "best.pt", ""
    if best.is_file():
        hint = f"; to resume from the best epoch instead, copy {best} to {folder / 'last.pt'}"
    raise CheckpointError("all checkpoints of the run are damaged: " + "; ".join(complaints) + hint)


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a run except ``best.pt``, newest first."""
    names = [path.name for path in folder.glob("last*.pt")]
    matches = [match for name in names if (match := re.fullmatch(r"last(-[1-9]\d*)?\.pt", name))]
    return [folder / match[0] for match in sorted(matches, key=lambda match: -int(match[1] or 0))]


def check_resumable(state: Mapping[str, Any], where: str) -> None:
    """Raise a ``CheckpointError`` for a format that lacks optimizer state or random states."""
    if state["format"] < 3:
        raise CheckpointError(
            f"{where} has format {state['format']}, of an earlier fastokd: it can be evaluated and"
            " exported, but not resumed; start a new run"
        )


class CheckpointStore:
    """The ``keep`` newest checkpoints of a run (``last.pt``, ``last-1.pt``, ...) and ``best.pt``.

    At every moment the newest checkpoint that was saved, or a newer one, is complete on the disk.
    Only the process that holds the run folder's lock may have a store.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self.keep = keep
        self._kept = [self.last, *(folder / f"last-{number}.pt" for number in range(1, keep))]
        self._last_is_whole: bool | None = None  # not checked yet
        for path in (self.last, self.best):
            remove_temporaries(path)

    def check_space(self, size: int) -> None:
        """Raise a ``StorageError`` if the disk cannot hold checkpoints of ``size`` bytes each."""
        count, paths = self.keep + 2, (*checkpoint_files(self.last.parent), self.best)
        existing = sum(path.stat().st_size for path in paths if path.is_file())
        titles = f"({self.keep} of the newest, the best, and one while it is written)"
        check_space(self.last.parent, count * size - existing, f"{count} checkpoints {titles}")

    def save(
        self,
        state: Mapping[str, Any],
        *,
        is_best: bool = False,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Write a state: ``best.pt``, then what ``before`` writes, then ``last.pt``.

        ``last.pt`` comes last because it makes the epoch count: until it exists, a resumed run
        trains the epoch again and writes the rest again.

        Args:
            state: all of ``ENTRIES`` and ``ADDED``.
            is_best: write ``best.pt``.
            before: writes the other records of the epoch.

        Raises:
            StorageError: the disk refused; the checkpoints before are intact.
            TypeError: the state holds something other than tensors and plain values.
        """
        if wrong := _wrong_entry(state):
            raise TypeError(f"the entry '{wrong}' of a checkpoint is missing or of the wrong type")
        data = serialize(state)
        if is_best:
            _write(self.best, data)
        if before is not None:
            before()
        if self._last_is_whole is None:
            self._last_is_whole = _is_whole(self.last)
        _write(self.last, data, self._rotate if self._last_is_whole else None)
        self._last_is_whole = True
        for path in checkpoint_files(self.last.parent):
            if path not in self._kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    def restore_best(self, epoch: int) -> bool:
        """Make ``best.pt`` the checkpoint of the best epoch (from 0, -1 for none) again, if a run
        was killed between writing ``best.pt`` and ``last.pt``; False if no checkpoint is of it.
        """
        if epoch < 0:
            return True
        for path in (self.best, *checkpoint_files(self.last.parent)):
            with contextlib.suppress(CheckpointError):
                state = load_checkpoint(path)
                if state["epoch"] == epoch + 1 and not state["loader"]:
                    if path != self.best:
                        _write(self.best, path.read_bytes())
                    return True
        return False

    def _rotate(self) -> None:
        """Rename ``last.pt`` to ``last-1.pt`` and so on, up to the first name that is free. Only
        the oldest checkpoint is lost, however often this is interrupted.
        """
        paths = self._kept
        free = next((i for i, path in enumerate(paths) if not path.exists()), len(paths) - 1)
        for i in range(free, 0, -1):
            os.replace(paths[i - 1], paths[i])


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return bool(load_checkpoint(path, "meta"))
    return False


def _write(
    path: Path, data: bytes | memoryview, before: Callable[[], object] | None = None
) -> None:
    write_atomically(path, lambda file: file.write(data), before_rename=before)


def serialize(state: Mapping[str, Any]) -> memoryview:
    """The bytes of a checkpoint; raises as ``snapshot``."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **snapshot(dict(state))}, buffer)
    return buffer.getbuffer()


def snapshot(value: Any, where: str = "the checkpoint") -> Any:
    """A copy in host memory of tensors and plain values; a ``TypeError`` for anything else."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the attribute of a state dict with module versions
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise TypeError(f"{where} has a key of type {type(key).__name__}")
            copied[key] = snapshot(item, f"{where}[{key!r}]")
        return copied
    if type(value) in (list, tuple):
        return type(value)(snapshot(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) not in _PLAIN:
        raise TypeError(f"{where} is of type {type(value).__name__}, which is not a plain value")
    return value


def state_bytes(state: Mapping[str, Any]) -> int:
    """The approximate size of a state's checkpoint in bytes."""
    tensors = [value for value in tree_leaves(state) if isinstance(value, Tensor)]
    return 2**16 + sum(tensor.numel() * tensor.element_size() + 512 for tensor in tensors)


def _wrong_entry(state: Mapping[str, Any]) -> str | None:
    """The first entry that is missing or of the wrong type."""
    kinds = {**ENTRIES, **{name: type(value) for name, value in ADDED.items()}}
    return next(
        (name for name, kind in kinds.items() if not isinstance(state.get(name), kind)), None
    )


def _read(path: Path, device: torch.device | str) -> Any:
    """The content of a file, verified by its checksums, which ``torch.load`` does not do."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it has another checksum")
        return torch.load(path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror or first_line(error)}"
        raise DamagedCheckpoint(reason) from error
    except Exception as error:  # zipfile and torch.load raise many kinds for damaged bytes
        reason = f"{path} is damaged or not a checkpoint ({first_line(error)}); restore it"
        raise DamagedCheckpoint(reason) from error
