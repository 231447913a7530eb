"""IDX files as of MNIST, Fashion-MNIST, KMNIST and EMNIST, plain or compressed by gzip."""

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastokd.data.dataset import DataSource, Split, invalid
from fastokd.data.files import cannot_read
from fastokd.data.images import resize_all
from fastokd.data.kinds import DatasetKind, ReadOptions
from fastokd.errors import summarize

_BYTES = 8  # the code of unsigned bytes in the header
_DIMENSIONS = {"images": 3, "labels": 1}
_NAME = re.compile(r"(.*?)[-_.]?(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}
_INNER = "raw"
"""The folder in which torchvision keeps the files."""


class _Part(NamedTuple):
    """The parts of a file's name: its dataset ("" for MNIST's names), its split and content."""

    dataset: str
    split: str
    content: str


def _find(path: Path) -> dict[_Part, str]:
    """The IDX files of a folder by what they hold, unpacked ones before compressed ones."""
    found: dict[_Part, str] = {}
    try:
        names = sorted(os.listdir(path))
    except OSError:  # reported when the folder is read
        return found
    for name in names:
        match = _NAME.fullmatch(name)
        *words, last = re.split("[-_.]", match[1]) if match else ("",)
        if match and last in _SPLITS and os.path.isfile(path / name):
            found.setdefault(_Part("-".join(words), _SPLITS[last], match[2]), name)
    return found


def _folder(path: Path) -> Path:
    """The folder of the files: the given one, or ``raw`` in it."""
    return path / _INNER if not _find(path) and _find(path / _INNER) else path


def _detect(path: Path) -> bool:
    return any(part[1:] == ("train", "images") for part in _find(_folder(path)))


def read(path: Path, options: ReadOptions) -> DataSource[Split]:
    """Read both parts; the classes are the numbers of the labels.

    Raises:
        DataError: a missing or damaged file.
    """
    folder = _folder(path)
    files = _find(folder)
    datasets = sorted({part.dataset for part in files})
    if len(datasets) > 1:
        several = f"files of several datasets: {summarize(datasets)}"
        raise invalid(folder, f"{several}; move those of one into a folder")
    arrays: dict[tuple[str, str], Tensor] = {}
    for split in ("train", "test"):
        for content, dimensions in _DIMENSIONS.items():
            file = files.get(_Part("".join(datasets), split, content))
            if file is None:
                name = f"{'t10k' if split == 'test' else split}-{content}-idx{dimensions}-ubyte"
                raise invalid(folder, f"missing {name} (nothing is downloaded)")
            arrays[split, content] = _read_array(folder / file, dimensions)
        counts = [len(arrays[split, content]) for content in _DIMENSIONS]
        if counts[0] != counts[1]:
            problem = f"{counts[0]} images and {counts[1]} labels in the {split} files"
            raise invalid(folder, f"{problem}; download them again")
    # The letters of EMNIST have the labels 1 to 26.
    numbers = torch.cat([arrays[split, "labels"] for split in ("train", "test")]).unique()
    train, test = (
        Split(
            split,
            resize_all(
                arrays[split, "images"][:, None].expand(-1, 3, -1, -1), options.image_size, folder
            ),
            torch.searchsorted(numbers, arrays[split, "labels"]),
        )
        for split in ("train", "test")
    )
    names = tuple(str(number) for number in numbers.tolist())
    return DataSource(path.resolve().name, names, train, test, root=path.resolve())


def _read_array(file: Path, dimensions: int) -> Tensor:
    """The array of bytes in a file."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise invalid(file, "damaged gzip data; download it again") from error
    except OSError as error:
        raise cannot_read(file, error) from error
    start = 4 + 4 * dimensions
    if len(content) < start or tuple(content[:4]) != (0, 0, _BYTES, dimensions):
        raise invalid(file, f"not an IDX file of bytes in {dimensions} dimension(s)")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - start != math.prod(shape):
        problem = f"{len(content) - start} bytes for the shape {list(shape)}"
        raise invalid(file, f"{problem}; download it again")
    array = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(array.copy())


IDX = DatasetKind(read, _detect, layout="train-images-idx3-ubyte and the three other files")
