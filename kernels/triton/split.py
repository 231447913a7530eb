"""Kernels for few and long rows: several programs share a row, so that a handful of rows fills a
GPU.

A pass over the columns is a launch of ``partial_kernel``: each program sums up its part of a row
and writes its maxima and sums side by side, [B, sums, splits]. Whoever needs them, the next pass or
``merge_kernel`` at the end, reads those of a row as if they were a program's lanes and combines
them with the same functions, in the order of a fixed tree: no atomics, the same bits every time. So
every graph can be split, those with a pass ahead (selections, minima with soft targets) or with
normalised probabilities (mixtures of probabilities, exact eps) included: they take one more launch.

The gradient of a column needs statistics of its row only, so that the parts of a row do not meet in
the backward pass; but the gradients of weights are sums over columns, merged by ``weights_kernel``.
"""

import triton
import triton.language as tl

from fastokd.kernels.triton.backward import backward_columns, before_columns, store_weight_gradients
from fastokd.kernels.triton.columns import computed, load_weights, row_sums
from fastokd.kernels.triton.forward import before_main, forward_row
from fastokd.kernels.triton.kernels import UNSPECIALIZED, program_rows, store_values, unaligned
from fastokd.kernels.triton.normal import lane_normal_sweep
from fastokd.kernels.triton.sweep import load_parts, own_sweep, store_part, sweep


@triton.jit(do_not_specialize=UNSPECIALIZED)
def partial_kernel(
    logits,
    weights,
    externals,
    target,
    partials,
    batch,
    shift,
    STAGE: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums of a part of a row in the pass ahead (STAGE 0), the main pass (1), or that with
    normalised probabilities (2).
    """
    rows, _inside = program_rows(batch, TILE)
    logits = unaligned(logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    soft: tl.constexpr = TILE.soft_target
    ahead: tl.constexpr = SPEC.needs_first_pass(soft)
    dots: tl.constexpr = soft and SPEC.use_label_logits and not ahead
    plain_sums: tl.constexpr = SPEC.num_plain + (SPEC.num_logits + 1 if dots else 0)
    if STAGE == 0:
        maxima, weighted, plain = own_sweep(
            logits,
            externals,
            target,
            rows,
            loaded,
            (),
            (),
            SPEC,
            0,
            soft,
            SPEC.num_logits + 1 if soft else 0,
            TILE,
        )
        found = maxima + weighted + plain
    else:
        _labels, labels, _mass, choices = before_main(
            logits, externals, target, rows, loaded, partials, SPEC, TILE
        )
        if STAGE == 1:
            maxima, weighted, plain = own_sweep(
                logits,
                externals,
                target,
                rows,
                loaded,
                labels,
                choices,
                SPEC,
                1,
                dots,
                plain_sums,
                TILE,
            )
            found = maxima + weighted + plain
        else:
            maxima, sums, _means, _plain = sweep(
                logits,
                externals,
                target,
                rows,
                loaded,
                labels,
                choices,
                partials,
                SPEC,
                1,
                dots,
                plain_sums,
                TILE,
            )
            found = row_sums(
                lane_normal_sweep(
                    logits, externals, rows, loaded, labels, choices, maxima, sums, SPEC, TILE
                ),
                TILE,
            )
    store_part(
        partials, found, rows, SPEC.first_partial(STAGE, soft), SPEC.num_partials(soft), TILE
    )


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
    """What ``forward_kernel`` writes, from the parts of the rows. One program per row."""
    rows = tl.program_id(0).to(tl.int64)
    inside = rows < batch
    logits = unaligned(logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    loss, terms, stats = forward_row(
        logits, loaded, externals, target, term_weights, rows, partials, SPEC, TILE
    )
    store_values(loss, terms, out_rows, out_terms, rows, inside, batch, SPEC, TILE)
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        tl.store(out_stats + rows * SPEC.num_stats + j, stats[j])


@triton.jit
def load_stats(stats, rows, SPEC: tl.constexpr):
    kept = ()
    for j in tl.static_range(tl.constexpr(SPEC.num_stats)):
        kept = kept + (tl.load(stats + rows * SPEC.num_stats + j),)
    return kept


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
    logits = unaligned(logits, shift, TILE)
    grad_logits = unaligned(grad_logits, shift, TILE)
    loaded = load_weights(weights, rows, SPEC, TILE)
    kept = load_stats(stats, rows, SPEC)
    gradient = computed(tl.load(grad_rows + rows * TILE.grad_stride), TILE)
    factors, onto_target, onto_one, labels = before_columns(
        loaded, gradient, term_weights, kept, SPEC, TILE
    )
    dots = backward_columns(
        grad_logits,
        logits,
        loaded,
        externals,
        target,
        rows,
        inside,
        factors,
        onto_target,
        onto_one,
        labels,
        kept,
        SPEC,
        TILE,
    )
    if TILE.needs_weights:
        store_part(products, row_sums(dots, TILE), rows, 0, SPEC.num_weights, TILE)


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
    kept = load_stats(stats, rows, SPEC)
    gradient = computed(tl.load(grad_rows + rows * TILE.grad_stride), TILE)
    factors, onto_target, onto_one, labels = before_columns(
        loaded, gradient, term_weights, kept, SPEC, TILE
    )
    dots = load_parts(products, rows, 0, SPEC.num_weights, SPEC.num_weights, TILE)
    store_weight_gradients(
        grad_weights,
        dots,
        loaded,
        rows,
        inside,
        factors,
        onto_target,
        onto_one,
        labels,
        kept,
        SPEC,
        TILE,
    )
