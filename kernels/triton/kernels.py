"""The kernels: forward, backward, and both in one. A program works on ``TILE.rows`` rows."""

import triton
import triton.language as tl

from fastokd.kernels.triton.backward import backward_row
from fastokd.kernels.triton.columns import computed, load_weights, store_rows
from fastokd.kernels.triton.forward import forward_row


@triton.jit
def program_rows(batch, TILE: tl.constexpr):
    """The rows [R, 1] of this program, those beyond the batch replaced by its last, and which are inside it."""
    # int64: B times a row stride can pass 2^31.
    if TILE.rows == 1:
        row = tl.program_id(0).to(tl.int64)
        return row, row < batch
    else:
        rows = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)[:, None]
        return tl.minimum(rows, batch - 1).to(tl.int64), rows < batch


@triton.jit
def store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC: tl.constexpr, TILE: tl.constexpr):
    store_rows(out_rows + rows, loss, inside, TILE)
    for t in tl.static_range(tl.constexpr(SPEC.num_terms)):
        store_rows(out_terms + t * batch + rows, terms[t], inside, TILE)


@triton.jit
def forward_kernel(logits, weights, externals, target, term_weights, out_rows, out_terms, out_stats, batch,
                   SPEC: tl.constexpr, TILE: tl.constexpr):
    """Loss [B], terms [T, B] and statistics (row after row) of every row."""
    rows, inside = program_rows(batch, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(logits, loaded, externals, target, term_weights, rows, SPEC, TILE)
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        store_rows(out_stats + rows * SPEC.num_stats + j, stats[j], inside, TILE)


@triton.jit
def backward_kernel(grad_logits, grad_weights, grad_rows, logits, weights, externals, target, term_weights, stats, batch,
                    SPEC: tl.constexpr, TILE: tl.constexpr):
    """Gradients of ``sum(grad_rows * loss)`` for the logits and weights that ``TILE.needs`` names."""
    rows, inside = program_rows(batch, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    kept = ()
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        kept = kept + (tl.load(stats + rows * SPEC.num_stats + j),)
    gradient = computed(tl.load(grad_rows + rows * TILE.grad_stride), TILE)
    backward_row(grad_logits, grad_weights, logits, loaded, externals, target, gradient, term_weights, rows, inside, kept,
                 SPEC, TILE)


@triton.jit
def fused_kernel(grad_logits, grad_weights, logits, weights, externals, target, term_weights, out_rows, out_terms, batch,
                 SPEC: tl.constexpr, TILE: tl.constexpr):
    """Loss [B], terms [T, B], and the gradients of the mean loss over the batch."""
    rows, inside = program_rows(batch, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(logits, loaded, externals, target, term_weights, rows, SPEC, TILE)
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    gradient = (loss * 0.0 + 1.0) / batch
    backward_row(grad_logits, grad_weights, logits, loaded, externals, target, gradient, term_weights, rows, inside, stats,
                 SPEC, TILE)
