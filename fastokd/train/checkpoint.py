"""Checkpoints: tensors and plain values only, written in the background, atomically and read back,
loaded without running any code from the file.
"""

import contextlib
import copy
import errno
import os
import pickle
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import CheckpointError, first_line
from fastokd.storage import (
    check_space,
    remove_temporaries,
    retried,
    temporary_path,
    write_atomically,
)

FORMAT = 3
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "optimizer": dict,
    "criterion": dict,
    "epoch": int,
    "last": dict,
    "best": dict,
    "best_epoch": int,
    "seconds": (int, float),
    "classes": list,
    "data": dict,
    "config": str,
}
"""What every checkpoint holds: weights, the optimizers' state, what the method's loss remembers,
finished epochs, accuracies of the last and the best epoch and which that was, seconds of training,
class names, what was read of the data, and the configuration as YAML.
"""

ADDED: dict[str, Any] = {
    "step": 0,
    "loader": {},
    "sums": {},
    "ema": {},
    "scaler": {},
    "ranks": [],
    "config_hash": "",
}
"""What format 3 added, with what is read for it from older files: optimizer steps in all, the
loader's place (its ``state_dict``), what an epoch that is not finished has taken ("seconds"), the
moving average of the student, the loss scale, one dictionary for each process ("rng": states of its
generators by device; of an epoch that is not finished "sums": what it measured, and "statistics":
its own running statistics), and the hash of the configuration.
"""

_PLAIN = (str, int, float, bool, type(None))


class DamagedCheckpoint(CheckpointError):
    """A file that is no whole checkpoint, or that cannot be read; the one before it may be."""


def save_checkpoint(
    path: Path, state: Mapping[str, Any], before_rename: Callable[[], object] | None = None
) -> None:
    """Write a checkpoint and read it back; the one before stays until this one is on the disk and
    whole.

    Args:
        path: the file.
        state: what is in it, see ``ENTRIES`` and ``ADDED``.
        before_rename: called when it is on the disk and whole, before it takes the place of the one
            before.

    Raises:
        StorageError: the disk refused, or gave back something else; the old checkpoint is
            untouched.
    """

    def check(temporary: Path) -> None:
        _forget_cached(temporary)
        try:
            _read(temporary, "meta")
        except CheckpointError as error:
            raise OSError(errno.EIO, "what was read back is not what was written") from error
        if before_rename is not None:
            before_rename()

    write_atomically(
        path, lambda file: torch.save({"format": FORMAT, **state}, file), before_rename=check
    )


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, of this or an older format; which one it was is its entry "format".

    Raises:
        CheckpointError: missing, damaged, not a checkpoint of fastokd, or of a newer format.
    """
    if not os.path.lexists(path):
        raise CheckpointError(
            f"there is no checkpoint at {path}: the run has not finished its first epoch, or this"
            " is not a run folder"
        )
    state = _read(path, device)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise DamagedCheckpoint(f"{path} is not a checkpoint of fastokd")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, this fastokd reads up to {FORMAT}: install a"
            " newer fastokd"
        )
    if state["format"] == 1:
        # Methods of that time remembered nothing and had one optimizer.
        state["criterion"], state["optimizer"] = {}, {"sgd": state.get("optimizer")}
    state = {**copy.deepcopy(ADDED), **state}
    if wrong := _wrong_entry(state):
        raise DamagedCheckpoint(
            f"{path} is damaged: its entry '{wrong}' is missing or of the wrong kind"
        )
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """The newest checkpoint in a folder that is whole.

    Args:
        folder: the folder of ``last.pt``, ``last-1.pt`` and so on.

    Returns:
        What it holds, which file it is, and for each newer one what is wrong with it.

    Raises:
        CheckpointError: there is none, none is whole, or the newest is of a newer format (an older
            one is not taken for it: going on from there would throw away what the newer fastokd has
            trained).
    """
    complaints: list[str] = []
    for path in checkpoint_files(folder):
        try:
            return load_checkpoint(path), path, complaints
        except DamagedCheckpoint as error:
            complaints.append(str(error))
    if not complaints:
        load_checkpoint(folder / "last.pt")  # says that there is none
    best = folder / "best.pt"
    hint = (
        f"; to go on from the best epoch instead, copy {best} to {folder / 'last.pt'}"
        if best.is_file()
        else ""
    )
    raise CheckpointError("no checkpoint of the run is whole: " + "; ".join(complaints) + hint)


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; without the best, which is one of them or older."""
    numbers = {
        path: match
        for path in folder.glob("last*.pt")
        if (match := re.fullmatch(r"last(?:-([1-9]\d*))?\.pt", path.name))
    }
    return sorted(numbers, key=lambda path: int(numbers[path][1] or 0))


def check_resumable(state: Mapping[str, Any], where: str) -> None:
    """Refuse to go on from a checkpoint that does not hold enough for it.

    Raises:
        CheckpointError: it is of a format before 3, whose optimizers are not kept by parameter and
            whose generators are not kept.
    """
    if state["format"] < 3:
        raise CheckpointError(
            f"{where} has format {state['format']}, of an earlier fastokd: it can be evaluated and"
            " exported, but not resumed; start a new run, or resume it with that version"
        )


class _Write:
    """One write, done by the thread that takes it first.

    A thread is not joined, because Thread.join that Ctrl-C interrupts takes the thread for ended
    (CPython before 3.13).
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._work: Callable[[], object] | None = work
        self._taken = threading.Lock()

    def run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            assert self._work is not None
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self._work = None  # the copy of the state that it holds is as large as the run's
            self.done.set()


class CheckpointStore:
    """The checkpoints of a run: ``last.pt``, those before it (``last-1.pt``, ...), and ``best.pt``,
    written in the background.

    At every moment the newest of them that was reported as saved, or a newer one, is whole on the
    disk. The process that owns the run folder's lock has one store; others have none.

    Args:
        folder: where the checkpoints are.
        keep: how many of the newest are kept, ``last.pt`` among them.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self.keep = keep
        self._older = [folder / f"last-{number}.pt" for number in range(1, keep)]
        self._last_is_whole = False  # nobody has looked
        self._current: _Write | None = None
        for path in (self.last, self.best):
            remove_temporaries(path)

    def check_space(self, size: int) -> None:
        """Refuse to begin a run whose checkpoints will not fit.

        Args:
            size: bytes of a checkpoint, see ``state_bytes``.

        Raises:
            StorageError: fewer bytes are free than all that are kept need, and the next one while
                it is written.
        """
        count = self.keep + 2
        there = sum(
            path.stat().st_size
            for path in (*checkpoint_files(self.last.parent), self.best)
            if path.is_file()
        )
        check_space(
            self.last.parent,
            count * size - there,
            f"{count} checkpoints ({self.keep} of the newest, the best, and one while it is"
            " written)",
        )

    def save(
        self,
        state: Mapping[str, Any],
        *,
        is_best: bool = False,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Copy a state, return, and write it meanwhile: ``best.pt``, then what ``before`` writes,
        then ``last.pt``.

        ``last.pt`` comes last, because it makes the rest count. A write that is still going on is
        waited for first.

        Args:
            state: all of ``ENTRIES`` and ``ADDED``. Tensors may change once this returns.
            is_best: write it as ``best.pt`` too.
            before: writes the other records; runs on another thread, so it must not read what the
                training goes on to change.

        Raises:
            StorageError: an earlier write failed; this state was not taken.
        """
        self.wait()
        if wrong := _wrong_entry(state):
            raise TypeError(f"the entry '{wrong}' of a checkpoint is missing or of the wrong kind")
        taken = snapshot(state)
        self._current = _Write(lambda: self._write(taken, is_best, before))
        # Not a daemon: a program that ends waits for it.
        threading.Thread(target=self._current.run, name="checkpoint").start()

    def restore_best(self, epoch: int) -> bool:
        """Make ``best.pt`` that of the best epoch again, where a run was cut short between
        ``best.pt`` and ``last.pt``.

        Args:
            epoch: the best of the checkpoint from which the run goes on, counted from 0; -1 for
                none yet.

        Returns:
            Whether ``best.pt`` is of that epoch now; if not, none of those that are kept is.

        Raises:
            StorageError: the disk refused.
        """
        if epoch < 0:
            return True
        for path in (self.best, *checkpoint_files(self.last.parent)):
            with contextlib.suppress(CheckpointError):
                state = load_checkpoint(path)
                if state["epoch"] == epoch + 1 and not state["loader"]:
                    if path != self.best:
                        save_checkpoint(
                            self.best,
                            {name: value for name, value in state.items() if name != "format"},
                        )
                    return True
        return False

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            StorageError: it is not; said once.
        """
        if (current := self._current) is not None:
            # Ctrl-C may have come before the thread was started; then this one does its work.
            while not current.done.wait(1.0):
                current.run()
            self._current = None
            if current.error is not None:
                raise current.error

    def close(self) -> None:
        """As ``wait``, at the end of a run."""
        self.wait()

    def _write(
        self, state: dict[str, Any], is_best: bool, before: Callable[[], object] | None
    ) -> None:
        if not self._last_is_whole and self.last.exists():
            with contextlib.suppress(CheckpointError):
                load_checkpoint(self.last, "meta")
                self._last_is_whole = True
        if is_best:
            save_checkpoint(self.best, state)
        if before is not None:
            before()
        save_checkpoint(self.last, state, self._shift)
        self._last_is_whole = True
        for path in checkpoint_files(self.last.parent)[1:]:
            if path not in self._older:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _shift(self) -> None:
        """Make ``last.pt`` the first of the older ones, under both names until the new one takes
        its place.

        However often this is cut short and done again, none is lost but the oldest: only those
        before the first gap move up. A damaged ``last.pt`` is not kept in the place of a whole one.
        """
        if not self._older or not self._last_is_whole or not self.last.exists():
            return
        first = self._older[0]
        if first.exists() and first.samefile(self.last):
            return
        link = temporary_path(self.last)
        try:
            os.link(self.last, link)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            link = (
                self.last
            )  # without hard links it has the older name alone for a moment, and is found under it
        try:
            gap = next(
                (i for i, path in enumerate(self._older) if not path.exists()), len(self._older) - 1
            )
            for i in range(gap, 0, -1):
                os.replace(self._older[i - 1], self._older[i])
            os.replace(link, first)
        finally:
            if link != self.last:
                with contextlib.suppress(OSError):
                    link.unlink()


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def snapshot(value: Any, where: str = "the checkpoint") -> Any:
    """A copy of tensors and plain values in dictionaries, lists and tuples; tensors are copied to
    host memory.

    Raises:
        TypeError: something else is in it, which could not be loaded again without running code.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        found = copy.copy(value)  # a state dict carries the versions of its modules as an attribute
        for key, item in value.items():
            if type(key) not in _PLAIN:
                raise TypeError(f"{where} has a key of type {type(key).__name__}")
            found[key] = snapshot(item, f"{where}[{key!r}]")
        return found
    if type(value) in (list, tuple):
        return type(value)(snapshot(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) not in _PLAIN:
        raise TypeError(
            f"{where} is of type {type(value).__name__}; a checkpoint holds tensors and plain"
            " values only"
        )
    return value


def state_bytes(state: Mapping[str, Any]) -> int:
    """About the size of a state's checkpoint in bytes: that of its tensors, and a little for
    each.
    """
    return 2**16 + sum(tensor.numel() * tensor.element_size() + 512 for tensor in _tensors(state))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _wrong_entry(state: Mapping[str, Any]) -> str | None:
    """The first entry that is missing or of the wrong kind."""
    kinds = {**ENTRIES, **{name: type(value) for name, value in ADDED.items()}}
    return next(
        (name for name, kind in kinds.items() if not isinstance(state.get(name), kind)), None
    )


def _read(path: Path, device: torch.device | str) -> Any:
    """What is in a file of ``torch.save``, every byte of it compared with the checksums in the
    file, which torch.load does not do.
    """

    def read() -> Any:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it has another checksum")
        return torch.load(path, map_location=device, weights_only=True)

    try:
        return retried(read)
    except OSError as error:
        raise DamagedCheckpoint(
            f"cannot read {path}: {error.strerror or first_line(error)}"
        ) from error
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    ) as error:
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint ({first_line(error)}); restore it or start the"
            " run again"
        ) from error


def _forget_cached(path: Path) -> None:
    """Have what is read next come from the disk and not from the system's memory, where the system
    has that.
    """
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
