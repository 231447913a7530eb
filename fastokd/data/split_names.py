"""The splits of a dataset, and the names of folders, archives and list entries that mean them."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from fastokd.data.dataset import invalid
from fastokd.errors import summarize

SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validate", "validation", "dev", "eval", "evaluation", "holdout"),
    "test": ("test", "testing", "tst"),
}
"""The splits, and the words for each, in any case."""

SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
"""The split that each of the words names."""

_GENERIC = ("set", "data", "images", "imgs")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_JOINED = re.compile(rf"({'|'.join(SPLIT_OF)})({'|'.join(_GENERIC)})")


class Reading(NamedTuple):
    """The split that a name means, and the other words in the name."""

    split: str
    rest: tuple[str, ...]


def read_name(name: str) -> Reading | None:
    """The split that a name such as ``TRAIN``, ``seg_train``, ``testSet`` or ``val2017`` means;
    None if it names no split, or several.
    """
    words: list[str] = []
    for word in _WORD.findall(name):
        joined = _JOINED.fullmatch(word.lower())
        words += joined.groups() if joined else (word.lower(),)
    named = [word for word in words if word in SPLIT_OF]
    if len(named) != 1:
        return None
    rest = tuple(word for word in words if word not in SPLIT_OF and word not in _GENERIC)
    return Reading(SPLIT_OF[named[0]], rest)


def is_wrapper(name: str, split: str) -> bool:
    """True for the name of a folder that holds all of a split: ``train/train``, ``val/images``."""
    reading = read_name(name)
    if reading is not None:
        return reading == Reading(split, ())
    return all(word.lower() in _GENERIC for word in _WORD.findall(name))


class SplitFolders(NamedTuple):
    """The folder of each split of a tree, and the other folders next to them."""

    folders: dict[str, str]
    unused: list[str]


def find_split_folders(root: Path, names: Collection[str]) -> SplitFolders:
    """The folders that are splits, among all folders of a root.

    A folder is a split if its name is a word of ``SPLITS``, in any case. Names with further words
    (``seg_train``, ``seg_test``) count if the further words are the same for all splits. Otherwise
    the folders are classes.

    Raises:
        DataError: two folders of one split, or names that mean several splits in different ways.
    """
    readings = {name: reading for name in sorted(names) if (reading := read_name(name))}
    exact = {name: each for name, each in readings.items() if name.lower() in SPLIT_OF}
    known = {each.split for each in exact.values()}
    # Next to train/ and val/, "test_scripts" is no split.
    complete = "train" in known and len(known) > 1
    others = {} if complete else readings
    meant = exact | {name: each for name, each in others.items() if each.split not in known}
    splits = {each.split for each in meant.values()}
    alone = len(readings) == len(names) == 1
    if not exact and ("train" not in splits or (len(splits) < 2 and not alone)):
        return SplitFolders({}, [])  # classes such as "bullet_train" next to "car"
    found: dict[str, str] = {}
    for name, each in sorted(meant.items(), key=lambda item: list(SPLITS).index(item[1].split)):
        if found.setdefault(each.split, name) != name:
            both = f"both {found[each.split]}/ and {name}/ exist"
            raise invalid(root, f"{both}; put the images of a split into one folder")
    if len({each.rest for each in meant.values() if each.rest}) > 1:
        listed = summarize([f"{name}/" for name in meant])
        fix = "rename them to train/, val/ and test/, or put class folders below train/"
        raise invalid(root, f"{listed} look like splits with different names; {fix}")
    return SplitFolders(found, [name for name in sorted(names) if name not in found.values()])


def split_of_name(path: str) -> set[str]:
    """The splits that the words of a path mean."""
    words = (word.lower() for part in path.split(os.sep) for word in _WORD.findall(part))
    return {SPLIT_OF[word] for word in words if word in SPLIT_OF}


def files_by_split(
    root: Path, files: Sequence[str], noun: str, ending: str
) -> dict[str, list[str]]:
    """The files of each split, by the words in their paths; all are for training where no path
    tells a split.

    Args:
        root: the folder that the paths are relative to.
        noun, ending: the kind of the files and the end of their names, for messages.

    Raises:
        DataError: paths that tell two splits, none next to paths that tell one, or no training
            files.
    """
    by_split: dict[str, list[str]] = {}
    for file in files:
        words = sorted(split_of_name(file))
        if len(words) > 1:
            both = " and ".join(words)
            raise invalid(root / file, f"its name says {both}; keep one of these words")
        by_split.setdefault(words[0] if words else "", []).append(file)
    if list(by_split) == [""]:
        return {"train": list(files)}
    if "" in by_split:
        problem = f"{noun}s whose split is unknown: {summarize(by_split[''])}"
        raise invalid(root, f"{problem}; name them train-, val- or test-NUMBER{ending}")
    if "train" not in by_split:
        problem = f"no training {noun}s (found {summarize(files)})"
        raise invalid(root, f"{problem}; name them train-NUMBER{ending}")
    return by_split
