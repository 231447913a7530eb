"""Writing files so that a crash, a full disk or a lost machine never leaves a partial file."""

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fastokd.errors import StorageError, first_line

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Limits of this process, e.g. those of its container."""


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    durable: bool = True,
    before_rename: Callable[[], object] | None = None,
) -> None:
    """Write a temporary file in the same folder, flush it to the disk, and rename it over ``path``.

    Args:
        path: the file.
        write: writes its content.
        durable: wait for the disk; otherwise a crash of the machine may lose the file.
        before_rename: called when the temporary file is complete.

    Raises:
        StorageError: the file cannot be written; an old file is untouched.
    """

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk; a ``StorageError`` leaves nothing of the line."""

    try:
        # Unbuffered: nothing is left in a buffer that closing the file would write after all.
        with open(path, "ab", buffering=0) as file:
            end, rest = file.tell(), memoryview(f"{line}\n".encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one-line error for a write that failed."""
    return StorageError(
        f"cannot write {path}: {error.strerror or first_line(error)}. Free some space or use"
        " another folder; files written before are intact"
    )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise a ``StorageError`` if ``folder`` has less than ``needed`` bytes free for ``what``."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    # Some network file systems report a size of 0.
    if usage.total and usage.free < needed:
        raise StorageError(
            f"{what} need {format_bytes(needed)}, and {folder} has {format_bytes(usage.free)} free:"
            " free some space, or use another folder"
        )


def format_bytes(count: float) -> str:
    """A number of bytes as text: "640 KiB", "13 MiB", "1.9 GiB"."""
    power, name = (3, "GiB") if count >= 2**30 else (2, "MiB") if count >= 2**20 else (1, "KiB")
    value = count / 1024**power
    digits = 0 if value >= 100 or (value >= 10 and name != "GiB") else 1
    return f"{value:.{digits}f} {name}"


def usable_cores() -> int:
    """CPU cores that this process may use: of its affinity, within the quota of its control group
    (the CPU limit of a container), at least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max 100000" without a quota
        quota, period = (CONTROL_GROUP / "cpu.max").read_text().split()
        cores = min(cores or 1, int(quota) // int(period))
    return max(1, cores or 1)


def available_memory() -> int | None:
    """Bytes of memory that this process can still take within its control group, if known."""
    readings = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        readings += [
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        ]
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError):
            total, used = ((CONTROL_GROUP / name).read_text() for name in (limit, usage))
            if total.strip() != "max":
                readings.append(int(total) - int(used))
    return max(0, min(readings)) if readings else None


def temporaries_of(path: Path) -> list[Path]:
    """The temporary files that killed calls of ``write_atomically`` left for a file."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"))


def remove_temporaries(path: Path) -> None:
    """Remove ``temporaries_of(path)``; no other process may be writing the file."""
    for leftover in temporaries_of(path):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every system can open or flush a folder."""
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
