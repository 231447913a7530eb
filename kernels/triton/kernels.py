"""The kernels: forward, backward, and both in one. A program works on ``TILE.rows`` rows."""

import triton
import triton.language as tl

from fastokd.kernels.triton.backward import backward_row
from fastokd.kernels.triton.columns import computed, load_weights, row_constant, store_rows
from fastokd.kernels.triton.forward import forward_row


@triton.jit
def program_rows(batch, TILE: tl.constexpr):
    """The rows [R, 1] of this program, those beyond the batch replaced by its last, and which are
    inside it.
    """
    # int64: B times a row stride can pass 2^31.
    if TILE.rows == 1:
        row = (tl.program_id(0) // TILE.splits).to(tl.int64)
        return row, row < batch
    else:
        rows = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)[:, None]
        return tl.minimum(rows, batch - 1).to(tl.int64), rows < batch


@triton.jit
def unaligned(pointers, shift, TILE: tl.constexpr):
    """The pointers moved by ``shift``, which is 0, but the compiler does not know.

    Where a chunk is not loaded as vectors, a row stride of, say, 10 would let it load pairs of
    columns and then send them through shared memory to the lanes that want them.
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
    store_rows(out_rows + rows, loss, inside, TILE)
    for t in tl.static_range(tl.constexpr(SPEC.num_terms)):
        store_rows(out_terms + t * batch + rows, terms[t], inside, TILE)


# No kernel is compiled again because a batch is smaller than the last.
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
    logits = unaligned(logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(
        logits, loaded, externals, target, term_weights, rows, term_weights, SPEC, TILE
    )
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
    """Gradients of ``sum(grad_rows * loss)`` for the logits and weights that ``TILE.needs``
    names.
    """
    rows, inside = program_rows(batch, TILE)
    logits = unaligned(logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    kept = ()
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        kept = kept + (tl.load(stats + rows * SPEC.num_stats + j),)
    gradient = computed(tl.load(grad_rows + rows * TILE.grad_stride), TILE)
    grad_logits = unaligned(grad_logits, shift, TILE)
    backward_row(
        grad_logits,
        grad_weights,
        logits,
        loaded,
        externals,
        target,
        gradient,
        term_weights,
        rows,
        inside,
        kept,
        SPEC,
        TILE,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fused_kernel(
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
    logits = unaligned(logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(
        logits, loaded, externals, target, term_weights, rows, term_weights, SPEC, TILE
    )
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    gradient = row_constant(1.0, TILE) / batch
    grad_logits = unaligned(grad_logits, shift, TILE)
    backward_row(
        grad_logits,
        grad_weights,
        logits,
        loaded,
        externals,
        target,
        gradient,
        term_weights,
        rows,
        inside,
        stats,
        SPEC,
        TILE,
    )


KERNELS = {"forward": forward_kernel, "backward": backward_kernel, "fused": fused_kernel}
