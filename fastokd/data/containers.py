"""Archives and containers of images that are not read, and the commands that convert them."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

_UNPACK = {
    (".zip",): "unzip {file} -d FOLDER",
    (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar"): (
        "mkdir FOLDER && tar -xf {file} -C FOLDER"
    ),
    (".7z",): "7z x {file} -oFOLDER",
    (".rar",): "unrar x {file} FOLDER/",
    (".gz",): "gunzip --keep {file}",
}
_ARRAYS = (
    ".arrow",
    ".h5",
    ".hdf5",
    ".lmdb",
    ".mat",
    ".mdb",
    ".npy",
    ".npz",
    ".pkl",
    ".pickle",
    ".pt",
)
_WRITE = (
    "write each image to FOLDER/CLASS/NUMBER.png, for example by"
    " PIL.Image.fromarray(pixels).save(path)"
)


def conversion(file: str | Path) -> str | None:
    """The way to convert an archive or container into a folder of images; None for other names."""
    name = str(file)
    for endings, command in _UNPACK.items():
        if name.lower().endswith(endings):
            return f"run: {command.format(file=shlex.quote(name))}; then pass FOLDER"
    if name.lower().endswith(_ARRAYS):
        return f"{_WRITE}; then pass FOLDER"
    return None


def describe_containers(root: Path, names: Sequence[str]) -> str | None:
    """The containers among a folder's entries in words, with the way to convert the first."""
    for name in names:
        if fix := conversion(os.path.join(root, name)):
            return f"found {name}; {fix}"
    return None
