"""Writing files so that a crash, a full disk or a lost machine never leaves half of one."""

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fastokd.errors import StorageError, first_line

T = TypeVar("T")

TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT})
"""Errors that may pass: of a file server that restarts, or a disk that missed one request."""

PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each further attempt after such an error."""


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    durable: bool = True,
    before_rename: Callable[[Path], object] | None = None,
) -> None:
    """Write a file through a temporary one beside it: written, flushed to the disk, then renamed
    over the old one.

    After an error that may pass all of this is done again, a few times; ``write`` and
    ``before_rename`` must bear that.

    Args:
        path: the file.
        write: writes its content.
        durable: wait for the disk; without it only a crash of the machine itself may lose the file.
        before_rename: called with the temporary file when it is complete; an OSError refuses it.

    Raises:
        StorageError: the disk refused; the old file, if there was one, is untouched and the
            temporary one is gone.
    """

    def attempt() -> None:
        temporary = temporary_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if before_rename is not None:
                before_rename(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    try:
        retried(attempt)
        if durable:
            retried(lambda: _sync_folder(path.parent))
    except (OSError, RuntimeError) as error:
        raise storage_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk.

    Raises:
        StorageError: the disk refused; nothing of the line is there.
    """

    def attempt() -> None:
        # Without a buffer: nothing is left in one that closing the file would write after all.
        with open(path, "ab", buffering=0) as file:
            end, left = file.tell(), memoryview(f"{line}\n".encode())
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise

    try:
        retried(attempt)
    except OSError as error:
        raise storage_error(path, error) from error


def retried(action: Callable[[], T]) -> T:
    """The result of an action, which is tried again, after growing pauses, when it fails with an
    error that may pass.

    The error that it fails with in the end has a note that says how often it was tried.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return action()
        except (OSError, RuntimeError) as error:
            if getattr(system_error(error), "errno", None) not in TRANSIENT:
                raise
            pause = next(pauses, None)
            if pause is None:
                error.add_note(f"tried {len(PAUSES) + 1} times")
                raise
        time.sleep(pause)


def system_error(error: Exception) -> Exception:
    """The system's error behind one: torch.save reports a failed write as a RuntimeError from its
    archive writer.
    """
    return (
        error
        if isinstance(error, OSError) or not isinstance(error.__context__, OSError)
        else error.__context__
    )


def storage_error(path: Path, error: Exception) -> StorageError:
    """The one-line error for a write that failed."""
    cause = system_error(error)
    reason = getattr(cause, "strerror", None) or first_line(cause)
    tried = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    fix = "Look after that disk" if tried else "Make room there"
    return StorageError(
        f"cannot write {path}: {reason}{tried}. {fix} or use another folder; what was written"
        " before is intact"
    )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what will not fit.

    Args:
        folder: where it is to be written.
        needed: bytes.
        what: what they are for, for the message.

    Raises:
        StorageError: the file system has fewer bytes free.
    """
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    # Some network file systems do not say how large they are.
    if usage.total and usage.free < needed:
        raise StorageError(
            f"{what} need {_size(needed)}, and {folder} has {_size(usage.free)} free: make room"
            " there, or use another folder"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def temporary_path(path: Path) -> Path:
    """A new name beside a file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def temporaries_of(path: Path) -> list[Path]:
    """What has such a name."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"))


def remove_temporaries(path: Path) -> None:
    """Remove what processes that were killed while they wrote a file left beside it. Nobody else
    may be writing it now.
    """
    for leftover in temporaries_of(path):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every system can open a folder, or flush one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
