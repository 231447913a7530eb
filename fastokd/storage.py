"""Writing files so that a crash, a full disk or a lost machine never leaves half of one."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fastokd.errors import StorageError, first_line


def write_atomically(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Write a file through a temporary one beside it: written, flushed to the disk, then renamed over the old one.

    Args:
        path: the file.
        write: writes its content.
        durable: wait for the disk; without it only a crash of the machine itself may lose the file.

    Raises:
        StorageError: the disk refused; the old file, if there was one, is untouched and the temporary one is gone.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError from its archive writer.
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise storage_error(path, error) from error
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk.

    Raises:
        StorageError: the disk refused.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: Exception) -> StorageError:
    """The one-line error for a write that failed."""
    cause = error if isinstance(error, OSError) else error.__context__ if isinstance(error.__context__, OSError) else error
    reason = getattr(cause, "strerror", None) or first_line(cause)
    return StorageError(f"cannot write {path}: {reason}. Make room there or use another folder; what was written before is intact")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every system can open a folder for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
