"""Decoded images on disk, so that the second start of a run need not decode them.

Every dataset and image size has one entry. It is valid while the names, labels, sizes, inodes and
times of the files stay the same: writing to a file updates its status change time, which no program
can set back. Two writes within one tick of the file system's clock have the same time, so datasets
with files that were changed just now are not cached.
"""

import hashlib
import json
import os
import pickle
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.errors import StorageError
from fastokd.storage import write_atomically

VERSION = 2
"""Increase it when decoding gives other pixels than before."""

WORTH_SECONDS = 1.0
"""Datasets that decode faster are not cached."""

MAX_BYTES = 20 * 2**30
"""Larger datasets are not cached."""

SETTLED_SECONDS = 2.0
"""Datasets with files changed more recently are not cached. No file system's clock is coarser."""

_OFF = ("off", "0", "")


class Entry(NamedTuple):
    """The cached images of a dataset."""

    images: Tensor
    """uint8 [N, 3, H, W], channels last in memory, of all splits."""
    sums: Tensor
    """int64 [N, 2, 3], the sum and the sum of squares of every channel of each image."""
    fingerprint: str
    """Of the decoded dataset."""


def cache_folder() -> Path | None:
    """The folder for decoded images: ``FASTOKD_CACHE``, by default ``~/.cache/fastokd``; None if it
    is ``off``.
    """
    named = os.environ.get("FASTOKD_CACHE")
    if named is not None and named.lower() in _OFF:
        return None
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastokd"
    except RuntimeError:  # no home folder
        return None


class Cache:
    """The cache of one dataset with one way of decoding it.

    Args:
        dataset: identifies the dataset; its entry is replaced when its content changes.
        content: everything but the files that determines the decoded images, as plain values.
        paths: the files that are read.
    """

    def __init__(self, dataset: Sequence[object], content: object, paths: Sequence[str]) -> None:
        from PIL import __version__ as pillow_version

        folder = cache_folder()
        name = hashlib.sha256(json.dumps([*map(str, dataset)]).encode()).hexdigest()[:32]
        self._file = None if folder is None else folder / "decoded" / f"{name}.pt"
        self._content = json.dumps([VERSION, pillow_version, content])
        self._paths = paths
        self._key = None if folder is None else self._hash()

    def find(self) -> Entry | None:
        """The entry of these files, if any."""
        if self._file is None or self._key is None:
            return None
        try:
            # Mapped, copy on write: writing to the tensors leaves the file unchanged.
            stored = torch.load(self._file, weights_only=True, mmap=True)
            if stored.pop("key") == self._key:
                return Entry(**stored)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):  # missing or damaged
            pass
        return None

    def keep(self, entry: Entry, seconds: float) -> None:
        """Cache images that took ``seconds`` to decode, unless they are not worth it or a file has
        changed since this object was made. An error of the disk is a warning.
        """
        if self._file is None or self._key is None or self._key != self._hash():
            return
        if seconds < WORTH_SECONDS or entry.images.nbytes > MAX_BYTES:
            return
        stored: dict[str, Any] = {"key": self._key, **entry._asdict()}
        try:
            write_atomically(self._file, lambda file: torch.save(stored, file))
        except (StorageError, OSError, RuntimeError) as error:
            warnings.warn(
                f"decoded images are not kept for the next start: {error}; FASTOKD_CACHE names"
                " another folder, or is 'off'",
                stacklevel=2,
            )

    def _hash(self) -> str | None:
        """A hash of the content and of the files' status; None if a file was changed just now, or
        is missing, which is reported when it is decoded.
        """
        digest = hashlib.sha256(self._content.encode("utf-8", "surrogatepass"))
        settled = time.time_ns() - round(SETTLED_SECONDS * 1e9)
        for path in self._paths:
            try:
                status = os.stat(path)
            except OSError:
                return None
            if status.st_ctime_ns > settled:
                return None
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            line = f"{status.st_size} {times} {status.st_ino} {status.st_dev}\n"
            digest.update(line.encode())
        return digest.hexdigest()
