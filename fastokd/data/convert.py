"""Writes a dataset anew: scaled to a shorter side, as a tree of class folders or as WebDataset
shards.

Every file appears whole or not at all, and what is there is not made again: an interrupted
conversion goes on where it stopped when it is called again, unless a picture changed under it.
Until it is finished its folder is refused as a dataset.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from fastokd.data.archives import CLASSES_FILE
from fastokd.data.check import Image, images_of, read_image, run_in_processes
from fastokd.data.files import CONVERSION_FILE
from fastokd.data.images import Progress, decode, first_of, reason_of, show
from fastokd.data.registry import resolve
from fastokd.data.webdataset import read_shard
from fastokd.errors import ConfigError, DataError, StorageError
from fastokd.storage import write_atomically, write_json

if TYPE_CHECKING:
    from PIL import Image as Pictures

QUALITY = 95
"""Of the JPEG files written; 4:4:4 colour, so that scaling again costs little."""

PER_SHARD = 5000
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


@dataclass(frozen=True)
class Conversion:
    """How images are written.

    Args:
        shorter_side: images with a longer one are scaled down to it, antialiased; None keeps every
            size.
        webdataset: shards instead of a tree.
        per_shard: images per shard.
    """

    shorter_side: int | None = None
    webdataset: bool = False
    per_shard: int = PER_SHARD

    def __post_init__(self) -> None:
        if self.shorter_side is None and not self.webdataset:
            raise ConfigError("nothing to convert: give --shorter-side N, --webdataset, or both")
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ConfigError(
                f"shorter_side={self.shorter_side}: it is a number of pixels, 1 or more"
            )
        if self.per_shard < 1:
            raise ConfigError(f"per_shard={self.per_shard}: it is a number of images, 1 or more")


class Outcome(NamedTuple):
    """What became of a conversion: how many images were written, how many were there already, and
    where.
    """

    written: int
    kept: int
    out: Path


class _Job(NamedTuple):
    """Files to write as one: an image of the tree, or a shard."""

    target: Path
    images: tuple[Image, ...]
    labels: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.target.name


class _Result(NamedTuple):
    written: int
    kept: int
    failures: tuple[tuple[str, str], ...] = ()  # image and reason


def convert_dataset(
    spec: str | Path,
    out: Path,
    conversion: Conversion,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write a dataset anew.

    Images that are small enough, upright and in RGB or grey are copied byte for byte; others are
    written as JPEG where they were, and as PNG where they were anything else.

    Args:
        spec: as for ``open_dataset``; it must be made of image files.
        out: the folder to write to: new, empty, or of the same conversion.
        conversion: how.
        workers: processes; one per usable core by default.
        progress: called with (files done, files in all): images of a tree, or shards.

    Raises:
        ConfigError: ``out`` holds something else, or what was made of pictures that have changed
            since.
        DataError: the dataset is not sound, or images cannot be decoded: all others are written
            then, and the bad ones named.
        StorageError: the disk refused.
    """
    kind, path = resolve(spec)
    if kind.files is None:
        raise DataError(f"{show(spec)} is not made of image files; there is nothing to convert")
    source = kind.files(path)
    images = images_of(source)
    record = {
        "finished": False,
        "shorter_side": conversion.shorter_side,
        "format": "webdataset" if conversion.webdataset else "tree",
        "per_shard": conversion.per_shard if conversion.webdataset else None,
        "quality": QUALITY,
        "images": len(images),
        "source": _fingerprint(images),
    }
    _claim(out, record, images)
    if conversion.webdataset:
        write_atomically(
            out / CLASSES_FILE,
            lambda file: file.write("".join(f"{name}\n" for name in source.classes).encode()),
        )
        jobs = _shard_jobs(
            out, images, {name: i for i, name in enumerate(source.classes)}, conversion.per_shard
        )
    else:
        jobs = _tree_jobs(out, images)
    write = partial(
        _write_shard if conversion.webdataset else _write_image,
        shorter_side=conversion.shorter_side,
    )
    results = run_in_processes(
        write, jobs, workers, progress, chunk=1 if conversion.webdataset else 16
    )
    failures = [failure for result in results for failure in result.failures]
    if failures:
        names = {name for name, _ in failures}
        bad = [i for i, image in enumerate(images) if image.name in names]
        write_json(
            out / CONVERSION_FILE, {**record, "bad": bad, "source": _fingerprint(images, bad)}
        )
        listed = first_of([f"{name} ({reason})" for name, reason in failures])
        raise DataError(
            f"{show(source.root or spec)}: {len(failures)} of {len(images)} images cannot be"
            f" decoded: {listed}; the others are written to {show(out)}. Mend them and call again,"
            " or convert the list that 'fastokd data check --write-list' makes"
        )
    write_json(out / CONVERSION_FILE, {**record, "finished": True})
    return Outcome(
        sum(result.written for result in results), sum(result.kept for result in results), out
    )


def _fingerprint(images: Sequence[Image], bad: Iterable[int] = ()) -> str:
    """A hash of the images' names and labels, and of their files' sizes and times, but for ``bad``
    ones, which are to be mended.
    """
    status = {path: _status(path) for path in dict.fromkeys(image.path for image in images)}
    left_out = set(bad)
    listed = [
        (i.split, i.label, i.name, None if place in left_out else status[i.path])
        for place, i in enumerate(images)
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _status(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # reported where it is read
        return None
    return status.st_size, status.st_mtime_ns


def _claim(out: Path, record: dict[str, Any], images: Sequence[Image]) -> None:
    """Make ``out`` the place of this conversion, or find that it is."""
    file = out / CONVERSION_FILE
    try:
        there = json.loads(file.read_text())
    except FileNotFoundError:
        try:
            taken = os.path.exists(out) and (not os.path.isdir(out) or bool(os.listdir(out)))
        except OSError as error:
            raise StorageError(f"cannot use {show(out)}: {error.strerror}") from error
        if taken:
            raise ConfigError(
                f"{show(out)} is not empty; give a new folder for what is converted"
            ) from None
        write_json(file, record)
        return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{show(file)} cannot be read ({show(error)}); give a new folder"
        ) from None
    differing = [
        f"{key} {there.get(key)!r} there, {value!r} now"
        for key, value in record.items()
        if key not in ("finished", "source") and there.get(key) != value
    ]
    if differing:
        raise ConfigError(
            f"{show(out)} holds another conversion ({'; '.join(differing)}); give a new folder"
        )
    bad = there.get("bad", [])
    if there.get("source") != _fingerprint(images, bad):
        raise ConfigError(
            f"{show(out)} was converted from other files, or from pictures that changed since; give"
            " a new folder"
        )
    if bad:  # mended now: from here on they are not to change either
        write_json(file, record)


def _tree_jobs(out: Path, images: Sequence[Image]) -> list[_Job]:
    jobs, taken = [], set()
    for image in images:
        if os.path.basename(image.label) != image.label or image.label.startswith("."):
            raise DataError(
                f"the class {show(image.label)} cannot be the name of a folder; rename it, or"
                " convert with --webdataset"
            )
        stem, extension = os.path.splitext(os.path.basename(image.name))
        if extension.lower() not in _FORMATS:
            stem, extension = stem + extension, ".png"
        target = out / image.split / image.label / (stem + extension)
        if target in taken:  # of another folder of the same class
            target = target.with_name(
                f"{stem}-{hashlib.sha256(os.fsencode(image.name)).hexdigest()[:8]}{extension}"
            )
        taken.add(target)
        jobs.append(_Job(target, (image,)))
    return jobs


def _shard_jobs(
    out: Path, images: Sequence[Image], number: dict[str, int], per_shard: int
) -> list[_Job]:
    """Training images are shuffled once, because shards are read in order; the same way every time,
    or no shard could be kept.
    """
    jobs = []
    for split in dict.fromkeys(image.split for image in images):
        members = [image for image in images if image.split == split]
        if split == "train":
            members = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
        for start in range(0, len(members), per_shard):
            part = tuple(members[start : start + per_shard])
            jobs.append(
                _Job(
                    out / f"{split}-{start // per_shard:06}.tar",
                    part,
                    tuple(number[image.label] for image in part),
                )
            )
    return jobs


def _write_image(job: _Job, shorter_side: int | None) -> _Result:
    if _is_whole(job.target, shorter_side):
        return _Result(0, 1)
    try:
        content = _converted(job.images[0], _FORMATS[job.target.suffix.lower()], shorter_side)
    except Exception as error:  # a decoder may raise anything at all for damaged bytes
        return _Result(0, 0, ((job.images[0].name, reason_of(error)),))
    # Not every file waits for the disk: what a lost machine left incomplete is found incomplete and
    # written again.
    write_atomically(job.target, lambda file: file.write(content), durable=False)
    return _Result(1, 0)


def _is_whole(target: Path, shorter_side: int | None) -> bool:
    """Whether an image was written before, to its end."""
    if not os.path.isfile(target):
        return False
    try:
        picture = decode(target)
    except Exception:
        return False
    return shorter_side is None or min(picture.size) <= shorter_side


def _write_shard(job: _Job, shorter_side: int | None) -> _Result:
    if os.path.isfile(job.target):
        try:
            if [sample.label for sample in read_shard(job.target)] == [
                str(label) for label in job.labels
            ]:
                return _Result(0, len(job.images))
        except DataError:  # damaged since: written again
            pass
    failures: list[tuple[str, str]] = []

    def write(file: BinaryIO) -> None:
        failures.clear()  # written a second time after an error of the disk that passed
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for i, (image, label) in enumerate(zip(job.images, job.labels, strict=True)):
                extension = os.path.splitext(image.name)[1].lower()
                extension = extension if extension in _FORMATS else ".png"
                try:
                    content = _converted(image, _FORMATS[extension], shorter_side)
                except Exception as error:  # a decoder may raise anything at all for damaged bytes
                    failures.append((image.name, reason_of(error)))
                    continue
                for name, data in (
                    (f"{i:06}{extension}", content),
                    (f"{i:06}.cls", str(label).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        if failures:
            raise _Incomplete

    try:
        write_atomically(job.target, write)
    except _Incomplete:
        return _Result(0, 0, tuple(failures))
    return _Result(len(job.images), 0)


class _Incomplete(Exception):
    """A shard with bad images is not written."""


def _converted(image: Image, file_format: str, shorter_side: int | None) -> bytes:
    """The bytes to write: those that are there if they will do."""
    from PIL import Image as Pictures

    content = read_image(image)
    with Pictures.open(io.BytesIO(content)) as picture:
        small = shorter_side is None or min(picture.size) <= shorter_side
        as_it_is = (
            small
            and picture.format == file_format
            and picture.mode in ("RGB", "L")
            and picture.getexif().get(0x0112, 1) == 1
        )
    decoded = decode(
        io.BytesIO(content)
    )  # also where its bytes are copied: what is damaged is found now
    if as_it_is:
        return content
    if not small:
        decoded = _scaled(decoded, shorter_side)
    out = io.BytesIO()
    if file_format == "JPEG":
        decoded.save(out, "JPEG", quality=QUALITY, subsampling=0)
    else:
        decoded.save(out, "PNG")
    return out.getvalue()


def _scaled(picture: "Pictures.Image", shorter_side: int) -> "Pictures.Image":
    from PIL import Image as Pictures

    width, height = picture.size
    shorter = min(width, height)
    return picture.resize(
        (shorter_side * width // shorter, shorter_side * height // shorter),
        Pictures.Resampling.BILINEAR,
    )
