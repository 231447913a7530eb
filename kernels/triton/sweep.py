"""The pass over the columns of a row that gathers maxima and sums of exponentials.

The exponentials are taken below a bound that is known before the sums begin, so that no sum is ever
moved to a new one: the maximum of each node where a row is a single chunk, else a guess at it,
which is checked afterwards (``own_sweep``). KL terms need no probabilities at all: with ``e =
exp((v_t - max) / T)``, ``KL = sum e (v_t - v_s) / (T sum e) - L_t + L_s``.
"""

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    FLOOR,
    PAD,
    computed,
    derived_rows,
    lane_constants,
    load_chunk,
    log2,
    masked,
    powered,
    row_maxima,
    row_sums,
    timed,
)

MOST = tl.constexpr(float(2**40))
"""The largest sum of exponentials below a guess: logits 28 above it at temperature 1. What a larger
one costs is accuracy: the hardware's logarithm of a sum is right to 2^-22 of its size.
"""


@triton.jit
def chunk_rows(
    logits,
    externals,
    rows,
    base,
    weights,
    labels,
    choices,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The rows of all nodes at the columns of a chunk: a tuple of COUNT tuples of pieces [R, L]."""
    chunks = ()
    for m in tl.static_range(len(logits)):
        start = logits[m] + rows * TILE.logit_strides[m][0] + base * TILE.logit_strides[m][1]
        chunks = chunks + (load_chunk(start, TILE.logit_strides[m][1], LIMIT, TILE),)
    for x in tl.static_range(len(externals)):
        start = (
            externals[x] + rows * TILE.external_strides[x][0] + base * TILE.external_strides[x][1]
        )
        chunks = chunks + (load_chunk(start, TILE.external_strides[x][1], LIMIT, TILE),)
    out = ()
    for p in tl.static_range(COUNT):
        pieces = ()
        for m in tl.static_range(len(chunks)):
            pieces = pieces + (computed(chunks[m][p], TILE),)
        out = out + (derived_rows(pieces, weights, labels, choices, SPEC, WHICH),)
    return out


@triton.jit
def raised_maxima(
    maxima, pieces, LIMIT: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr
):
    """The lanes' scaled maximum of each softened node, after the pieces of one more chunk."""
    out = ()
    for s in tl.static_range(len(SPEC.passes[WHICH].scaled_nodes)):
        peak = masked(pieces[0][SPEC.passes[WHICH].scaled_nodes[s].node], PAD, LIMIT, 0, TILE)
        for p in tl.static_range(1, len(pieces)):
            peak = tl.maximum(
                peak,
                masked(pieces[p][SPEC.passes[WHICH].scaled_nodes[s].node], PAD, LIMIT, p, TILE),
            )
        out = out + (tl.maximum(maxima[s], peak * SPEC.passes[WHICH].scaled_nodes[s].scale),)
    return out


@triton.jit
def rescaled(values, old, new, SPEC: tl.constexpr, WHICH: tl.constexpr):
    """The sums of all softs, then all moments, moved from old to new scaled maxima."""
    factors = ()
    for f in tl.static_range(len(SPEC.passes[WHICH].softmaxes)):
        gap = (
            old[SPEC.passes[WHICH].softmaxes[f].scaled_node]
            - new[SPEC.passes[WHICH].softmaxes[f].scaled_node]
        )
        factors = factors + (
            powered(
                tl.exp2(gap),
                gap,
                SPEC.passes[WHICH].softmaxes[f].power,
                SPEC.passes[WHICH].softmaxes[f].ratio,
            ),
        )
    out = ()
    for f in tl.static_range(len(SPEC.passes[WHICH].softmaxes)):
        out = out + (values[f] * factors[f],)
    gaps = ()
    for s in tl.static_range(len(SPEC.passes[WHICH].scaled_nodes)):
        gaps = gaps + (old[s] - new[s],)
    for d in tl.static_range(len(SPEC.passes[WHICH].moments)):
        shift = moment_value(gaps, d, SPEC, WHICH)
        moved = (
            values[len(SPEC.passes[WHICH].softmaxes) + d]
            + values[SPEC.passes[WHICH].moments[d].softmax] * shift
        )
        out = out + (moved * factors[SPEC.passes[WHICH].moments[d].softmax],)
    return out


@triton.jit
def moment_value(scaled, MOMENT: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr):
    """What a moment averages, from the scaled rows: the log-probability of its row minus that of
    the other row, but for the logarithms of their sums. An external row's part is not in it.
    """
    value = timed(
        scaled[SPEC.passes[WHICH].moments[MOMENT].first],
        SPEC.passes[WHICH].moments[MOMENT].first_ratio,
    )
    if SPEC.passes[WHICH].moments[MOMENT].external < 0:
        value -= timed(
            scaled[SPEC.passes[WHICH].moments[MOMENT].second],
            SPEC.passes[WHICH].moments[MOMENT].second_ratio,
        )
    return value


@triton.jit
def scaled_rows(rows, maxima, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr):
    """``(v - max) log2(e) / T`` of every slot at one piece, T being its base temperature.

    All that follows is computed from these, so that a common offset of a row's logits, which is
    rounded here once in a fused multiply-add, costs no accuracy anywhere else.
    """
    out = ()
    for s in tl.static_range(len(SPEC.passes[WHICH].scaled_nodes)):
        row = rows[SPEC.passes[WHICH].scaled_nodes[s].node]
        if TILE.hardware:
            out = out + (row * SPEC.passes[WHICH].scaled_nodes[s].scale - maxima[s],)
        else:
            exact = row.to(tl.float64) * SPEC.passes[WHICH].scaled_nodes[s].scale - maxima[s].to(
                tl.float64
            )
            out = out + (exact.to(row.dtype),)
    return out


@triton.jit
def exponentials(
    scaled,
    PIECE: tl.constexpr,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The exponential of every soft at one piece; 0 in missing columns."""
    bases = ()
    for s in tl.static_range(len(scaled)):
        bases = bases + (masked(scaled[s], PAD, LIMIT, PIECE, TILE),)
    out = ()
    for f in tl.static_range(len(SPEC.passes[WHICH].softmaxes)):
        base = bases[SPEC.passes[WHICH].softmaxes[f].scaled_node]
        out = out + (
            powered(
                tl.exp2(base),
                base,
                SPEC.passes[WHICH].softmaxes[f].power,
                SPEC.passes[WHICH].softmaxes[f].ratio,
            ),
        )
    return out


@triton.jit
def added_pieces(
    maxima,
    weighted,
    plain,
    pieces,
    target,
    rows,
    base,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    DOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weighted sums and plain sums after the pieces of one more chunk."""
    targets = ()
    if DOTS:
        start = target + rows * TILE.target_strides[0] + base * TILE.target_strides[1]
        targets = load_chunk(start, TILE.target_strides[1], LIMIT, TILE)
    for p in tl.static_range(len(pieces)):
        scaled = scaled_rows(pieces[p], maxima, SPEC, WHICH, TILE)
        powers = exponentials(scaled, p, LIMIT, SPEC, WHICH, TILE)
        sums = ()
        for f in tl.static_range(len(SPEC.passes[WHICH].softmaxes)):
            sums = sums + (weighted[f] + powers[f],)
        for d in tl.static_range(len(SPEC.passes[WHICH].moments)):
            value = moment_value(scaled, d, SPEC, WHICH)
            if SPEC.passes[WHICH].moments[d].external >= 0:
                value -= log2(
                    tl.maximum(pieces[p][SPEC.passes[WHICH].moments[d].external], FLOOR), TILE
                )
            sums = sums + (
                weighted[len(SPEC.passes[WHICH].softmaxes) + d]
                + powers[SPEC.passes[WHICH].moments[d].softmax] * value,
            )
        weighted = sums
        plain = plain_sums(plain, pieces[p], targets, p, LIMIT, SPEC, WHICH, DOTS, TILE)
    return weighted, plain


@triton.jit
def added_chunk(
    maxima,
    weighted,
    plain,
    logits,
    externals,
    target,
    rows,
    base,
    weights,
    labels,
    choices,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    DOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weighted sums and plain sums after one more chunk."""
    pieces = chunk_rows(
        logits, externals, rows, base, weights, labels, choices, LIMIT, COUNT, SPEC, WHICH, TILE
    )
    return added_pieces(
        maxima, weighted, plain, pieces, target, rows, base, LIMIT, SPEC, WHICH, DOTS, TILE
    )


@triton.jit
def plain_sums(
    plain,
    pieces,
    targets,
    PIECE: tl.constexpr,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    DOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums without exponentials: <y, v> of the logits rows and the mass of y (DOTS: soft targets),
    sums of rows, masses of external rows, crosses.
    """
    out = ()
    if DOTS:
        y = computed(targets[PIECE], TILE)
        for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
            out = out + (y * pieces[m],)
        out = out + (y,)
    if WHICH == 1:
        if SPEC.use_row_sums:
            for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
                out = out + (pieces[m],)
        for n in tl.static_range(len(SPEC.main.summed_nodes)):
            out = out + (pieces[SPEC.main.summed_nodes[n]],)
        if len(SPEC.main.external_products):
            for x in tl.static_range(tl.constexpr(SPEC.num_externals)):
                out = out + (pieces[SPEC.num_logits + x],)
        for c in tl.static_range(len(SPEC.main.external_products)):
            probability = pieces[SPEC.main.external_products[c].external]
            if SPEC.main.external_products[c].eps > 0:
                weight = probability + SPEC.main.external_products[c].eps
                logarithm = log2(weight, TILE)
            else:
                weight = probability
                logarithm = log2(tl.maximum(probability, FLOOR), TILE)
            out = out + (
                weight
                * (
                    logarithm
                    - pieces[SPEC.main.external_products[c].student]
                    * SPEC.main.external_products[c].factor
                ),
            )
    sums = ()
    for i in tl.static_range(len(out)):
        sums = sums + (plain[i] + masked(out[i], 0.0, LIMIT, PIECE, TILE),)
    return sums


@triton.jit
def part_of_row(TILE: tl.constexpr):
    """Which whole chunks of its row this program has (first, end), and the first of its chunks that
    is not whole: there is one at ``TILE.whole``, which the row's last program has.
    """
    part = tl.program_id(0) % TILE.splits
    tail = tl.where(part == TILE.splits - 1, TILE.whole, TILE.whole + 1)
    return TILE.whole * part // TILE.splits, TILE.whole * (part + 1) // TILE.splits, tail


@triton.jit
def chunks_of_pass(one, TILE: tl.constexpr):
    """As ``part_of_row``, for a pass that may be made again. ``one`` is 1, but the compiler does
    not know: else it would hold the chunk that is not whole in registers from one pass to the next.
    """
    if TILE.splits > 1:
        return part_of_row(TILE)
    else:
        return 0, tl.constexpr(TILE.whole), TILE.whole - 1 + one


@triton.jit
def guessed_maxima(
    logits,
    externals,
    rows,
    weights,
    labels,
    choices,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The scaled maximum of each slot [R, 1] over one column of each lane in this program's first
    chunk.
    """
    first = 0
    if TILE.splits > 1:
        first, _end, _tail = part_of_row(TILE)
    pieces = chunk_rows(
        logits,
        externals,
        rows,
        first * TILE.block,
        weights,
        labels,
        choices,
        0,
        1,
        SPEC,
        WHICH,
        TILE,
    )
    maxima = lane_constants(len(SPEC.passes[WHICH].scaled_nodes), PAD, TILE)
    return row_maxima(raised_maxima(maxima, pieces, 0, SPEC, WHICH, TILE), TILE)


@triton.jit
def exact_maxima(
    one,
    logits,
    externals,
    rows,
    weights,
    labels,
    choices,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The scaled maximum of each slot [R, 1] over this program's columns, in a pass of their
    own.
    """
    maxima = lane_constants(len(SPEC.passes[WHICH].scaled_nodes), PAD, TILE)
    first, end, tail = chunks_of_pass(one, TILE)
    for chunk in range(first, end):
        pieces = chunk_rows(
            logits,
            externals,
            rows,
            chunk * TILE.block,
            weights,
            labels,
            choices,
            0,
            TILE.pieces,
            SPEC,
            WHICH,
            TILE,
        )
        maxima = raised_maxima(maxima, pieces, 0, SPEC, WHICH, TILE)
    if TILE.rest:
        for chunk in range(tail, TILE.whole + 1):
            pieces = chunk_rows(
                logits,
                externals,
                rows,
                chunk * TILE.block,
                weights,
                labels,
                choices,
                TILE.rest,
                TILE.rest_pieces,
                SPEC,
                WHICH,
                TILE,
            )
            maxima = raised_maxima(maxima, pieces, TILE.rest, SPEC, WHICH, TILE)
    return row_maxima(maxima, TILE)


@triton.jit
def lane_sums(
    maxima,
    one,
    logits,
    externals,
    target,
    rows,
    weights,
    labels,
    choices,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    DOTS: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each lane's share of a pass over this program's columns, of which there are several chunks:
    sums by soft and moments, plain sums, all [R, L].
    """
    weighted = lane_constants(
        len(SPEC.passes[WHICH].softmaxes) + len(SPEC.passes[WHICH].moments), 0.0, TILE
    )
    plain = lane_constants(PLAIN, 0.0, TILE)
    first, end, tail = chunks_of_pass(one, TILE)
    for chunk in range(first, end):
        weighted, plain = added_chunk(
            maxima,
            weighted,
            plain,
            logits,
            externals,
            target,
            rows,
            chunk * TILE.block,
            weights,
            labels,
            choices,
            0,
            TILE.pieces,
            SPEC,
            WHICH,
            DOTS,
            TILE,
        )
    if TILE.rest:
        for chunk in range(tail, TILE.whole + 1):
            weighted, plain = added_chunk(
                maxima,
                weighted,
                plain,
                logits,
                externals,
                target,
                rows,
                chunk * TILE.block,
                weights,
                labels,
                choices,
                TILE.rest,
                TILE.rest_pieces,
                SPEC,
                WHICH,
                DOTS,
                TILE,
            )
    return weighted, plain


@triton.jit
def own_sweep(
    logits,
    externals,
    target,
    rows,
    weights,
    labels,
    choices,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    DOTS: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """A pass over this program's columns: scaled maxima by slot, sums by soft and moments, plain
    sums, all [R, 1].

    Of several chunks the maxima are guessed: keeping them, and moving the sums to each new one,
    would take a fifth of all instructions. A guess is a value of the row, so that no sum vanishes,
    and where a logit lies so far above it that a sum exceeds ``MOST``, the maxima are looked for
    and the pass is made again.
    """
    maxima = lane_constants(len(SPEC.passes[WHICH].scaled_nodes), PAD, TILE)
    weighted = lane_constants(
        len(SPEC.passes[WHICH].softmaxes) + len(SPEC.passes[WHICH].moments), 0.0, TILE
    )
    plain = lane_constants(PLAIN, 0.0, TILE)
    if TILE.single:
        pieces = chunk_rows(
            logits,
            externals,
            rows,
            0,
            weights,
            labels,
            choices,
            TILE.rest,
            TILE.pieces if TILE.whole else TILE.rest_pieces,
            SPEC,
            WHICH,
            TILE,
        )
        maxima = row_maxima(raised_maxima(maxima, pieces, TILE.rest, SPEC, WHICH, TILE), TILE)
        weighted, plain = added_pieces(
            maxima, weighted, plain, pieces, target, rows, 0, TILE.rest, SPEC, WHICH, DOTS, TILE
        )
    elif len(SPEC.passes[WHICH].scaled_nodes):
        maxima = guessed_maxima(
            logits, externals, rows, weights, labels, choices, SPEC, WHICH, TILE
        )
        again = tl.full((), 1, tl.int32)
        left = again
        while again > 0:
            weighted, plain = lane_sums(
                maxima,
                again,
                logits,
                externals,
                target,
                rows,
                weights,
                labels,
                choices,
                SPEC,
                WHICH,
                DOTS,
                PLAIN,
                TILE,
            )
            above = (weighted[0] >= MOST).to(tl.int32)
            for f in tl.static_range(1, len(SPEC.passes[WHICH].softmaxes)):
                above |= (weighted[f] >= MOST).to(tl.int32)
            # The maximum of integers takes a warp one instruction, by which the compiler knows that
            # no thread goes alone. Once more at most: logits near 1e9, of which a unit of rounding
            # is large, exceed even their maximum.
            again = tl.minimum(tl.max(above), left)
            left -= 1
            if again > 0:
                maxima = exact_maxima(
                    again, logits, externals, rows, weights, labels, choices, SPEC, WHICH, TILE
                )
    else:
        weighted, plain = lane_sums(
            maxima,
            1,
            logits,
            externals,
            target,
            rows,
            weights,
            labels,
            choices,
            SPEC,
            WHICH,
            DOTS,
            PLAIN,
            TILE,
        )
    return maxima, row_sums(weighted, TILE), row_sums(plain, TILE)


@triton.jit
def merged(maxima, weighted, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr):
    """The maxima over the parts of a row, and the sums over its parts moved to them."""
    peaks = row_maxima(maxima, TILE)
    return peaks, row_sums(rescaled(weighted, maxima, peaks, SPEC, WHICH), TILE)


@triton.jit
def load_parts(
    partials,
    rows,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    TOTAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """What the programs of a row have found, as if each were a lane: a tuple of [1, splits]."""
    out = ()
    for i in tl.static_range(COUNT):
        at = (rows * TOTAL + FIRST + i) * TILE.splits + tl.arange(0, TILE.splits)[None, :]
        out = out + (tl.load(partials + at),)
    return out


@triton.jit
def store_part(
    partials, values, rows, FIRST: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr
):
    """What this program has found for its part of a row."""
    for i in tl.static_range(len(values)):
        tl.store(
            partials + (rows * TOTAL + FIRST + i) * TILE.splits + tl.program_id(0) % TILE.splits,
            values[i],
        )


@triton.jit
def sweep(
    logits,
    externals,
    target,
    rows,
    weights,
    labels,
    choices,
    partials,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    DOTS: tl.constexpr,
    PLAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """One pass over all columns: scaled maxima by slot, sums by soft, moments, and PLAIN plain
    sums, all [R, 1]. For a split row the pass has been made, and its parts are in ``partials``.
    """
    slots: tl.constexpr = len(SPEC.passes[WHICH].scaled_nodes)
    softs: tl.constexpr = len(SPEC.passes[WHICH].softmaxes)
    moments: tl.constexpr = len(SPEC.passes[WHICH].moments)
    if TILE.splits > 1:
        parts = load_parts(
            partials,
            rows,
            SPEC.first_partial(WHICH, TILE.soft_target),
            slots + softs + moments + PLAIN,
            SPEC.num_partials(TILE.soft_target),
            TILE,
        )
        maxima, weighted = merged(
            parts[:slots], parts[slots : slots + softs + moments], SPEC, WHICH, TILE
        )
        plain = row_sums(parts[slots + softs + moments :], TILE)
    else:
        maxima, weighted, plain = own_sweep(
            logits,
            externals,
            target,
            rows,
            weights,
            labels,
            choices,
            SPEC,
            WHICH,
            DOTS,
            PLAIN,
            TILE,
        )
    means = ()
    for d in tl.static_range(moments):
        means = means + (weighted[softs + d] / weighted[SPEC.passes[WHICH].moments[d].softmax],)
    return maxima, weighted[:softs], means, plain
