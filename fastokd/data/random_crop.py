"""Random choices for training images, as a function of (seed, epoch, position in the epoch).

Every image of an epoch has ``NUMBERS`` uniform numbers of a counter-based generator. So any part of
an epoch can be drawn on its own, independent of the number of processes and the batch size.

The random resized crop is that of Szegedy et al. 2015 (section 6) as commonly implemented: an area
fraction and an aspect ratio are drawn until the crop window fits, at most ten times; otherwise the
largest central window of an allowed ratio is used.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ATTEMPTS = 10
NUMBERS = 24
"""Numbers per image and purpose. For the purpose "augment": ATTEMPTS areas, ATTEMPTS ratios, the
window's position (y, x), the flip, and one that is unused. For "erase", the last is for the
probability.
"""

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
"""Ranges of the area fraction and of height / width of random erasing, as in torchvision."""

_PER_TICK = 4  # numbers that Philox returns for each value of its counter


def uniforms(
    seed: int, epoch: int, start: int, count: int, view: int = 0, purpose: str = "augment"
) -> NDArray[np.float64]:
    """The numbers of the images at positions ``start`` to ``start + count`` of an epoch: [count,
    NUMBERS], in [0, 1). ``view`` numbers the independent views of each image; numbers for other
    purposes are independent.
    """
    text = f"{purpose}/{seed}/{epoch}/{view}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())
    bits = np.random.Philox(key=key).advance(start * (NUMBERS // _PER_TICK))
    whole: NDArray[np.uint64] = bits.random_raw(count * NUMBERS) >> np.uint64(11)
    return whole.reshape(count, NUMBERS).astype(np.float64) * 2.0**-53


def flipped(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The images to flip, bool [B]: about half of them."""
    return numbers[:, 22] < 0.5


def offsets(numbers: NDArray[np.float64], pad: int) -> NDArray[np.int64]:
    """The corners (y, x) of crops of images padded by ``pad``: int64 [B, 2] in 0 .. 2 * pad."""
    return (numbers[:, 20:22] * (2 * pad + 1)).astype(np.int64)


def policy_seeds(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """The seed of each image's augmentation policy: int64 [B], not negative."""
    return (numbers[:, 0] * 2.0**53).astype(np.int64)


def jitters(numbers: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
    """The choices of ``fastokd.data.augment.jitter``: float32 [B, 3, 2]. Factors are uniform in [1
    - strength, 1 + strength], from 0 on.
    """
    order = numbers[:, :3].argsort(axis=1)
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * numbers[:, 3:6]
    return np.stack([order, factors], axis=2).astype(np.float32)


def erasures(
    numbers: NDArray[np.float64], probability: float, size: tuple[int, int]
) -> NDArray[np.int64]:
    """The boxes of random erasing (Zhong et al. 2020) in images of ``size`` (height, width), as
    torchvision draws them: int64 [B, 4] (top, bottom, left, right), empty in images that are kept.
    """
    height, width = size
    drawn = candidates(numbers, ERASED_AREA, ERASED_RATIO)
    areas, ratios = drawn[:, :ATTEMPTS] * (height * width), drawn[:, ATTEMPTS : 2 * ATTEMPTS]
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    chosen = (np.arange(len(numbers)), fits.argmax(axis=1))
    erased = fits.any(axis=1) & (numbers[:, NUMBERS - 1] < probability)
    h, w = heights[chosen] * erased, widths[chosen] * erased
    top = (numbers[:, 20] * (height - h + 1)).astype(np.int64)
    left = (numbers[:, 21] * (width - w + 1)).astype(np.int64)
    return np.stack([top, top + h, left, left + w], axis=1)


def candidates(
    numbers: NDArray[np.float64], scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.float64]:
    """Candidates for crop windows: [B, 2 * ATTEMPTS + 2], area fractions, then ratios (width /
    height), then the position.

    Fractions are uniform in ``scale``, ratios in ``ratio`` on a logarithmic axis.
    """
    out = numbers[:, : 2 * ATTEMPTS + 2].copy()
    out[:, :ATTEMPTS] = scale[0] + (scale[1] - scale[0]) * out[:, :ATTEMPTS]
    low, high = np.log(ratio)
    out[:, ATTEMPTS : 2 * ATTEMPTS] = np.exp(low + (high - low) * out[:, ATTEMPTS : 2 * ATTEMPTS])
    return out


def window(
    candidate: NDArray[np.float64], height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The crop window of one image: top, left, height, width in pixels; ``candidate`` is a row of
    ``candidates``. ``fastokd.data.dali`` computes the same in its pipeline.
    """
    fractions, ratios, (y, x) = np.split(candidate, (ATTEMPTS, 2 * ATTEMPTS))
    areas = fractions * (height * width)
    widths = np.floor(np.sqrt(areas * ratios) + 0.5)
    heights = np.floor(np.sqrt(areas / ratios) + 0.5)
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        h, w = int(heights[first]), int(widths[first])
        return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h = max(1, int(min(height, width / ratio[0] + 0.5)))
    w = max(1, int(min(width, height * ratio[1] + 0.5)))
    return (height - h) // 2, (width - w) // 2, h, w


def cover(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image scaled, with its aspect ratio kept, until it just covers
    ``size`` (height, width).
    """
    if size[0] * width >= size[1] * height:
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def central(outer: int, inner: int) -> int:
    """The start of the central ``inner`` pixels of ``outer``; halves round to even."""
    return round((outer - inner) / 2)
