"""CINIC-10 (Darlow et al. 2018): ``train/``, ``valid/`` and ``test/`` with 90,000 images of 32 x 32
each.
"""

import os
from dataclasses import replace
from pathlib import Path

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit
from fastokd.data.folder import list_split, list_tree
from fastokd.data.kinds import DatasetKind
from fastokd.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.47889522, 0.47227842, 0.43047404)
STD = (0.24205776, 0.23828046, 0.25874835)
"""The normalization of CINIC-10's authors."""


def _detect(path: Path) -> bool:
    # The folder named valid/ distinguishes it from CIFAR-10 as files.
    return all(os.path.isdir(path / "valid" / name) for name in CLASSES)


def list_cinic10(path: Path | None) -> DataSource[FileSplit]:
    """List CINIC-10's files.

    Raises:
        DataError: no folder, or none that holds CINIC-10.
    """
    if path is None:
        raise DataError(
            "cinic10 needs a folder: cinic10:PATH, where PATH holds train/, valid/ and test/"
            " (nothing is downloaded)"
        )
    tree = list_tree(path)
    if tree.classes != CLASSES:
        raise DataError(
            f"{path}: not CINIC-10, whose classes are {', '.join(CLASSES)}; open it as"
            f" folder:{path}"
        )
    return replace(tree, name="cinic10", mean=MEAN, std=STD, augment=Augment(pad=4, flip=True))


CINIC10 = DatasetKind(files=list_cinic10, detect=_detect, list_split=list_split)
