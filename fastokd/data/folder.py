"""A folder tree of image files: a folder of images per class, below ``train/``, ``val/`` and
``test/`` or alone.

Where ``val/`` or ``test/`` is flat, as ImageNet's and Tiny-ImageNet's are, a label file says what
its images show.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit, check_finished
from fastokd.data.images import EXTENSIONS, first_of, show
from fastokd.data.kinds import DatasetKind
from fastokd.data.label_list import NAMES, find_label_file, read_label_file
from fastokd.errors import ConfigError, DataError

LAYOUT = "train/<class>/ and val/<class>/ or test/<class>/"
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""The splits, and the words that folders, archives and lists call them by."""

SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
"""The split that each of the words means."""


def list_tree(root: Path | None) -> DataSource[FileSplit]:
    """List a tree's image files and check its structure, without opening any of them.

    Hidden files and folders are passed over, and so are files without an image extension (they are
    counted). Folders below a class folder belong to the class; symbolic links are followed, each
    folder once per class.

    Raises:
        DataError: a folder or split that is missing or empty, classes that differ between the
            splits, a class without images in some split, a flat split without labels.
    """
    if root is None:
        raise DataError(f"folder needs a path: folder:PATH, with {LAYOUT}")
    # os.path's tests, unlike pathlib's, answer False where permission is missing.
    if not os.path.isdir(root):
        raise DataError(f"{show(root)}: no folder that can be read; give one with {LAYOUT}")
    names = split_folders(root)
    if not names:
        return _one_folder(root)
    if "train" not in names:
        found = [entry.name + "/" for entry in entries(root) if is_folder(entry)]
        raise DataError(
            f"{show(root)}: no train/ (found {first_of(found)}); arrange the images as {LAYOUT}"
        )
    check_finished(root)
    classes = _class_names(root / names["train"])
    splits: dict[str, FileSplit] = {}
    ignored, empty = 0, []
    for split, name in names.items():
        flat = flat_images(root / name, classes) if split != "train" else None
        if flat is not None:
            labels = find_label_file(root, split, root / name)
            if labels is None and split == "test" and "val" in splits:
                ignored += len(flat)  # ImageNet's test images, whose labels are not public
                continue
            if labels is None:
                raise DataError(
                    f"{show(root / name)}: {len(flat)} images and no class folders; put the images"
                    " of each class into a folder named after it, or say what they are in a file"
                    f" there: {NAMES[0]} with 'image class' lines, or ImageNet's ground truth"
                    f" ({NAMES[-1]} and meta.mat)"
                )
            targets = read_label_file(labels, [os.path.basename(path) for path in flat], classes)
            splits[split] = _file_split(split, root, flat, targets)
            continue
        if split != "train":
            _same_classes(root, classes, names["train"], name)
        files, targets, others, without = _list_classes(root, name, classes)
        splits[split] = _file_split(split, root, files, targets)
        ignored += others
        empty += without
    if empty:
        raise DataError(
            f"{show(root)}: {len(empty)} class folder(s) without images: {first_of(empty)}; fill or"
            " remove them in every split"
        )
    # Where there is no test/, val/ is what the run is judged on.
    test = splits.pop("test") if "test" in splits else splits.pop("val", None)
    return DataSource(
        root.resolve().name,
        tuple(classes),
        splits["train"],
        test,
        splits.get("val"),
        root=root.resolve(),
        ignored_files=ignored,
    )


def list_split(root: Path, name: str | None) -> DataSource[FileSplit]:
    """One split of a tree as the only one of a source, without the rest: ``train/`` need not be
    there.

    Args:
        name: "train", "val" or "test"; None for what a run is evaluated on, or for class folders in
            ``root`` itself.

    Raises:
        ConfigError: there is no such split.
        DataError: as ``list_tree``.
    """
    if not os.path.isdir(root):
        raise DataError(
            f"{show(root)}: no folder that can be read; give one with {LAYOUT}, or one of class"
            " folders"
        )
    names = split_folders(root)
    if name is None:
        name = next((split for split in ("val", "test") if split in names), None)
        if name is None and names:
            raise DataError(
                f"{show(root)}: there is train/ alone; add val/ or test/, or say --split train"
            )
    elif name not in names:
        raise ConfigError(
            f"{show(root)} has no split '{show(name)}' (there is"
            f" {first_of(list(names)) if names else 'none'})"
        )
    if name is None:
        whole = _one_folder(root)
        return dataclasses.replace(whole, train=dataclasses.replace(whole.train, name=whole.name))
    if flat_images(root / names[name], []) is not None:
        # Whose labels are numbers or synsets means something only beside the training split's
        # classes.
        whole = list_tree(root)
        found = next((split for split in whole.splits if split.name == name), None)
        if found is None:
            raise DataError(
                f"{show(root / names[name])}: images and no label file; write one there with 'image"
                " class' lines, or take another split"
            )
        return dataclasses.replace(whole, train=found, test=None, val=None)
    check_finished(root)
    classes = _class_names(root / names[name])
    files, targets, ignored, empty = _list_classes(root, names[name], classes)
    if empty:
        raise DataError(
            f"{show(root)}: {len(empty)} class folder(s) without images: {first_of(empty)}; fill or"
            " remove them"
        )
    return DataSource(
        root.resolve().name,
        tuple(classes),
        _file_split(name, root, files, targets),
        None,
        root=root.resolve(),
        ignored_files=ignored,
    )


def _one_folder(root: Path) -> DataSource[FileSplit]:
    """A folder of class folders, all for training until some are held out."""
    folders = [entry.name for entry in entries(root) if is_folder(entry)]
    if not folders:
        images = sum(is_image(entry.name) for entry in entries(root))
        found = f"{images} images" if images else "no folders"
        raise DataError(
            f"{show(root)}: no train/ (found {found}); arrange the images as {LAYOUT}, or as"
            " <class>/ to use with --val-split"
        )
    check_finished(root)
    files, targets, ignored, empty = _list_classes(root, ".", folders)
    if len(empty) == len(folders):
        raise DataError(
            f"{show(root)}: no train/ (found {first_of([name + '/' for name in folders])}), and no"
            f" images in them; arrange the images as {LAYOUT}"
        )
    if empty:
        raise DataError(
            f"{show(root)}: {len(empty)} class folder(s) without images: {first_of(empty)}; fill or"
            " remove them"
        )
    return DataSource(
        root.resolve().name,
        tuple(folders),
        _file_split("train", root, files, targets),
        None,
        root=root.resolve(),
        ignored_files=ignored,
    )


def _file_split(name: str, root: Path, files: list[str], targets: list[int]) -> FileSplit:
    return FileSplit(
        name,
        root,
        tuple(os.path.relpath(file, root) for file in files),
        torch.tensor(targets, dtype=torch.int64),
    )


def _list_classes(
    root: Path, folder: str, classes: list[str]
) -> tuple[list[str], list[int], int, list[str]]:
    """The images of every class and their labels, how many files are no images, and the classes
    without any.
    """
    # A link back up to these would bring the other classes' images in under this class's label.
    above = {identity(root), identity(root / folder)}
    files: list[str] = []
    targets: list[int] = []
    ignored, empty = 0, []
    for label, name in enumerate(classes):
        found = list(walk(root / folder / name, set(above)))
        images = sorted(path for path in found if is_image(path))
        ignored += len(found) - len(images)
        files += images
        targets += [label] * len(images)
        if not images:
            empty.append(os.path.normpath(f"{folder}/{name}"))
    return files, targets, ignored, empty


def _same_classes(root: Path, classes: list[str], train: str, name: str) -> None:
    there = _class_names(root / name)
    for (here, names), (other, others) in (
        ((train, classes), (name, there)),
        ((name, there), (train, classes)),
    ):
        extra = sorted(set(names) - set(others))
        if extra:
            raise DataError(
                f"{show(root)}: {len(extra)} class(es) in {here}/ and not in {other}/:"
                f" {first_of(extra)}; every split needs the same class folders"
            )


def split_folders(root: Path) -> dict[str, str]:
    """The folder of each split that a tree has.

    Raises:
        DataError: two folders of one split.
    """
    found: dict[str, str] = {}
    for word, split in SPLIT_OF.items():
        if os.path.isdir(root / word) and found.setdefault(split, word) != word:
            raise DataError(
                f"{show(root)}: both {found[split]}/ and {word}/ are there; put the images of a"
                " split into one folder"
            )
    return found


def flat_images(folder: Path, classes: list[str]) -> list[str] | None:
    """The images of a split that has no class folders, by name: in it, or in its folder ``images``;
    else None.
    """
    listed = entries(folder)
    folders = [entry.name for entry in listed if is_folder(entry)]
    if folders == ["images"] and classes != ["images"]:
        listed = entries(folder / "images")
    elif folders:
        return None
    images = [entry.path for entry in listed if not is_folder(entry) and is_image(entry.name)]
    return images or None


def is_image(name: str) -> bool:
    """Whether a file is named like an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    """The entries of a folder that are not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name
            )
    except OSError as error:
        raise _unreadable(folder, error) from error


def identity(folder: Path | str) -> tuple[int, int]:
    """What tells a folder from every other, however it is reached."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(folder: Path | str, error: OSError) -> DataError:
    return DataError(
        f"{show(folder)}: cannot be read: {error.strerror}; check its permissions and links"
    )


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _class_names(folder: Path) -> list[str]:
    listed = entries(folder)
    names = [entry.name for entry in listed if is_folder(entry)]
    if not names:
        images = sum(is_image(entry.name) for entry in listed)
        what = f"{images} images and no class folders" if images else "empty"
        raise DataError(
            f"{show(folder)}: {what}; put the images of each class into a folder named after it"
        )
    return names


def walk(folder: Path | str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """The files below a folder. ``seen`` identifies the folders already visited, which ends
    symbolic link loops.
    """
    if identity(folder) in seen:
        return
    seen.add(identity(folder))
    for entry in entries(folder):
        if is_folder(entry):
            yield from walk(entry.path, seen)
        elif (
            entry.is_symlink() or entry.is_file()
        ):  # a broken link is reported later; a named pipe would block
            yield entry.path


FOLDER = DatasetKind(files=list_tree, list_split=list_split)
