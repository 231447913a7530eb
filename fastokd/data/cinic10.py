"""CINIC-10 (Darlow et al. 2018): ``train/``, ``valid/`` and ``test/`` with 90,000 images of 32 x 32
each.
"""

import os
from dataclasses import replace
from pathlib import Path

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource, invalid
from fastokd.data.files import FileSplit
from fastokd.data.folder import list_split, list_tree
from fastokd.data.kinds import DatasetKind
from fastokd.errors import escape

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.47889522, 0.47227842, 0.43047404)
STD = (0.24205776, 0.23828046, 0.25874835)
"""The normalization of CINIC-10's authors."""


def _detect(path: Path) -> bool:
    # The folder named valid/ distinguishes it from CIFAR-10 as files.
    return all(os.path.isdir(path / "valid" / name) for name in CLASSES)


def list_cinic10(path: Path) -> DataSource[FileSplit]:
    """List CINIC-10's files; a ``DataError`` for a folder that does not hold them."""
    tree = list_tree(path)
    if tree.classes != CLASSES:
        wrong = f"not CINIC-10, whose classes are {', '.join(CLASSES)}"
        raise invalid(path, f"{wrong}; open it as folder:{escape(path)}")
    return replace(tree, name="cinic10", mean=MEAN, std=STD, augment=Augment(pad=4, flip=True))


CINIC10 = DatasetKind(
    files=list_cinic10,
    detect=_detect,
    list_split=list_split,
    layout="train/, valid/ and test/ (nothing is downloaded)",
)
