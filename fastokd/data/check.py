"""Check every image of a dataset before training and report what is wrong.

Problems stop a run or make its results wrong; remarks do neither. Unlike opening a dataset,
checking a folder tree continues after a problem, so that one call finds all of them.
"""

import csv
import hashlib
import io
import math
import multiprocessing
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit, read_bytes
from fastokd.data.folder import LAYOUT, list_tree, walk_tree
from fastokd.data.images import Progress, decode, default_workers, reason_of
from fastokd.data.registry import resolve
from fastokd.errors import DataError, escape
from fastokd.storage import write_atomically

TINY_SIDE = 8
HUGE_PIXELS = 50_000_000
_CHUNK = 16

PROBLEMS = {
    "empty file": "zero bytes",
    "unreadable": "cannot be opened",
    "permission": "cannot be opened: permission denied",
    "truncated": "ends before its pixels do",
    "damaged": "a checksum is wrong",
    "not an image": "no format that can be decoded",
    "too large": "more pixels than a decoder accepts; scale it down",
    "empty class": "a class folder without images",
    "one-sided class": "a class that some split does not have",
    "no labels": "images of unknown class",
    "refused": "a structure that training refuses",
    "duplicate across splits": "the same image in training and evaluation",
    "duplicate across classes": "the same image under two labels",
}
"""Kinds of problems, which stop a run or make its results wrong, and their meaning."""

REMARKS = {
    "misnamed": "the content has another format than the name; it is decoded by its content",
    "huge": (
        f"more than {HUGE_PIXELS // 10**6} million pixels, which slow every epoch down; 'fastokd"
        " data convert' makes them smaller"
    ),
    "tiny": f"a side below {TINY_SIDE} pixels",
    "duplicate": "the same image twice in one class and split",
    "not an image file": "not an image by its name, or in no class folder; ignored",
}
"""Kinds of remarks and their meaning."""


class Image(NamedTuple):
    """An image to check: its split ("" without splits), class, name, file, and byte range there."""

    split: str
    label: str
    name: str
    path: str
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return self.name


class Look(NamedTuple):
    """The result of checking one image: findings (kind and detail), size, format, mode, and hashes
    of its bytes and of its pixels.
    """

    findings: tuple[tuple[str, str], ...]
    height: int = 0
    width: int = 0
    format: str = ""
    mode: str = ""
    content: bytes = b""
    pixels: bytes = b""


@dataclass
class Report:
    """The result of checking a dataset.

    Attributes:
        root: the folder that names are relative to.
        images, classes: their number in each split.
        problems, remarks: for each kind in ``PROBLEMS`` and ``REMARKS``, the names of the images
            with details.
        formats, modes: the number of images of each.
        sizes: [height, width] of the smallest and of the largest image.
        clean: path, label and split of the images without problems.
    """

    root: Path
    images: dict[str, int]
    classes: dict[str, int]
    problems: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    clean: list[tuple[str, str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Plain values for a file, with the length of the clean list instead of the list."""
        values = asdict(self)
        clean = values.pop("clean")
        return {**values, "root": str(self.root), "clean_images": len(clean)}

    def write_clean(self, file: Path) -> None:
        """Write the images without problems as a CSV list (path, label and split) for ``--data``.

        Raises:
            DataError: no image is left.
            StorageError: the disk refused.
        """
        if not self.clean:
            problem = "no image file without problems is left to list"
            raise invalid(self.root, f"{problem} (images in archives cannot be listed)")
        folder = file.absolute().parent
        rows: list[tuple[object, str, str]] = [("path", "label", "split")]
        for name, label, split in self.clean:
            path = Path(os.path.abspath(self.root / name))
            path = path.relative_to(folder) if path.is_relative_to(folder) else path
            rows.append((path, label, split))
        columns = 3 if any(split for _, _, split in self.clean) else 2
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(row[:columns] for row in rows)
        content = text.getvalue().encode("utf-8", "surrogateescape")
        write_atomically(file, lambda out: out.write(content))


def check_dataset(
    spec: str | Path, workers: int | None = None, progress: Progress | None = None
) -> Report:
    """Check every image of a dataset.

    Args:
        spec: as for ``open_dataset``; the dataset must be made of image files.
        workers: processes that decode; one per usable core by default.
        progress: called with (images done, images in all).

    Raises:
        DataError: no images, or a list or archive whose structure is wrong.
    """
    kind, path = resolve(spec)
    if kind.files is None:
        raise DataError(f"{escape(spec)} is not made of image files; opening it checks its content")
    found: dict[str, list[str]] = defaultdict(list)
    if path is not None and os.path.isdir(path) and kind.list_split:
        root, images = path, _images_of_tree(path, found)
        if not images:
            list_tree(path)  # raises an error about the contents
    else:
        source = kind.files(path)
        root, images = source.train.root, images_of(source)
    if not images:
        raise invalid(root, f"no images there; pass a folder with {LAYOUT}, or <class>/")
    looks = run_in_processes(look_at, images, workers, progress)
    labels: dict[str, set[str]] = {image.split: set() for image in images}
    for image in images:
        labels[image.split] |= {image.label} - {""}
    everywhere = set().union(*labels.values())
    for split, names in labels.items():
        missing = sorted(everywhere - names) if names else []
        found["one-sided class"] += [f"{label} (not in {split})" for label in missing]
    for image, look in zip(images, looks, strict=True):
        for kind_of_finding, detail in look.findings:
            found[kind_of_finding].append(f"{image.name} ({detail})" if detail else image.name)
    dropped = _find_duplicates(images, looks, found)
    clean = [
        (image.name, image.label, image.split)
        for i, (image, look) in enumerate(zip(images, looks, strict=True))
        if i not in dropped and image.label and image.size < 0 and look.format
    ]
    # A class without training images cannot be learned, so its evaluation images are dropped.
    learned = {label for _, label, split in clean if split in ("train", "")}
    valid = [look for look in looks if look.format]
    sizes = sorted(((look.height, look.width) for look in valid), key=math.prod)
    return Report(
        root,
        images=dict(Counter(image.split for image in images)),
        classes={split: len(names) for split, names in labels.items()},
        problems={finding: found[finding] for finding in PROBLEMS if found.get(finding)},
        remarks={finding: found[finding] for finding in REMARKS if found.get(finding)},
        formats=dict(Counter(look.format for look in valid).most_common()),
        modes=dict(Counter(look.mode for look in valid).most_common()),
        sizes=(sizes[0], sizes[-1]) if sizes else None,
        clean=[row for row in clean if row[1] in learned],
    )


def _images_of_tree(root: Path, found: dict[str, list[str]]) -> list[Image]:
    """All images of a tree; problems of its structure are added to ``found``."""
    images = []
    for listing in walk_tree(root):
        for finding in listing.findings:
            found[finding.kind].append(finding.entry)
        found["not an image file"] += listing.ignored
        images += [
            Image(listing.split, label, os.path.relpath(file, root), file)
            for file, label in zip(listing.files, listing.labels, strict=True)
        ]
    known = any(found[kind] for kind in ("permission", "empty class", "no labels", "refused"))
    if not known and {image.split for image in images} & {"train", ""}:
        try:
            list_tree(root)
        except DataError as error:
            if "class(es) in " not in str(error):  # reported as "one-sided class"
                found["refused"].append(str(error))
    return images


def images_of(source: DataSource[FileSplit]) -> list[Image]:
    """The images of a listed dataset."""
    images = []
    for split in source.splits:
        for i, target in enumerate(split.targets.tolist()):
            label = source.classes[target]
            images.append(Image(split.name, label, split.files[i], *split.location(i)))
    return images


def look_at(image: Image) -> Look:
    """Read, decode and check one image. Never raises."""
    from PIL import Image as PIL

    try:
        content = read_bytes(image.path, image.offset, image.size)
    except PermissionError:
        return Look((("permission", ""),))
    except OSError as error:
        return Look((("unreadable", error.strerror or escape(error)),))
    if not content:
        return Look((("empty file", ""),))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.DecompressionBombWarning)  # reported as "huge"
            with PIL.open(io.BytesIO(content)) as encoded:
                width, height = encoded.size
                file_format, mode = encoded.format or "", encoded.mode
            decoded = decode(io.BytesIO(content))
    except PIL.DecompressionBombError as error:
        # Up to the comma, the message has the number of pixels and the limit.
        return Look((("too large", escape(error).partition(",")[0]),))
    except Exception as error:  # a decoder may raise any exception for damaged bytes
        reason = reason_of(error)
        signs = ("truncated", "broken data stream", "not enough", "unexpected end")
        cut = any(sign in reason.lower() for sign in signs)
        broken = "damaged" if reason.startswith("damaged") else "not an image"
        return Look((("truncated" if cut else broken, escape(reason)),))
    findings = []
    named = PIL.registered_extensions().get(os.path.splitext(image.name)[1].lower())
    # A JPEG with further images in it, as phones write them, still counts as JPEG.
    actual = "JPEG" if named == "JPEG" and file_format == "MPO" else file_format
    if named not in (None, actual) and {named, actual} != {"PPM", "PGM"}:
        findings.append(("misnamed", f"it is {file_format}"))
    if width * height > HUGE_PIXELS:
        findings.append(("huge", f"{height} x {width}"))
    if min(height, width) < TINY_SIDE:
        findings.append(("tiny", f"{height} x {width}"))
    pixels = _hash(f"{decoded.height} {decoded.width} ".encode() + decoded.tobytes())
    return Look(tuple(findings), height, width, file_format, mode, _hash(content), pixels)


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None,
    progress: Progress | None,
    chunk: int = _CHUNK,
) -> list[Result]:
    """Apply a function to every item, in order; in this process if one worker is enough. A decoder
    that crashes ends only its worker process.

    Raises:
        DataError: a worker process died; the message names the items it worked on.
    """
    workers = min(workers or default_workers(), max(1, len(items) // chunk))
    results: list[Result] = []

    def collect(result: Result) -> None:
        results.append(result)
        if progress is not None and (len(results) % chunk == 0 or len(results) == len(items)):
            progress(len(results), len(items))

    if workers == 1:
        for item in items:
            collect(function(item))
        return results
    # Forked workers start fastest; they only decode, so they need none of their parent's threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
    try:
        for result in pool.map(function, items, chunksize=chunk):
            collect(result)
    except BrokenProcessPool:
        place = f"among {escape(items[len(results)])} and the {workers * chunk} after it"
        reason = f"out of memory or by a damaged file {place}"
        raise DataError(f"a decoding process died, {reason}; try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _find_duplicates(
    images: Sequence[Image], looks: Sequence[Look], found: dict[str, list[str]]
) -> set[int]:
    """Report images that occur more than once, by their pixels; returns the indices of those that a
    clean list omits.

    Of an image in training and evaluation, the training copies are dropped; of an image under two
    labels, all training copies.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, look in enumerate(looks):
        if look.pixels:
            groups[look.pixels].append(i)
    dropped: set[int] = set()
    for copies in groups.values():
        if len(copies) == 1:
            continue
        named = " = ".join(images[i].name for i in copies)
        if len({looks[i].content for i in copies}) > 1:
            named += " (the same pixels in other bytes)"
        labels, splits = {images[i].label for i in copies} - {""}, {images[i].split for i in copies}
        training = {i for i in copies if images[i].split in ("train", "")}
        if len(labels) > 1:
            found["duplicate across classes"].append(named)
            dropped |= training
        if len(splits) > 1 and "train" in splits:
            found["duplicate across splits"].append(named)
            dropped |= training
        if len(labels) <= 1 and len(splits) == 1:
            found["duplicate"].append(named)
    return dropped
