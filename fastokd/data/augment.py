"""Training augmentation of a whole batch at once, on whatever device the batch lies.

Every operation here has static shapes and no host synchronisation, so it may be compiled or captured.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """The augmentation policy of the training split: a random crop, then random mirroring.

    Args:
        pad: black pixels added on every side before a crop of the original size is taken; 0 for no such crop.
        flip: mirror each image left to right with probability one half.
        crop_scale: the range of the area fraction of random resized crops, (0.08, 1) for ImageNet; None for none.
        crop_ratio: the range of their aspect ratio, width / height.
    """

    pad: int = 0
    flip: bool = False
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ConfigError(f"augment pad={self.pad} is negative; use 0 to switch the random crop off")
        if self.crop_scale is None:
            return
        if self.pad:
            raise ConfigError(f"augment pad={self.pad} with crop_scale={self.crop_scale}: images are cropped one way; leave one of them out")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"augment crop_scale={self.crop_scale}: it must be a range of area fractions, 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise ConfigError(f"augment crop_ratio={self.crop_ratio}: it must be a range of width / height, 0 < low <= high")

    def evaluation_side(self, side: int) -> int:
        """What an evaluated image's side is scaled to before its central ``side`` pixels are cut.

        Random resized crops show objects larger than they are: 256 for 224 is the custom that goes with them.
        """
        return side if self.crop_scale is None else round(side * 256 / 224)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The random choices for ``count`` images: crop offsets int64 [count, 2] (y, x) and mirroring bool [count].

        The crop of an unmoved image has offset ``pad`` on both axes.
        """
        offsets = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        mirrored = torch.randint(0, 2, (count,), generator=generator) == 1
        return offsets, mirrored & self.flip


def crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Crop each image out of itself surrounded by ``pad`` zeros, keeping its size.

    Args:
        images: [B, H, W, C], any dtype.
        offsets: int64 [B, 2], the (y, x) corner of each crop in the padded image, 0 .. 2 * pad.

    Returns:
        [B, H, W, C], contiguous, where pixel (y, x) is padded[y + offset_y, x + offset_x].
    """
    height, width = images.shape[1:3]
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    # A view of every possible crop, [B, 2 pad + 1, 2 pad + 1, C, H, W]: picking one of them per image is one gather.
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)
    rows = torch.arange(len(images), device=images.device)
    return windows.permute(0, 1, 2, 4, 5, 3)[rows, offsets[:, 0], offsets[:, 1]]


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images [B, H, W, C] left to right where ``mirrored``, bool [B], says so."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)


def normalize(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """``images * scale + shift`` of uint8 [B, H, W, C], computed in float32, then cast to ``dtype``.

    ``scale`` and ``shift`` are float32 [H * W * C], the channels' factors repeated for every pixel: broadcasting over
    an inner dimension of three is four times slower on a CPU.
    """
    return (images.flatten(1) * scale + shift).to(dtype).view(images.shape)
