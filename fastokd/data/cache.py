"""Decoded images on disk, so that the second start of a run need not decode them.

An entry is found by content: a hash of everything that determines the decoded images, including the
bytes of every file. To find it without reading the files, a status record maps their names, sizes,
inodes and times to that hash. Writing to a file always updates its status change time, which no
program can set back, so a changed file is never served stale. Files changed a moment before they
were hashed get no status record, because two changes may have the same time.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.data.images import default_workers
from fastokd.errors import ConfigError, StorageError
from fastokd.storage import write_atomically, write_json

VERSION = 1
"""Increase it when decoding gives other pixels than before."""

DEFAULT_GIB = 20.0
WORTH_SECONDS = 1.0
"""Datasets that decode faster are not cached."""

_RACY_SECONDS = 2.0
_ABANDONED_SECONDS = 86400.0
_OFF = ("off", "0", "")


@dataclass(frozen=True)
class Entry:
    """The cached images of a dataset.

    Args:
        images: uint8 [N, 3, H, W], channels last in memory, of all splits.
        sums: int64 [N, 2, 3], the sum and the sum of squares of every channel of each image.
        fingerprint: of the decoded dataset.
    """

    images: Tensor
    sums: Tensor
    fingerprint: str


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


def cache_limit() -> int:
    """The size limit of the cache in bytes: ``FASTOKD_CACHE_GIB``, 20 by default.

    Raises:
        ConfigError: not a number of at least 0.
    """
    text = os.environ.get("FASTOKD_CACHE_GIB", str(DEFAULT_GIB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise ConfigError(
            f"FASTOKD_CACHE_GIB='{text}': it is the limit of the cache in GiB, a number of at least"
            " 0"
        )
    return int(limit * 2**30)


class Cache:
    """The cache of one dataset with one way of decoding it.

    Args:
        recipe: everything else that determines the decoded images: plain values.
        paths: the files that are read.
        read: returns the bytes of the i-th image.
        count: the number of images.
    """

    def __init__(
        self, recipe: dict[str, Any], paths: Sequence[str], read: Callable[[int], bytes], count: int
    ) -> None:
        from PIL import __version__ as pillow_version

        root = cache_folder()
        self._folder = None if root is None else root / "decoded"
        self._limit = cache_limit()
        recipe = {"version": VERSION, "pillow": pillow_version, **recipe}
        self._recipe = json.dumps(recipe).encode("utf-8", "surrogatepass")
        self._paths, self._read, self._count = paths, read, count
        self._status = ""
        self._content: str | None = None
        self._digests: list[bytes] = []
        self._settled = False
        self._changed = False

    def find(self) -> Entry | None:
        """The entry of these files, if any. Reads the files only if their status is new."""
        if self._folder is None:
            return None
        try:
            self._status, newest = self._stat()
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(self._file(self._status, "status").read_text())["content"]
                if entry := self._load(content):
                    return entry
            self._settled = time.time() - newest > _RACY_SECONDS
            self._content = self._hash()
        except OSError:  # an unreadable file is reported when it is decoded
            self._folder = None
            return None
        entry = self._load(self._content)
        if entry is not None:
            self._remember()
        return entry

    def checked_read(self, i: int) -> bytes:
        """The bytes of the i-th image; if they differ from the hashed ones, nothing is cached."""
        content = self._read(i)
        if self._digests and hashlib.blake2b(content, digest_size=16).digest() != self._digests[i]:
            self._changed = True
        return content

    def keep(self, entry: Entry, seconds: float) -> None:
        """Cache images that took ``seconds`` to decode, if they fit and are worth it. An error of
        the disk is a warning.
        """
        needed = entry.images.nbytes + entry.sums.nbytes
        content = self._content
        if self._folder is None or content is None or self._changed:
            return
        if seconds < WORTH_SECONDS or needed > self._limit:
            return
        images = entry.images.permute(0, 2, 3, 1).numpy()
        try:
            self._evict(needed)
            for name, array in (("images", images), ("sums", entry.sums.numpy())):
                save = partial(np.save, arr=array, allow_pickle=False)
                write_atomically(self._file(content, f"{name}.npy"), save)
            # Last: an entry without its record is ignored.
            record = {"shape": list(images.shape), "fingerprint": entry.fingerprint}
            write_json(self._file(content, "json"), record)
        except (StorageError, OSError) as error:
            warnings.warn(
                f"decoded images are not kept for the next start: {error}; FASTOKD_CACHE names"
                " another folder, or is 'off'",
                stacklevel=2,
            )
            return
        self._remember()

    def _file(self, key: str, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.{suffix}"

    def _stat(self) -> tuple[str, float]:
        """A hash of the files' status, and the latest status change time."""
        digest = hashlib.sha256(self._recipe)
        newest = 0.0
        for path in self._paths:
            status = os.stat(path)
            newest = max(newest, status.st_ctime)
            digest.update(
                f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
                f" {status.st_ino} {status.st_dev}\0".encode("utf-8", "surrogateescape")
            )
        return digest.hexdigest(), newest

    def _hash(self) -> str:
        def digest(i: int) -> bytes:
            return hashlib.blake2b(self._read(i), digest_size=16).digest()

        with ThreadPoolExecutor(default_workers()) as pool:
            self._digests = list(pool.map(digest, range(self._count), chunksize=64))
        whole = hashlib.sha256(self._recipe)
        for part in self._digests:
            whole.update(part)
        return whole.hexdigest()

    def _load(self, content: str) -> Entry | None:
        record_file = self._file(content, "json")
        try:
            record = json.loads(record_file.read_text())
            # Copy on write: writing to the tensor leaves the file unchanged.
            images = np.load(self._file(content, "images.npy"), mmap_mode="c", allow_pickle=False)
            sums = np.load(self._file(content, "sums.npy"), allow_pickle=False)
            complete = images.dtype == np.uint8 and list(images.shape) == record["shape"]
            if not complete or not len(sums) == len(images) == self._count:
                return None
            with contextlib.suppress(OSError):
                os.utime(record_file)  # its time is that of the last use
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            return Entry(pixels, torch.from_numpy(sums), record["fingerprint"])
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # missing or damaged
            return None

    def _remember(self) -> None:
        if self._settled:
            with contextlib.suppress(StorageError):
                write_json(self._file(self._status, "status"), {"content": self._content})

    def _evict(self, needed: int) -> None:
        """Remove the least recently used entries until ``needed`` more bytes fit. Also remove
        temporary files of killed runs and status records of removed entries.
        """
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        sizes: dict[str, int] = defaultdict(int)
        used: dict[str, float] = defaultdict(float)  # 0 for incomplete entries
        for file in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.name.startswith("."):
                    if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                        file.unlink()
                elif file.suffix != ".status":
                    key = file.name.partition(".")[0]
                    sizes[key] += status.st_size
                    used[key] += status.st_mtime if file.suffix == ".json" else 0.0
        for key in sorted(sizes, key=lambda key: used[key]):
            if sum(sizes.values()) + needed <= self._limit:
                break
            for suffix in ("json", "images.npy", "sums.npy"):
                self._file(key, suffix).unlink(missing_ok=True)
            del sizes[key]
        for file in self._folder.glob("*.status"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(file.read_text())["content"] not in sizes:
                    file.unlink()
