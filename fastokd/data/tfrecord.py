"""TFRecord files of ``tf.train.Example`` messages, as ImageNet is kept for TensorFlow, read without
TensorFlow.

An example has the encoded image in ``image/encoded`` and its class in ``image/class/synset`` (a
name) or ``image/class/label`` (a number, from 0 or from 1), or as TensorFlow Datasets writes it:
``image`` and ``label``.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastokd.data.archives import Sample, holds_archives, indexed, list_archives
from fastokd.data.dataset import DataSource
from fastokd.data.files import FileSplit
from fastokd.data.images import show
from fastokd.data.registry import DatasetKind
from fastokd.errors import DataError

IMAGES, SYNSET, LABELS = (
    (b"image/encoded", b"image"),
    b"image/class/synset",
    (b"image/class/label", b"label"),
)
"""The features that are read; of the images and of the labels the first that is there."""

NAMED = re.compile(r"(\.tfrecord|(\.tfrecord)?-\d{5}-of-\d{5})$")
_HEADER, _FOOTER = (
    12,
    4,
)  # length and its checksum before the message, the message's checksum after it
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protocol buffers' wire types


def read_tfrecord(file: Path) -> list[Sample]:
    """The samples of one file, in its order.

    Raises:
        DataError: cut off, not a TFRecord file, or an example without image or class.
    """
    samples: list[Sample] = []
    try:
        with (
            open(file, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            start = 0
            while start < len(data):
                (length,) = struct.unpack_from("<Q", data, start)
                begin, end = start + _HEADER, start + _HEADER + length
                if end + _FOOTER > len(data):
                    raise ValueError("its end is missing")
                samples.append(_sample(data, begin, end, f"{file.name}/{len(samples)}"))
                start = end + _FOOTER
    except OSError as error:
        raise DataError(f"{show(file)}: cannot be read: {error.strerror or show(error)}") from error
    except (ValueError, struct.error, IndexError, StopIteration) as error:
        raise DataError(
            f"{show(file)}: record {len(samples)} is no example with {IMAGES[0].decode()} and a"
            f" class, or the file is cut off ({show(error)}); write or copy it again"
        ) from error
    return samples


def _sample(data: mmap.mmap, begin: int, end: int, name: str) -> Sample:
    features: dict[bytes, tuple[int, int]] = {}
    for _, left, right in _fields(data, begin, end, 1):  # Example.features
        for _, entry, after in _fields(data, left, right, 1):  # Features.feature, a map
            key = next(data[a:b] for _, a, b in _fields(data, entry, after, 1))
            if key in (*IMAGES, SYNSET, *LABELS):
                features[key] = next((a, b) for _, a, b in _fields(data, entry, after, 2))
    image, target = (
        next((key for key in keys if key in features), None) for keys in (IMAGES, (SYNSET, *LABELS))
    )
    if image is None or target is None:
        raise ValueError(f"no {(IMAGES if image is None else LABELS)[0].decode()}")
    _, left, right = next(_fields(data, *features[image], 1))  # Feature.bytes_list
    _, start, stop = next(_fields(data, left, right, 1))
    if target == SYNSET:
        _, left, right = next(_fields(data, *features[target], 1))
        label = next(
            data[a:b].decode("utf-8", "surrogateescape")
            for _, a, b in _fields(data, left, right, 1)
        )
    else:
        _, left, right = next(_fields(data, *features[target], 3))  # Feature.int64_list
        kind, a, _ = next(_fields(data, left, right, 1))
        value = a if kind == _VARINT else _varint(data, a)[0]  # packed or not
        label = str(value - (1 << 64) if value >> 63 else value)
    return Sample(name, start, stop - start, label)


def _fields(data: mmap.mmap, begin: int, end: int, wanted: int) -> Iterator[tuple[int, int, int]]:
    """The fields of one number in a message: wire type, and where their bytes begin and end, or the
    value of a varint, twice.
    """
    place = begin
    while place < end:
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
            found = value, value
        elif kind in (_FIXED64, _FIXED32):
            found = place, place + (8 if kind == _FIXED64 else 4)
            place = found[1]
        elif kind == _BYTES:
            length, place = _varint(data, place)
            found = place, place + length
            place = found[1]
        else:
            raise ValueError(f"wire type {kind}")
        if place > end:
            raise ValueError("a field beyond its message")
        if tag >> 3 == wanted:
            yield kind, *found


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def list_tfrecords(path: Path | None) -> DataSource[FileSplit]:
    """List the samples of all files in a folder named ``*.tfrecord`` or ``*-NNNNN-of-NNNNN``,
    without decoding any image.

    Raises:
        DataError: as ``list_archives`` and ``read_tfrecord``.
    """
    return list_archives(
        "tfrecord", ".tfrecord", NAMED, path, indexed(read_tfrecord), from_one=True
    )


TFRECORD = DatasetKind(files=list_tfrecords, detect=partial(holds_archives, NAMED))
