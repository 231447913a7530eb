"""A folder tree of image files: one folder of images per class, either directly in the root or
below ``train/``, ``val/`` and ``test/``.

If ``val/`` or ``test/`` is flat, as for ImageNet and Tiny-ImageNet, a label file has the classes.
"""

import contextlib
import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.data.containers import describe_containers
from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit, cannot_read, check_finished, from_splits
from fastokd.data.images import EXTENSIONS
from fastokd.data.kinds import DatasetKind
from fastokd.data.label_list import NAMES, find_label_file, read_label_file
from fastokd.data.split_names import SplitFolders, find_split_folders, is_wrapper
from fastokd.errors import ConfigError, DataError, escape, summarize

LAYOUT = "train/<class>/ and val/<class>/ or test/<class>/"
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})
"""Folders that operating systems and archives add."""

LISTS = (".csv", ".tsv")

_ARRANGE = f"arrange the images as {LAYOUT}"


class Finding(NamedTuple):
    """A problem of a tree: its kind in the report of ``fastokd data check``, its entry there, and
    the error that ``list_tree`` raises.
    """

    kind: str
    entry: str
    error: DataError


@dataclass
class Listing:
    """The image files of one split of a tree, and what is wrong with its structure.

    Attributes:
        split: "train", "val" or "test"; "" if the class folders are in the root.
        folder: the split's folder, relative to the root.
        classes: the names of its class folders.
        files: paths of the images.
        labels: the class name of each image; "" if unknown.
        ignored: files that are not images, relative to the root.
    """

    split: str
    folder: str
    classes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def note(self, kind: str, entry: str, error: DataError) -> None:
        self.findings.append(Finding(kind, entry, error))

    def raise_first(self, root: Path, *, empty: bool = True) -> None:
        """Raise the first problem's error; ``empty`` includes class folders without images."""
        for finding in self.findings:
            if finding.kind != "empty class":
                raise finding.error
        if empty:
            _raise_empty(root, [finding.entry for finding in self.findings])

    def file_split(self, name: str, root: Path, classes: Sequence[str]) -> FileSplit:
        """The images as a split of a dataset with these classes."""
        number = {label: i for i, label in enumerate(classes)}
        targets = [number[label] for label in self.labels]
        files = tuple(os.path.relpath(file, root) for file in self.files)
        return FileSplit(name, root, files, torch.tensor(targets, dtype=torch.int64))

    def as_source(self, root: Path, name: str) -> DataSource[FileSplit]:
        """The images as the only split, of this name, of a dataset."""
        splits = {"train": self.file_split(name, root, self.classes)}
        root = root.resolve()
        return from_splits(root.name, self.classes, splits, root, self.ignored)


def walk_tree(root: Path) -> Iterator[Listing]:
    """List each split of a tree, whatever is wrong with it.

    Hidden files and folders are skipped, and so are files without an image extension. Folders below
    a class folder belong to the class; symbolic links are followed, each folder once per class.

    Raises:
        DataError: two folders of one split.
    """
    folders = split_folders(root).folders
    if not folders:
        yield _walk_split(root, "", ".")
    classes: list[str] = []
    for split, folder in folders.items():
        listing = _walk_split(root, split, folder, None if split == "train" else classes)
        if split == "train":
            classes = listing.classes
        yield listing


def list_tree(root: Path) -> DataSource[FileSplit]:
    """List a tree's image files as ``walk_tree`` does, and check its structure.

    Raises:
        DataError: a folder or split that is missing or empty, classes that differ between the
            splits, a class without images in some split, a flat split without labels.
    """
    names, unused = _readable_splits(root)
    if not names:
        return _one_folder(root)
    if "train" not in names:
        present = [entry.name + "/" for entry in entries(root) if is_folder(entry)]
        raise invalid(root, f"no train/ (found {summarize(present)}); {_ARRANGE}")
    check_finished(root)
    if error := _missing_target(root, entries(root)):
        raise error
    classes: list[str] = []
    splits: dict[str, FileSplit] = {}
    ignored, empty = [f"{name}/" for name in unused], []
    for listing in walk_tree(root):
        split = listing.split
        listing.raise_first(root, empty=False)
        if split == "train":
            classes = listing.classes
        elif listing.classes:
            _check_same_classes(root, names["train"], classes, listing)
        elif "" in listing.labels:  # a flat test split without a label file
            if "val" not in splits:
                raise _no_labels_error(root / listing.folder, len(listing.files))
            # ImageNet's test images, whose labels are not public
            ignored += [os.path.relpath(file, root) for file in listing.files]
            continue
        splits[split] = listing.file_split(split, root, classes)
        ignored += listing.ignored
        empty += [finding.entry for finding in listing.findings]
    _raise_empty(root, empty, " in every split")
    resolved = root.resolve()
    return from_splits(resolved.name, classes, splits, resolved, ignored)


def _readable_splits(root: Path) -> SplitFolders:
    """``split_folders`` of a folder that exists."""
    # os.path's tests, unlike pathlib's, return False where permission is missing.
    if not os.path.isdir(root):
        raise invalid(root, f"no readable folder; pass one with {LAYOUT}")
    return split_folders(root)


def list_split(root: Path, name: str | None) -> DataSource[FileSplit]:
    """List one split of a tree as the only one of its source; ``train/`` need not exist.

    Args:
        name: "train", "val" or "test"; None for the split a run is evaluated on, or for class
            folders in ``root`` itself.

    Raises:
        ConfigError: the tree has no such split.
        DataError: as ``list_tree``.
    """
    names = _readable_splits(root).folders
    if name is None and names:
        name = next((split for split in ("val", "test") if split in names), None)
        if name is None:
            raise invalid(root, "only train/ exists; add val/ or test/, or pass --split train")
    if name is None:
        source = _one_folder(root)
        train = dataclasses.replace(source.train, name=source.name)
        return dataclasses.replace(source, train=train)
    if name not in names:
        known = summarize(list(names)) or "none"
        raise ConfigError(f"{escape(root)} has no split '{escape(name)}' (it has {known})")
    if flat_images(root / names[name], []) is not None:
        # Its labels are numbers or synsets, which refer to the classes of the training split.
        source = list_tree(root)
        chosen = next((split for split in source.splits if split.name == name), None)
        if chosen is None:
            fix = "write one with 'image class' lines there, or choose another split"
            raise invalid(root / names[name], f"images without a label file; {fix}")
        return dataclasses.replace(source, train=chosen, test=None, val=None)
    check_finished(root)
    listing = _walk_split(root, name, names[name])
    listing.raise_first(root)
    return listing.as_source(root, name)


def _one_folder(root: Path) -> DataSource[FileSplit]:
    """A folder of class folders, all for training until some images are held out."""
    folders = [entry.name for entry in entries(root) if is_folder(entry)]
    if not folders:
        count = sum(is_image(entry.name) for entry in entries(root))
        present = f"{count} images" if count else "no folders"
        if found := describe_containers(root, [entry.name for entry in entries(root)]):
            raise invalid(root, f"no train/; {found}")
        fix = f"{_ARRANGE}, or as <class>/ to use with --val-split{_lists(root)}"
        raise invalid(root, f"no train/ (found {present}); {fix}")
    check_finished(root)
    _check_depth(root, folders)
    listing = _walk_split(root, "", ".")
    listing.raise_first(root, empty=False)
    if not listing.files:
        present = summarize([name + "/" for name in folders])
        inside = sorted({os.path.splitext(name)[1].lower() for name in listing.ignored} - {""})
        files = f" but {summarize(inside)} files" if inside else ""
        raise invalid(
            root, f"no train/ (found {present}), and no images in them{files}; {_ARRANGE}"
        )
    listing.raise_first(root)
    if len(listing.classes) == 1 and (lists := _lists(root)):
        only = f"one folder, {listing.classes[0]}/, which would be the only class"
        raise invalid(root, f"{only}; {_ARRANGE}{lists}")
    return listing.as_source(root, "train")


def _check_depth(root: Path, folders: Sequence[str]) -> None:
    """Raise ``DataError`` if the folders of a root are no classes, but a dataset or splits."""
    if len(folders) == 1:
        deepest = root / folders[0]
        while len(below := entries(deepest)) == 1 and is_folder(below[0]):
            deepest = deepest / below[0].name
        if (
            len(names := [entry.name for entry in below if is_folder(entry)]) > 1
            and deepest != root
        ):
            present = f"one folder, {folders[0]}/, which holds {summarize(names)}"
            raise invalid(root, f"{present}; pass {escape(deepest)}")
        return
    inner = [
        [entry.name for entry in entries(root / folder) if is_folder(entry) or is_image(entry.name)]
        for folder in folders
    ]
    folders_only = not any(is_image(name) for names in inner for name in names)
    if not folders_only or not all(len(names) > 1 for names in inner):
        return
    if all(names == inner[0] for names in inner):
        listed = summarize([f"{name}/" for name in folders])
        same = f"{listed} hold the same folders ({summarize(inner[0])}), as splits do"
        fix = "rename them to train/, val/ and test/; if they are classes, put them below train/"
        raise invalid(root, f"{same}; {fix}")


def _walk_split(
    root: Path, split: str, folder: str, classes: Sequence[str] | None = None
) -> Listing:
    """List one split. ``classes`` are those of the training split, if the split may be flat."""
    listing = Listing(split, folder)
    try:
        flat = None if classes is None else flat_images(root / folder, classes)
        if classes is not None and flat is not None:
            _label_flat(root, listing, flat, classes)
            return listing
        above = {identity(root), identity(root / folder)}
        present = entries(root / folder)
    except DataError as error:
        listing.note("permission", escape(error), error)
        return listing
    if broken := _missing_target(root / folder, present):
        listing.note("refused", escape(broken), broken)
    listing.classes = [entry.name for entry in present if is_folder(entry)]
    loose = (entry.path for entry in present if not is_folder(entry))
    listing.ignored += [os.path.relpath(path, root) for path in loose]
    if not listing.classes:
        images = sum(is_image(entry.name) for entry in present)
        content = f"{images} images and no class folders" if images else "empty"
        fix = "put the images of each class into a folder named after it"
        problem = f"{content}; {fix}{_lists(root)}"
        listing.note("no labels", f"{folder} ({content})", invalid(root / folder, problem))
    for name in listing.classes:
        try:
            # A link up to these folders would label the other classes' images with this class.
            found = list(walk(root / folder / name, set(above)))
        except DataError as error:
            listing.note("permission", escape(error), error)
            continue
        images_of_class = sorted(path for path in found if is_image(path))
        listing.files += images_of_class
        listing.labels += [name] * len(images_of_class)
        listing.ignored += [os.path.relpath(path, root) for path in found if not is_image(path)]
        if not images_of_class:
            entry = os.path.normpath(f"{folder}/{name}")
            inside = {os.path.splitext(path)[1].lower() for path in found} - {"", ".txt"}
            shown = f"{entry} (only {summarize(sorted(inside))})" if inside else entry
            listing.note("empty class", shown, invalid(root / entry, "no images"))
    return listing


def _label_flat(root: Path, listing: Listing, images: list[str], classes: Sequence[str]) -> None:
    """Add the images of a flat split, with the labels of its label file."""
    listing.files, listing.labels = images, [""] * len(images)
    file = find_label_file(root, listing.split, root / listing.folder)
    if file is None:
        if listing.split != "test":  # ImageNet's test images have no labels
            problem = f"{listing.folder} ({len(images)} images and no label file)"
            error = _no_labels_error(root / listing.folder, len(images))
            listing.note("no labels", problem, error)
        return
    try:
        numbers = read_label_file(file, [os.path.basename(path) for path in images], classes)
        listing.labels = [classes[i] for i in numbers]
    except DataError as error:
        listing.note("no labels", escape(error), error)


def _no_labels_error(folder: Path, images: int) -> DataError:
    return invalid(
        folder,
        f"{images} images and no class folders; make a folder for each class, or add a label file:"
        f" {NAMES[0]} with 'image class' lines, or ImageNet's {NAMES[-1]} and meta.mat",
    )


def _raise_empty(root: Path, empty: Sequence[str], where: str = "") -> None:
    if empty:
        problem = f"{len(empty)} class folder(s) without images: {summarize(empty)}"
        raise invalid(root, f"{problem}; fill or remove them{where}")


def _check_same_classes(root: Path, train: str, classes: list[str], listing: Listing) -> None:
    pairs = ((train, classes), (listing.folder, listing.classes))
    for (name, names), (other, others) in (pairs, pairs[::-1]):
        if extra := sorted(set(names) - set(others)):
            problem = f"{len(extra)} class(es) in {name}/ and not in {other}/: {summarize(extra)}"
            alike = {_canonical(each): each for each in set(others) - set(names)}
            for each in extra:
                if twin := alike.get(_canonical(each)):
                    pair = f"{each!a} and {twin!a} differ in blanks or Unicode form"
                    raise invalid(root, f"{problem}; {pair}: rename one of them")
            raise invalid(root, f"{problem}; every split needs the same class folders")


def _canonical(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def split_folders(root: Path) -> SplitFolders:
    """The folder of each split that a tree has, and the folders that are not used.

    Raises:
        DataError: as ``find_split_folders``.
    """
    try:
        names = [entry.name for entry in entries(root) if is_folder(entry)]
    except DataError:  # reported when the folder is listed
        names = []
    found = find_split_folders(root, names)
    inner = {split: _unwrapped(root, split, name) for split, name in found.folders.items()}
    return found._replace(folders=inner)


def _unwrapped(root: Path, split: str, name: str) -> str:
    """The folder of a split's classes: an inner one if it is named after the split and alone."""
    with contextlib.suppress(DataError):  # reported when the folder is listed
        while len(below := entries(root / name)) == 1 and is_wrapper(below[0].name, split):
            inside = entries(below[0].path) if is_folder(below[0]) else []
            if not any(map(is_folder, inside)):  # images without class folders
                break
            name = os.path.join(name, below[0].name)
    return name


def _lists(root: Path) -> str:
    """The lists of images in a folder, as the end of a message about it."""
    with contextlib.suppress(DataError):
        names = [entry.name for entry in entries(root) if entry.name.lower().endswith(LISTS)]
        if names:
            return f", or pass a list of images ({summarize(names)})"
    return ""


def flat_images(folder: Path, classes: Sequence[str]) -> list[str] | None:
    """The images of a split without class folders, sorted by name: in its folder, or in a folder
    ``images`` there; None if it has class folders.
    """
    listed = entries(folder)
    folders = [entry.name for entry in listed if is_folder(entry)]
    if folders == ["images"] and list(classes) != ["images"]:
        listed = entries(folder / "images")
    elif folders:
        return None
    images = [entry.path for entry in listed if not is_folder(entry) and is_image(entry.name)]
    return images or None


def is_image(name: str) -> bool:
    """True if a file is named like an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    """The entries of a folder that are not hidden or ``SYSTEM_FOLDERS``, sorted by name."""
    try:
        with os.scandir(folder) as found:
            shown = (
                e for e in found if not e.name.startswith(".") and e.name not in SYSTEM_FOLDERS
            )
            return sorted(shown, key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_read(folder, error) from error


def _missing_target(folder: Path, present: Iterable["os.DirEntry[str]"]) -> DataError | None:
    """The error for a link to a missing folder, which may have held a class or a split."""
    for entry in present:
        if entry.is_symlink() and not os.path.exists(entry.path):
            missing = f"a link to {escape(os.readlink(entry.path))}, which does not exist"
            return invalid(folder / entry.name, f"{missing}; restore it or delete the link")
    return None


def identity(folder: Path | str) -> tuple[int, int]:
    """Device and inode: equal for two paths to one folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise cannot_read(folder, error) from error
    return status.st_dev, status.st_ino


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """True for a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def walk(folder: Path | str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """The files below a folder; folders with an identity in ``visited`` are skipped."""
    if identity(folder) in visited:
        return
    visited.add(identity(folder))
    for entry in entries(folder):
        if is_folder(entry):
            yield from walk(entry.path, visited)
        # A broken link is reported when it is read; a named pipe would block.
        elif entry.is_symlink() or entry.is_file():
            yield entry.path


FOLDER = DatasetKind(files=list_tree, list_split=list_split, layout=LAYOUT)
