"""Terms that need normalised probabilities: probability mixtures as teachers, and an exact eps on a
teacher row.

They take a second pass over the columns, once the sums of exponentials are known.
"""

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    FLOOR,
    LN2,
    PAD,
    lane_constants,
    log2,
    masked,
    row_sums,
    timed,
)
from fastokd.kernels.triton.sweep import chunk_rows, load_parts, part_of_row, scaled_rows


@triton.jit
def log_probability(scaled, logs, SOFT: tl.constexpr, SPEC: tl.constexpr):
    """log2 of a soft's probabilities at one piece; ``logs`` are log2 of the sums."""
    return (
        timed(scaled[SPEC.main.softmaxes[SOFT].scaled_node], SPEC.main.softmaxes[SOFT].ratio)
        - logs[SOFT]
    )


@triton.jit
def blend_row(
    rows, scaled, weights, logs, BLEND: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """A probability mixture at one piece: its probability, log2 of it, and d log / d weight of each
    input.
    """
    parts = ()
    peak = PAD
    total = 0.0
    for k in tl.static_range(len(SPEC.prob_mixtures[BLEND].inputs)):
        if SPEC.prob_mixtures[BLEND].softmaxes[k] < 0:
            part = log2(tl.maximum(rows[SPEC.prob_mixtures[BLEND].inputs[k]], FLOOR), TILE)
        else:
            part = log_probability(scaled, logs, SPEC.prob_mixtures[BLEND].softmaxes[k], SPEC)
        parts = parts + (part,)
        peak = tl.maximum(part, peak)
    ratios = ()
    for k in tl.static_range(len(SPEC.prob_mixtures[BLEND].inputs)):
        ratio = tl.exp2(parts[k] - peak)
        ratios = ratios + (ratio,)
        if SPEC.prob_mixtures[BLEND].first_weight >= 0:
            share = ratio * weights[SPEC.prob_mixtures[BLEND].first_weight + k]
        else:
            share = ratio * SPEC.prob_mixtures[BLEND].constants[k]
        total = share + total
    kept = tl.maximum(total, FLOOR)
    scale = tl.where(total >= FLOOR, 1.0 / kept, 0.0)
    slopes = ()
    for k in tl.static_range(len(SPEC.prob_mixtures[BLEND].inputs)):
        slopes = slopes + (ratios[k] * scale,)
    return tl.exp2(peak) * kept, peak + log2(kept, TILE), slopes


@triton.jit
def blend_rows(rows, scaled, weights, logs, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Every probability mixture at one piece: a tuple of (probability, log2, slopes)."""
    out = ()
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        out = out + (blend_row(rows, scaled, weights, logs, b, SPEC, TILE),)
    return out


@triton.jit
def log_sums(sums, TILE: tl.constexpr):
    logs = ()
    for f in tl.static_range(len(sums)):
        logs = logs + (log2(sums[f], TILE),)
    return logs


@triton.jit
def teacher_row(scaled, blends, logs, EDGE: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The teacher of a normal edge at one piece: its probability, the same with eps, and log2 of
    the latter.
    """
    if SPEC.normalized_edges[EDGE].prob_mixture >= 0:
        probability = blends[SPEC.normalized_edges[EDGE].prob_mixture][0]
        logarithm = blends[SPEC.normalized_edges[EDGE].prob_mixture][1]
    else:
        logarithm = log_probability(scaled, logs, SPEC.normalized_edges[EDGE].teacher_softmax, SPEC)
        probability = tl.exp2(logarithm)
    if SPEC.normalized_edges[EDGE].eps > 0:
        weight = probability + SPEC.normalized_edges[EDGE].eps
        return probability, weight, log2(weight, TILE)
    else:
        return probability, probability, logarithm


@triton.jit
def normal_chunk(
    totals,
    logits,
    externals,
    rows,
    base,
    weights,
    labels,
    choices,
    maxima,
    logs,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    pieces = chunk_rows(
        logits, externals, rows, base, weights, labels, choices, LIMIT, COUNT, SPEC, 1, TILE
    )
    for p in tl.static_range(COUNT):
        scaled = scaled_rows(pieces[p], maxima, SPEC, 1, TILE)
        blends = blend_rows(pieces[p], scaled, weights, logs, SPEC, TILE)
        out = ()
        products = ()
        for e in tl.static_range(len(SPEC.normalized_edges)):
            probability, weight, logarithm = teacher_row(scaled, blends, logs, e, SPEC, TILE)
            student = log_probability(scaled, logs, SPEC.normalized_edges[e].student_softmax, SPEC)
            gap = (logarithm - student) * LN2
            if SPEC.normalized_edges[e].student_first:
                pull = -tl.exp2(student)
                out = out + (pull * gap, pull)
            else:
                out = out + (weight * gap, probability * gap)
                pull = probability * (gap + 1.0)
            if SPEC.normalized_edges[e].prob_mixture >= 0:
                for k in tl.static_range(
                    len(SPEC.prob_mixtures[SPEC.normalized_edges[e].prob_mixture].inputs)
                ):
                    products = products + (
                        pull * blends[SPEC.normalized_edges[e].prob_mixture][2][k],
                    )
        for b in tl.static_range(len(SPEC.prob_mixtures)):
            out = out + (blends[b][0],)
        out = out + products
        sums = ()
        for i in tl.static_range(len(out)):
            sums = sums + (totals[i] + masked(out[i], 0.0, LIMIT, p, TILE),)
        totals = sums
    return totals


@triton.jit
def lane_normal_sweep(
    logits,
    externals,
    rows,
    weights,
    labels,
    choices,
    maxima,
    sums,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each lane's share of the sums of ``normal_sweep`` over this program's columns."""
    logs = log_sums(sums, TILE)
    totals = lane_constants(SPEC.num_normalized, 0.0, TILE)
    if TILE.splits > 1:
        first, end, tail = part_of_row(TILE)
        for chunk in range(first, end):
            totals = normal_chunk(
                totals,
                logits,
                externals,
                rows,
                chunk * TILE.block,
                weights,
                labels,
                choices,
                maxima,
                logs,
                0,
                TILE.pieces,
                SPEC,
                TILE,
            )
        if TILE.rest:
            for chunk in range(tail, TILE.whole + 1):
                totals = normal_chunk(
                    totals,
                    logits,
                    externals,
                    rows,
                    chunk * TILE.block,
                    weights,
                    labels,
                    choices,
                    maxima,
                    logs,
                    TILE.rest,
                    TILE.rest_pieces,
                    SPEC,
                    TILE,
                )
    else:
        if TILE.whole:
            for chunk in range(TILE.whole):
                totals = normal_chunk(
                    totals,
                    logits,
                    externals,
                    rows,
                    chunk * TILE.block,
                    weights,
                    labels,
                    choices,
                    maxima,
                    logs,
                    0,
                    TILE.pieces,
                    SPEC,
                    TILE,
                )
        if TILE.rest:
            totals = normal_chunk(
                totals,
                logits,
                externals,
                rows,
                TILE.whole * TILE.block,
                weights,
                labels,
                choices,
                maxima,
                logs,
                TILE.rest,
                TILE.rest_pieces,
                SPEC,
                TILE,
            )
    return totals


@triton.jit
def normal_sweep(
    logits,
    externals,
    rows,
    weights,
    labels,
    choices,
    maxima,
    sums,
    partials,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """For each normal edge its value and the mean of its teacher's side; masses of the blends; for
    each normal edge from a blend, per input, ``sum_c dKL/dlog h_c dlog h_c/dw``. All [R, 1].
    """
    if TILE.splits > 1:
        totals = load_parts(
            partials,
            rows,
            SPEC.first_partial(2, TILE.soft_target),
            SPEC.num_normalized,
            SPEC.num_partials(TILE.soft_target),
            TILE,
        )
    else:
        totals = lane_normal_sweep(
            logits, externals, rows, weights, labels, choices, maxima, sums, SPEC, TILE
        )
    return row_sums(totals, TILE)
