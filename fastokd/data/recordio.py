"""RecordIO files of images, as MXNet's ``im2rec`` packs them, read without MXNet; ``.idx`` files
are not needed.
"""

import mmap
import re
import struct
from functools import partial
from pathlib import Path

from fastokd.data.archives import Sample, holds_archives, indexed, list_archives
from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit
from fastokd.data.images import show
from fastokd.data.registry import DatasetKind
from fastokd.errors import DataError

MAGIC = 0xCED7230A
NAMED = re.compile(r"\.rec$")
_RECORD, _IMAGE = (
    struct.Struct("<II"),
    struct.Struct("<IfQQ"),
)  # magic, kind and length; flag, label, two ids
_LENGTH_BITS = 29


def read_recordio(file: Path) -> list[Sample]:
    """The samples of one file, in its order.

    Raises:
        DataError: cut off, not a RecordIO file of images, a record in several parts, or a label
            that is no whole number.
    """
    samples: list[Sample] = []
    try:
        with (
            open(file, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            start = 0
            while start < len(data):
                magic, word = _RECORD.unpack_from(data, start)
                length, parts = word & (1 << _LENGTH_BITS) - 1, word >> _LENGTH_BITS
                begin = start + _RECORD.size
                if magic != MAGIC or begin + length > len(data):
                    raise ValueError(
                        "its end is missing" if magic == MAGIC else "no record begins there"
                    )
                if parts:
                    raise ValueError(
                        "it is in several parts, because the format's magic number occurs in its"
                        " image: leave it out, or pack the images anew"
                    )
                flag, label, _, _ = _IMAGE.unpack_from(data, begin)
                image = (
                    begin + _IMAGE.size + 4 * flag
                )  # a flag counts the labels that follow instead
                if flag:
                    (label,) = struct.unpack_from("<f", data, begin + _IMAGE.size)
                if label != int(label) or image > begin + length:
                    raise ValueError(f"its label {label:g} is no class number")
                samples.append(
                    Sample(
                        f"{file.name}/{len(samples)}",
                        image,
                        begin + length - image,
                        str(int(label)),
                    )
                )
                start = begin + (length + 3) // 4 * 4
    except OSError as error:
        raise DataError(f"{show(file)}: cannot be read: {error.strerror or show(error)}") from error
    except (ValueError, OverflowError, struct.error) as error:
        raise DataError(
            f"{show(file)}: record {len(samples)} cannot be used ({show(error)}); write or copy the"
            " file again"
        ) from error
    return samples


def list_recordio(path: Path | None) -> DataSource[FileSplit]:
    """List the samples of all ``.rec`` files in a folder, without decoding any image.

    Raises:
        DataError: as ``list_archives`` and ``read_recordio``.
    """
    return list_archives("recordio", ".rec", NAMED, path, indexed(read_recordio), from_one=True)


RECORDIO = DatasetKind(files=list_recordio, detect=partial(holds_archives, NAMED))
