"""Arithmetic in DALI's pipelines: crop windows, sizes, and the sign of missing rows."""

from typing import Any

import numpy as np

from fastokd.data.random_crop import ATTEMPTS

Node = Any
"""A ``DataNode`` of DALI, whose operators have no static types."""


def dali() -> tuple[Any, Any, Any]:
    """``fn``, ``math`` and ``types`` of DALI, whose contents are generated at import."""
    from nvidia.dali import fn, math, types

    return fn, math, types


def integers(*values: Node) -> Node:
    fn, _, types = dali()
    return fn.cast(fn.stack(*values), dtype=types.INT32)


def window(
    candidates: Node, height: Node, width: Node, ratio: tuple[float, float]
) -> tuple[Node, Node, Node, Node]:
    """``random_crop.window`` in DALI's arithmetic: top, left, height and width as floats."""
    fn, math, types = dali()

    def single(values: Node) -> Node:  # integers, and reductions do not take doubles
        return fn.cast(values, dtype=types.FLOAT)

    areas, ratios = candidates[:ATTEMPTS] * (height * width), candidates[ATTEMPTS : 2 * ATTEMPTS]
    widths = math.floor(math.sqrt(areas * ratios) + 0.5)
    heights = math.floor(math.sqrt(areas / ratios) + 0.5)
    fits = single((widths >= 1.0) & (heights >= 1.0) & (widths <= width) & (heights <= height))
    attempts = types.Constant(np.arange(ATTEMPTS, dtype=np.float32))
    first = fn.reductions.min(attempts + ATTEMPTS * (1.0 - fits))
    chosen = single(attempts == first)
    found = single(first < float(ATTEMPTS))
    missing = 1.0 - found
    largest_h = math.max(1.0, single(math.floor(math.min(height, width / ratio[0] + 0.5))))
    largest_w = math.max(1.0, single(math.floor(math.min(width, height * ratio[1] + 0.5))))
    h = fn.reductions.sum(chosen * single(heights)) * found + largest_h * missing
    w = fn.reductions.sum(chosen * single(widths)) * found + largest_w * missing
    top, left = (
        math.floor(position * (outer - inner + 1.0)) * found
        + math.floor((outer - inner) / 2.0) * missing
        for position, outer, inner in (
            (candidates[2 * ATTEMPTS], height, h),
            (candidates[2 * ATTEMPTS + 1], width, w),
        )
    )
    return top, left, h, w


def cover(height: Node, width: Node, size: tuple[int, int]) -> tuple[Node, Node]:
    """``random_crop.cover`` in DALI's arithmetic."""
    _, math, _ = dali()
    by_height = size[0] * width >= size[1] * height
    by_width = 1.0 - by_height
    rows = math.max(float(size[0]), math.floor(size[1] * height / width))
    columns = math.max(float(size[1]), math.floor(size[0] * width / height))
    return (
        by_height * float(size[0]) + by_width * rows,
        by_height * columns + by_width * float(size[1]),
    )


def central(outer: Node, inner: int) -> Node:
    """``random_crop.central`` in DALI's arithmetic: half of the difference, rounded to even."""
    _, math, _ = dali()
    spare = outer - float(inner)
    half = math.floor(spare / 2.0)
    return half + (spare - 2.0 * half) * (half - 2.0 * math.floor(half / 2.0))


def has_gray_edge(pixels: Node) -> Node:
    """1 for each image with an edge of mid-gray, else 0: libjpeg gives this color to rows that are
    missing from a file, which are at another edge if the image was turned.
    """
    fn, math, types = dali()
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    distances = [math.abs(fn.cast(edge, dtype=types.INT32) - 128) for edge in edges]
    farthest = fn.stack(*(fn.reductions.max(distance) for distance in distances))
    return fn.reductions.min(farthest) == 0
