"""Predictions of an exported student for image files."""

import glob
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.data.images import EXTENSIONS, default_workers, reason_of
from fastokd.errors import DataError, escape
from fastokd.export.files import Export
from fastokd.export.preprocessing import preprocess

_BATCH = 32


class Prediction(NamedTuple):
    """The most probable classes of an image."""

    file: str
    classes: tuple[tuple[str, float], ...]
    """Names and probabilities, the largest first."""
    error: str = ""
    """The reason why the image cannot be read; it has no classes then."""

    def as_json(self) -> dict[str, Any]:
        """The prediction as JSON has it."""
        if self.error:
            return {"file": self.file, "error": self.error}
        classes = [{"class": name, "probability": value} for name, value in self.classes]
        return {"file": self.file, "predictions": classes}


def find_images(paths: Sequence[str]) -> list[str]:
    """The image files that paths name: files, folders (with subfolders) and patterns such as
    ``photos/*.jpg``, each in alphabetical order.

    Raises:
        DataError: a path that does not exist, a folder or pattern without images, or no paths.
    """
    files: list[str] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*") if _is_image(file))
        elif path.exists():
            inside = [text]
        else:
            inside = sorted(file for file in glob.glob(text, recursive=True) if _is_image(file))
        if not inside:
            problem = "there is no such file"
            if path.is_dir():
                problem = "it holds no images"
            elif glob.has_magic(text):
                problem = "no image has such a name"
            raise DataError(f"{escape(text)}: {problem}; pass images, folders or patterns")
        files += inside
    if not files:
        raise DataError("no images; pass image files, folders or patterns such as 'photos/*.jpg'")
    return files


def _is_image(path: str | Path) -> bool:
    return Path(path).suffix.lower() in EXTENSIONS and Path(path).is_file()


def predict_files(export: Export, files: Sequence[str], top: int = 5) -> Iterator[Prediction]:
    """Classify image files, prepared as in the record of the student.

    Args:
        export: see ``open_export``.
        files: paths of images.
        top: the number of most probable classes to return.
    """
    prepare, classes = preprocess(_of_network(export.record)), export.record["classes"]

    def read(file: str) -> Tensor | str:
        try:
            return prepare(file)
        except Exception as error:  # a decoder may raise any exception for damaged files
            return reason_of(error)

    with ThreadPoolExecutor(default_workers()) as pool:
        for start in range(0, len(files), _BATCH):
            names = files[start : start + _BATCH]
            images = list(pool.map(read, names))
            readable = [image for image in images if isinstance(image, Tensor)]
            rows: Iterator[Tensor] = iter(())
            if readable:
                batch = torch.stack(readable).to(export.runtime.device)
                rows = iter(export.runtime.run(batch).float().softmax(1).cpu())
            for name, image in zip(names, images, strict=True):
                if isinstance(image, str):
                    yield Prediction(name, (), image)
                    continue
                values, indices = next(rows).topk(min(top, len(classes)))
                found = zip(indices.tolist(), values.tolist(), strict=True)
                yield Prediction(name, tuple((classes[index], value) for index, value in found))


def _of_network(record: dict[str, Any]) -> dict[str, Any]:
    """The record of the student alone: runtimes take normalized images for every file."""
    return {**record, "export": {**record["export"], "with_preprocessing": False}}
