"""A folder tree of image files: ``train/`` and ``val/`` or ``test/``, each with one folder of images per class."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource, Split
from fastokd.data.images import EXTENSIONS, decode_all, first_of, show
from fastokd.data.registry import DatasetKind, ReadOptions
from fastokd.errors import ConfigError, DataError

LAYOUT = "train/<class>/ and val/<class>/ or test/<class>/"


@dataclass(frozen=True)
class FolderSplit:
    """The files of one split, relative to the tree's root, in the order class name, file name; and their labels."""

    name: str
    files: tuple[str, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A folder tree whose structure is sound: the same classes in every split, and none of them empty."""

    root: Path
    classes: tuple[str, ...]
    splits: tuple[FolderSplit, ...]
    ignored_files: int


def scan_tree(root: Path, only: Sequence[str] = ()) -> Tree:
    """List a tree's image files and check its structure, without opening any of them.

    Hidden files and folders are passed over, and so are files without an image extension (they are counted).
    Folders below a class folder belong to the class; symbolic links are followed, each folder once per class.

    Args:
        only: the splits to read, "." for the root itself; by default all that are there, train/ and one more at least.

    Raises:
        DataError: a folder or split that is missing or empty, classes that differ between the splits, a class
            without images in some split.
    """
    # os.path's tests, unlike pathlib's, answer False where permission is missing.
    if not os.path.isdir(root):
        raise DataError(f"{show(root)}: no folder that can be read; give one with {LAYOUT}")
    names = list(only) or _split_folders(root)
    if not only and ("train" not in names or len(names) < 2):
        found = [entry.name + "/" for entry in _entries(root) if _is_folder(entry)]
        missing = "train/" if "train" not in names else "val/ or test/"
        raise DataError(
            f"{show(root)}: no {missing} (found {first_of(found) if found else 'no folders'}); arrange the images as "
            f"{LAYOUT}, or give a folder with cifar-10-batches-py or cifar-100-python"
        )
    classes = {name: _class_names(root, name) for name in names}
    for name in names[1:]:
        for here, there in ((names[0], name), (name, names[0])):
            extra = sorted(set(classes[here]) - set(classes[there]))
            if extra:
                raise DataError(
                    f"{show(root)}: {len(extra)} class(es) in {here}/ and not in {there}/: {first_of(extra)}; every "
                    f"split needs the same class folders"
                )
    splits, ignored, empty = [], 0, []
    for name in names:
        # A link back up to these would bring the other classes' images in under this class's label.
        above = {_identity(root), _identity(root / name)}
        files: list[str] = []
        targets: list[int] = []
        for label, class_name in enumerate(classes[names[0]]):
            found = list(_walk(root / name / class_name, set(above)))
            images = sorted(path for path in found if os.path.splitext(path)[1].lower() in EXTENSIONS)
            ignored += len(found) - len(images)
            files += (os.path.relpath(path, root) for path in images)
            targets += [label] * len(images)
            if not images:
                empty.append(f"{name}/{class_name}")
        splits.append(FolderSplit(name, tuple(files), tuple(targets)))
    if empty:
        raise DataError(f"{show(root)}: {len(empty)} class folder(s) without images: {first_of(empty)}; fill or remove them in every split")
    return Tree(root, tuple(classes[names[0]]), tuple(splits), ignored)


def read(path: Path | None, options: ReadOptions) -> DataSource:
    """Scan a tree, then decode all of its images."""
    if path is None:
        raise DataError(f"folder needs a path: folder:PATH, with {LAYOUT}")
    tree = scan_tree(path)
    files = [file for split in tree.splits for file in split.files]
    images = decode_all(tree.root, files, options.image_size, options.workers, options.progress)
    parts = images.split([len(split.files) for split in tree.splits])
    splits = {
        split.name: Split(split.name, part, torch.tensor(split.targets), split.files)
        for split, part in zip(tree.splits, parts, strict=True)
    }
    # Where there is no test/, val/ is what the run is judged on.
    test = splits.pop("test") if "test" in splits else splits.pop("val")
    return DataSource(
        path.resolve().name, tree.classes, splits["train"], test, splits.get("val"), root=path.resolve(),
        augment=Augment(pad=min(images.shape[2:]) // 8, flip=True), ignored_files=tree.ignored_files,
    )


def read_split(path: Path, name: str | None, options: ReadOptions) -> tuple[tuple[str, ...], Split]:
    """One split and the class names, without the rest of the tree: ``train/`` need not be there.

    Args:
        name: "train", "val" or "test"; None for what a run is evaluated on, or for class folders in ``path`` itself.

    Raises:
        ConfigError: there is no such split.
        DataError: as ``scan_tree`` and ``decode_all``.
    """
    there = _split_folders(path)
    if name is None:
        name = next((split for split in ("val", "test") if split in there), None)
        if name is None and there:
            raise DataError(f"{show(path)}: there is train/ alone; add val/ or test/, or say --split train")
    elif name not in there:
        raise ConfigError(f"{show(path)} has no split '{show(name)}' (there is {first_of(there) if there else 'none'})")
    tree = scan_tree(path, (name or ".",))
    (split,) = tree.splits
    images = decode_all(tree.root, split.files, options.image_size, options.workers, options.progress)
    return tree.classes, Split(name or path.resolve().name, images, torch.tensor(split.targets), split.files)


def _split_folders(root: Path) -> list[str]:
    return [name for name in ("train", "val", "test") if os.path.isdir(root / name)]


def _entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    """The entries of a folder that are not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _identity(folder: Path | str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(folder: Path | str, error: OSError) -> DataError:
    return DataError(f"{show(folder)}: cannot be read: {error.strerror}; check its permissions and links")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _class_names(root: Path, split: str) -> list[str]:
    entries = _entries(root / split)
    names = [entry.name for entry in entries if _is_folder(entry)]
    if not names:
        images = sum(os.path.splitext(entry.name)[1].lower() in EXTENSIONS for entry in entries)
        what = f"{images} images and no class folders" if images else "empty"
        raise DataError(f"{show(root / split)}: {what}; put the images of each class into a folder named after it")
    return names


def _walk(folder: Path | str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """The files below a folder. ``seen`` identifies the folders already visited, which ends symbolic link loops."""
    if _identity(folder) in seen:
        return
    seen.add(_identity(folder))
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _walk(entry.path, seen)
        elif entry.is_symlink() or entry.is_file():  # a broken link is reported later; a named pipe would block
            yield entry.path


FOLDER = DatasetKind(read)
