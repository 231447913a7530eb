"""Device functions shared by the kernels: loading and storing columns, sums over the lanes.

A program handles R rows. Its threads form R x L lanes. A lane handles P columns of a chunk of L * P
columns, one *piece* [R, L] per column, so each running quantity takes one register per thread, and
threads exchange nothing before the end of the row. Quantities of a whole row are [R, 1], or scalars
if R is 1. Exponentials and logarithms are to base 2.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(1e-30)
"""The smallest probability inside a logarithm: the reference executor's ``PROBABILITY_FLOOR``."""
PAD = tl.constexpr(-float(2**100))
"""Replaces missing columns in a maximum. A power of two, so scaling it rounds nothing."""
MASKED = tl.constexpr(-1e37)
"""Replaces -inf in logits, as in the reference executor. If bfloat16 had this number, the compiler
would take the maximum before the conversion, which costs twice as much."""
MASKED_PAIR = tl.constexpr(0xFCF1FCF1)
"""The nearest bfloat16, two times."""
MASKED_LOSS = tl.constexpr(1e30)
"""A term above this is infinite, as in the reference executor."""
NEGATIVE_ZERO = tl.constexpr(-0.0)
"""The start of a sum that the compiler can drop: x + -0.0 is x for every x, x + 0.0 is not."""


@triton.jit
def to_compute(x, TILE: tl.constexpr):
    """x in the dtype of the arithmetic."""
    if TILE.double:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def to_finite(x):
    """Logits with ``MASKED`` instead of -inf: for a class that two rows mask, their difference is 0
    and not NaN. NaN stays NaN.
    """
    return tl.maximum(x, MASKED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2(x, TILE: tl.constexpr):
    """The hardware's logarithm if available: Triton's takes about twenty instructions."""
    if TILE.hardware:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def row_constant(VALUE: tl.constexpr, TILE: tl.constexpr):
    """A quantity of a row. For programs of one row it is a scalar, which compiles much faster than
    a tensor.
    """
    if TILE.rows == 1:
        return tl.full((), VALUE, tl.float64 if TILE.double else tl.float32)
    else:
        return tl.full((TILE.rows, 1), VALUE, tl.float64 if TILE.double else tl.float32)


@triton.jit
def row_constants(COUNT: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr):
    """A tuple of COUNT quantities of a row."""
    out = ()
    for _i in tl.static_range(COUNT):
        out = out + (row_constant(VALUE, TILE),)
    return out


@triton.jit
def lane_constants(COUNT: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr):
    """A tuple of COUNT quantities of a lane."""
    out = ()
    for _i in tl.static_range(COUNT):
        out = out + (
            tl.full((TILE.rows, TILE.lanes), VALUE, tl.float64 if TILE.double else tl.float32),
        )
    return out


@triton.jit
def add_at(values, INDEX: tl.constexpr, x):
    """The tuple with x added to one entry."""
    return values[:INDEX] + (values[INDEX] + x,) + values[INDEX + 1 :]


@triton.jit
def set_at(values, INDEX: tl.constexpr, x):
    """The tuple with one entry replaced by x, which must not be a tuple.

    Triton identifies a compiled function by the flattened types of its arguments, so calls must not
    differ in the nesting of tuples alone.
    """
    return values[:INDEX] + (x,) + values[INDEX + 1 :]


@triton.jit
def negated(values):
    """A tuple of negated quantities."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (-values[i],)
    return out


@triton.jit
def split_halves(tile, P: tl.constexpr):
    """A tile [R, L, P] as P pieces [R, L] in the order of ``TILE.order``."""
    if P == 1:
        return (tl.reshape(tile, (tile.shape[0], tile.shape[1])),)
    else:
        halves = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1], P // 2, 2)))
        return split_halves(halves[0], P // 2) + split_halves(halves[1], P // 2)


@triton.jit
def join_halves(pieces, P: tl.constexpr):
    """Inverse of ``split_halves``."""
    if P == 1:
        return tl.reshape(pieces[0], (pieces[0].shape[0], pieces[0].shape[1], 1))
    else:
        low = join_halves(pieces[: P // 2], P // 2)
        high = join_halves(pieces[P // 2 :], P // 2)
        return tl.reshape(tl.join(low, high), (low.shape[0], low.shape[1], P))


@triton.jit
def reordered(pieces, TILE: tl.constexpr):
    """From the order of ``split_halves`` to that of the columns, or back."""
    out = ()
    for p in tl.static_range(len(pieces)):
        out = out + (pieces[TILE.order[p]],)
    return out


@triton.jit
def tile_columns(TILE: tl.constexpr):
    """The columns of a chunk in the order of loading: [1, L, P] if a lane's columns are adjacent,
    else [1, P, L].
    """
    lanes = tl.arange(0, TILE.lanes)
    pieces = tl.arange(0, TILE.pieces)
    if TILE.vector:
        return lanes[None, :, None] * TILE.pieces + pieces[None, None, :]
    else:
        return pieces[None, :, None] * TILE.lanes + lanes[None, None, :]


@triton.jit
def first_column(chunk, TILE: tl.constexpr):
    """The first column of a chunk in a loop over chunks.

    For vectors, its value is hidden from the compiler, which would otherwise keep 64-bit offsets:
    with 32 bits, each address takes one instruction instead of two.
    """
    block: tl.constexpr = TILE.block
    base = chunk * block
    if TILE.hardware and TILE.vector and TILE.whole > 1:
        base = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [base], dtype=tl.int32, is_pure=True, pack=1
        )
        base = tl.multiple_of(base, block)
    return base


@triton.jit
def piece_columns(PIECE: tl.constexpr, TILE: tl.constexpr):
    """The columns [1, L] of a piece, counted from the start of its chunk."""
    lanes = tl.arange(0, TILE.lanes)[None, :]
    if TILE.vector:
        return lanes * TILE.pieces + PIECE
    else:
        return lanes + PIECE * TILE.lanes


@triton.jit
def load_pairs(start, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """``load_chunk`` for adjacent columns in bfloat16, as float32: pairs of columns in words of 32
    bits.

    A bfloat16 is the upper half of a float32. The compiler's own code shifts the upper column of
    each pair down and then up again. This code takes one instruction for either column, which saves
    2 of 61 instructions per column at M = 4. On a GPU, ``MASKED`` replaces -inf here, in both
    columns of a word at once.
    """
    words = (
        tl.arange(0, TILE.lanes)[None, :, None] * (TILE.pieces // 2)
        + tl.arange(0, TILE.pieces // 2)[None, None, :]
    )
    start = start.to(tl.pointer_type(tl.uint32), bitcast=True)
    if LIMIT:
        tile = tl.load(start + words, mask=words < LIMIT // 2, other=0)
    else:
        tile = tl.load(start + words)
    if TILE.hardware:
        tile = tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [tile, MASKED_PAIR],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    pairs = split_halves(tile, TILE.pieces // 2)
    low = ()
    high = ()
    for p in tl.static_range(len(pairs)):
        low = low + ((pairs[p] << 16).to(tl.float32, bitcast=True),)
        high = high + ((pairs[p] & 0xFFFF0000).to(tl.float32, bitcast=True),)
    # The words are ordered by repeated splits into even and odd. Appending the high halves to the
    # low ones makes that the order of the columns after one more split.
    return reordered(low + high, TILE)


@triton.jit
def load_chunk(start, STRIDE: tl.constexpr, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """The pieces of a chunk at ``start`` (of a row), in the stored dtype, or float32 instead of
    bfloat16; 0 beyond LIMIT columns (LIMIT 0: the chunk is whole).

    One load reads all pieces, because the time to compile grows with the number of loads. They are
    separated in registers: a thread holds all columns of its lane.
    """
    if start.dtype.element_ty == tl.bfloat16 and TILE.has_pairs(STRIDE, LIMIT):
        return load_pairs(start, LIMIT, TILE)
    else:
        columns = tile_columns(TILE)
        offsets = columns if STRIDE == 1 else columns.to(tl.int64) * STRIDE
        if TILE.rows > 1:
            start = start[:, :, None]
        if LIMIT:
            tile = tl.load(start + offsets, mask=columns < LIMIT, other=0.0)
        else:
            tile = tl.load(start + offsets)
        if not TILE.vector:
            tile = tl.permute(tile, (0, 2, 1))
        return reordered(split_halves(tile, TILE.pieces), TILE)


@triton.jit
def load_logits(start, STRIDE: tl.constexpr, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """The pieces of a chunk of logits at ``start`` (of a row) in the dtype of the arithmetic, with
    ``MASKED`` instead of -inf.
    """
    chunk = load_chunk(start, STRIDE, LIMIT, TILE)
    out = ()
    for p in tl.static_range(len(chunk)):
        piece = to_compute(chunk[p], TILE)
        if not (
            TILE.hardware
            and start.dtype.element_ty == tl.bfloat16
            and TILE.has_pairs(STRIDE, LIMIT)
        ):
            piece = to_finite(piece)
        out = out + (piece,)
    return out


@triton.jit
def store_chunk(start, pieces, inside, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """Write pieces at ``start`` (of a row) to adjacent columns, below LIMIT and in rows inside the
    batch.
    """
    columns = tile_columns(TILE)
    for _p in tl.static_range(len(pieces), tl.constexpr(TILE.pieces)):
        pieces = pieces + (pieces[0],)
    tile = join_halves(reordered(pieces, TILE), TILE.pieces)
    if not TILE.vector:
        tile = tl.permute(tile, (0, 2, 1))
    if TILE.rows > 1:
        tl.store(
            start[:, :, None] + columns,
            tile,
            mask=inside[:, :, None] & (columns < LIMIT if LIMIT else columns >= 0),
        )
    elif LIMIT:
        tl.store(start + columns, tile, mask=columns < LIMIT)
    else:
        tl.store(start + columns, tile)


@triton.jit
def masked(x, OTHER: tl.constexpr, LIMIT: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr):
    """x, or OTHER in the columns of the piece that are beyond the row."""
    if TILE.masks(LIMIT, PIECE):
        return tl.where(piece_columns(PIECE, TILE) < LIMIT, x, OTHER)
    else:
        return x


@triton.jit
def row_sum(x, TILE: tl.constexpr):
    """The sum over the lanes."""
    if TILE.rows == 1:
        return tl.sum(x)
    else:
        return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _add_all(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _max_all(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return (
        tl.maximum(a0, b0),
        tl.maximum(a1, b1),
        tl.maximum(a2, b2),
        tl.maximum(a3, b3),
        tl.maximum(a4, b4),
        tl.maximum(a5, b5),
        tl.maximum(a6, b6),
        tl.maximum(a7, b7),
    )


@triton.jit
def reduce_by_eight(values, MAXIMUM: tl.constexpr):
    """Sums or maxima of a tuple of [1, L], eight at a time: the warps synchronize once instead of
    eight times.
    """
    out = ()
    for first in tl.static_range(0, len(values), 8):
        flat = ()
        for i in tl.static_range(8):
            if first + i < len(values):
                flat = flat + (tl.ravel(values[first + i]),)
            else:
                flat = flat + (flat[0],)
        if MAXIMUM:
            out = out + tl.reduce(flat, 0, _max_all)
        else:
            out = out + tl.reduce(flat, 0, _add_all)
    return out[: len(values)]


@triton.jit
def row_sums(values, TILE: tl.constexpr):
    """The sums over the lanes of a tuple."""
    if TILE.num_warps > 1 and len(values) > 1:
        return reduce_by_eight(values, False)
    else:
        out = ()
        for i in tl.static_range(len(values)):
            out = out + (row_sum(values[i], TILE),)
        return out


@triton.jit
def row_maxima(values, TILE: tl.constexpr):
    """The maxima over the lanes of a tuple."""
    if TILE.num_warps > 1 and len(values) > 1:
        return reduce_by_eight(values, True)
    else:
        out = ()
        for i in tl.static_range(len(values)):
            if TILE.rows == 1:
                out = out + (tl.max(values[i]),)
            else:
                out = out + (tl.max(values[i], 1, keep_dims=True),)
        return out


@triton.jit
def store_rows(at, values, inside, TILE: tl.constexpr):
    """Write rows inside the batch. A program of one row is always inside."""
    if TILE.rows == 1:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=inside)
