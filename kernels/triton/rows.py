"""Device functions that evaluate nodes, scaled nodes and softmaxes in the columns of a chunk.

``inputs`` is (logits, externals, target), as the kernels receive them. ``row_state`` holds the
quantities of a row that derived nodes depend on: (run-time weights, label logits of all nodes,
chosen inputs of the selections). The latter two are empty where no node needs them.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.graph import plan as _plan
from fastokd.kernels.triton import spec as _spec
from fastokd.kernels.triton.columns import (
    PAD,
    load_chunk,
    load_logits,
    masked,
    piece_columns,
    set_at,
    to_compute,
)

MIXTURE = tl.constexpr(_plan.MIXTURE)
MINIMUM = tl.constexpr(_plan.MINIMUM)
NON_TARGET = tl.constexpr(_plan.NON_TARGET)
SELECTION = tl.constexpr(_plan.SELECTION)
FIRST_PASS = tl.constexpr(_spec.FIRST_PASS)
MAIN_PASS = tl.constexpr(_spec.MAIN_PASS)
NORMALIZED_PASS = tl.constexpr(_spec.NORMALIZED_PASS)


@triton.jit
def load_weights(weights, rows, SPEC: tl.constexpr, TILE: tl.constexpr):
    """All run-time weights [R, 1], ordered by source."""
    out = ()
    for s in tl.static_range(len(SPEC.widths)):
        for k in tl.static_range(tl.constexpr(SPEC.widths[s])):
            at = weights[s] + rows * TILE.weight_strides[s][0] + k * TILE.weight_strides[s][1]
            out = out + (to_compute(tl.load(at), TILE),)
    return out


@triton.jit
def mixture_row(rows, weights, J: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr):
    """A mixture of logits: the weighted sum of its inputs.

    The multiply-adds are explicitly fused, as in ``scaled_rows``.
    """
    row = rows[0]
    for k in tl.static_range(len(SPEC.passes[PASS].nodes[J].inputs)):
        part = rows[SPEC.passes[PASS].nodes[J].inputs[k]]
        if SPEC.passes[PASS].nodes[J].first_weight >= 0:
            weight = weights[SPEC.passes[PASS].nodes[J].first_weight + k]
        else:
            weight = tl.full((), SPEC.passes[PASS].nodes[J].constants[k], part.dtype)
        row = part * weight if k == 0 else tl.fma(part, weight, row)
    return row


@triton.jit
def minimum_row(rows, label_logits, J: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr):
    """The minimum of the inputs, each relative to its label logit."""
    row = rows[0]
    for k in tl.static_range(len(SPEC.passes[PASS].nodes[J].inputs)):
        shifted = (
            rows[SPEC.passes[PASS].nodes[J].inputs[k]]
            - label_logits[SPEC.passes[PASS].nodes[J].inputs[k]]
        )
        row = shifted if k == 0 else tl.minimum(row, shifted)
    return row


@triton.jit
def selected_row(rows, chosen, J: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr):
    """The input that a selection chose."""
    row = rows[0]
    for k in tl.static_range(len(SPEC.passes[PASS].nodes[J].inputs)):
        candidate = rows[SPEC.passes[PASS].nodes[J].inputs[k]]
        if k == 0:
            row = candidate
        else:
            is_chosen = chosen[SPEC.passes[PASS].nodes[J].selection] == k
            row = tl.where(is_chosen, candidate, row)
    return row


@triton.jit
def derived_rows(rows, row_state, SPEC: tl.constexpr, PASS: tl.constexpr):
    """Rows of all nodes from those of the logits and external rows: at one piece, or of any linear
    function of rows. The rows of nodes that the pass skips are never read. Those of non-target
    nodes still have the label's class (``without_label``).
    """
    weights, label_logits, chosen = row_state
    for j in tl.static_range(len(SPEC.passes[PASS].nodes)):
        row = rows[0]
        if SPEC.passes[PASS].nodes[j].kind == MIXTURE:
            row = mixture_row(rows, weights, j, SPEC, PASS)
        elif SPEC.passes[PASS].nodes[j].kind == MINIMUM:
            row = minimum_row(rows, label_logits, j, SPEC, PASS)
        elif SPEC.passes[PASS].nodes[j].kind == SELECTION:
            row = selected_row(rows, chosen, j, SPEC, PASS)
        elif SPEC.passes[PASS].nodes[j].kind == NON_TARGET:
            row = rows[SPEC.passes[PASS].nodes[j].inputs[0]]
        rows = rows + (row,)
    return rows


@triton.jit
def linear_rows(values, weights, SPEC: tl.constexpr):
    """A linear function of rows (a label logit, a sum over the classes) for all nodes from its
    values for the logits. The values of external rows and nonlinear nodes are never read.
    """
    for _x in tl.static_range(tl.constexpr(SPEC.num_externals)):
        values = values + (values[0],)
    return derived_rows(values, (weights, (), ()), SPEC, FIRST_PASS)


@triton.jit
def without_label(nodes, is_label, SPEC: tl.constexpr):
    """The rows of all nodes at one piece, with the label's class removed from non-target nodes."""
    for n in tl.static_range(len(SPEC.non_target)):
        row = tl.where(is_label, PAD, nodes[SPEC.non_target[n]])
        nodes = set_at(nodes, SPEC.non_target[n], row)
    return nodes


@triton.jit
def row_start(pointer, rows, base, ROW_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr):
    """The address of column ``base`` of each row."""
    start = pointer + rows * ROW_STRIDE
    if COLUMN_STRIDE == 1:
        return start + base
    else:
        # int64, as the rows: C times the column stride of transposed logits can exceed 2^31.
        return start + (tl.full((), 0, tl.int64) + base) * COLUMN_STRIDE


@triton.jit
def load_nodes(
    inputs,
    row_state,
    rows,
    base,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The rows of all nodes in the chunk at column ``base``: a tuple of COUNT pieces, each a tuple
    of [R, L] by node.
    """
    logits, externals, target = inputs
    chunks = ()
    for m in tl.static_range(len(logits)):
        start = row_start(logits[m], rows, base, TILE.logit_strides[m][0], TILE.logit_strides[m][1])
        chunks = chunks + (load_logits(start, TILE.logit_strides[m][1], LIMIT, TILE),)
    for x in tl.static_range(len(externals)):
        start = row_start(
            externals[x], rows, base, TILE.external_strides[x][0], TILE.external_strides[x][1]
        )
        chunks = chunks + (load_chunk(start, TILE.external_strides[x][1], LIMIT, TILE),)
    out = ()
    for p in tl.static_range(COUNT):
        piece = ()
        for m in tl.static_range(len(chunks)):
            piece = piece + (to_compute(chunks[m][p], TILE),)
        nodes = derived_rows(piece, row_state, SPEC, PASS)
        if len(SPEC.non_target):
            label = tl.load(target + rows * TILE.target_strides[0])
            is_label = piece_columns(p, TILE) == (label - base).to(tl.int32)
            nodes = without_label(nodes, is_label, SPEC)
        out = out + (nodes,)
    return out


@triton.jit
def load_target(inputs, rows, base, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """The pieces of a soft target in the chunk at column ``base``."""
    _logits, _externals, target = inputs
    start = row_start(target, rows, base, TILE.target_strides[0], TILE.target_strides[1])
    return load_chunk(start, TILE.target_strides[1], LIMIT, TILE)


@triton.jit
def scaled_rows(rows, offsets, SPEC: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr):
    """``(v - max) log2(e) / T`` of every scaled node at one piece. ``offsets`` are the negated
    scaled maxima: negating them in a loop would keep both in registers.

    Everything else is computed from these values. So a common offset of a row's logits is rounded
    only here, and costs no accuracy elsewhere. Every pass must compute the same value, because the
    exponential of the difference of two roundings of a large logit can have any size. So the
    multiply-add is explicitly fused; the compiler would fuse some of the products and not others.
    """
    out = ()
    for s in tl.static_range(len(SPEC.passes[PASS].scaled_nodes)):
        row = rows[SPEC.passes[PASS].scaled_nodes[s].node]
        if TILE.hardware or TILE.double:
            scale = tl.full((), SPEC.passes[PASS].scaled_nodes[s].scale, row.dtype)
            out = out + (tl.fma(row, scale, offsets[s]),)
        else:
            product = row.to(tl.float64) * SPEC.passes[PASS].scaled_nodes[s].scale
            out = out + ((product + offsets[s].to(tl.float64)).to(row.dtype),)
    return out


@triton.jit
def scale_by(x, FACTOR: tl.constexpr):
    """x times a constant that is often 1."""
    if FACTOR == 1.0:
        return x
    else:
        return x * FACTOR


@triton.jit
def power_of(base, scaled, POWER: tl.constexpr, RATIO: tl.constexpr):
    """``exp2(scaled * RATIO)`` given ``base = exp2(scaled)``, without another exponential if RATIO
    is 1, 2, 3 or 4.
    """
    if POWER == 1:
        return base
    elif POWER == 2:
        return base * base
    elif POWER == 3:
        return base * base * base
    elif POWER == 4:
        return (base * base) * (base * base)
    else:
        return tl.exp2(scaled * RATIO)


@triton.jit
def softmax_power(base, scaled, F: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr):
    """The exponential of a softmax, given its scaled node and the exponential of that."""
    return power_of(
        base, scaled, SPEC.passes[PASS].softmaxes[F].power, SPEC.passes[PASS].softmaxes[F].ratio
    )


@triton.jit
def exponentials(
    scaled,
    PIECE: tl.constexpr,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The exponential of every softmax at one piece; 0 in missing columns."""
    used = ()
    for s in tl.static_range(len(scaled)):
        used = used + (masked(scaled[s], PAD, LIMIT, PIECE, TILE),)
    out = ()
    for f in tl.static_range(len(SPEC.passes[PASS].softmaxes)):
        row = used[SPEC.passes[PASS].softmaxes[f].scaled_node]
        out = out + (softmax_power(tl.exp2(row), row, f, SPEC, PASS),)
    return out


@triton.jit
def moment_value(scaled, D: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr):
    """The values that a moment averages, from the scaled rows: ``log2 p_first - log2 p_second``
    without the logarithms of the two sums. The part of an external row is not included.
    """
    value = scale_by(
        scaled[SPEC.passes[PASS].moments[D].first], SPEC.passes[PASS].moments[D].first_ratio
    )
    if SPEC.passes[PASS].moments[D].external < 0:
        value -= scale_by(
            scaled[SPEC.passes[PASS].moments[D].second], SPEC.passes[PASS].moments[D].second_ratio
        )
    return value
