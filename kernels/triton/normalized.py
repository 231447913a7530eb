"""Normalized edges: probability mixtures as teachers, an exact eps added to a teacher, and
Jensen-Shannon divergences.

They take another pass over the columns, after the sums of exponentials are known. ``logs`` are log2
of the sums, by softmax. ``mixtures`` holds (probability, log2 of it, d log / d weight by input) of
every probability mixture at one piece.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    FLOOR,
    LN2,
    MASKED_LOSS,
    PAD,
    first_column,
    lane_constants,
    log2,
    masked,
    negated,
    row_sums,
)
from fastokd.kernels.triton.passes import load_partials, part_of_row
from fastokd.kernels.triton.rows import (
    MAIN_PASS,
    NORMALIZED_PASS,
    load_nodes,
    scale_by,
    scaled_rows,
)


@triton.jit
def log_probability(scaled, logs, F: tl.constexpr, SPEC: tl.constexpr):
    """log2 of a softmax's probabilities at one piece."""
    row = scaled[SPEC.main.softmaxes[F].scaled_node]
    return scale_by(row, SPEC.main.softmaxes[F].ratio) - logs[F]


@triton.jit
def prob_mixture(
    rows, scaled, weights, logs, B: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """A probability mixture at one piece, computed relative to the largest log-probability of its
    inputs.
    """
    parts = ()
    peak = PAD
    total = 0.0
    for k in tl.static_range(len(SPEC.prob_mixtures[B].inputs)):
        if SPEC.prob_mixtures[B].softmaxes[k] < 0:
            part = log2(tl.maximum(rows[SPEC.prob_mixtures[B].inputs[k]], FLOOR), TILE)
        else:
            part = log_probability(scaled, logs, SPEC.prob_mixtures[B].softmaxes[k], SPEC)
        parts = parts + (part,)
        peak = tl.maximum(part, peak)
    ratios = ()
    for k in tl.static_range(len(SPEC.prob_mixtures[B].inputs)):
        ratio = tl.exp2(parts[k] - peak)
        ratios = ratios + (ratio,)
        if SPEC.prob_mixtures[B].first_weight >= 0:
            share = ratio * weights[SPEC.prob_mixtures[B].first_weight + k]
        else:
            share = ratio * SPEC.prob_mixtures[B].constants[k]
        total = share + total
    floored = tl.maximum(total, FLOOR)
    scale = tl.where(total >= FLOOR, 1.0 / floored, 0.0)
    slopes = ()
    for k in tl.static_range(len(SPEC.prob_mixtures[B].inputs)):
        slopes = slopes + (ratios[k] * scale,)
    return tl.exp2(peak) * floored, peak + log2(floored, TILE), slopes


@triton.jit
def prob_mixtures(rows, scaled, weights, logs, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Every probability mixture at one piece."""
    out = ()
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        out = out + (prob_mixture(rows, scaled, weights, logs, b, SPEC, TILE),)
    return out


@triton.jit
def log_sums(sums, TILE: tl.constexpr):
    """log2 of every sum."""
    logs = ()
    for f in tl.static_range(len(sums)):
        logs = logs + (log2(sums[f], TILE),)
    return logs


@triton.jit
def teacher_row(
    rows, scaled, mixtures, logs, student, E: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The teacher of a normalized edge at one piece: its probability, the same with eps, and log2
    of the latter. ``student`` is log2 of the student's. A class that both rows mask has no share in
    the value, and eps is for those that exist.
    """
    mixture: tl.constexpr = SPEC.normalized_edges[E].prob_mixture
    if SPEC.normalized_edges[E].external >= 0:
        probability = rows[SPEC.normalized_edges[E].external]
        logarithm = log2(tl.maximum(probability, FLOOR), TILE)
    elif mixture >= 0:
        probability, logarithm, _slopes = mixtures[mixture]
    else:
        logarithm = log_probability(scaled, logs, SPEC.normalized_edges[E].teacher_softmax, SPEC)
        probability = tl.exp2(logarithm)
    with_eps = probability
    if SPEC.normalized_edges[E].eps > 0:
        with_eps = probability + SPEC.normalized_edges[E].eps
        logarithm = log2(with_eps, TILE)
    if SPEC.normalized_edges[E].eps > 0 or mixture >= 0:
        exists = (probability > FLOOR) | (student > -MASKED_LOSS)
        with_eps = tl.where(exists, with_eps, 0.0)
        probability = tl.where(exists, probability, 0.0)
    return probability, with_eps, logarithm


@triton.jit
def jensen_shannon(
    probability, logarithm, student, E: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The summands of the student's and the teacher's part of a Jensen-Shannon divergence, which
    are also its derivatives for the logarithms of their probabilities: those through the mixture's
    logarithm add up to 0. ``logarithm`` and ``student`` are log2 of the probabilities.
    """
    of_teacher = probability * SPEC.normalized_edges[E].beta
    of_student = tl.exp2(student) * (1.0 - SPEC.normalized_edges[E].beta)
    middle = log2(tl.maximum(of_teacher + of_student, FLOOR), TILE)
    return of_student * (student - middle) * LN2, of_teacher * (logarithm - middle) * LN2


@triton.jit
def added_products(products, mixture, pull):
    """The products with the slopes of one more mixture appended."""
    _probability, _logarithm, slopes = mixture
    for k in tl.static_range(len(slopes)):
        products = products + (pull * slopes[k],)
    return products


@triton.jit
def normalized_summands(piece, scaled, weights, logs, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The summands of the normalized pass at one piece."""
    mixtures = prob_mixtures(piece, scaled, weights, logs, SPEC, TILE)
    out = ()
    products = ()
    for e in tl.static_range(len(SPEC.normalized_edges)):
        student = log_probability(scaled, logs, SPEC.normalized_edges[e].student_softmax, SPEC)
        probability, with_eps, logarithm = teacher_row(
            piece, scaled, mixtures, logs, student, e, SPEC, TILE
        )
        gap = (logarithm - student) * LN2
        if SPEC.normalized_edges[e].beta > 0:
            of_student, pull = jensen_shannon(probability, logarithm, student, e, SPEC, TILE)
            out = out + (of_student, pull)
        elif SPEC.normalized_edges[e].student_first:
            pull = -tl.exp2(student)
            out = out + (pull * gap, pull)
        else:
            out = out + (with_eps * gap, probability * gap)
            pull = probability * (gap + 1.0)
        if SPEC.normalized_edges[e].prob_mixture >= 0:
            products = added_products(
                products, mixtures[SPEC.normalized_edges[e].prob_mixture], pull
            )
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        probability, _logarithm, _slopes = mixtures[b]
        out = out + (probability,)
    return out + products


@triton.jit
def normalized_chunk(
    totals,
    inputs,
    row_state,
    rows,
    base,
    offsets,
    logs,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums of the normalized pass after one more chunk."""
    pieces = load_nodes(inputs, row_state, rows, base, LIMIT, COUNT, SPEC, MAIN_PASS, TILE)
    weights, _label_logits, _chosen = row_state
    for p in tl.static_range(COUNT):
        scaled = scaled_rows(pieces[p], offsets, SPEC, MAIN_PASS, TILE)
        out = normalized_summands(pieces[p], scaled, weights, logs, SPEC, TILE)
        sums = ()
        for i in tl.static_range(len(out)):
            sums = sums + (totals[i] + masked(out[i], 0.0, LIMIT, p, TILE),)
        totals = sums
    return totals


@triton.jit
def lane_normalized_sums(
    inputs, row_state, rows, maxima, sums, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """Each lane's part of the sums of ``normalized_pass`` over this program's columns."""
    logs = log_sums(sums, TILE)
    offsets = negated(maxima)
    rest: tl.constexpr = TILE.rest
    rest_pieces: tl.constexpr = TILE.rest_pieces
    out = lane_constants(SPEC.num_normalized, 0.0, TILE)
    if TILE.splits > 1:
        first, end, tail = part_of_row(TILE)
        for chunk in range(first, end):
            base = first_column(chunk, TILE)
            out = normalized_chunk(
                out, inputs, row_state, rows, base, offsets, logs, 0, TILE.pieces, SPEC, TILE
            )
        if TILE.rest:
            for chunk in range(tail, TILE.whole + 1):
                base = first_column(chunk, TILE)
                out = normalized_chunk(
                    out, inputs, row_state, rows, base, offsets, logs, rest, rest_pieces, SPEC, TILE
                )
    else:
        if TILE.whole:
            for chunk in range(TILE.whole):
                base = first_column(chunk, TILE)
                out = normalized_chunk(
                    out, inputs, row_state, rows, base, offsets, logs, 0, TILE.pieces, SPEC, TILE
                )
        if TILE.rest:
            last: tl.constexpr = TILE.whole * TILE.block
            out = normalized_chunk(
                out, inputs, row_state, rows, last, offsets, logs, rest, rest_pieces, SPEC, TILE
            )
    return out


@triton.jit
def normalized_pass(
    inputs, row_state, rows, maxima, sums, partials, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """For each normalized edge its value and the mean of its teacher's side; the mass of each
    probability mixture; for each normalized edge from a mixture, by input,
    ``sum_c dKL/dlog h_c dlog h_c/dw``. All [R, 1].
    """
    if TILE.splits > 1:
        totals = load_partials(
            partials,
            rows,
            SPEC.first_partial(NORMALIZED_PASS, TILE.soft_target),
            SPEC.num_normalized,
            SPEC.num_partials(TILE.soft_target),
            TILE,
        )
    else:
        totals = lane_normalized_sums(inputs, row_state, rows, maxima, sums, SPEC, TILE)
    return row_sums(totals, TILE)
