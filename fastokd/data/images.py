"""Decoding of image files and arrays into one uint8 tensor: size and memory."""

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastokd.data.dataset import invalid
from fastokd.data.decoding import EXTENSIONS as EXTENSIONS
from fastokd.data.decoding import Color, central_part
from fastokd.data.decoding import decode as decode
from fastokd.errors import ConfigError, DataError, escape, summarize
from fastokd.storage import available_memory, usable_cores

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[int, int], None]

MEMORY_FRACTION = 0.5
_CHUNK = 64


def default_workers() -> int:
    """One decoding thread per CPU core that this process may use."""
    return usable_cores()


def workers_per_process() -> int:
    """The threads of ``default_workers`` for each process of a run on this machine, at least 1.
    Launchers set the number of processes.
    """
    return max(1, default_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_memory(count: int, height: int, width: int, where: object) -> None:
    """Raise ``DataError`` if ``count`` RGB images need more than half of the free memory."""
    available = available_memory()
    needed = count * height * width * 3
    if available is not None and needed > MEMORY_FRACTION * available:
        need = f"{count} images of {height}x{width} need {needed / 2**30:.3g} GiB decoded"
        limit = f"more than half of the {available / 2**30:.3g} GiB of free memory"
        raise invalid(where, f"{need}, {limit}; use a smaller --image-size or fewer images")


def check_image_size(image_size: int | None) -> None:
    """Raise ``ConfigError`` unless the size is None or a positive number of pixels."""
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size}: must be 1 or more pixels")


def fit(image: "Image.Image", size: int) -> "Image.Image":
    """Scale the shorter side to ``size``, antialiased, then crop the central square."""
    from PIL import Image

    if image.size == (size, size):
        return image
    if (part := central_part(*image.size)) != (0, 0, *image.size):
        image = image.crop(part)
    width, height = image.size
    shorter = min(width, height)
    width, height = size * width // shorter, size * height // shorter
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resize_all(images: Tensor, size: int | None, where: object) -> Tensor:
    """Apply ``fit`` to decoded images: uint8 [N, 3, H, W] to [N, 3, size, size], channels last in
    memory.

    Raises:
        DataError: the result does not fit in memory.
    """
    if size is None or images.shape[2:] == (size, size):
        return images
    from PIL import Image

    check_memory(len(images), size, size, where)
    out = torch.empty((len(images), size, size, 3), dtype=torch.uint8)
    pixels = out.numpy()
    for row, image in zip(pixels, images.permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
        row[...] = np.asarray(fit(Image.fromarray(image), size))
    return out.permute(0, 3, 1, 2)


def corrupt_files_error(
    root: Path,
    files: Sequence[str],
    corrupt: Mapping[int, str],
    fix: str = "replace or delete them",
) -> DataError:
    """The error that names files that cannot be decoded: ``corrupt`` has the reason for each by its
    index in ``files``, ``fix`` the advice at the end of the message.
    """
    named = summarize([f"{files[i]} ({reason})" for i, reason in corrupt.items()])
    count = f"{len(corrupt)} of {len(files)} image files"
    return invalid(root, f"{count} cannot be decoded: {named}; {fix}")


def try_decode_all(
    root: Path,
    files: Sequence[str],
    read: Callable[[int], bytes],
    image_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    background: Color | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """Decode files in a thread pool into one tensor, skipping files that cannot be decoded.

    Args:
        root: the folder of the dataset, for messages.
        files: the names of the files, for messages.
        read: returns the bytes of the i-th file.
        image_size: side of the square that every image is fitted to; None keeps the size that all
            of them must share.
        workers: decoding threads; one per usable core by default.
        progress: called in this thread with (files done, files in all).
        background: the color behind transparent pixels, see ``decode``.

    Returns:
        The images uint8 [N, 3, H, W], channels last in memory, with undefined pixels for corrupt
        files, and the reason for each corrupt file by its index.

    Raises:
        DataError: sizes that differ without an ``image_size``, or more images than fit in memory.
    """
    height = width = image_size or 1
    model = ""
    for i in () if image_size else range(len(files)):
        with contextlib.suppress(Exception):  # reported when all files are decoded
            first = decode(BytesIO(read(i)))
            height, width, model = first.height, first.width, files[i]
            break
    check_memory(len(files), height, width, root)
    out = torch.empty((len(files), height, width, 3), dtype=torch.uint8)
    pixels = out.numpy()

    def decode_chunk(start: int) -> dict[int, str]:
        unreadable = {}
        for i in range(start, min(start + _CHUNK, len(files))):
            try:
                image = decode(BytesIO(read(i)), background)
            except Exception as error:  # a decoder may raise any exception for damaged bytes
                unreadable[i] = reason_of(error)
                continue
            if image_size is not None:
                image = fit(image, image_size)
            elif image.size != (width, height):
                one, other = f"{model} is {height}x{width}", f"{files[i]} is {image.height}"
                sizes = f"{escape(one)} and {escape(other)}x{image.width} (height x width)"
                side = max(4, min(height, width, *image.size))  # --image-size takes no less
                fix = f"use --image-size {side}"
                raise invalid(root, f"images differ in size: {sizes}; {fix}")
            pixels[i] = np.asarray(image)
        return unreadable

    corrupt: dict[int, str] = {}
    pool = ThreadPoolExecutor(workers or default_workers())
    try:
        chunks = pool.map(decode_chunk, range(0, len(files), _CHUNK))
        for done, failed in enumerate(chunks, start=1):
            corrupt |= failed
            if progress is not None:
                progress(min(done * _CHUNK, len(files)), len(files))
    finally:
        # Without this, an error or Ctrl-C would wait for every file in the queue.
        pool.shutdown(cancel_futures=True)
    return out.permute(0, 3, 1, 2), corrupt


def reason_of(error: Exception) -> str:
    """The reason why a file cannot be decoded, in words."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image, or empty"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Without colors of a terminal and the paths of the machine that built the decoder.
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.sub(r"(\w+, )?\S+\.(cpp|cc|cu|h|hpp):\d+[],:]? *", "", text).strip()
    return text.splitlines()[0] if text else type(error).__name__
