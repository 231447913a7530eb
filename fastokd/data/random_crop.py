"""What is random about one training picture, as a function of (seed, epoch, place in the epoch)
alone.

Every picture of an epoch owns ``NUMBERS`` uniform numbers of a counter-based generator. Any part of
an epoch can therefore be drawn without what came before it, and neither the number of processes nor
the size of a batch matters.

The random resized crop is that of Szegedy et al. 2015 (section 6) as everybody computes it: an area
fraction and an aspect ratio are drawn until the window fits, at most ten times; else the largest
central window whose ratio is allowed.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ATTEMPTS = 10
NUMBERS = 24
"""Numbers per picture: ATTEMPTS areas, ATTEMPTS ratios, the window's place (y, x), the mirroring,
and one that is spare.
"""

_PER_TICK = 4  # what Philox gives for every value of its counter


def uniforms(seed: int, epoch: int, start: int, count: int, view: int = 0) -> NDArray[np.float64]:
    """The numbers of the pictures at places ``start`` to ``start + count`` of an epoch: [count,
    NUMBERS], in [0, 1).

    ``view`` counts the independent views that are made of each picture.
    """
    key = int.from_bytes(
        hashlib.blake2b(f"augment/{seed}/{epoch}/{view}".encode(), digest_size=16).digest()
    )
    bits = np.random.Philox(key=key).advance(start * (NUMBERS // _PER_TICK))
    return (bits.random_raw(count * NUMBERS) >> np.uint64(11)).reshape(count, NUMBERS) * 2.0**-53


def mirrored(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the pictures are mirrored, bool [B]: one half of them."""
    return numbers[:, 22] < 0.5


def offsets(numbers: NDArray[np.float64], pad: int) -> NDArray[np.int64]:
    """The corners (y, x) of crops out of pictures padded by ``pad``: int64 [B, 2], each in 0 .. 2 *
    pad.
    """
    return (numbers[:, 20:22] * (2 * pad + 1)).astype(np.int64)


def candidates(
    numbers: NDArray[np.float64], scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.float64]:
    """What a window is chosen from: [B, 2 * ATTEMPTS + 2], area fractions, then ratios (width /
    height), then the place.

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
    """The window of one picture: top, left, height, width in pixels; ``candidate`` is a row of
    ``candidates``.

    ``fastokd.data.dali`` computes the same inside its pipeline.
    """
    fractions, ratios, (place_y, place_x) = np.split(candidate, (ATTEMPTS, 2 * ATTEMPTS))
    areas = fractions * (height * width)
    widths, heights = (
        np.floor(np.sqrt(areas * ratios) + 0.5),
        np.floor(np.sqrt(areas / ratios) + 0.5),
    )
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        h, w = int(heights[first]), int(widths[first])
        return int(place_y * (height - h + 1)), int(place_x * (width - w + 1)), h, w
    h, w = (
        max(1, int(side))
        for side in (min(height, width / ratio[0] + 0.5), min(width, height * ratio[1] + 0.5))
    )
    return (height - h) // 2, (width - w) // 2, h, w


def cover(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture scaled, its shape kept, until it just covers ``size`` (height,
    width).
    """
    if size[0] * width >= size[1] * height:
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def central(outer: int, inner: int) -> int:
    """Where the central ``inner`` pixels of ``outer`` begin; a half goes to the even side, as
    Python rounds.
    """
    return round((outer - inner) / 2)
