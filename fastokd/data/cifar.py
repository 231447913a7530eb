"""CIFAR-10 and CIFAR-100 in the files that torchvision and the authors' ``-python.tar.gz`` archives
use.

These files are pickles. They are read by an unpickler that resolves only the parts of an array of
numbers, so a malicious file can only be refused.
"""

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource, Split, invalid
from fastokd.data.images import resize_all
from fastokd.data.kinds import DatasetKind, ReadOptions
from fastokd.errors import escape


@dataclass(frozen=True)
class CifarFiles:
    """Names and keys of one CIFAR's files, and the customary normalisation."""

    name: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels_key: str
    classes_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR10 = CifarFiles(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    labels_key="labels",
    classes_key="label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = CifarFiles(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    test=("test",),
    meta="meta",
    labels_key="fine_labels",
    classes_key="fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def _find(files: CifarFiles, path: Path) -> Path | None:
    """The folder with the files: ``path`` itself, or the one below it."""
    folders = (path / files.folder, path)
    return next((p for p in folders if p.name == files.folder and os.path.isdir(p)), None)


def _read(files: CifarFiles, path: Path, options: ReadOptions) -> DataSource[Split]:
    folder = _find(files, path)
    if folder is None:
        packed = os.path.exists(path / files.archive)
        fix = f"unpack {files.archive} there: tar xzf"
        fix = fix if packed else f"put the unpacked {files.archive} there"
        raise invalid(path, f"no {files.folder}/; {fix} (nothing is downloaded)")
    names = (*files.train, *files.test, files.meta)
    again = f"unpack {files.archive} again"
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise invalid(folder, f"missing {', '.join(missing)}; {again}")
    classes = _load(folder / files.meta).get(files.classes_key)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise invalid(folder / files.meta, f"no list '{files.classes_key}' in it; {again}")
    train = _read_split("train", folder, files.train, files, options.image_size)
    test = _read_split("test", folder, files.test, files, options.image_size)
    augment, root = Augment(pad=train.images.shape[-1] // 8, flip=True), folder.resolve()
    return DataSource(
        files.name, tuple(classes), train, test, None, files.mean, files.std, augment, root
    )


def _read_split(
    name: str, folder: Path, batches: tuple[str, ...], files: CifarFiles, image_size: int | None
) -> Split:
    images, targets = [], []
    for batch in batches:
        content = _load(folder / batch)
        pixels, labels = content.get("data"), content.get(files.labels_key)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.shape[1:] != (3072,)
            or not isinstance(labels, list)
            or len(labels) != len(pixels)
            or not all(type(y) is int for y in labels)
        ):
            expected = f"uint8 'data' [N, 3072] with N '{files.labels_key}'"
            raise invalid(folder / batch, f"not {expected}; unpack {files.archive} again")
        images.append(torch.from_numpy(pixels).reshape(-1, 3, 32, 32).permute(0, 2, 3, 1))
        targets += labels
    whole = torch.cat(images).contiguous().permute(0, 3, 1, 2)
    return Split(name, resize_all(whole, image_size, folder), torch.tensor(targets))


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes in protocol-2 pickles of Python 3; other codecs are refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


# NumPy 1 and 2 keep ``_reconstruct`` in different modules, so it is taken from an array.
_rebuild: Any = np.empty(0).__reduce__()[0]
_ARRAY_PARTS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _rebuild,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file does")
        return _ARRAY_PARTS[module, name]


def _load(path: Path) -> dict[str, Any]:
    """A CIFAR file's dictionary, with text keys.

    Raises:
        DataError: the file is damaged, or holds more than numbers, text and containers.
    """
    reason = ""
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # damaged bytes make the unpickler raise almost any exception
        content, reason = None, escape(error) or type(error).__name__
    if not isinstance(content, dict):
        reason = reason or f"a {type(content).__name__}"
        raise invalid(path, f"not a CIFAR file ({reason}); unpack the archive again")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value
        for key, value in content.items()
    }


def _kind(files: CifarFiles) -> DatasetKind:
    layout = f"{files.folder}/ (nothing is downloaded)"
    return DatasetKind(
        partial(_read, files), lambda path: _find(files, path) is not None, layout=layout
    )


CIFAR10, CIFAR100 = _kind(_CIFAR10), _kind(_CIFAR100)
