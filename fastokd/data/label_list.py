"""Label files of flat image folders, as for ImageNet and related datasets.

Three forms, recognized by their content: ``image synset`` pairs (Tiny-ImageNet's
``val_annotations.txt``, Kaggle's ``LOC_val_solution.csv``, custom lists), one synset per line in
the order of the images' names, and ImageNet's official ground truth, one number per line, which
refers to ``meta.mat`` of the development kit.
"""

import csv
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from fastokd.data.dataset import invalid
from fastokd.data.files import read_lines
from fastokd.data.text import COLUMNS, conflict, plain
from fastokd.errors import MissingExtra, escape, summarize

NAMES = (
    "val_annotations.txt",
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
FOLDERS = (".", "ILSVRC2012_devkit_t12/data", "data")


def find_label_file(root: Path, split: str, folder: Path) -> Path | None:
    """The label file of the flat split "val" or "test": in its folder, in the tree's root, or in
    ImageNet's development kit there.

    Files outside the split's folder with one of ``NAMES`` apply to "val" only.
    """
    split_names = (f"{folder.name}_labels.txt", f"{folder.name}.txt", f"{folder.name}.csv")
    outside = [root / name for name in FOLDERS]
    candidates = (
        parent / name
        for name in (*NAMES, *split_names)
        for parent in (folder, *(outside if split == "val" or name in split_names else ()))
    )
    return next((file for file in candidates if os.path.isfile(file)), None)


def read_label_file(file: Path, images: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The class number of each image.

    Args:
        file: the label file.
        images: file names without folders, in ascending order.
        classes: the class names; a number is an index into them.

    Raises:
        DataError: images without a label, unknown labels, or a file of another form.
    """
    lines = read_lines(file)
    if lines and (
        set(lines) <= set(classes)
        or all(len(line.split()) == 1 and not re.search("[,;]", line) for line in lines)
    ):
        labels = _in_order(file, lines, images, classes)
    else:
        labels = _by_name(file, _pairs(lines, images), images, classes)
    number = {name: label for label, name in enumerate(classes)}
    unknown = sorted({name for name in labels if name not in number})
    if unknown:
        problem = f"{len(unknown)} class(es) that have no folder in train/: {summarize(unknown)}"
        raise invalid(file, f"{problem}; the names must be those of the folders")
    return [number[name] for name in labels]


def _pairs(lines: Sequence[str], images: Sequence[str]) -> list[tuple[str, str]]:
    """Image and label of each line: separated by tabs, commas or semicolons if all lines have them,
    with quotes as in CSV; else by blanks, which names may contain too.
    """
    mark = next((mark for mark in "\t,;" if all(mark in line for line in lines)), None)
    if mark is not None:
        rows = [row for row in csv.reader(lines, delimiter=mark) if len(row) > 1]
        first, second = _named_columns(rows[0]) if rows else (0, 1)
        rows = [row for row in rows if len(row) > max(first, second)]
        return [(row[first].strip(), row[second].strip()) for row in rows]
    known = {*images, *(os.path.splitext(image)[0] for image in images)}
    pairs = []
    for line in lines:
        words = re.split(r"([\s,;]+)", line)  # words and separators in turn
        name, label = words[0], "".join(words[2:])
        for end in range(1, len(words), 2):
            if os.path.basename("".join(words[:end])) in known:
                name, label = "".join(words[:end]), "".join(words[end + 1 :])
        pairs.append((name, label))
    return pairs


def _named_columns(heading: Sequence[str]) -> tuple[int, int]:
    """The columns of names and labels: those that a heading names, else the first two."""
    cells = [plain(cell) for cell in heading]
    found = [
        next((cells.index(name) for name in COLUMNS[kind] if name in cells), -1)
        for kind in ("path", "label")
    ]
    return (found[0], found[1]) if min(found) >= 0 else (0, 1)


def _by_name(
    file: Path, pairs: Sequence[tuple[str, str]], images: Sequence[str], classes: Sequence[str]
) -> list[str]:
    pairs = [(os.path.basename(name.replace("\\", "/")), label) for name, label in pairs]
    # A list may have further columns, and the boxes of several objects of the class.
    pairs = [
        (name, label if label in classes else (label.split() or [""])[0]) for name, label in pairs
    ]
    if twice := conflict(pairs):
        listed = [f"{name} as '{one}' and '{other}'" for name, (one, other) in twice.items()]
        raise invalid(file, f"images with two classes: {summarize(listed)}; keep one line for each")
    labels = dict(pairs)
    known = {*images, *(os.path.splitext(image)[0] for image in images)}
    if unused := [name for name, _ in pairs[1:] if name not in known]:
        unused = list(dict.fromkeys(unused))  # the first line may be a heading
        problem = f"{len(unused)} lines name no image of the split: {summarize(unused, 3)}"
        warnings.warn(f"{escape(file)}: {problem}", stacklevel=2)
    found = [labels.get(image, labels.get(os.path.splitext(image)[0])) for image in images]
    missing = [image for image, label in zip(images, found, strict=True) if label is None]
    if missing:
        problem = f"no label for {len(missing)} of {len(images)} images: {summarize(missing)}"
        raise invalid(file, f"{problem}; each line is an image's name and its class")
    named = [label for label in found if label is not None]
    if set(named) <= set(classes) or not all(label.isdecimal() for label in named):
        return named
    numbers = [int(label) for label in named]
    if min(numbers) != 0 or max(numbers) != len(classes) - 1:
        folders = f"the {len(classes)} class folders in order are 0 to {len(classes) - 1}"
        problem = f"labels are the numbers {min(numbers)} to {max(numbers)}, and {folders}"
        raise invalid(file, f"{problem}; write the folders' names instead")
    return [classes[number] for number in numbers]


def _in_order(
    file: Path, labels: Sequence[str], images: Sequence[str], classes: Sequence[str]
) -> list[str]:
    if sorted(images, key=_natural) != sorted(images):
        problem = "one class per line, but the images' names are in another order as numbers"
        example = f"{summarize(sorted(images)[:3])}, ..."
        raise invalid(file, f"{problem} than as text ({example}); write 'image class' lines")
    if len(labels) != len(images):
        problem = f"{len(labels)} labels for {len(images)} images"
        raise invalid(file, f"{problem}; a list without image names needs one line for each")
    if set(labels) <= set(classes) or not all(label.isdecimal() for label in labels):
        return list(labels)
    synsets = _read_meta(file)
    unknown = sorted({label for label in labels if int(label) not in synsets})
    if unknown:
        meta = escape(file.with_name("meta.mat"))
        raise invalid(file, f"numbers that {meta} does not have: {summarize(unknown)}")
    return [synsets[int(label)] for label in labels]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that compares runs of digits as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _read_meta(file: Path) -> dict[int, str]:
    """ILSVRC2012_ID to WNID, from the development kit's ``meta.mat``."""
    meta = file.with_name("meta.mat")
    if not os.path.isfile(meta):
        fix = "put it in the same folder, or use a list of 'image synset' lines"
        raise invalid(file, f"ImageNet's numbers need meta.mat of the development kit; {fix}")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise MissingExtra(f"reading {escape(meta)} needs SciPy: pip install scipy") from None
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {int(number): str(name) for number, name in pairs}
    except Exception as error:  # a damaged file makes the reader raise almost any exception
        problem = f"not the meta.mat of ImageNet's development kit ({escape(error)})"
        raise invalid(meta, problem) from error
