"""The kernels for rows that are not split: forward, backward, and both in one launch.

A program handles ``TILE.rows`` rows.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.backward import backward_row
from fastokd.kernels.triton.columns import row_constant, store_rows, to_compute
from fastokd.kernels.triton.forward import forward_row
from fastokd.kernels.triton.rows import load_weights


@triton.jit
def program_rows(batch, TILE: tl.constexpr):
    """The rows [R, 1] of this program, and whether each is inside the batch. The last row replaces
    those beyond it.
    """
    # int64: B times a row stride can exceed 2^31.
    if TILE.rows == 1:
        row = (tl.program_id(0) // TILE.splits).to(tl.int64)
        return row, row < batch
    else:
        rows = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)[:, None]
        return tl.minimum(rows, batch - 1).to(tl.int64), rows < batch


@triton.jit
def hide_alignment(pointers, shift, TILE: tl.constexpr):
    """The pointers moved by ``shift``, which is 0, unknown to the compiler.

    If chunks are not loaded as vectors, the compiler would still use a row stride such as 10 to
    load pairs of columns, and then exchange them between lanes through shared memory.
    """
    if TILE.vector:
        return pointers
    else:
        out = ()
        for i in tl.static_range(len(pointers)):
            out = out + (pointers[i] + shift,)
        return out


@triton.jit
def store_values(
    loss, terms, out_rows, out_terms, rows, inside, batch, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """Write the loss and the terms of the rows."""
    store_rows(out_rows + rows, loss, inside, TILE)
    for t in tl.static_range(tl.constexpr(SPEC.num_terms)):
        store_rows(out_terms + t * tl.cast(batch, tl.int64) + rows, terms[t], inside, TILE)


@triton.jit
def load_stats(stats, rows, SPEC: tl.constexpr):
    """The statistics of the rows as a tuple."""
    out = ()
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        out = out + (tl.load(stats + rows * SPEC.num_stats + j),)
    return out


@triton.jit
def row_term_weights(term_weights, rows, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Pointers to the rows' weights of the terms: one for all rows if they share them."""
    if TILE.weights_per_row:
        return term_weights + rows * SPEC.num_terms
    else:
        return term_weights


@triton.jit
def load_gradient(grad_rows, rows, TILE: tl.constexpr):
    """The gradients of the rows' losses."""
    return to_compute(tl.load(grad_rows + rows * TILE.grad_stride), TILE)


# A batch of another size must not compile a kernel again.
UNSPECIALIZED = ["batch", "shift"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    logits,
    weights,
    externals,
    target,
    term_weights,
    out_rows,
    out_terms,
    out_stats,
    batch,
    shift,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Loss [B], terms [T, B] and statistics (row after row) of every row."""
    rows, inside = program_rows(batch, TILE)
    inputs = (hide_alignment(logits, shift, TILE), externals, target)
    loaded = load_weights(weights, rows, SPEC, TILE)
    term_weights = row_term_weights(term_weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(inputs, loaded, term_weights, rows, out_rows, SPEC, TILE)
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        store_rows(out_stats + rows * SPEC.num_stats + j, stats[j], inside, TILE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    grad_logits,
    grad_weights,
    grad_rows,
    logits,
    weights,
    externals,
    target,
    term_weights,
    stats,
    batch,
    shift,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of ``sum(grad_rows * loss)`` for the logits and weights selected by
    ``TILE.needs``.
    """
    rows, inside = program_rows(batch, TILE)
    inputs = (hide_alignment(logits, shift, TILE), externals, target)
    loaded = load_weights(weights, rows, SPEC, TILE)
    term_weights = row_term_weights(term_weights, rows, SPEC, TILE)
    row_stats = load_stats(stats, rows, SPEC)
    gradient = load_gradient(grad_rows, rows, TILE)
    grad_logits = hide_alignment(grad_logits, shift, TILE)
    backward_row(
        grad_logits,
        grad_weights,
        inputs,
        loaded,
        gradient,
        term_weights,
        rows,
        inside,
        row_stats,
        SPEC,
        TILE,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_backward_kernel(
    grad_logits,
    grad_weights,
    logits,
    weights,
    externals,
    target,
    term_weights,
    out_rows,
    out_terms,
    batch,
    shift,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Loss [B], terms [T, B], and the gradients of the mean loss over the batch."""
    rows, inside = program_rows(batch, TILE)
    inputs = (hide_alignment(logits, shift, TILE), externals, target)
    loaded = load_weights(weights, rows, SPEC, TILE)
    term_weights = row_term_weights(term_weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(inputs, loaded, term_weights, rows, out_rows, SPEC, TILE)
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    gradient = row_constant(1.0, TILE) / batch
    grad_logits = hide_alignment(grad_logits, shift, TILE)
    backward_row(
        grad_logits,
        grad_weights,
        inputs,
        loaded,
        gradient,
        term_weights,
        rows,
        inside,
        stats,
        SPEC,
        TILE,
    )


KERNELS = {
    "forward": forward_kernel,
    "backward": backward_kernel,
    "forward_backward": forward_backward_kernel,
}
