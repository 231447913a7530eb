"""Training augmentation of a whole batch on its device.

Every operation has static shapes and no host synchronization, so it can be compiled or captured.
Random choices are drawn before, on the CPU, so that they are equal on all devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.data.policies import NO_POLICY, policy_options
from fastokd.errors import ConfigError

PADDINGS = ("zero", "reflect")


@dataclass(frozen=True)
class Augment:
    """The augmentation of the training split, in this order: a random crop, a random horizontal
    flip, a policy, color jitter, and, after the normalization, random erasing.

    Args:
        pad: pixels added on every side before a crop of the original size; 0 for no such crop.
        flip: flip each image horizontally with probability one half.
        padding: the added pixels: "zero" (black) or "reflect" (reflected at the edge, which is not
            repeated).
        crop_scale: the range of the area fraction of random resized crops, (0.08, 1) for ImageNet;
            None for no such crops. They need images of the original size, and so a loader that
            decodes while training.
        crop_ratio: the range of their aspect ratio, width / height.
        policy, policy_options: a policy and its options, see ``fastokd.data.policies.POLICIES``.
        color_jitter: brightness, contrast and saturation are multiplied, in random order, by
            factors from [1 - color_jitter, 1 + color_jitter].
        erasing: the probability that a box of 2 to 33 % of an image's area is set to the mean.
    """

    pad: int = 0
    flip: bool = False
    padding: str = "zero"
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    policy: str = NO_POLICY
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    color_jitter: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        policy_options(self.policy, self.policy_options)
        if not 0 <= self.color_jitter < math.inf:
            raise ConfigError(f"color_jitter={self.color_jitter}: it must be at least 0")
        if not 0 <= self.erasing <= 1:
            raise ConfigError(f"random_erasing={self.erasing}: it must be in [0, 1]")
        if self.pad < 0:
            raise ConfigError(f"augment pad={self.pad} is negative; use 0 for no random crop")
        if self.padding not in PADDINGS:
            raise ConfigError(f"augment padding='{self.padding}'; use {' or '.join(PADDINGS)}")
        if self.crop_scale is None:
            return
        if self.pad:
            both = f"pad={self.pad} with crop_scale={self.crop_scale}"
            raise ConfigError(f"augment {both}: images are cropped one way; omit one of them")
        (low, high), ratios = self.crop_scale, self.crop_ratio
        if not 0 < low <= high <= 1:
            needed = "must be a range of area fractions, 0 < low <= high <= 1"
            raise ConfigError(f"augment crop_scale={self.crop_scale}: it {needed}")
        if not 0 < ratios[0] <= ratios[1] < math.inf:
            needed = "must be a range of width / height, 0 < low <= high"
            raise ConfigError(f"augment crop_ratio={ratios}: it {needed}")

    @property
    def has_policy(self) -> bool:
        """True if a policy is applied to each image."""
        return self.policy != NO_POLICY

    @property
    def is_random(self) -> bool:
        """True if two views of an image can differ."""
        crops = self.pad > 0 or self.crop_scale is not None
        return crops or self.flip or self.has_policy or self.color_jitter > 0 or self.erasing > 0

    def evaluation_side(self, side: int) -> int:
        """The side that evaluated images are scaled to before a center crop of ``side`` pixels.

        Random resized crops enlarge objects; scaling to 256 for 224 is the customary correction.
        """
        return side if self.crop_scale is None else round(side * 256 / 224)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The random choices for ``count`` images: crop offsets int64 [count, 2] (y, x) and
        flips bool [count].

        An offset of ``pad`` on both axes leaves the image unchanged.
        """
        offsets = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flipped = torch.randint(0, 2, (count,), generator=generator) == 1
        return offsets, flipped & self.flip


def crop(images: Tensor, offsets: Tensor, pad: int, padding: str = "zero") -> Tensor:
    """Pad each image by ``pad`` pixels and crop it to its size.

    Args:
        images: [B, H, W, C], any dtype.
        offsets: int64 [B, 2], the (y, x) corner of each crop in the padded image, 0 .. 2 * pad.
        pad, padding: see ``Augment``; reflecting needs ``pad`` below H and W.

    Returns:
        [B, H, W, C], contiguous, where pixel (y, x) is padded[y + offset_y, x + offset_x].
    """
    count, height, width, channels = images.shape
    y = torch.arange(height, device=images.device) + offsets[:, :1] - pad
    x = torch.arange(width, device=images.device) + offsets[:, 1:] - pad
    is_reflected = padding == "reflect"
    inner_y, inner_x = (
        _reflected(positions, size) if is_reflected else positions.clamp(0, size - 1)
        for positions, size in ((y, height), (x, width))
    )
    # One gather of whole pixels from a list of all pixels, without padding anything.
    rows = (
        torch.arange(count, device=images.device)[:, None, None] * height + inner_y[:, :, None]
    ) * width + inner_x[:, None, :]
    picked = images.reshape(-1, channels).index_select(0, rows.flatten()).view(images.shape)
    if is_reflected:
        return picked
    return picked * ((y == inner_y)[:, :, None] & (x == inner_x)[:, None, :])[..., None]


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Map -1 to 1, and ``size`` to ``size - 2``."""
    return size - 1 - (size - 1 - positions.abs()).abs()


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Flip those of the images [B, H, W, C] horizontally where ``flipped``, bool [B], is true."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(2), images)


def jitter(images: Tensor, choices: Tensor) -> Tensor:
    """Change brightness, contrast and saturation as torchvision's functions of these names do.

    Args:
        images: uint8 [B, H, W, 3].
        choices: float32 [B, 3, 2], on the images' device: the three operations of each image in
            order (0 brightness, 1 contrast, 2 saturation), each with its factor.

    Returns:
        uint8 [B, H, W, 3].
    """
    for choice in choices.unbind(1):
        operation, factor = choice[:, :, None, None, None].unbind(1)
        pixels = images.float()
        red, green, blue = pixels.split(1, dim=-1)
        gray = (0.2989 * red + 0.587 * green + 0.114 * blue).floor()
        other = torch.where(operation == 1, gray.mean((1, 2), keepdim=True), gray)
        other = torch.where(operation == 0, 0.0, other)
        images = (pixels * factor + other * (1 - factor)).clamp(0, 255).to(torch.uint8)
    return images


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each normalized image [B, H, W, C] to 0, the mean of the data.

    ``boxes`` is int64 [B, 4] (top, bottom, left, right) on the images' device.
    """
    top, bottom, left, right = boxes.view(-1, 4, 1, 1).unbind(1)
    y = torch.arange(images.shape[1], device=images.device)[:, None]
    x = torch.arange(images.shape[2], device=images.device)
    box = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return images.masked_fill(box[..., None], 0.0)


def normalize(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``images * scale + shift`` of uint8 [B, H, W, C] as float32. The factors, float32 [H*W*C],
    repeat for every pixel: broadcasting over three channels is four times slower on a CPU.
    """
    return (images.flatten(1) * scale + shift).view(images.shape)


@dataclass(frozen=True)
class Mixing:
    """Mixing of every training image with another one of its batch.

    Mixup (Zhang et al. 2018) blends pixels and labels by a weight from Beta(alpha, alpha); CutMix
    (Yun et al. 2019) pastes a box whose area is that weight's complement. With both, each batch
    draws one of them evenly.

    Args:
        mixup: alpha of mixup; 0 disables it.
        cutmix: alpha of CutMix; 0 disables it.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if not 0 <= alpha < float("inf"):
                needed = "a positive number, the alpha of a Beta distribution, or 0 for none"
                raise ConfigError(f"{name}={alpha}: it must be {needed}")

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def draw(self, count: int, seed: int) -> Tensor:
        """The random choices for ``count`` batches, float32 [count, 5].

        A row is the box (top, bottom, left, right) as fractions of the image, and the weight of the
        image's pixels outside the box. Mixup's box is empty, CutMix's weight is 1.
        """
        random = np.random.Generator(np.random.PCG64(seed))
        cut = np.full(count, bool(self.cutmix))
        if self.mixup and self.cutmix:
            cut = random.random(count) < 0.5
        cut_weight, mix_weight = (
            random.beta(alpha or 1, alpha or 1, count) for alpha in (self.cutmix, self.mixup)
        )
        weight = np.where(cut, cut_weight, mix_weight)
        half = np.where(cut, np.sqrt(1 - weight) / 2, 0.0)
        center_y, center_x = random.random((2, count))
        box = [center_y - half, center_y + half, center_x - half, center_x + half]
        choices = np.stack([*np.clip(box, 0, 1), np.where(cut, 1.0, weight)], axis=1)
        return torch.from_numpy(choices.astype(np.float32))


def mix(
    images: Tensor,
    others: Tensor,
    target: Tensor,
    other_target: Tensor,
    choice: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Mix each image with another.

    Args:
        images, others: floating [..., B, H, W, C].
        target, other_target: int64 [B].
        choice: float32 [5], a row of ``Mixing.draw``, on the images' device.
        num_classes: C of the result's targets.

    Returns:
        The images, and their targets float32 [B, C]: each class's share of the pixels.
    """
    height, width = images.shape[-3:-1]
    top, bottom, left, right, weight = choice.unbind()
    y, x = ((torch.arange(size, device=images.device) + 0.5) / size for size in (height, width))
    box = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    weights = torch.where(box, 0.0, weight)  # [H, W], of the pixels of ``images``
    # Exact where the weight is 0 or 1
    mixed = torch.lerp(others, images, weights[..., None].to(images.dtype).expand_as(images))
    share = weights.mean()
    classes = torch.arange(num_classes, device=target.device)
    own, other = target[:, None] == classes, other_target[:, None] == classes
    return mixed, share * own + (1 - share) * other
