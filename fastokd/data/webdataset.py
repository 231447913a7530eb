"""WebDataset shards: tar archives in which the files of one sample lie together, named alike up to
the first dot.

A sample is an image and its label: ``.cls`` with a class number or name. Splits and class names are
told as in all ``archives``.
"""

import os
import re
import tarfile
from functools import partial
from pathlib import Path

from fastokd.data.archives import Sample, holds_archives, list_archives
from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit
from fastokd.data.images import EXTENSIONS, show
from fastokd.data.registry import DatasetKind
from fastokd.errors import DataError

NAMED = re.compile(r"\.tar$")


def list_shards(path: Path | None) -> DataSource[FileSplit]:
    """List the samples of all shards, without decoding any image.

    Raises:
        DataError: as ``list_archives`` and ``read_shard``.
    """
    return list_archives("webdataset", ".tar", NAMED, path, read_shard)


def read_shard(file: Path) -> list[Sample]:
    """The samples of one shard, in its order.

    Raises:
        DataError: not an uncompressed tar archive, cut off, a sample without image or label, or two
            of one name.
    """
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        _check_end(file)
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if member.isfile() and not name.startswith("."):
                    key = os.path.join(folder, stem)
                    if (
                        parts.setdefault(key, {}).setdefault(extension.lower(), member)
                        is not member
                    ):
                        raise DataError(
                            f"{show(file)}: sample {show(key)} has a second"
                            f" .{show(extension.lower())} file; give every sample a name of its own"
                        )
            samples = []
            for key, members in parts.items():
                image = next(
                    (members[extension] for extension in members if f".{extension}" in EXTENSIONS),
                    None,
                )
                label = members.get("cls")
                if image is None or label is None:
                    raise DataError(
                        f"{show(file)}: sample {show(key)} has no"
                        f" {'image' if image is None else '.cls file with its label'}; each needs"
                        " both"
                    )
                text = archive.extractfile(label)
                assert text is not None, "a regular file"
                samples.append(
                    Sample(
                        image.name,
                        image.offset_data,
                        image.size,
                        text.read().decode("utf-8", "surrogateescape").strip(),
                    )
                )
            return samples
    except tarfile.TarError as error:
        raise DataError(
            f"{show(file)}: not an uncompressed tar archive, or cut off ({show(error)}); write or"
            " copy it again"
        ) from error
    except OSError as error:
        raise DataError(f"{show(file)}: cannot be read: {error.strerror or show(error)}") from error


def _check_end(file: Path) -> None:
    """Raise ``tarfile.ReadError`` unless the archive has its end, two blocks of zeros: it may be
    cut between two members.
    """
    with open(file, "rb") as archive:
        if archive.seek(0, os.SEEK_END) >= 2 * tarfile.BLOCKSIZE:
            archive.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
            if not archive.read().strip(b"\0"):
                return
    raise tarfile.ReadError("its end is missing")


WEBDATASET = DatasetKind(files=list_shards, detect=partial(holds_archives, NAMED))
