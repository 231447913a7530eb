"""The first pass and the main pass over the columns of a row: maxima and sums of exponentials.

Exponentials are taken relative to a bound that is known before the sums begin, so no sum is ever
rescaled. If a row is a single chunk, the bound is the maximum of each node. Otherwise it is an
estimate of the maximum, which is checked afterwards (``program_pass``). KL terms need no
probabilities: with ``e = exp((v_t - max) / T)``,
``KL = sum e (v_t - v_s) / (T sum e) - L_t + L_s``.

A pass yields maxima by scaled node, weighted sums (of exponentials by softmax, then moments), and
plain sums, which have no exponentials.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    FLOOR,
    MASKED_LOSS,
    PAD,
    first_column,
    lane_constants,
    log2,
    masked,
    negated,
    row_maxima,
    row_sums,
    to_compute,
)
from fastokd.kernels.triton.rows import (
    MAIN_PASS,
    exponentials,
    load_nodes,
    load_target,
    moment_value,
    scaled_rows,
    softmax_power,
)

MAX_SUM = tl.constexpr(float(2**40))
"""The largest accepted sum of exponentials relative to an estimated maximum: logits 28 above it at
temperature 1. Larger sums would cost accuracy: the hardware's logarithm of a sum has an error of
2^-22 of its size.
"""


@triton.jit
def raised_maxima(
    maxima, pieces, LIMIT: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr
):
    """The lanes' maximum of each scaled node before scaling, after one more chunk."""
    out = ()
    for s in tl.static_range(len(SPEC.passes[PASS].scaled_nodes)):
        peak = masked(pieces[0][SPEC.passes[PASS].scaled_nodes[s].node], PAD, LIMIT, 0, TILE)
        for p in tl.static_range(1, len(pieces)):
            row = pieces[p][SPEC.passes[PASS].scaled_nodes[s].node]
            peak = tl.maximum(peak, masked(row, PAD, LIMIT, p, TILE))
        out = out + (tl.maximum(maxima[s], peak),)
    return out


@triton.jit
def scaled_offsets(maxima, SPEC: tl.constexpr, PASS: tl.constexpr):
    """The negated scaled maxima, from the maxima before scaling."""
    out = ()
    for s in tl.static_range(len(SPEC.passes[PASS].scaled_nodes)):
        out = out + (maxima[s] * -SPEC.passes[PASS].scaled_nodes[s].scale,)
    return out


@triton.jit
def rescaled(weighted, old, new, SPEC: tl.constexpr, PASS: tl.constexpr):
    """The weighted sums, moved from old to new maxima."""
    factors = ()
    for f in tl.static_range(len(SPEC.passes[PASS].softmaxes)):
        gap = (
            old[SPEC.passes[PASS].softmaxes[f].scaled_node]
            - new[SPEC.passes[PASS].softmaxes[f].scaled_node]
        )
        factors = factors + (softmax_power(tl.exp2(gap), gap, f, SPEC, PASS),)
    out = ()
    for f in tl.static_range(len(SPEC.passes[PASS].softmaxes)):
        out = out + (weighted[f] * factors[f],)
    gaps = ()
    for s in tl.static_range(len(SPEC.passes[PASS].scaled_nodes)):
        gaps = gaps + (old[s] - new[s],)
    for d in tl.static_range(len(SPEC.passes[PASS].moments)):
        shift = moment_value(gaps, d, SPEC, PASS)
        moved = (
            weighted[len(SPEC.passes[PASS].softmaxes) + d]
            + weighted[SPEC.passes[PASS].moments[d].softmax] * shift
        )
        out = out + (moved * factors[SPEC.passes[PASS].moments[d].softmax],)
    return out


@triton.jit
def added_pieces(
    sums,
    offsets,
    pieces,
    inputs,
    rows,
    base,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weighted sums and plain sums after the pieces of one more chunk."""
    weighted, plain = sums
    targets = ()
    if USE_TARGET:
        targets = load_target(inputs, rows, base, LIMIT, TILE)
    for p in tl.static_range(len(pieces)):
        scaled = scaled_rows(pieces[p], offsets, SPEC, PASS, TILE)
        powers = exponentials(scaled, p, LIMIT, SPEC, PASS, TILE)
        out = ()
        for f in tl.static_range(len(SPEC.passes[PASS].softmaxes)):
            out = out + (weighted[f] + powers[f],)
        for d in tl.static_range(len(SPEC.passes[PASS].moments)):
            value = moment_value(scaled, d, SPEC, PASS)
            if SPEC.passes[PASS].moments[d].external >= 0:
                probability = pieces[p][SPEC.passes[PASS].moments[d].external]
                value -= log2(tl.maximum(probability, FLOOR), TILE)
            moment = weighted[len(SPEC.passes[PASS].softmaxes) + d]
            out = out + (moment + powers[SPEC.passes[PASS].moments[d].softmax] * value,)
        weighted = out
        plain = added_plain(plain, pieces[p], targets, p, LIMIT, SPEC, PASS, USE_TARGET, TILE)
    return weighted, plain


@triton.jit
def added_chunk(
    sums,
    offsets,
    inputs,
    row_state,
    rows,
    base,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weighted sums and plain sums after one more chunk."""
    pieces = load_nodes(inputs, row_state, rows, base, LIMIT, COUNT, SPEC, PASS, TILE)
    return added_pieces(
        sums, offsets, pieces, inputs, rows, base, LIMIT, SPEC, PASS, USE_TARGET, TILE
    )


@triton.jit
def summed_value(x, SPEC: tl.constexpr):
    """The summand of a sum of rows. Without label smoothing, the sums serve the first-order eps,
    which is for the classes that exist.
    """
    if SPEC.label_smoothing > 0:
        return x
    else:
        return tl.where(x > -MASKED_LOSS, x, 0.0)


@triton.jit
def external_product(piece, C: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The summand of an external product at one piece."""
    probability = piece[SPEC.main.external_products[C].external]
    student = piece[SPEC.main.external_products[C].student]
    if SPEC.main.external_products[C].eps > 0:
        with_eps = probability + SPEC.main.external_products[C].eps
        logarithm = log2(with_eps, TILE)
        exists = (probability > FLOOR) | (student > -MASKED_LOSS)
        weight = tl.where(exists, with_eps, 0.0)
    else:
        weight = probability
        logarithm = log2(tl.maximum(probability, FLOOR), TILE)
    return weight * (logarithm - student * SPEC.main.external_products[C].factor)


@triton.jit
def error_of(piece, E: tl.constexpr, SPEC: tl.constexpr):
    """The summand of a squared or absolute error at one piece."""
    gap = piece[SPEC.main.errors[E].student] - piece[SPEC.main.errors[E].teacher]
    if SPEC.main.errors[E].squared:
        return gap * gap
    else:
        return tl.abs(gap)


@triton.jit
def added_plain(
    plain,
    piece,
    targets,
    PIECE: tl.constexpr,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    TILE: tl.constexpr,
):
    """Plain sums after one more piece: products of a soft target y with the logits and the mass of
    y (USE_TARGET); in the main pass also sums of rows, masses of external rows, external products,
    errors.
    """
    out = ()
    if USE_TARGET:
        y = to_compute(targets[PIECE], TILE)
        for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
            out = out + (y * piece[m],)
        out = out + (y,)
    if PASS == MAIN_PASS:
        if SPEC.use_row_sums:
            for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
                out = out + (summed_value(piece[m], SPEC),)
        for n in tl.static_range(len(SPEC.main.summed_nodes)):
            out = out + (summed_value(piece[SPEC.main.summed_nodes[n]], SPEC),)
        if len(SPEC.main.external_products):
            for x in tl.static_range(tl.constexpr(SPEC.num_externals)):
                out = out + (piece[SPEC.num_logits + x],)
        for c in tl.static_range(len(SPEC.main.external_products)):
            out = out + (external_product(piece, c, SPEC, TILE),)
        for e in tl.static_range(len(SPEC.main.errors)):
            out = out + (error_of(piece, e, SPEC),)
    sums = ()
    for i in tl.static_range(len(out)):
        sums = sums + (plain[i] + masked(out[i], 0.0, LIMIT, PIECE, TILE),)
    return sums


@triton.jit
def part_of_row(TILE: tl.constexpr):
    """This program's whole chunks of its row (first, end), and the first of its chunks that is not
    whole. The only such chunk is number ``TILE.whole``; the row's last program has it.
    """
    part = tl.program_id(0) % TILE.splits
    tail = tl.where(part == TILE.splits - 1, TILE.whole, TILE.whole + 1)
    return TILE.whole * part // TILE.splits, TILE.whole * (part + 1) // TILE.splits, tail


@triton.jit
def chunks_of_pass(one, TILE: tl.constexpr):
    """As ``part_of_row``, for a pass that may be repeated. ``one`` is 1, unknown to the compiler:
    otherwise the compiler would keep the chunk that is not whole in registers between passes.
    """
    if TILE.splits > 1:
        return part_of_row(TILE)
    else:
        return 0, tl.constexpr(TILE.whole), TILE.whole - 1 + one


@triton.jit
def estimated_maxima(
    inputs, row_state, rows, SPEC: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr
):
    """Maxima [R, 1], before scaling, over one column of each lane in this program's first chunk."""
    first = 0
    if TILE.splits > 1:
        first, _end, _tail = part_of_row(TILE)
    pieces = load_nodes(inputs, row_state, rows, first * TILE.block, 0, 1, SPEC, PASS, TILE)
    maxima = lane_constants(len(SPEC.passes[PASS].scaled_nodes), PAD, TILE)
    return row_maxima(raised_maxima(maxima, pieces, 0, SPEC, PASS, TILE), TILE)


@triton.jit
def exact_maxima(
    one, inputs, row_state, rows, SPEC: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr
):
    """Maxima [R, 1], before scaling, over this program's columns, in a separate pass."""
    maxima = lane_constants(len(SPEC.passes[PASS].scaled_nodes), PAD, TILE)
    first, end, tail = chunks_of_pass(one, TILE)
    for chunk in range(first, end):
        pieces = load_nodes(
            inputs, row_state, rows, first_column(chunk, TILE), 0, TILE.pieces, SPEC, PASS, TILE
        )
        maxima = raised_maxima(maxima, pieces, 0, SPEC, PASS, TILE)
    if TILE.rest:
        for chunk in range(tail, TILE.whole + 1):
            base = first_column(chunk, TILE)
            pieces = load_nodes(
                inputs, row_state, rows, base, TILE.rest, TILE.rest_pieces, SPEC, PASS, TILE
            )
            maxima = raised_maxima(maxima, pieces, TILE.rest, SPEC, PASS, TILE)
    return row_maxima(maxima, TILE)


@triton.jit
def lane_sums(
    offsets,
    one,
    inputs,
    row_state,
    rows,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    NUM_PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each lane's part [R, L] of the weighted and plain sums over this program's columns, for rows
    of several chunks.
    """
    weighted = lane_constants(
        len(SPEC.passes[PASS].softmaxes) + len(SPEC.passes[PASS].moments), 0.0, TILE
    )
    sums = (weighted, lane_constants(NUM_PLAIN, 0.0, TILE))
    first, end, tail = chunks_of_pass(one, TILE)
    for chunk in range(first, end):
        base = first_column(chunk, TILE)
        sums = added_chunk(
            sums,
            offsets,
            inputs,
            row_state,
            rows,
            base,
            0,
            TILE.pieces,
            SPEC,
            PASS,
            USE_TARGET,
            TILE,
        )
    if TILE.rest:
        for chunk in range(tail, TILE.whole + 1):
            sums = added_chunk(
                sums,
                offsets,
                inputs,
                row_state,
                rows,
                first_column(chunk, TILE),
                TILE.rest,
                TILE.rest_pieces,
                SPEC,
                PASS,
                USE_TARGET,
                TILE,
            )
    return sums


@triton.jit
def single_chunk_sums(
    inputs,
    row_state,
    rows,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    NUM_PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Maxima, and each lane's part of the sums, for rows of a single chunk."""
    maxima = lane_constants(len(SPEC.passes[PASS].scaled_nodes), PAD, TILE)
    weighted = lane_constants(
        len(SPEC.passes[PASS].softmaxes) + len(SPEC.passes[PASS].moments), 0.0, TILE
    )
    plain = lane_constants(NUM_PLAIN, 0.0, TILE)
    count: tl.constexpr = TILE.pieces if TILE.whole else TILE.rest_pieces
    pieces = load_nodes(inputs, row_state, rows, 0, TILE.rest, count, SPEC, PASS, TILE)
    maxima = raised_maxima(maxima, pieces, TILE.rest, SPEC, PASS, TILE)
    maxima = row_maxima(negated(scaled_offsets(maxima, SPEC, PASS)), TILE)
    offsets = negated(maxima)
    weighted, plain = added_pieces(
        (weighted, plain), offsets, pieces, inputs, rows, 0, TILE.rest, SPEC, PASS, USE_TARGET, TILE
    )
    return maxima, weighted, plain


@triton.jit
def checked_sums(
    inputs,
    row_state,
    rows,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    NUM_PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Maxima, and each lane's part of the sums, for rows of several chunks.

    The maxima are estimated: updating them and rescaling the sums at each new maximum would take a
    fifth of all instructions. An estimate is a value of the row, so no sum vanishes. If a logit is
    so far above it that a sum exceeds ``MAX_SUM``, the exact maxima are computed and the pass is
    repeated.
    """
    maxima = estimated_maxima(inputs, row_state, rows, SPEC, PASS, TILE)
    offsets = scaled_offsets(maxima, SPEC, PASS)
    weighted = lane_constants(
        len(SPEC.passes[PASS].softmaxes) + len(SPEC.passes[PASS].moments), 0.0, TILE
    )
    plain = lane_constants(NUM_PLAIN, 0.0, TILE)
    again = tl.full((), 1, tl.int32)
    left = again
    while again > 0:
        weighted, plain = lane_sums(
            offsets, again, inputs, row_state, rows, SPEC, PASS, USE_TARGET, NUM_PLAIN, TILE
        )
        above = (weighted[0] >= MAX_SUM).to(tl.int32)
        for f in tl.static_range(1, len(SPEC.passes[PASS].softmaxes)):
            above |= (weighted[f] >= MAX_SUM).to(tl.int32)
        # The maximum of integers takes a warp one instruction, and tells the compiler that all
        # threads branch alike. Repeat once at most: logits near 1e9, whose rounding unit is large,
        # can exceed even their maximum.
        again = tl.minimum(tl.max(above), left)
        left -= 1
        if again > 0:
            maxima = exact_maxima(again, inputs, row_state, rows, SPEC, PASS, TILE)
            offsets = scaled_offsets(maxima, SPEC, PASS)
    return negated(offsets), weighted, plain


@triton.jit
def program_pass(
    inputs,
    row_state,
    rows,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    NUM_PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """A pass over this program's columns: maxima, weighted sums, NUM_PLAIN plain sums, [R, 1]."""
    if TILE.single:
        maxima, weighted, plain = single_chunk_sums(
            inputs, row_state, rows, SPEC, PASS, USE_TARGET, NUM_PLAIN, TILE
        )
    elif len(SPEC.passes[PASS].scaled_nodes):
        maxima, weighted, plain = checked_sums(
            inputs, row_state, rows, SPEC, PASS, USE_TARGET, NUM_PLAIN, TILE
        )
    else:
        maxima = ()
        weighted, plain = lane_sums(
            maxima, 1, inputs, row_state, rows, SPEC, PASS, USE_TARGET, NUM_PLAIN, TILE
        )
    return maxima, row_sums(weighted, TILE), row_sums(plain, TILE)


@triton.jit
def load_partials(
    partials,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    TOTAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums of the programs of a row, as if each program were a lane: a tuple of [1, splits]."""
    out = ()
    for i in tl.static_range(COUNT):
        at = (rows * TOTAL + FIRST + i) * TILE.splits + tl.arange(0, TILE.splits)[None, :]
        out = out + (tl.load(partials + at),)
    return out


@triton.jit
def store_partials(
    partials, values, rows, FIRST: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr
):
    """Write this program's sums for its part of a row."""
    for i in tl.static_range(len(values)):
        tl.store(
            partials + (rows * TOTAL + FIRST + i) * TILE.splits + tl.program_id(0) % TILE.splits,
            values[i],
        )


@triton.jit
def merged_pass(
    partials,
    rows,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    NUM_PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Maxima, weighted sums and plain sums [R, 1] of a split row from those of its parts."""
    scaled_nodes: tl.constexpr = len(SPEC.passes[PASS].scaled_nodes)
    plain: tl.constexpr = (
        scaled_nodes + len(SPEC.passes[PASS].softmaxes) + len(SPEC.passes[PASS].moments)
    )
    parts = load_partials(
        partials,
        rows,
        SPEC.first_partial(PASS, TILE.soft_target),
        plain + NUM_PLAIN,
        SPEC.num_partials(TILE.soft_target),
        TILE,
    )
    maxima = row_maxima(parts[:scaled_nodes], TILE)
    weighted = rescaled(parts[scaled_nodes:plain], parts[:scaled_nodes], maxima, SPEC, PASS)
    return maxima, row_sums(weighted, TILE), row_sums(parts[plain:], TILE)


@triton.jit
def run_pass(
    inputs,
    row_state,
    rows,
    partials,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    USE_TARGET: tl.constexpr,
    NUM_PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """A pass over all columns of a row: maxima, sums by softmax, means by moment, and plain sums,
    [R, 1]. For a split row, other programs have made the pass and written ``partials``.
    """
    softmaxes: tl.constexpr = len(SPEC.passes[PASS].softmaxes)
    if TILE.splits > 1:
        maxima, weighted, plain = merged_pass(partials, rows, SPEC, PASS, NUM_PLAIN, TILE)
    else:
        maxima, weighted, plain = program_pass(
            inputs, row_state, rows, SPEC, PASS, USE_TARGET, NUM_PLAIN, TILE
        )
    means = ()
    for d in tl.static_range(len(SPEC.passes[PASS].moments)):
        total = weighted[SPEC.passes[PASS].moments[d].softmax]
        means = means + (weighted[softmaxes + d] / total,)
    return maxima, weighted[:softmaxes], means, plain
