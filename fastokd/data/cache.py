"""Decoded images kept on the disk, so that the second start of a run need not decode them.

An entry is found by content: a hash of everything the decoded images follow from, down to the bytes
of every file. So that the files need not be read to find it, a second, smaller record maps what the
file system says of them (name, size, inode, times of modification and of status change) to that
hash. Writing to a file always moves its status change time, which no program can set back, so a
changed file is never served stale; what was changed a moment before it was hashed gets no such
record, because two changes may bear one time.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.data.images import default_workers
from fastokd.errors import ConfigError, StorageError
from fastokd.storage import write_atomically, write_json

VERSION = 1
"""Raise it when decoding gives other pixels than before."""

DEFAULT_GIB = 20.0
WORTH_SECONDS = 1.0
"""What decodes faster is not kept."""

_RACY_SECONDS = 2.0
_ABANDONED_SECONDS = 86400.0
_OFF = ("off", "0", "")


@dataclass(frozen=True)
class Entry:
    """What is kept of a dataset.

    Args:
        images: uint8 [N, 3, H, W], channels last in memory, of all splits.
        sums: int64 [N, 2, 3], the sum and the sum of squares of every channel of each image.
        fingerprint: of the decoded dataset.
    """

    images: Tensor
    sums: Tensor
    fingerprint: str


def cache_folder() -> Path | None:
    """Where decoded images are kept: ``FASTOKD_CACHE``, by default ``~/.cache/fastokd``; None if
    that says ``off``.
    """
    named = os.environ.get("FASTOKD_CACHE")
    if named is not None and named.lower() in _OFF:
        return None
    try:
        return (
            Path(named).expanduser()
            if named
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastokd"
        )
    except RuntimeError:  # no home folder
        return None


def cache_limit() -> int:
    """How many bytes may be kept: ``FASTOKD_CACHE_GIB``, 20 by default.

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
            f"FASTOKD_CACHE_GIB='{text}': it is how many GiB of decoded images may be kept, a"
            " number of at least 0"
        )
    return int(limit * 2**30)


class Cache:
    """The cache of one dataset as it is to be decoded.

    Args:
        recipe: what besides the files' bytes the decoded images follow from: plain values.
        paths: the files that are read.
        read: gives the bytes of the i-th image.
        count: the number of images.
    """

    def __init__(
        self, recipe: dict[str, Any], paths: Sequence[str], read: Callable[[int], bytes], count: int
    ) -> None:
        from PIL import __version__ as pillow_version

        self._folder = cache_folder()
        self._limit = cache_limit()
        self._recipe = json.dumps({"version": VERSION, "pillow": pillow_version, **recipe}).encode(
            "utf-8", "surrogatepass"
        )
        self._paths, self._read, self._count = paths, read, count
        self._status: str | None = None
        self._content: str | None = None
        self._digests: list[bytes] = []
        self._settled = False
        self._changed = False

    def find(self) -> Entry | None:
        """What was kept of these very files, if anything was. Reads the files only if their status
        is new.
        """
        if self._folder is None:
            return None
        try:
            self._status, newest = self._stat()
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                entry = self._load(json.loads(self._status_file.read_text())["content"])
                if entry is not None:
                    return entry
            self._settled = time.time() - newest > _RACY_SECONDS
            self._content = self._hash()
        except OSError:  # an unreadable file, reported by whoever decodes it
            self._folder = None
            return None
        entry = self._load(self._content)
        if entry is not None:
            self._remember()
        return entry

    def checked_read(self, i: int) -> bytes:
        """The bytes of the i-th image; if they are no longer those that were hashed, nothing will
        be kept.
        """
        content = self._read(i)
        if self._digests and hashlib.blake2b(content, digest_size=16).digest() != self._digests[i]:
            self._changed = True
        return content

    def keep(self, entry: Entry, seconds: float) -> None:
        """Keep what took ``seconds`` to decode, if that is worth it and there is room. A refusal of
        the disk is a warning.
        """
        needed = entry.images.nbytes + entry.sums.nbytes
        if (
            self._folder is None
            or self._content is None
            or self._changed
            or seconds < WORTH_SECONDS
            or needed > self._limit
        ):
            return
        try:
            self._make_room(needed)
            images = entry.images.permute(0, 2, 3, 1).numpy()
            write_atomically(
                self._file("images.npy"), lambda file: np.save(file, images, allow_pickle=False)
            )
            write_atomically(
                self._file("sums.npy"),
                lambda file: np.save(file, entry.sums.numpy(), allow_pickle=False),
            )
            # Last: an entry without it is none.
            write_json(
                self._file("json"), {"shape": list(images.shape), "fingerprint": entry.fingerprint}
            )
        except (StorageError, OSError) as error:
            warnings.warn(
                f"decoded images are not kept for the next start: {error}; FASTOKD_CACHE names"
                " another folder, or is 'off'",
                stacklevel=2,
            )
            return
        self._remember()

    def _file(self, suffix: str, content: str | None = None) -> Path:
        assert self._folder is not None
        return self._folder / "decoded" / f"{content or self._content}.{suffix}"

    @property
    def _status_file(self) -> Path:
        assert self._folder is not None
        return self._folder / "decoded" / f"{self._status}.status"

    def _stat(self) -> tuple[str, float]:
        """A hash of what the file system says of the files, and the newest time of a status
        change.
        """
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
        try:
            record = json.loads(self._file("json", content).read_text())
            # Copy on write: nothing that is done to the tensor reaches the file.
            images = np.load(self._file("images.npy", content), mmap_mode="c", allow_pickle=False)
            sums = np.load(self._file("sums.npy", content), allow_pickle=False)
            if (
                list(images.shape) != record["shape"]
                or images.dtype != np.uint8
                or len(sums) != len(images)
                or len(images) != self._count
            ):
                return None
            with contextlib.suppress(OSError):
                os.utime(self._file("json", content))  # used last just now
            return Entry(
                torch.from_numpy(images).permute(0, 3, 1, 2),
                torch.from_numpy(sums),
                record["fingerprint"],
            )
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
        ):  # not there, cut off, or not ours: decode again
            return None

    def _remember(self) -> None:
        if self._settled:
            with contextlib.suppress(StorageError):
                write_json(self._status_file, {"content": self._content})

    def _make_room(self, needed: int) -> None:
        """Remove entries, those used longest ago first, until ``needed`` more bytes are within the
        limit.

        Temporary files that a killed run left behind and records of entries that are gone go in any
        case.
        """
        folder = self._file("json").parent
        folder.mkdir(parents=True, exist_ok=True)
        entries: dict[str, list[tuple[Path, os.stat_result]]] = {}
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                if file.name.startswith("."):
                    if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                        file.unlink()
                elif file.suffix != ".status":
                    entries.setdefault(file.name.partition(".")[0], []).append((file, status))
        kept = sum(status.st_size for files in entries.values() for _, status in files)
        # The record, ``.json``, was touched when the entry was used last; what was cut off before
        # it was written has none.
        used = {
            content: max((file.suffix == ".json", status.st_mtime) for file, status in files)[1]
            for content, files in entries.items()
        }
        for content in sorted(entries, key=lambda content: used[content]):
            if kept + needed <= self._limit:
                break
            for file, status in sorted(
                entries.pop(content), key=lambda pair: pair[0].suffix != ".json"
            ):
                file.unlink(missing_ok=True)
                kept -= status.st_size
        for file in folder.glob("*.status"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(file.read_text())["content"] not in entries:
                    file.unlink()
