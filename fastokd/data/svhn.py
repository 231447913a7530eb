"""The Street View House Numbers (Netzer et al. 2011): ``train_32x32.mat``, ``test_32x32.mat``."""

import os
from pathlib import Path

import numpy as np
import torch

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource, Split, invalid
from fastokd.data.images import resize_all
from fastokd.data.kinds import DatasetKind, ReadOptions
from fastokd.errors import MissingExtra, escape

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}


def _detect(path: Path) -> bool:
    return os.path.isfile(path / FILES["train"])


def read(path: Path, options: ReadOptions) -> DataSource[Split]:
    """Read the digits 0 to 9; the files' label 10 is the digit 0."""
    missing = [name for name in FILES.values() if not os.path.isfile(path / name)]
    if missing:
        raise invalid(path, f"missing {', '.join(missing)} (nothing is downloaded)")
    train, test = (
        _read_split(name, path / file, options.image_size) for name, file in FILES.items()
    )
    # No flips: a flipped 2 is not a digit. The statistics are those of the training images.
    return DataSource(
        "svhn",
        tuple(map(str, range(10))),
        train,
        test,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        augment=Augment(pad=train.images.shape[-1] // 8, flip=False),
        root=path.resolve(),
    )


def _read_split(name: str, file: Path, image_size: int | None) -> Split:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise MissingExtra(f"reading {escape(file)} needs SciPy: pip install scipy") from None
    try:
        content = loadmat(file, variable_names=["X", "y"])
        pixels, labels = content["X"], content["y"].astype(np.int64).flatten()
    except Exception as error:  # a damaged file makes the reader raise almost any exception
        reason = escape(error) or type(error).__name__
        raise invalid(file, f"not an SVHN file ({reason}); download it again") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2:] != (3, len(labels)):
        found = f"X is {pixels.dtype} {list(pixels.shape)} for {len(labels)} labels"
        raise invalid(file, f"{found}, not uint8 [H, W, 3, N]; download it again")
    array = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    return Split(name, resize_all(images, image_size, file), torch.from_numpy(labels % 10))


SVHN = DatasetKind(read, _detect, layout=f"{' and '.join(FILES.values())} (nothing is downloaded)")
