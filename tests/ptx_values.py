"""Types of PTX and the arithmetic on them, as numpy arrays."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}


def width(type_: str) -> int:
    """Bits of a type such as ``f32`` or ``bf16x2``."""
    if type_ == "pred":
        return 1
    bits, _, copies = re.sub("^[a-z]+", "", type_).partition("x")
    return int(bits) * int(copies or 1)


def decode(bits: Array, type_: str) -> Array:
    """The values that registers hold, in columns if the type is packed. bf16 becomes float32."""
    base, _, copies = type_.partition("x")
    if copies:
        bits = np.ascontiguousarray(bits).view(UNSIGNED[width(base)]).reshape(-1, int(copies))
    if base == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    kind = {"s": SIGNED, "f": FLOAT}.get(type_[0], UNSIGNED)
    return np.ascontiguousarray(bits).view(kind[width(base)])


def encode(values: Array, type_: str) -> Array:
    """The bits of values, rounded to the type. The inverse of ``decode``."""
    base, _, copies = type_.partition("x")
    if base == "bf16":
        word = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
        bits = np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    else:
        kind = {"s": SIGNED, "f": FLOAT}.get(type_[0], UNSIGNED)
        bits = np.ascontiguousarray(values.astype(kind[width(base)])).view(UNSIGNED[width(base)])
    if copies:
        bits = np.ascontiguousarray(bits).view(UNSIGNED[width(type_)]).reshape(-1)
    return bits


def flushed(values: Array) -> Array:
    """The values with subnormal numbers replaced by zeros of their sign."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once (but for rare double rounding); integers wrap."""
    if a.dtype.kind != "f":
        return a * b + c
    wide = WIDER.get(a.dtype, np.float64)
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


FUNCTIONS: dict[str, Callable[..., Array]] = {
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": fused_multiply_add,
    "mad": fused_multiply_add,
    "neg": np.negative,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "not": np.invert,
    "min": np.fmin,
    "max": np.fmax,
    "minNaN": np.minimum,
    "maxNaN": np.maximum,
    **{name: getattr(np, name) for name in ("add", "abs", "sqrt")},
    **{name: getattr(np, f"bitwise_{name}") for name in ("and", "or", "xor")},
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
