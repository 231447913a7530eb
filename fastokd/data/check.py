"""Looks at every image of a dataset before it is trained on, and says what is wrong with it.

Problems stop a run or make its numbers wrong; remarks are worth knowing and do neither. Unlike
opening a dataset, looking at a folder tree goes on after what is wrong with it, so that one look
finds all of it.
"""

import csv
import hashlib
import io
import multiprocessing
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit
from fastokd.data.folder import (
    entries,
    flat_images,
    identity,
    is_folder,
    is_image,
    split_folders,
    walk,
)
from fastokd.data.images import Progress, decode, default_workers, reason_of, show
from fastokd.data.label_list import find_label_file, read_label_file
from fastokd.data.registry import resolve
from fastokd.errors import DataError
from fastokd.storage import write_atomically

TINY_SIDE = 8
HUGE_PIXELS = 50_000_000
_CHUNK = 16

PROBLEMS = {
    "empty file": "zero bytes",
    "unreadable": "cannot be opened",
    "permission": "cannot be opened: permission denied",
    "truncated": "ends before its pixels do",
    "not an image": "no format that can be decoded",
    "too large": "more pixels than a decoder takes; scale it down",
    "empty class": "a class folder without images",
    "one-sided class": "a class that some split does not have",
    "no labels": "images that nothing says the class of",
    "duplicate across splits": "the same picture in training and evaluation",
    "duplicate across classes": "the same picture under two labels",
}
"""What stops a run or makes its numbers wrong, and what it means."""

REMARKS = {
    "misnamed": "the content is of another format than the name says; it is decoded by its content",
    "huge": (
        f"more than {HUGE_PIXELS // 10**6} million pixels, which slow every epoch down; 'fastokd"
        " data convert' makes them smaller"
    ),
    "tiny": f"a side below {TINY_SIDE} pixels",
    "duplicate": "the same picture twice in one class and split",
    "not an image file": "no image by its name; passed over",
}
"""What is worth knowing, and what it means."""

_BAD = frozenset(
    {"empty file", "unreadable", "permission", "truncated", "not an image", "too large"}
)


class Image(NamedTuple):
    """An image to look at: its split ("" where there are none yet), class, name, and where its
    bytes are.
    """

    split: str
    label: str
    name: str
    path: str
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return self.name


class Look(NamedTuple):
    """What one image is like: what is wrong with it, its size, format and colours, and hashes of
    its bytes and its pixels.
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
    """What a look at a dataset found.

    Attributes:
        root: the folder that names are relative to.
        images: how many there are in each split.
        classes: how many there are in each split.
        problems, remarks: of each kind in ``PROBLEMS`` and ``REMARKS`` what was found: each a name
            and details.
        formats, modes: how many images are of each.
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

    def as_json(self) -> dict[str, Any]:
        """Plain values for a file; the clean list is not among them."""
        return {
            "root": str(self.root),
            "images": self.images,
            "classes": self.classes,
            "problems": self.problems,
            "remarks": self.remarks,
            "formats": self.formats,
            "modes": self.modes,
            "sizes": None if self.sizes is None else [list(size) for size in self.sizes],
            "clean_images": len(self.clean),
        }

    def write_clean(self, file: Path) -> None:
        """Write the list of images without problems, as ``--data`` takes it: CSV of path, label and
        split.

        Raises:
            DataError: no image is left.
            StorageError: the disk refused.
        """
        if not self.clean:
            raise DataError(
                f"{show(self.root)}: no image file without problems is left to list (pictures in"
                " archives are none)"
            )
        here = file.absolute().parent
        with_splits = any(split for _, _, split in self.clean)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "split"][: 3 if with_splits else 2])
        for name, label, split in self.clean:
            path = Path(os.path.abspath(self.root / name))
            path = path.relative_to(here) if path.is_relative_to(here) else path
            writer.writerow([path, label, split][: 3 if with_splits else 2])
        write_atomically(
            file, lambda out: out.write(text.getvalue().encode("utf-8", "surrogateescape"))
        )


def check_dataset(
    spec: str | Path, workers: int | None = None, progress: Progress | None = None
) -> Report:
    """Look at every image of a dataset.

    Args:
        spec: as for ``open_dataset``; it must be made of image files.
        workers: processes that decode; one per usable core by default.
        progress: called with (images done, images in all).

    Raises:
        DataError: nothing to look at, or a list or archive whose structure is wrong.
    """
    kind, path = resolve(spec)
    if kind.files is None:
        raise DataError(
            f"{show(spec)} is not made of image files; there is nothing to check that opening it"
            " does not"
        )
    found: dict[str, list[str]] = defaultdict(list)
    if path is not None and os.path.isdir(path) and kind.list_split:
        root, images = path, _walk_tree(path, found)
    else:
        source = kind.files(path)
        root, images = source.train.root, images_of(source)
    if not images:
        raise DataError(
            f"{show(root)}: no images there; give a folder with train/<class>/ and val/<class>/, or"
            " <class>/"
        )
    looks = look_at_all(images, workers, progress)
    _compare_classes(images, found)
    for image, look in zip(images, looks, strict=True):
        for what, detail in look.findings:
            found[what].append(f"{image.name} ({detail})" if detail else image.name)
    dropped = _find_duplicates(images, looks, found)
    clean = [
        (image.name, image.label, image.split)
        for i, (image, look) in enumerate(zip(images, looks, strict=True))
        if i not in dropped
        and image.label
        and image.size < 0
        and not any(what in _BAD for what, _ in look.findings)
    ]
    # Without training images nobody can learn what evaluation images of a class show.
    learned = {label for _, label, split in clean if split in ("train", "")}
    good = [look for look in looks if look.format]
    sizes = sorted(((look.height, look.width) for look in good), key=lambda size: size[0] * size[1])
    per_split: dict[str, set[str]] = defaultdict(set)
    for image in images:
        per_split[image.split].add(image.label)
    return Report(
        root,
        dict(Counter(image.split for image in images)),
        {split: len(labels - {""}) for split, labels in per_split.items()},
        {what: found[what] for what in PROBLEMS if found.get(what)},
        {what: found[what] for what in REMARKS if found.get(what)},
        dict(Counter(look.format for look in good).most_common()),
        dict(Counter(look.mode for look in good).most_common()),
        (sizes[0], sizes[-1]) if sizes else None,
        [row for row in clean if row[1] in learned],
    )


def images_of(source: DataSource[FileSplit]) -> list[Image]:
    """The images of a listed dataset."""
    images = []
    for split in source.splits:
        whole = split.members is None
        for i, target in enumerate(split.targets.tolist()):
            place = (0, -1) if whole else (int(split.members.offset[i]), int(split.members.size[i]))
            images.append(
                Image(split.name, source.classes[target], split.files[i], split.path(i), *place)
            )
    return images


def read_image(image: Image) -> bytes:
    """The encoded bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(image.path, "rb") as file:
        file.seek(image.offset)
        return file.read(image.size)


def look_at(image: Image) -> Look:
    """Read and decode one image, and say what is wrong with it. Never raises."""
    from PIL import Image as Pictures

    try:
        content = read_image(image)
    except PermissionError:
        return Look((("permission", ""),))
    except OSError as error:
        return Look((("unreadable", error.strerror or show(error)),))
    if not content:
        return Look((("empty file", ""),))
    findings = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pictures.DecompressionBombWarning)  # the report says it
            with Pictures.open(io.BytesIO(content)) as picture:
                width, height = picture.size
                file_format, mode = picture.format or "", picture.mode
            decoded = decode(io.BytesIO(content))
        extension = os.path.splitext(image.name)[1].lower()
        named = Pictures.registered_extensions().get(extension)
        # A JPEG with further pictures in it, as phones write them, is still one.
        if (
            named is not None
            and named != ("JPEG" if file_format == "MPO" else file_format)
            and {named, file_format} != {"PPM", "PGM"}
        ):
            findings.append(("misnamed", f"it is {file_format}"))
        if width * height > HUGE_PIXELS:
            findings.append(("huge", f"{height} x {width}"))
        if min(height, width) < TINY_SIDE:
            findings.append(("tiny", f"{height} x {width}"))
    except Pictures.DecompressionBombError as error:
        return Look(
            (("too large", show(error).partition(",")[0]),)
        )  # up to the comma it says how many there are and may be
    except Exception as error:  # a decoder may raise anything at all for damaged bytes
        reason = reason_of(error)
        cut = any(
            word in reason.lower()
            for word in ("truncated", "broken data stream", "not enough", "unexpected end")
        )
        return Look((("truncated" if cut else "not an image", show(reason)),))
    shape = f"{decoded.height} {decoded.width} ".encode()
    return Look(
        tuple(findings),
        height,
        width,
        file_format,
        mode,
        _hash(content),
        _hash(shape + decoded.tobytes()),
    )


def look_at_all(
    images: Sequence[Image], workers: int | None = None, progress: Progress | None = None
) -> list[Look]:
    """``look_at`` each, in processes: a decoder that crashes takes none of the others with it.

    Raises:
        DataError: a process died; the message names the images it was looking at.
    """
    return run_in_processes(look_at, images, workers, progress)


def run_in_processes(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int | None,
    progress: Progress | None,
    chunk: int = _CHUNK,
) -> list[Any]:
    """``function`` of every item, in order; in this process if one worker is enough.

    Raises:
        DataError: a process died.
    """
    workers = min(workers or default_workers(), max(1, len(items) // chunk))
    results: list[Any] = []
    if workers == 1:
        for item in items:
            results.append(function(item))
            _report(progress, results, items, chunk)
        return results
    # Forked, a worker starts at once; it decodes and does nothing else, so it needs no thread of
    # its parent.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method))
    try:
        for result in pool.map(function, items, chunksize=chunk):
            results.append(result)
            _report(progress, results, items, chunk)
    except BrokenProcessPool:
        raise DataError(
            "a decoding process died, out of memory or by a damaged file among"
            f" {show(items[len(results)])} and the {workers * chunk} after it; try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _report(
    progress: Progress | None, results: Sequence[Any], items: Sequence[Any], chunk: int
) -> None:
    if progress is not None and (len(results) % chunk == 0 or len(results) == len(items)):
        progress(len(results), len(items))


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _walk_tree(root: Path, found: dict[str, list[str]]) -> list[Image]:
    """All images of a tree, whatever else is wrong with it; what is wrong with its structure goes
    to ``found``.

    Raises:
        DataError: two folders of one split.
    """
    images: list[Image] = []
    for split, name in (split_folders(root) or {"": "."}).items():
        top = root / name
        try:
            labels = [entry.name for entry in entries(top) if is_folder(entry)]
            trained = sorted({image.label for image in images if image.split == "train"})
            flat = flat_images(top, trained) if split not in ("", "train") else None
        except DataError as error:
            found["permission"].append(show(error))
            continue
        if flat is not None:
            images += _flat_split(root, split, name, flat, trained, found)
            continue
        for label in labels:
            try:
                files = sorted(walk(top / label, {identity(root), identity(top)}))
            except DataError as error:
                found["permission"].append(show(error))
                continue
            pictures = [file for file in files if is_image(file)]
            found["not an image file"] += [
                os.path.relpath(file, root) for file in files if not is_image(file)
            ]
            if not pictures:
                found["empty class"].append(os.path.normpath(f"{name}/{label}"))
            images += [Image(split, label, os.path.relpath(file, root), file) for file in pictures]
    return images


def _flat_split(
    root: Path,
    split: str,
    name: str,
    files: Sequence[str],
    classes: Sequence[str],
    found: dict[str, list[str]],
) -> list[Image]:
    labels = [""] * len(files)
    list_file = find_label_file(root, split, root / name)
    try:
        if list_file is not None:
            labels = [
                classes[i]
                for i in read_label_file(
                    list_file, [os.path.basename(file) for file in files], classes
                )
            ]
        elif split != "test":  # test images without labels are how ImageNet's come
            found["no labels"].append(f"{name} ({len(files)} images and no label file)")
    except DataError as error:
        found["no labels"].append(show(error))
    return [
        Image(split, label, os.path.relpath(file, root), file)
        for file, label in zip(files, labels, strict=True)
    ]


def _compare_classes(images: Iterable[Image], found: dict[str, list[str]]) -> None:
    labels: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.label:
            labels[image.split].add(image.label)
    everywhere = set().union(*labels.values())
    for split, here in labels.items():
        found["one-sided class"] += [
            f"{label} (not in {split})" for label in sorted(everywhere - here)
        ]


def _find_duplicates(
    images: Sequence[Image], looks: Sequence[Look], found: dict[str, list[str]]
) -> set[int]:
    """Report pictures that are there more than once, by their pixels; the places of those that a
    clean list leaves out.

    Of a picture in training and evaluation the one in training goes; of one under two labels all
    that are for training.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, look in enumerate(looks):
        if look.pixels:
            groups[look.pixels].append(i)
    dropped: set[int] = set()
    for places in groups.values():
        if len(places) == 1:
            continue
        same_bytes = len({looks[i].content for i in places}) == 1
        named = " = ".join(images[i].name for i in places) + (
            "" if same_bytes else " (the same pixels in other bytes)"
        )
        labels, splits = {images[i].label for i in places} - {""}, {images[i].split for i in places}
        training = {i for i in places if images[i].split in ("train", "")}
        if len(labels) > 1:
            found["duplicate across classes"].append(named)
            dropped |= training
        if len(splits) > 1 and "train" in splits:
            found["duplicate across splits"].append(named)
            dropped |= training
        if len(labels) <= 1 and len(splits) == 1:
            found["duplicate"].append(named)
    return dropped
