"""Preparation of images for an exported student, as its record describes it."""

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastokd.data.decoding import Color, decode, to_rgb

if TYPE_CHECKING:
    from PIL import Image


def preprocess(record: Mapping[str, Any]) -> Callable[["str | Path | bytes | Image.Image"], Tensor]:
    """The preprocessing of a student's record, as in its evaluation.

    Args:
        record: of ``load_student``, ``open_export``, or the JSON file next to an export.

    Returns:
        A function from an image (a file's path, its bytes, or a PIL image) to float32 [3, H, W]:
        decoded to upright RGB, on the record's background if it is transparent, the shorter side
        scaled (bilinear, antialiased), the center cropped, divided by 255 and normalized. For a
        file exported with preprocessing it returns the pixels before the division, uint8 [3, H, W].
    """
    settings = record["preprocessing"]
    height, width = settings["image_size"]
    # Records of early versions have no shorter_side.
    side = settings.get("shorter_side", min(height, width))
    background = background_of(record)
    normalize = None if takes_pixels(record) else Normalize(settings)

    def prepare(image: "str | Path | bytes | Image.Image") -> Tensor:
        if isinstance(image, str | Path | bytes):
            image = decode(BytesIO(image) if isinstance(image, bytes) else image, background)
        rgb = to_rgb(image, background)
        pixels = torch.from_numpy(_cropped(rgb, side, height, width)).permute(2, 0, 1)
        return pixels.contiguous() if normalize is None else normalize(pixels[None])[0].contiguous()

    return prepare


def background_of(record: Mapping[str, Any]) -> Color | None:
    """The color behind transparent pixels; None, as in records of early versions, drops the
    transparency.
    """
    color = record["preprocessing"].get("background")
    return None if color is None else tuple(color)


def _cropped(image: "Image.Image", side: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """The pixels [H, W, 3] of the center of an image whose shorter side is scaled to ``side``."""
    from PIL import Image

    shorter = min(image.size)
    wide, high = (side * each // shorter for each in image.size)
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return np.array(image.crop((left, top, left + width, top + height)))


def takes_pixels(record: Mapping[str, Any]) -> bool:
    """True if the file of this record was exported with preprocessing and takes uint8 pixels."""
    return bool(record["export"].get("with_preprocessing"))


def example_images(record: Mapping[str, Any]) -> Tensor:
    """Two images of zeros in the type and size that the file of a record takes."""
    dtype = torch.uint8 if takes_pixels(record) else torch.float32
    return torch.zeros(2, 3, *record["preprocessing"]["image_size"], dtype=dtype)


class Normalize(nn.Module):
    """Pixels [B, 3, H, W] from 0 to 255 to normalized images float32.

    Args:
        settings: the entry ``preprocessing`` of a record.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(settings[name], dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, values)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """The uint8 pixels of normalized images: the inverse."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def run_on_pixels(
    run: Callable[[Tensor], Tensor], record: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The function of normalized images for one that takes a file's inputs."""
    if not takes_pixels(record):
        return run
    normalize = Normalize(record["preprocessing"])
    return lambda images: run(normalize.pixels(images))
