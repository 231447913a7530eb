"""Write a dataset of image files again, scaled down to a shorter side, as a tree of class folders.

Every file appears complete or not at all, and complete files are kept: after an interruption, the
same call continues. It refuses to continue if a source image changed. Loaders refuse the folder
until the conversion has finished.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.data.check import Image, images_of, run_in_processes
from fastokd.data.dataset import invalid
from fastokd.data.decoding import Color
from fastokd.data.files import CONVERSION_FILE, read_bytes
from fastokd.data.images import Progress, decode, reason_of
from fastokd.data.registry import list_source
from fastokd.errors import ConfigError, DataError, StorageError, escape, summarize
from fastokd.storage import write_atomically, write_json

QUALITY = 95
"""JPEG quality of written files; with 4:4:4 color, so that scaling them again loses little."""

_NEW = "pass a new folder"
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


class Outcome(NamedTuple):
    """The result of a conversion: images written now, images kept from before, and the folder."""

    written: int
    kept: int
    out: Path


class _Job(NamedTuple):
    image: Image
    target: Path

    def __str__(self) -> str:
        return self.target.name


def convert_dataset(
    spec: str | Path,
    out: Path,
    shorter_side: int,
    workers: int | None = None,
    progress: Progress | None = None,
    background: Color | None = None,
) -> Outcome:
    """Scale a dataset's images down to a shorter side, antialiased.

    Images that are small enough, upright and RGB or grayscale are copied byte for byte. Others are
    written as JPEG if they were JPEG, else as PNG.

    Args:
        spec: as for ``open_dataset``; the dataset must be made of image files.
        out: the folder to write to: new, empty, or holding the same conversion.
        shorter_side: pixels, 1 or more.
        workers: processes; one per usable core by default.
        progress: called with (images done, images in all).
        background: the color behind transparent pixels; None drops the transparency of images that
            are not copied.

    Raises:
        ConfigError: ``shorter_side`` is out of range, or ``out`` holds something else or images of
            source files that have changed since.
        DataError: the dataset is invalid, or images cannot be decoded; then all others are written
            and the corrupt ones named.
        StorageError: the disk refused.
    """
    if shorter_side < 1:
        raise ConfigError(f"shorter_side={shorter_side}: must be 1 or more pixels")
    source = list_source(spec)
    images = images_of(source)
    record = {
        "finished": False,
        "shorter_side": shorter_side,
        "format": "tree",
        "quality": QUALITY,
        "images": len(images),
        "source": _fingerprint(images),
        "background": None if background is None else list(background),
    }
    _claim(out, record, images)
    write = functools.partial(_write_image, shorter_side=shorter_side, background=background)
    results = run_in_processes(write, _jobs(out, images), workers, progress)
    corrupt = {i: reason for i, (_, reason) in enumerate(results) if reason is not None}
    if corrupt:
        fingerprint = _fingerprint(images, corrupt)
        write_json(out / CONVERSION_FILE, {**record, "bad": [*corrupt], "source": fingerprint})
        listed = summarize([f"{images[i].name} ({reason})" for i, reason in corrupt.items()])
        problem = f"{len(corrupt)} of {len(images)} images cannot be decoded: {listed}"
        rest = f"the others are written to {escape(out)}"
        fix = "Fix them and repeat the command, or convert a list of 'fastokd data check'"
        raise invalid(source.root or spec, f"{problem}; {rest}. {fix}")
    write_json(out / CONVERSION_FILE, {**record, "finished": True})
    written = sum(is_new for is_new, _ in results)
    return Outcome(written, len(images) - written, out)


def _fingerprint(images: Sequence[Image], corrupt: Iterable[int] = ()) -> str:
    """A hash of the images' names and labels and of their files' sizes and times, except those of
    corrupt images, which may be fixed.
    """

    @functools.cache
    def status(path: str) -> tuple[int, int] | None:
        try:
            result = os.stat(path)
        except OSError:  # reported when it is read
            return None
        return result.st_size, result.st_mtime_ns

    skipped = set(corrupt)
    listed = [
        (image.split, image.label, image.name, None if i in skipped else status(image.path))
        for i, image in enumerate(images)
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _claim(out: Path, record: dict[str, Any], images: Sequence[Image]) -> None:
    """Start the conversion in ``out``, or check that ``out`` holds the same conversion."""
    file = out / CONVERSION_FILE
    try:
        before = json.loads(file.read_text())
    except FileNotFoundError:
        try:
            taken = os.path.exists(out) and (not os.path.isdir(out) or bool(os.listdir(out)))
        except OSError as error:
            raise StorageError(f"cannot use {escape(out)}: {error.strerror}") from error
        if taken:
            raise ConfigError(f"{escape(out)} is not empty; {_NEW}") from None
        write_json(file, record)
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{escape(file)} cannot be read ({escape(error)}); {_NEW}") from None
    differences = [
        f"{key} {before.get(key)!r} before, {value!r} now"
        for key, value in record.items()
        if key not in ("finished", "source") and before.get(key) != value
    ]
    if differences:
        different = "; ".join(differences)
        raise ConfigError(f"{escape(out)} holds another conversion ({different}); {_NEW}")
    corrupt = before.get("bad", [])
    if before.get("source") != _fingerprint(images, corrupt):
        reason = "was converted from other files, or source images changed since"
        raise ConfigError(f"{escape(out)} {reason}; {_NEW}")
    if corrupt:  # fixed now: from here on they must not change either
        write_json(file, record)


def _jobs(out: Path, images: Sequence[Image]) -> list[_Job]:
    jobs, taken = [], set()
    for image in images:
        if os.path.basename(image.label) != image.label or image.label.startswith("."):
            label = escape(image.label)
            raise DataError(f"the class {label} cannot be the name of a folder; rename it")
        stem, extension = os.path.splitext(os.path.basename(image.name))
        if extension.lower() not in _FORMATS:
            stem, extension = stem + extension, ".png"
        target = out / image.split / image.label / (stem + extension)
        if target in taken:  # the same name in another folder of the class
            digest = hashlib.sha256(os.fsencode(image.name)).hexdigest()[:8]
            target = target.with_name(f"{stem}-{digest}{extension}")
        taken.add(target)
        jobs.append(_Job(image, target))
    return jobs


def _write_image(job: _Job, shorter_side: int, background: Color | None) -> tuple[bool, str | None]:
    """Write one image unless it is complete: whether it was written, and why it cannot be."""
    with contextlib.suppress(Exception):  # it is missing or incomplete
        if min(decode(job.target).size) <= shorter_side:
            return False, None
    try:
        file_format = _FORMATS[job.target.suffix.lower()]
        content = converted_bytes(job.image, file_format, shorter_side, background)
    except Exception as error:  # a decoder may raise any exception for damaged bytes
        return False, reason_of(error)
    # Not synchronized to the disk: a file that a crash leaves incomplete is detected and rewritten.
    write_atomically(job.target, lambda file: file.write(content), durable=False)
    return True, None


def converted_bytes(
    image: Image, file_format: str, shorter_side: int, background: Color | None = None
) -> bytes:
    """The bytes to write: the image's own where possible."""
    from PIL import Image as PIL

    content = read_bytes(image.path, image.offset, image.size)
    with PIL.open(io.BytesIO(content)) as original:
        is_small = min(original.size) <= shorter_side
        upright = original.getexif().get(0x0112, 1) == 1
        plain = original.format == file_format and original.mode in ("RGB", "L")
        if background is not None:
            plain = plain and not original.has_transparency_data
    decoded = decode(io.BytesIO(content), background)  # also before a copy, to find damage now
    if is_small and plain and upright:
        return content
    if not is_small:
        width, height = decoded.size
        shorter = min(width, height)
        size = (shorter_side * width // shorter, shorter_side * height // shorter)
        decoded = decoded.resize(size, PIL.Resampling.BILINEAR)
    out = io.BytesIO()
    options = {"quality": QUALITY, "subsampling": 0} if file_format == "JPEG" else {}
    decoded.save(out, file_format, **options)
    return out.getvalue()
