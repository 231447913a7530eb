"""Kernels for few and long rows: several programs share a row, so few rows can fill a GPU.

A pass over the columns is a launch of ``partial_kernel``. Each program sums its part of a row and
writes its maxima and sums, [B, sums, splits]. The next pass, or ``merge_kernel`` after the last
one, reads those of a row as if they were a program's lanes, and combines them with the same
functions, in the order of a fixed tree: without atomics, so the results are reproducible to the
bit. Every graph can be split. Graphs with a first pass (selections, minima with soft targets) or a
normalized pass take one more launch for each.

The gradient of a column depends only on the statistics of its row, so the parts of a row are
independent in the backward pass. But the gradients of weights are sums over columns, which
``weights_kernel`` merges.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.backward import backward_columns, store_weight_gradients
from fastokd.kernels.triton.coefs import before_columns
from fastokd.kernels.triton.columns import row_sums
from fastokd.kernels.triton.forward import before_main_pass, forward_row
from fastokd.kernels.triton.kernels import (
    UNSPECIALIZED,
    hide_alignment,
    load_gradient,
    load_stats,
    program_rows,
    row_term_weights,
    store_values,
)
from fastokd.kernels.triton.normalized import lane_normalized_sums
from fastokd.kernels.triton.passes import load_partials, program_pass, run_pass, store_partials
from fastokd.kernels.triton.rows import FIRST_PASS, MAIN_PASS, load_weights


@triton.jit
def partial_sums(
    inputs, weights, rows, partials, PASS: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The sums of this program's part of a row in a pass."""
    soft: tl.constexpr = TILE.soft_target
    if PASS == FIRST_PASS:
        num_plain: tl.constexpr = SPEC.num_logits + 1 if soft else 0
        maxima, weighted, plain = program_pass(
            inputs, (weights, (), ()), rows, SPEC, FIRST_PASS, soft, num_plain, TILE
        )
        return maxima + weighted + plain
    else:
        use_target: tl.constexpr = (
            soft and SPEC.use_label_logits and not SPEC.needs_first_pass(soft)
        )
        num_sums: tl.constexpr = SPEC.num_plain + (SPEC.num_logits + 1 if use_target else 0)
        _logit_labels, label_logits, _mass, chosen = before_main_pass(
            inputs, weights, rows, partials, SPEC, TILE
        )
        row_state = (weights, label_logits, chosen)
        if PASS == MAIN_PASS:
            maxima, weighted, plain = program_pass(
                inputs, row_state, rows, SPEC, MAIN_PASS, use_target, num_sums, TILE
            )
            return maxima + weighted + plain
        else:
            maxima, sums, _means, _plain = run_pass(
                inputs, row_state, rows, partials, SPEC, MAIN_PASS, use_target, num_sums, TILE
            )
            lane_sums = lane_normalized_sums(inputs, row_state, rows, maxima, sums, SPEC, TILE)
            return row_sums(lane_sums, TILE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def partial_kernel(
    logits,
    weights,
    externals,
    target,
    partials,
    batch,
    shift,
    PASS: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums of each part of the rows in a pass (``FIRST_PASS``, ``MAIN_PASS`` or
    ``NORMALIZED_PASS``).
    """
    rows, _inside = program_rows(batch, TILE)
    inputs = (hide_alignment(logits, shift, TILE), externals, target)
    loaded = load_weights(weights, rows, SPEC, TILE)
    sums = partial_sums(inputs, loaded, rows, partials, PASS, SPEC, TILE)
    first: tl.constexpr = SPEC.first_partial(PASS, TILE.soft_target)
    store_partials(partials, sums, rows, first, SPEC.num_partials(TILE.soft_target), TILE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(
    logits,
    weights,
    externals,
    target,
    term_weights,
    partials,
    out_rows,
    out_terms,
    out_stats,
    batch,
    shift,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The outputs of ``forward_kernel`` from the parts of the rows. One program per row."""
    rows = tl.program_id(0).to(tl.int64)
    inside = rows < batch
    inputs = (hide_alignment(logits, shift, TILE), externals, target)
    loaded = load_weights(weights, rows, SPEC, TILE)
    term_weights = row_term_weights(term_weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(inputs, loaded, term_weights, rows, partials, SPEC, TILE)
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        tl.store(out_stats + rows * SPEC.num_stats + j, stats[j])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def columns_kernel(
    grad_logits,
    grad_rows,
    logits,
    weights,
    externals,
    target,
    term_weights,
    stats,
    products,
    batch,
    shift,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradients of the logits in a part of a row, and its products [B, weights, splits] for the
    gradients of weights.
    """
    rows, inside = program_rows(batch, TILE)
    inputs = (hide_alignment(logits, shift, TILE), externals, target)
    grad_logits = hide_alignment(grad_logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    term_weights = row_term_weights(term_weights, rows, SPEC, TILE)
    row_stats = load_stats(stats, rows, SPEC)
    gradient = load_gradient(grad_rows, rows, TILE)
    shared, label_logits = before_columns(loaded, gradient, term_weights, row_stats, SPEC, TILE)
    sums = backward_columns(
        grad_logits, inputs, loaded, rows, inside, shared, label_logits, row_stats, SPEC, TILE
    )
    if TILE.needs_weights:
        store_partials(products, row_sums(sums, TILE), rows, 0, SPEC.num_weights, TILE)


@triton.jit(do_not_specialize=["batch"])
def weights_kernel(
    grad_weights,
    grad_rows,
    weights,
    term_weights,
    stats,
    products,
    batch,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradients of weights from the products of the parts of a row. One program per row."""
    rows = tl.program_id(0).to(tl.int64)
    inside = rows < batch
    loaded = load_weights(weights, rows, SPEC, TILE)
    term_weights = row_term_weights(term_weights, rows, SPEC, TILE)
    row_stats = load_stats(stats, rows, SPEC)
    gradient = load_gradient(grad_rows, rows, TILE)
    shared, label_logits = before_columns(loaded, gradient, term_weights, row_stats, SPEC, TILE)
    sums = load_partials(products, rows, 0, SPEC.num_weights, SPEC.num_weights, TILE)
    store_weight_gradients(
        grad_weights, sums, loaded, rows, inside, shared, label_logits, row_stats, SPEC, TILE
    )
