"""The pass over the columns of a row that gathers maxima and sums of exponentials.

It keeps a running maximum per lane and node, so that logits are read once and whatever their size no exponential
overflows and no sum vanishes. KL terms need no probabilities at all: with ``e = exp((v_t - max) / T)``,
``KL = sum e (v_t - v_s) / (T sum e) - L_t + L_s``.
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


@triton.jit
def chunk_rows(logits, externals, rows, base, weights, labels, choices, LIMIT: tl.constexpr, COUNT: tl.constexpr,
               SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr):
    """The rows of all nodes at the columns of a chunk: a tuple of COUNT tuples of pieces [R, L]."""
    chunks = ()
    for m in tl.static_range(len(logits)):
        start = logits[m] + rows * TILE.logit_strides[m][0] + base * TILE.logit_strides[m][1]
        chunks = chunks + (load_chunk(start, TILE.logit_strides[m][1], LIMIT, TILE),)
    for x in tl.static_range(len(externals)):
        start = externals[x] + rows * TILE.external_strides[x][0] + base * TILE.external_strides[x][1]
        chunks = chunks + (load_chunk(start, TILE.external_strides[x][1], LIMIT, TILE),)
    out = ()
    for p in tl.static_range(COUNT):
        pieces = ()
        for m in tl.static_range(len(chunks)):
            pieces = pieces + (computed(chunks[m][p], TILE),)
        out = out + (derived_rows(pieces, weights, labels, choices, SPEC, WHICH),)
    return out


@triton.jit
def raised_maxima(maxima, pieces, COUNT: tl.constexpr, LIMIT: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr,
                  TILE: tl.constexpr):
    """The running scaled maximum of each softened node after one more chunk."""
    out = ()
    for s in tl.static_range(len(SPEC.passes[WHICH].slots)):
        peak = masked(pieces[0][SPEC.passes[WHICH].slots[s][0]], PAD, LIMIT, 0, TILE)
        for p in tl.static_range(1, COUNT):
            peak = tl.maximum(peak, masked(pieces[p][SPEC.passes[WHICH].slots[s][0]], PAD, LIMIT, p, TILE))
        out = out + (tl.maximum(maxima[s], peak * SPEC.passes[WHICH].slots[s][1]),)
    return out


@triton.jit
def rescaled(values, old, new, SPEC: tl.constexpr, WHICH: tl.constexpr):
    """The sums of all softs, then all moments, moved from old to new scaled maxima."""
    factors = ()
    for f in tl.static_range(len(SPEC.passes[WHICH].softs)):
        gap = old[SPEC.passes[WHICH].softs[f][0]] - new[SPEC.passes[WHICH].softs[f][0]]
        factors = factors + (powered(tl.exp2(gap), gap, SPEC.passes[WHICH].softs[f][1], SPEC.passes[WHICH].softs[f][2]),)
    out = ()
    for f in tl.static_range(len(SPEC.passes[WHICH].softs)):
        out = out + (values[f] * factors[f],)
    gaps = ()
    for s in tl.static_range(len(SPEC.passes[WHICH].slots)):
        gaps = gaps + (old[s] - new[s],)
    for d in tl.static_range(len(SPEC.passes[WHICH].moments)):
        shift = moment_value(gaps, d, SPEC, WHICH)
        moved = values[len(SPEC.passes[WHICH].softs) + d] + values[SPEC.passes[WHICH].moments[d][0]] * shift
        out = out + (moved * factors[SPEC.passes[WHICH].moments[d][0]],)
    return out


@triton.jit
def moment_value(scaled, MOMENT: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr):
    """What a moment averages, from the scaled rows: the log-probability of its row minus that of the other row, but for
    the logarithms of their sums. An external row's part is not in it."""
    value = timed(scaled[SPEC.passes[WHICH].moments[MOMENT][1]], SPEC.passes[WHICH].moments[MOMENT][2])
    if SPEC.passes[WHICH].moments[MOMENT][5] < 0:
        value -= timed(scaled[SPEC.passes[WHICH].moments[MOMENT][3]], SPEC.passes[WHICH].moments[MOMENT][4])
    return value


@triton.jit
def scaled_rows(rows, maxima, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr):
    """``(v - max) log2(e) / T`` of every slot at one piece, T being its base temperature.

    All that follows is computed from these, so that a common offset of a row's logits, which is rounded here once in a
    fused multiply-add, costs no accuracy anywhere else.
    """
    out = ()
    for s in tl.static_range(len(SPEC.passes[WHICH].slots)):
        row = rows[SPEC.passes[WHICH].slots[s][0]]
        if TILE.hardware:
            out = out + (row * SPEC.passes[WHICH].slots[s][1] - maxima[s],)
        else:
            exact = row.to(tl.float64) * SPEC.passes[WHICH].slots[s][1] - maxima[s].to(tl.float64)
            out = out + (exact.to(row.dtype),)
    return out


@triton.jit
def exponentials(scaled, PIECE: tl.constexpr, LIMIT: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr):
    """The exponential of every soft at one piece; 0 in missing columns."""
    bases = ()
    for s in tl.static_range(len(scaled)):
        bases = bases + (masked(scaled[s], PAD, LIMIT, PIECE, TILE),)
    out = ()
    for f in tl.static_range(len(SPEC.passes[WHICH].softs)):
        base = bases[SPEC.passes[WHICH].softs[f][0]]
        out = out + (powered(tl.exp2(base), base, SPEC.passes[WHICH].softs[f][1], SPEC.passes[WHICH].softs[f][2]),)
    return out


@triton.jit
def forward_chunk(maxima, weighted, plain, logits, externals, target, rows, base, weights, labels, choices,
                  LIMIT: tl.constexpr, COUNT: tl.constexpr, FRESH: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr,
                  DOTS: tl.constexpr, TILE: tl.constexpr):
    """Running maxima, weighted sums and plain sums after one more chunk. FRESH: before it there was none."""
    pieces = chunk_rows(logits, externals, rows, base, weights, labels, choices, LIMIT, COUNT, SPEC, WHICH, TILE)
    targets = ()
    if DOTS:
        start = target + rows * TILE.target_strides[0] + base * TILE.target_strides[1]
        targets = load_chunk(start, TILE.target_strides[1], LIMIT, TILE)
    raised = raised_maxima(maxima, pieces, COUNT, LIMIT, SPEC, WHICH, TILE)
    if not FRESH:
        weighted = rescaled(weighted, maxima, raised, SPEC, WHICH)
    for p in tl.static_range(COUNT):
        scaled = scaled_rows(pieces[p], raised, SPEC, WHICH, TILE)
        powers = exponentials(scaled, p, LIMIT, SPEC, WHICH, TILE)
        sums = ()
        for f in tl.static_range(len(SPEC.passes[WHICH].softs)):
            sums = sums + (weighted[f] + powers[f],)
        for d in tl.static_range(len(SPEC.passes[WHICH].moments)):
            value = moment_value(scaled, d, SPEC, WHICH)
            if SPEC.passes[WHICH].moments[d][5] >= 0:
                value -= log2(tl.maximum(pieces[p][SPEC.passes[WHICH].moments[d][5]], FLOOR), TILE)
            sums = sums + (weighted[len(SPEC.passes[WHICH].softs) + d] + powers[SPEC.passes[WHICH].moments[d][0]] * value,)
        weighted = sums
        plain = plain_sums(plain, pieces[p], targets, p, LIMIT, SPEC, WHICH, DOTS, TILE)
    return raised, weighted, plain


@triton.jit
def plain_sums(plain, pieces, targets, PIECE: tl.constexpr, LIMIT: tl.constexpr, SPEC: tl.constexpr,
               WHICH: tl.constexpr, DOTS: tl.constexpr, TILE: tl.constexpr):
    """Sums without exponentials: <y, v> of the logits rows and the mass of y (DOTS: soft targets), sums of rows, masses of
    external rows, crosses."""
    out = ()
    if DOTS:
        y = computed(targets[PIECE], TILE)
        for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
            out = out + (y * pieces[m],)
        out = out + (y,)
    if WHICH == 1:
        if SPEC.use_sums:
            for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
                out = out + (pieces[m],)
        for n in tl.static_range(len(SPEC.passes[1].summed)):
            out = out + (pieces[SPEC.passes[1].summed[n]],)
        if len(SPEC.passes[1].crosses):
            for x in tl.static_range(tl.constexpr(SPEC.num_externals)):
                out = out + (pieces[SPEC.num_logits + x],)
        for c in tl.static_range(len(SPEC.passes[1].crosses)):
            probability = pieces[SPEC.passes[1].crosses[c][0]]
            if SPEC.passes[1].crosses[c][3] > 0:
                weight = probability + SPEC.passes[1].crosses[c][3]
                logarithm = log2(weight, TILE)
            else:
                weight = probability
                logarithm = log2(tl.maximum(probability, FLOOR), TILE)
            out = out + (weight * (logarithm - pieces[SPEC.passes[1].crosses[c][1]] * SPEC.passes[1].crosses[c][2]),)
    sums = ()
    for i in tl.static_range(len(out)):
        sums = sums + (plain[i] + masked(out[i], 0.0, LIMIT, PIECE, TILE),)
    return sums


@triton.jit
def part_of_row(TILE: tl.constexpr):
    """Which whole chunks of its row this program has (first, end), and the first of its chunks that is not whole: there
    is one at ``TILE.whole``, which the row's last program has."""
    part = tl.program_id(0) % TILE.splits
    tail = tl.where(part == TILE.splits - 1, TILE.whole, TILE.whole + 1)
    return TILE.whole * part // TILE.splits, TILE.whole * (part + 1) // TILE.splits, tail


@triton.jit
def lane_sweep(logits, externals, target, rows, weights, labels, choices, SPEC: tl.constexpr, WHICH: tl.constexpr,
               DOTS: tl.constexpr, PLAIN: tl.constexpr, TILE: tl.constexpr):
    """Each lane's share of a pass over this program's columns: scaled maxima by slot, sums by soft and moments, plain
    sums, all [R, L]."""
    maxima = lane_constants(len(SPEC.passes[WHICH].slots), PAD, TILE)
    weighted = lane_constants(len(SPEC.passes[WHICH].softs) + len(SPEC.passes[WHICH].moments), 0.0, TILE)
    plain = lane_constants(PLAIN, 0.0, TILE)
    if TILE.splits > 1:
        first, end, tail = part_of_row(TILE)
        for chunk in range(first, end):
            maxima, weighted, plain = forward_chunk(
                maxima, weighted, plain, logits, externals, target, rows, chunk * TILE.block, weights, labels, choices,
                0, TILE.pieces, False, SPEC, WHICH, DOTS, TILE)
        if TILE.rest:
            for chunk in range(tail, TILE.whole + 1):
                maxima, weighted, plain = forward_chunk(
                    maxima, weighted, plain, logits, externals, target, rows, chunk * TILE.block, weights, labels, choices,
                    TILE.rest, TILE.rest_pieces, False, SPEC, WHICH, DOTS, TILE)
    else:
        if TILE.whole == 1 and TILE.rest == 0:
            maxima, weighted, plain = forward_chunk(
                maxima, weighted, plain, logits, externals, target, rows, 0, weights, labels, choices,
                0, TILE.pieces, True, SPEC, WHICH, DOTS, TILE)
        elif TILE.whole:
            for chunk in range(TILE.whole):
                maxima, weighted, plain = forward_chunk(
                    maxima, weighted, plain, logits, externals, target, rows, chunk * TILE.block, weights, labels, choices,
                    0, TILE.pieces, False, SPEC, WHICH, DOTS, TILE)
        if TILE.rest:
            maxima, weighted, plain = forward_chunk(
                maxima, weighted, plain, logits, externals, target, rows, TILE.whole * TILE.block, weights, labels, choices,
                TILE.rest, TILE.rest_pieces, TILE.whole == 0, SPEC, WHICH, DOTS, TILE)
    return maxima, weighted, plain


@triton.jit
def over_lanes(maxima, weighted, plain, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr):
    """The maxima and sums of a pass over the lanes, or over the parts of a row."""
    peaks = row_maxima(maxima, TILE)
    return peaks, row_sums(rescaled(weighted, maxima, peaks, SPEC, WHICH), TILE), row_sums(plain, TILE)


@triton.jit
def load_parts(partials, rows, FIRST: tl.constexpr, COUNT: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr):
    """What the programs of a row have found, as if each were a lane: a tuple of [1, splits]."""
    out = ()
    for i in tl.static_range(COUNT):
        at = (rows * TOTAL + FIRST + i) * TILE.splits + tl.arange(0, TILE.splits)[None, :]
        out = out + (tl.load(partials + at),)
    return out


@triton.jit
def store_part(partials, values, rows, FIRST: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr):
    """What this program has found for its part of a row."""
    for i in tl.static_range(len(values)):
        tl.store(partials + (rows * TOTAL + FIRST + i) * TILE.splits + tl.program_id(0) % TILE.splits, values[i])


@triton.jit
def sweep(logits, externals, target, rows, weights, labels, choices, partials, SPEC: tl.constexpr, WHICH: tl.constexpr,
          DOTS: tl.constexpr, PLAIN: tl.constexpr, TILE: tl.constexpr):
    """One pass over all columns: scaled maxima by slot, sums by soft, moments, and PLAIN plain sums, all [R, 1]. For a
    split row the pass has been made, and its parts are in ``partials``."""
    slots: tl.constexpr = len(SPEC.passes[WHICH].slots)
    softs: tl.constexpr = len(SPEC.passes[WHICH].softs)
    moments: tl.constexpr = len(SPEC.passes[WHICH].moments)
    if TILE.splits > 1:
        parts = load_parts(partials, rows, SPEC.first_partial(WHICH, TILE.soft_target), slots + softs + moments + PLAIN,
                           SPEC.first_partial(3, TILE.soft_target), TILE)
        maxima = parts[:slots]
        weighted = parts[slots:slots + softs + moments]
        plain = parts[slots + softs + moments:]
    else:
        maxima, weighted, plain = lane_sweep(
            logits, externals, target, rows, weights, labels, choices, SPEC, WHICH, DOTS, PLAIN, TILE)
    peaks, weighted, plain = over_lanes(maxima, weighted, plain, SPEC, WHICH, TILE)
    means = ()
    for d in tl.static_range(moments):
        means = means + (weighted[softs + d] / weighted[SPEC.passes[WHICH].moments[d][0]],)
    return peaks, weighted[:softs], means, plain
