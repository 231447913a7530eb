"""IDX files as of MNIST, Fashion-MNIST and KMNIST, plain or compressed by gzip."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastokd.data.dataset import DataSource, Split, invalid
from fastokd.data.files import cannot_read
from fastokd.data.images import resize_all
from fastokd.data.kinds import DatasetKind, ReadOptions

PARTS = {"train": "train", "test": "t10k"}
_BYTES = 8  # the code of unsigned bytes in the header


def _find(path: Path, part: str, content: str) -> Path | None:
    """The file of a part's "images" or "labels", whose names have a dash or a dot before "idx"."""
    dimensions = {"images": 3, "labels": 1}[content]
    names = (
        f"{part}-{content}{mark}idx{dimensions}-ubyte{ending}"
        for mark in "-."
        for ending in ("", ".gz")
    )
    return next((path / name for name in names if os.path.isfile(path / name)), None)


def _detect(path: Path) -> bool:
    return _find(path, PARTS["train"], "images") is not None


def read(path: Path, options: ReadOptions) -> DataSource[Split]:
    """Read both parts; the classes are the numbers of the labels.

    Raises:
        DataError: a missing or damaged file.
    """
    images: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for split, part in PARTS.items():
        for content, arrays, dimensions in (("images", images, 3), ("labels", labels, 1)):
            file = _find(path, part, content)
            if file is None:
                name = f"{part}-{content}-idx{dimensions}-ubyte"
                raise invalid(path, f"missing {name} (nothing is downloaded)")
            arrays[split] = _read_array(file, dimensions)
        if len(images[split]) != len(labels[split]):
            counts = f"{len(images[split])} images and {len(labels[split])} labels"
            raise invalid(path, f"{counts} in the part {part}; download the files again")
    count = 1 + max(int(each.max()) for each in labels.values() if len(each))
    train, test = (
        Split(
            split,
            resize_all(images[split][:, None].expand(-1, 3, -1, -1), options.image_size, path),
            labels[split].long(),
        )
        for split in PARTS
    )
    names = tuple(map(str, range(count)))
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
