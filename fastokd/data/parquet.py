"""Parquet files as Hugging Face exports datasets: a column of encoded images and one of labels.

Loaders need random access to single images, and Parquet compresses hundreds together. So the
encoded images of each file are copied once, one after another and unchanged, into a file of the
cache, where an image is a byte range as in a tar shard.
"""

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from fastokd.data.cache import cache_folder
from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit, Members, cannot_read, from_splits
from fastokd.data.images import EXTENSIONS
from fastokd.data.kinds import DatasetKind
from fastokd.data.split_names import SPLIT_OF, SPLITS, files_by_split, read_name
from fastokd.data.text import COLUMNS, SPLIT_COLUMNS, plain
from fastokd.errors import DataError, MissingExtra, StorageError, escape, summarize
from fastokd.storage import write_atomically

SUFFIX = ".parquet"
UNLABELED = -1
"""The label of Hugging Face for images whose labels are not public."""

_DEPTH = 2
_MOST_FOLDERS = 64
"""Folders with more folders than this hold no Parquet files, but class folders."""
_BATCH = 128
_IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
_LARGE = 2**30


class Table(NamedTuple):
    """The content of one file."""

    file: str
    """Relative to the root."""
    names: tuple[str, ...]
    """Of the images."""
    copy: Path
    """The file with the encoded images."""
    sizes: tuple[int, ...]
    """In bytes."""
    labels: tuple[Any, ...]
    classes: tuple[str, ...] | None
    """The names of the labels 0, 1, ... if the file has them."""
    splits: tuple[str, ...] | None
    """The split of each image if the file has a column of them."""


def list_parquet(path: Path) -> DataSource[FileSplit]:
    """List the images of a Parquet file, or of all in a folder and its subfolders.

    A word in their names or folders (``data/train-00000-of-00001.parquet``,
    ``default/validation/0000.parquet``) tells the split, else a column ``split``. Class names are
    those in the metadata of Hugging Face, else the labels.

    Raises:
        MissingExtra: pyarrow is not installed.
        DataError: no such files, a damaged one, no columns of images and labels, files of several
            datasets, or labels outside the classes.
    """
    root = path if os.path.isdir(path) else path.parent
    files = find_parquet(path)
    if not files:
        raise invalid(path, f"no {SUFFIX} files there; pass the file, or the folder that holds it")
    _check_one_dataset(path, files)
    # The name of a file that is passed alone does not matter.
    by_split = {"train": files}
    if root == path:
        by_split = files_by_split(root, files, "file", SUFFIX)
    # A column of splits counts if the names of the files tell no split.
    unnamed = set(by_split) == {"train"}
    tables = {
        split: [_read(root, file, unnamed) for file in members]
        for split, members in by_split.items()
    }
    skipped = [
        table.file
        for split in tables
        if split != "train"
        for table in tables[split]
        if _hidden(table)
    ]
    tables = {split: [t for t in read if t.file not in skipped] for split, read in tables.items()}
    classes, number = _classes(root, [table for read in tables.values() for table in read])
    splits = {
        split: _file_split(split, root, read, number) for split, read in tables.items() if read
    }
    read = tables.get("train", [])
    if unnamed and len({table.splits is None for table in read}) > 1:
        without = summarize([table.file for table in read if table.splits is None])
        raise invalid(path, f"files without the column split of the others: {without}; add it")
    if unnamed and all(table.splits for table in read):
        words = np.array([word for table in read for word in table.splits or ()])
        images = {split: torch.from_numpy(np.flatnonzero(words == split)) for split in SPLITS}
        whole = splits["train"]
        splits = {
            split: whole.select(index, split) for split, index in images.items() if len(index)
        }
        if "train" not in splits:
            raise invalid(path, "no training images in it; rows with the split train are needed")
    name = path.resolve().name if root == path else path.stem
    return from_splits(name, classes, splits, root.resolve(), skipped)


def find_parquet(path: Path) -> list[str]:
    """The Parquet files that a path means, relative to its folder; [] if it holds images, too."""
    if path.suffix.lower() == SUFFIX and os.path.isfile(path):
        return [path.name]
    files: list[str] = []
    return sorted(files) if _search(path, "", _DEPTH, files) else []


def _search(root: Path, folder: str, depth: int, files: list[str]) -> bool:
    """Add the Parquet files of a folder; False if it holds images."""
    try:
        entries = sorted(os.listdir(root / folder))
    except OSError:  # reported when the folder is read
        return True
    folders = []
    for name in entries:
        inside = os.path.join(folder, name)
        extension = os.path.splitext(name)[1].lower()
        if name.startswith("."):
            continue
        if extension == SUFFIX:
            files.append(inside)
        elif extension in EXTENSIONS:
            return False
        elif not extension and os.path.isdir(root / inside):
            folders.append(inside)
    if not depth:
        return True
    if len(folders) > _MOST_FOLDERS:
        return False
    return all([_search(root, inside, depth - 1, files) for inside in folders])


def _check_one_dataset(path: Path, files: Sequence[str]) -> None:
    """Raise ``DataError`` for files in folders of several datasets, or versions of one."""
    folders = (os.path.dirname(file).split(os.sep) for file in files)
    datasets = sorted({os.sep.join(p for p in parts if not read_name(p)) for parts in folders})
    if len(datasets) > 1:
        listed = summarize([f"{name or '.'}/" for name in datasets])
        raise invalid(path, f"{SUFFIX} files of several datasets: {listed}; pass one of them")


def _read(root: Path, file: str, with_splits: bool) -> Table:
    """Read the labels of a file, and copy its images unless they are in the cache."""
    pq = _pyarrow()
    path = root / file
    try:
        with pq.ParquetFile(path) as opened:
            image, label, classes = _columns(opened.schema_arrow, path)
            copy, sizes, names = _copied(opened, path, image)
            labels = opened.read(columns=[label]).column(0).to_pylist()
            splits = _splits(opened, path) if with_splits else None
    except OSError as error:  # pyarrow's errors about damage are OSErrors or ValueErrors
        if error.errno:
            raise cannot_read(path, error) from error
        raise invalid(path, f"damaged ({escape(error)}); download it again") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise invalid(path, f"not a Parquet file ({escape(error)}); download it again") from error
    for row, value in enumerate(labels):
        if value is None:
            raise invalid(path, f"row {row} has no label; fill or drop it")
        if value == "" or isinstance(value, (list, dict)):
            given = f"row {row} has the label {escape(repr(value))[:80]}"
            raise invalid(path, f"{given}; one class number or name per image is needed")
    shown = tuple(f"{file}/{row}{f'-{name}' if name else ''}" for row, name in enumerate(names))
    return Table(file, shown, copy, tuple(sizes), tuple(labels), classes, splits)


def _splits(opened: Any, path: Path) -> tuple[str, ...] | None:
    """The split of each row by a column such as ``split``; None without one."""
    names = opened.schema_arrow.names
    for column in (name for word in COLUMNS["split"] for name in names if plain(name) == word):
        words = [str(word).lower() for word in opened.read(columns=[column]).column(0).to_pylist()]
        unknown = sorted({word for word in words if word not in SPLIT_OF})
        if not unknown:
            return tuple(SPLIT_OF[word] for word in words)
        if plain(column) in SPLIT_COLUMNS:  # others may be categories
            fix = "use train, val or test in a column split, or rename the column"
            raise invalid(path, f"column {column} has {summarize(unknown)}; {fix}")
    return None


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        fix = "pip install -e '.[parquet]'"
        raise MissingExtra(f"reading {SUFFIX} files needs pyarrow: {fix}") from None
    return pyarrow.parquet


def _columns(schema: Any, path: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """The columns of the images and labels of a file, and the class names in its metadata."""
    features = _features(schema.metadata or {})
    kinds = {name: features.get(name, {}).get("_type") for name in schema.names}
    columns = []
    for what, kind, usual in (
        ("images", "Image", _IMAGE_COLUMNS),
        ("labels", "ClassLabel", COLUMNS["label"]),
    ):
        matches = [name for name in schema.names if kinds[name] == kind]
        matches = matches or [name for name in usual if name in schema.names]
        preferred = [name for name in usual if name in matches]
        if len(matches) > 1 and not preferred:
            several = f"several columns of {what}: {summarize(matches)}"
            raise invalid(path, f"{several}; name the one to use {usual[0]}")
        if not matches:
            found = f"it has {summarize(schema.names)}"
            raise invalid(path, f"no column of {what} ({found}); name it {usual[0]}")
        columns.append((preferred or matches)[0])
    image, label = columns
    content = schema.field(image).type
    parts = [content.field(i).name for i in range(content.num_fields)]
    if "bytes" not in parts and (parts or "binary" not in str(content)):
        fix = "encoded images are needed, as {bytes, path} or as binary"
        raise invalid(path, f"column {image} is of type {escape(content)[:80]}; {fix}")
    names = features.get(label, {}).get("names")
    return image, label, tuple(map(str, names)) if isinstance(names, list) else None


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """Hugging Face's description of the columns; {} without one."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _images(opened: Any, column: str, path: Path) -> Iterator[tuple[bytes, str]]:
    """The encoded images of a column and their names; "" for images without a name."""
    row = 0
    for batch in opened.iter_batches(_BATCH, columns=[column]):
        for value in batch.column(0).to_pylist():
            content, name = value, ""
            if isinstance(value, dict):
                content, name = value.get("bytes"), str(value.get("path") or "")
            if not content:
                where = f"row {row} has no image"
                known = f", only the path {escape(name)}" if name else ""
                fix = "export the dataset with the images embedded, or drop the row"
                raise invalid(path, f"{where}{known}; {fix}")
            if not isinstance(content, bytes):
                given = f"row {row} has an image of type {type(content).__name__}"
                raise invalid(path, f"{given}; the encoded bytes are needed")
            yield content, os.path.basename(name)
            row += 1


def _copied(opened: Any, path: Path, column: str) -> tuple[Path, Sequence[int], Sequence[str]]:
    """The copy of a file's images, their sizes, and their names."""
    status = os.stat(path)
    times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    key = hashlib.sha256(json.dumps([os.fspath(path.absolute()), *times, column]).encode())
    copy = _folder() / f"{key.hexdigest()[:32]}.images"
    listing = copy.with_suffix(".json")
    try:
        sizes, names = json.loads(listing.read_text())
        if sum(sizes) == os.path.getsize(copy):
            return copy, sizes, names
    except (OSError, ValueError, TypeError):  # missing or damaged
        pass
    if status.st_size > _LARGE:
        given = f"{escape(path)}: its images are copied to {escape(copy.parent)}"
        warnings.warn(f"{given}; FASTOKD_CACHE names another folder", stacklevel=2)
    sizes, names = [], []

    def write(out: BinaryIO) -> None:
        for content, name in _images(opened, column, path):
            out.write(content)
            sizes.append(len(content))
            names.append(name)

    try:
        write_atomically(copy, write, durable=False)
        text = json.dumps([sizes, names])
        write_atomically(listing, lambda out: out.write(text.encode()), durable=False)
    except StorageError as error:
        fix = "FASTOKD_CACHE names another folder for the copy of the images"
        raise StorageError(f"{error}; {fix}") from error
    return copy, sizes, names


def _folder() -> Path:
    """The folder of the copies: in the cache, or one for this process if the cache is off."""
    cache = cache_folder()
    return _temporary_folder() if cache is None else cache / "parquet"


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="fastokd-parquet-")
    atexit.register(shutil.rmtree, folder, True)
    return Path(folder)


def _hidden(table: Table) -> bool:
    """True for images without public labels."""
    return bool(table.labels) and set(table.labels) == {UNLABELED}


def _classes(root: Path, tables: Sequence[Table]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The class names in the order of their numbers, and the number of every label."""
    named = {table.classes: table.file for table in tables}
    if len(named) > 1:
        files = summarize(list(named.values()))
        fix = "pass the folder or file of one of them"
        raise invalid(root, f"files with other class names, as of several datasets: {files}; {fix}")
    names = next(iter(named), None)
    labels = {label for table in tables for label in table.labels}
    if all(isinstance(label, str) for label in labels):
        names = names or tuple(sorted(labels))
        if unknown := sorted(labels - set(names)):
            raise invalid(root, f"labels that the metadata does not list: {summarize(unknown)}")
        return names, {name: i for i, name in enumerate(names)}
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        kinds = sorted({type(label).__name__ for label in labels})
        raise invalid(root, f"labels of type {summarize(kinds)}; class numbers or names are needed")
    # Every class has a training image, so class numbers stay below the number of images. Checked
    # before names are made of the numbers.
    count = len(names) if names else sum(len(table.labels) for table in tables)
    for table in tables:
        for name, label in zip(table.names, table.labels, strict=True):
            if not 0 <= label < count:
                of = f"the {count} class names" if names else f"{count} images"
                given = f"{escape(name)} has the label {label}, outside 0..{count - 1} for {of}"
                raise invalid(root, f"{given}; number the classes from 0")
    if not names and 0 not in labels:
        raise invalid(root, f"labels from {min(labels)} on; number the classes from 0")
    names = names or tuple(str(i) for i in range(max(labels, default=-1) + 1))
    return names, {i: i for i in range(len(names))}


def _file_split(
    split: str, root: Path, tables: Sequence[Table], number: Mapping[Any, int]
) -> FileSplit:
    sizes = [np.array(table.sizes, dtype=np.int64) for table in tables]
    offsets = [np.cumsum(each) - each for each in sizes]
    shard = np.repeat(np.arange(len(tables)), [len(each) for each in sizes])
    targets = [number[label] for table in tables for label in table.labels]
    members = Members(
        tuple(os.fspath(table.copy.absolute()) for table in tables),
        *(torch.from_numpy(np.concatenate(each)) for each in ([shard], offsets, sizes)),
    )
    names = tuple(name for table in tables for name in table.names)
    return FileSplit(split, root, names, torch.tensor(targets, dtype=torch.int64), members)


PARQUET = DatasetKind(
    files=list_parquet,
    detect=lambda path: bool(find_parquet(path)),
    layout="train-*.parquet and validation-*.parquet",
)
