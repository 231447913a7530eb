"""The datasets of ``bench.accuracy``: subsets of image folders, prepared once."""

import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bench.gpu.results import ROOT
from fastokd.data.convert import convert_dataset
from fastokd.errors import ConfigError
from fastokd.storage import write_text

ARCHIVES = tuple(folder / "shared" / "data" for folder in (ROOT, ROOT.parent))
"""Folders that may have the archives of the images, next to or inside the checkout."""

PRETRAINING = "pretraining.csv"
"""The list of other classes next to that of ``fine_tuning``."""


def tiny_imagenet_100(images: Path | None, folder: Path) -> Path:
    """Tiny-ImageNet-100 at 32 x 32: 200 training images of each class and all validation images.

    Args:
        images: the folder with ``train/CLASS`` and ``val/CLASS``; None to unpack the archives.
        folder: for the prepared images.

    Returns:
        A list for ``fastokd train --data``: ``folder/tiny-imagenet-100.csv``.
    """
    name = "tiny-imagenet-100"
    made = folder / f"{name}.csv"
    if images is None and made.is_file():
        return made
    return image_list(_tiny_imagenet_32(images, folder), made, train=200, evaluated="val")


def fine_tuning(images: Path | None, folder: Path) -> Path:
    """Tiny-ImageNet-100 at 32 x 32 in two lists of 50 classes each, every other class by name.

    Arguments as for ``tiny_imagenet_100``.

    Returns:
        ``folder/fine-tuning.csv``, with 20 training images of each class and all validation images
        of these classes. Next to it is ``pretraining.csv`` of the other classes, with 500 training
        images of each.
    """
    made, before = folder / "fine-tuning.csv", folder / PRETRAINING
    if images is None and made.is_file() and before.is_file():
        return made
    small = _tiny_imagenet_32(images, folder)
    image_list(small, before, train=500, evaluated="val", classes=slice(0, None, 2))
    return image_list(small, made, train=20, evaluated="val", classes=slice(1, None, 2))


def _tiny_imagenet_32(images: Path | None, folder: Path) -> Path:
    """The folder of all images of Tiny-ImageNet-100 at 32 x 32."""
    name = "tiny-imagenet-100"
    archives = [f"{name}.part1.tar.xz", f"{name}.part2.tar.xz"]
    source = images or unpacked(archives, folder / name, inside=name)
    return convert_dataset(source, folder / f"{name}-32", 32).out


def cifar10(images: Path | None, folder: Path) -> Path:
    """CIFAR-10 as JPEG files: 1,000 training images of each class and all test images.

    Arguments and result as for ``tiny_imagenet_100``, with ``test/CLASS`` instead of ``val``.
    """
    source = images or unpacked(["cifar10-jpeg.tar.xz"], folder / "cifar10-jpeg")
    return image_list(source, folder / "cifar10-jpeg.csv", train=1000, evaluated="test")


def find_archive(name: str) -> Path | None:
    """The path of an archive in the first of ``ARCHIVES`` that has it; None if none has."""
    return next((folder / name for folder in ARCHIVES if (folder / name).is_file()), None)


def unpacked(archives: Iterable[str], folder: Path, inside: str = "") -> Path:
    """The folder with the content of archives, unpacked once.

    Args:
        archives: their names in one of ``ARCHIVES``.
        folder: appears complete or not at all.
        inside: the folder of the images within the archives.

    Raises:
        ConfigError: there is no such archive.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        (content := Path(temporary, "content")).mkdir()
        for name in archives:
            path = find_archive(name)
            if path is None:
                where = " or ".join(map(str, ARCHIVES))
                raise ConfigError(f"no {name} in {where}; pass the unpacked images with --data")
            with tarfile.open(path) as archive:
                archive.extractall(content, filter="data")
        (content / inside).rename(folder)
    return folder


def image_list(
    root: Path, path: Path, train: int, evaluated: str, classes: slice = slice(None)
) -> Path:
    """Write a CSV list of the first images of each class, by their names.

    Args:
        root: a folder with ``train/CLASS`` and the split ``evaluated``.
        path: of the list.
        train: the number of training images of each class.
        evaluated: the split to evaluate on, all of it.
        classes: of the sorted names; all by default.

    Raises:
        ConfigError: a class has fewer training images, or there are no classes.
    """
    lines = ["path,label,split"]
    for split, count in (("train", train), (evaluated, None)):
        folders = sorted(each for each in (root / split).glob("*") if each.is_dir())
        if not folders:
            raise ConfigError(f"{root} has no folder {split}/CLASS; pass the images with --data")
        for each in folders[classes]:
            files = sorted(each.iterdir())
            if count is not None and len(files) < count:
                raise ConfigError(f"{each} has {len(files)} images; {count} are needed")
            lines += [f"{file.absolute()},{each.name},{split}" for file in files[:count]]
    write_text(path, "\n".join(lines) + "\n")
    return path
