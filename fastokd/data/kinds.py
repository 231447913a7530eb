"""The interface of a dataset kind, and the options for reading one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.data.dataset import DataSource, Split
from fastokd.data.files import FileSplit
from fastokd.data.images import Progress


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a dataset into memory.

    Args:
        image_size: side of the square that all images are fitted to (shorter side scaled, center
            cropped); None keeps their size.
        workers: decoding threads; None for one per usable CPU core.
        progress: called with (files done, files in all) while files are decoded.
    """

    image_size: int | None = None
    workers: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class DatasetKind:
    """A kind of dataset: one that is decoded while it is read, or a list of image files.

    Args:
        read: reads a dataset from a path, or from the package itself if the path is None; raises
            ``DataError``. Exactly one of ``read`` and ``files`` is given.
        detect: tells whether a path holds this kind; None for kinds that are only opened by name.
        files: lists the image files of a dataset without decoding any; raises ``DataError``.
        layout: the content of its path, for messages. With a layout, a path must be given.
        list_split: lists one split ("train", "val", "test", or None for the split a run is
            evaluated on) as the only one of its source, without needing the others. Given for trees
            of class folders, which ``fastokd data check`` can walk even if they are broken.
    """

    read: Callable[[Any, ReadOptions], DataSource[Split]] | None = None
    detect: Callable[[Path], bool] | None = None
    files: Callable[[Any], DataSource[FileSplit]] | None = None
    list_split: Callable[[Path, str | None], DataSource[FileSplit]] | None = None
    layout: str = ""
