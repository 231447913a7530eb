"""From logits and a row's statistics to gradients: one pass over the columns, whatever the graph.

Every probability is recomputed from its logit. What the gradient of a soft row has in common over
the columns is summed up once per row (``pulls``), as are the parts that are linear in the target or
constant over the columns: these pass through the mixtures as numbers instead of rows.
"""

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    FLOOR,
    LN2,
    NOTHING,
    added,
    computed,
    lane_constants,
    linear_rows,
    load_chunk,
    log2,
    masked,
    piece_columns,
    powered,
    row_constant,
    row_constants,
    row_sums,
    store_chunk,
    store_rows,
)
from fastokd.kernels.triton.normal import blend_rows, log_probability, log_sums, teacher_row
from fastokd.kernels.triton.sweep import (
    chunk_rows,
    exponentials,
    moment_value,
    part_of_row,
    scaled_rows,
)


@triton.jit
def row_factors(gradient, weights, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr):
    """What is the same in all columns of a row, [R, 1] each: the coefficient of each soft's
    probabilities (by their sum: it multiplies exponentials), of the target and of 1 for each node,
    then the coefficients of the edges, outer edges and normal edges, and of d log / d weight for
    the inputs of each blend.
    """
    sums = stats[SPEC.layout[1] : SPEC.layout[2]]
    means = stats[SPEC.layout[2] : SPEC.layout[3]]
    mass = stats[SPEC.layout[6]]
    pulls = row_constants(len(sums), NOTHING, TILE)
    onto_target = row_constants(len(SPEC.learning), NOTHING, TILE)
    onto_one = row_constants(len(SPEC.learning), NOTHING, TILE)
    for c in tl.static_range(len(SPEC.entropies)):
        factor = gradient * tl.load(term_weights + SPEC.entropies[c][0])
        total = mass * (1.0 - SPEC.label_smoothing) + SPEC.label_smoothing
        pulls = added(pulls, SPEC.entropies[c][1], factor * total / sums[SPEC.entropies[c][1]])
        onto_target = added(
            onto_target, SPEC.entropies[c][2], factor * (SPEC.label_smoothing - 1.0)
        )
        if SPEC.label_smoothing > 0:
            onto_one = added(
                onto_one, SPEC.entropies[c][2], factor * (-SPEC.label_smoothing / TILE.num_classes)
            )
    edges = ()
    for e in tl.static_range(len(SPEC.edges)):
        factor = (
            gradient
            * tl.load(term_weights + SPEC.edges[e][0])
            * (SPEC.edges[e][1] / SPEC.edges[e][2])
        )
        onto_other = factor / sums[SPEC.edges[e][3]]
        onto_gap = onto_other * LN2
        if SPEC.edges[e][8]:
            pulls = added(pulls, SPEC.edges[e][5], factor / sums[SPEC.edges[e][5]])
        if SPEC.edges[e][7]:
            pulls = added(pulls, SPEC.edges[e][3], -(onto_gap * means[e]))
        if SPEC.edges[e][9] > 0:
            onto_one = added(onto_one, SPEC.edges[e][6], factor * -SPEC.edges[e][9])
            pulls = added(
                pulls,
                SPEC.edges[e][5],
                factor * (SPEC.edges[e][9] * TILE.num_classes) / sums[SPEC.edges[e][5]],
            )
            if SPEC.edges[e][7]:
                onto_one = added(onto_one, SPEC.edges[e][4], factor * SPEC.edges[e][9])
                pulls = added(
                    pulls, SPEC.edges[e][3], onto_other * (-SPEC.edges[e][9] * TILE.num_classes)
                )
        edges = edges + ((onto_other, onto_gap),)
    outer = ()
    for o in tl.static_range(len(SPEC.outer)):
        factor = (
            gradient
            * tl.load(term_weights + SPEC.outer[o][0])
            * (SPEC.outer[o][1] / SPEC.outer[o][2])
        )
        if SPEC.outer[o][6]:
            factor = factor * LN2 / sums[SPEC.outer[o][3]]
            pulls = added(pulls, SPEC.outer[o][3], -(factor * means[SPEC.outer[o][8]]))
        else:
            heavy = (
                stats[SPEC.layout[8] + SPEC.outer[o][5] - SPEC.num_logits]
                + SPEC.outer[o][7] * TILE.num_classes
            )
            pulls = added(pulls, SPEC.outer[o][3], factor * heavy / sums[SPEC.outer[o][3]])
        outer = outer + (factor,)
    normal = ()
    onto_blends = ()
    for b in tl.static_range(len(SPEC.blends)):
        onto_blends = onto_blends + (row_constants(len(SPEC.blends[b][1]), NOTHING, TILE),)
    for e in tl.static_range(len(SPEC.normal)):
        factor = (
            gradient
            * tl.load(term_weights + SPEC.normal[e][0])
            * (SPEC.normal[e][1] / SPEC.normal[e][2])
        )
        if not SPEC.normal[e][7]:
            if SPEC.normal[e][10] >= 0:
                heavy = (
                    stats[SPEC.layout[10] + SPEC.normal[e][10]]
                    + SPEC.normal[e][8] * TILE.num_classes
                )
            else:
                heavy = row_constant(1.0, TILE) + SPEC.normal[e][8] * TILE.num_classes
            pulls = added(pulls, SPEC.normal[e][3], factor * heavy / sums[SPEC.normal[e][3]])
        if SPEC.normal[e][10] >= 0 and SPEC.normal[e][9]:
            inputs = onto_blends[SPEC.normal[e][10]]
            for k in tl.static_range(len(inputs)):
                product = stats[SPEC.layout[11] + SPEC.products[e] + k]
                inputs = added(inputs, k, factor * SPEC.normal[e][2] * product)
            onto_blends = (
                onto_blends[: SPEC.normal[e][10]]
                + (inputs,)
                + onto_blends[SPEC.normal[e][10] + 1 :]
            )
        normal = normal + (factor,)
    for b in tl.static_range(len(SPEC.blends)):
        for k in tl.static_range(len(SPEC.blends[b][1])):
            if SPEC.blends[b][2][k] >= 0 and SPEC.pulls[SPEC.blends[b][2][k]]:
                pull = onto_blends[b][k] / (sums[SPEC.blends[b][2][k]] * -SPEC.blends[b][5])
                if SPEC.blends[b][3] >= 0:
                    pull = pull * weights[SPEC.blends[b][3] + k]
                else:
                    pull = pull * SPEC.blends[b][4][k]
                pulls = added(pulls, SPEC.blends[b][2][k], pull)
    return pulls, onto_target, onto_one, edges, outer, normal, onto_blends


@triton.jit
def through_mixtures(values, weights, SPEC: tl.constexpr):
    """Gradients of all nodes after every mixture, last first, has passed its own on to its
    inputs.
    """
    for j in tl.static_range(len(SPEC.mixtures)):
        for k in tl.static_range(len(SPEC.mixtures[j][1])):
            if SPEC.mixtures[j][2] >= 0:
                part = weights[SPEC.mixtures[j][2] + k] * values[SPEC.mixtures[j][0]]
            else:
                part = values[SPEC.mixtures[j][0]] * SPEC.mixtures[j][3][k]
            values = added(values, SPEC.mixtures[j][1][k], part)
    return values


@triton.jit
def edge_gradients(
    grads,
    rows,
    scaled,
    powers,
    weights,
    logs,
    factors,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of every node at one piece, from the terms at this node and the blends that it
    enters.

    ``factors`` as from ``row_factors``; ``logs`` log2 of the sums, needed by normal edges only.
    """
    pulls, _target, _one, edges, outer, normal, _blends = factors
    for e in tl.static_range(len(SPEC.edges)):
        if SPEC.edges[e][7]:
            pulls = added(pulls, SPEC.edges[e][3], edges[e][1] * moment_value(scaled, e, SPEC, 1))
        if SPEC.edges[e][8]:
            grads = added(grads, SPEC.edges[e][6], -(edges[e][0] * powers[SPEC.edges[e][3]]))
    for o in tl.static_range(len(SPEC.outer)):
        outside = rows[SPEC.outer[o][5]]
        if SPEC.outer[o][6]:
            gap = moment_value(scaled, SPEC.outer[o][8], SPEC, 1) - log2(
                tl.maximum(outside, FLOOR), TILE
            )
            pulls = added(pulls, SPEC.outer[o][3], outer[o] * gap)
        else:
            grads = added(grads, SPEC.outer[o][4], -(outer[o] * (outside + SPEC.outer[o][7])))
    # a e + b e^3 = e (a + b e^2): what a power pulls is added to what its base pulls.
    for f in tl.static_range(len(SPEC.pulls)):
        if SPEC.pulls[f] and SPEC.passes[1].softs[f][1] > 1:
            lower = powered(powers[SPEC.bases[f]], 0.0, SPEC.passes[1].softs[f][1] - 1, 0.0)
            pulls = added(pulls, SPEC.bases[f], pulls[f] * lower)
    for f in tl.static_range(len(SPEC.pulls)):
        if SPEC.pulls[f] and SPEC.bases[f] == f:
            grads = added(
                grads, SPEC.passes[1].slots[SPEC.passes[1].softs[f][0]][0], pulls[f] * powers[f]
            )
    if len(SPEC.normal):
        blends = blend_rows(rows, scaled, weights, logs, SPEC, TILE)
        onto = lane_constants(len(SPEC.blends), NOTHING, TILE)
        for e in tl.static_range(len(SPEC.normal)):
            probability, weight, logarithm = teacher_row(scaled, blends, logs, e, SPEC, TILE)
            student = log_probability(scaled, logs, SPEC.normal[e][3], SPEC)
            gap = (logarithm - student) * LN2
            if SPEC.normal[e][7]:
                share = normal[e] * tl.exp2(student)
                grads = added(
                    grads, SPEC.normal[e][4], -(share * (gap + stats[SPEC.layout[9] + 2 * e]))
                )
                if SPEC.normal[e][9]:
                    onto = added(onto, SPEC.normal[e][10], -(share * SPEC.normal[e][2]))
            else:
                grads = added(grads, SPEC.normal[e][4], -(normal[e] * weight))
                if SPEC.normal[e][9]:
                    if SPEC.normal[e][10] >= 0:
                        onto = added(
                            onto,
                            SPEC.normal[e][10],
                            normal[e] * probability * (gap + 1.0) * SPEC.normal[e][2],
                        )
                    else:
                        pull = normal[e] * probability * (gap - stats[SPEC.layout[9] + 2 * e + 1])
                        grads = added(grads, SPEC.normal[e][5], pull)
        for b in tl.static_range(len(SPEC.blends)):
            for k in tl.static_range(len(SPEC.blends[b][1])):
                if SPEC.blends[b][2][k] >= 0 and SPEC.pulls[SPEC.blends[b][2][k]]:
                    slope = onto[b] * blends[b][2][k] * (1.0 / SPEC.blends[b][5])
                    if SPEC.blends[b][3] >= 0:
                        slope = slope * weights[SPEC.blends[b][3] + k]
                    else:
                        slope = slope * SPEC.blends[b][4][k]
                    grads = added(grads, SPEC.blends[b][1][k], slope)
    return grads


@triton.jit
def weight_products(
    dots,
    grads,
    rows,
    PIECE: tl.constexpr,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of every run-time weight of the mixtures after one more piece."""
    for j in tl.static_range(len(SPEC.mixtures)):
        if SPEC.mixtures[j][2] >= 0:
            for k in tl.static_range(len(SPEC.mixtures[j][1])):
                product = grads[SPEC.mixtures[j][0]] * rows[SPEC.mixtures[j][1][k]]
                dots = added(
                    dots, SPEC.mixtures[j][2] + k, masked(product, 0.0, LIMIT, PIECE, TILE)
                )
    return dots


@triton.jit
def weight_gradients(
    totals, weights, onto_target, onto_one, onto_blends, labels, stats, SPEC: tl.constexpr
):
    """The gradients of all run-time weights, from the products summed over the columns: with what
    is linear in the target or constant over the columns, and what comes from probability mixtures.
    """
    node_sums = ()
    if SPEC.use_sums:
        node_sums = linear_rows(stats[SPEC.layout[4] : SPEC.layout[5]], weights, SPEC)
    for j in tl.static_range(len(SPEC.mixtures)):
        if SPEC.mixtures[j][2] >= 0:
            for k in tl.static_range(len(SPEC.mixtures[j][1])):
                if SPEC.has_entropy:
                    part = onto_target[SPEC.mixtures[j][0]] * labels[SPEC.mixtures[j][1][k]]
                    totals = added(totals, SPEC.mixtures[j][2] + k, part)
                if SPEC.use_sums:
                    part = onto_one[SPEC.mixtures[j][0]] * node_sums[SPEC.mixtures[j][1][k]]
                    totals = added(totals, SPEC.mixtures[j][2] + k, part)
    for b in tl.static_range(len(SPEC.blends)):
        if SPEC.blends[b][3] >= 0:
            for k in tl.static_range(len(SPEC.blends[b][1])):
                totals = added(totals, SPEC.blends[b][3] + k, onto_blends[b][k])
    return totals


@triton.jit
def backward_chunk(
    dots,
    grad_logits,
    logits,
    externals,
    target,
    label,
    rows,
    inside,
    base,
    weights,
    labels,
    choices,
    maxima,
    logs,
    factors,
    onto_target,
    onto_one,
    stats,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradients of the logits in a chunk; returns the products for the weights."""
    pieces = chunk_rows(
        logits, externals, rows, base, weights, labels, choices, LIMIT, COUNT, SPEC, 1, TILE
    )
    targets = ()
    if SPEC.has_entropy and len(TILE.target_strides) == 2:
        start = target + rows * TILE.target_strides[0] + base * TILE.target_strides[1]
        targets = load_chunk(start, TILE.target_strides[1], LIMIT, TILE)
    # 32 bits are compared at half the cost of 64. That may take a label out of range for another,
    # but then all is NaN.
    column = (label - base).to(tl.int32)
    chunks = ()
    for p in tl.static_range(COUNT):
        scaled = scaled_rows(pieces[p], maxima, SPEC, 1, TILE)
        powers = exponentials(scaled, p, 0, SPEC, 1, TILE)
        grads = lane_constants(len(SPEC.learning), NOTHING, TILE)
        grads = edge_gradients(
            grads, pieces[p], scaled, powers, weights, logs, factors, stats, SPEC, TILE
        )
        grads = through_mixtures(grads, weights, SPEC)
        dots = weight_products(dots, grads, pieces[p], p, LIMIT, SPEC, TILE)
        branches = ()
        for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
            grad = grads[m]
            if SPEC.use_sums:
                grad += onto_one[m]
            if SPEC.has_entropy:
                if len(TILE.target_strides) == 2:
                    grad += onto_target[m] * computed(targets[p], TILE)
                else:
                    grad = tl.where(piece_columns(p, TILE) == column, grad + onto_target[m], grad)
            branches = branches + (grad,)
        chunks = chunks + (branches,)
    for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
        if TILE.needs[m]:
            out = ()
            for p in tl.static_range(COUNT):
                out = out + (chunks[p][m].to(grad_logits[m].dtype.element_ty),)
            store_chunk(grad_logits[m] + rows * TILE.num_classes + base, out, inside, LIMIT, TILE)
    return dots


@triton.jit
def before_columns(weights, gradient, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr):
    """What the gradients of a row have in common: its factors (as from ``row_factors``), those onto
    the target and onto 1 for every node, and the label logits of all nodes.
    """
    factors = row_factors(gradient, weights, term_weights, stats, SPEC, TILE)
    onto_target = through_mixtures(factors[1], weights, SPEC)
    onto_one = through_mixtures(factors[2], weights, SPEC)
    labels = ()
    if SPEC.use_labels:
        labels = linear_rows(stats[SPEC.layout[3] : SPEC.layout[4]], weights, SPEC)
    return factors, onto_target, onto_one, labels


@triton.jit
def backward_columns(
    grad_logits,
    logits,
    weights,
    externals,
    target,
    rows,
    inside,
    factors,
    onto_target,
    onto_one,
    labels,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradients of the logits in this program's columns; returns each lane's products
    for the weights.
    """
    maxima = stats[: SPEC.layout[1]]
    choices = stats[SPEC.layout[7] : SPEC.layout[8]]
    logs = ()
    if len(SPEC.normal):
        logs = log_sums(stats[SPEC.layout[1] : SPEC.layout[2]], TILE)
    label = rows
    if len(TILE.target_strides) == 1:
        label = tl.load(target + rows * TILE.target_strides[0])
    dots = lane_constants(SPEC.num_weights, 0.0, TILE)
    if TILE.splits > 1:
        first, end, tail = part_of_row(TILE)
        for chunk in range(first, end):
            dots = backward_chunk(
                dots,
                grad_logits,
                logits,
                externals,
                target,
                label,
                rows,
                inside,
                chunk * TILE.block,
                weights,
                labels,
                choices,
                maxima,
                logs,
                factors,
                onto_target,
                onto_one,
                stats,
                0,
                TILE.pieces,
                SPEC,
                TILE,
            )
        if TILE.rest:
            for chunk in range(tail, TILE.whole + 1):
                dots = backward_chunk(
                    dots,
                    grad_logits,
                    logits,
                    externals,
                    target,
                    label,
                    rows,
                    inside,
                    chunk * TILE.block,
                    weights,
                    labels,
                    choices,
                    maxima,
                    logs,
                    factors,
                    onto_target,
                    onto_one,
                    stats,
                    TILE.rest,
                    TILE.rest_pieces,
                    SPEC,
                    TILE,
                )
    else:
        if TILE.whole:
            for chunk in range(TILE.whole):
                dots = backward_chunk(
                    dots,
                    grad_logits,
                    logits,
                    externals,
                    target,
                    label,
                    rows,
                    inside,
                    chunk * TILE.block,
                    weights,
                    labels,
                    choices,
                    maxima,
                    logs,
                    factors,
                    onto_target,
                    onto_one,
                    stats,
                    0,
                    TILE.pieces,
                    SPEC,
                    TILE,
                )
        if TILE.rest:
            dots = backward_chunk(
                dots,
                grad_logits,
                logits,
                externals,
                target,
                label,
                rows,
                inside,
                TILE.whole * TILE.block,
                weights,
                labels,
                choices,
                maxima,
                logs,
                factors,
                onto_target,
                onto_one,
                stats,
                TILE.rest,
                TILE.rest_pieces,
                SPEC,
                TILE,
            )
    return dots


@triton.jit
def store_weight_gradients(
    grad_weights,
    dots,
    weights,
    rows,
    inside,
    factors,
    onto_target,
    onto_one,
    labels,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradients of a row's weights, from its products by lane or by part of the row."""
    totals = weight_gradients(
        row_sums(dots, TILE), weights, onto_target, onto_one, factors[6], labels, stats, SPEC
    )
    for s in tl.static_range(len(SPEC.widths)):
        if TILE.needs[SPEC.num_logits + s]:
            for k in tl.static_range(tl.constexpr(SPEC.widths[s])):
                at = grad_weights[s] + rows * SPEC.widths[s] + k
                store_rows(
                    at,
                    totals[SPEC.first_weight(s) + k].to(grad_weights[s].dtype.element_ty),
                    inside,
                    TILE,
                )


@triton.jit
def backward_row(
    grad_logits,
    grad_weights,
    logits,
    weights,
    externals,
    target,
    gradient,
    term_weights,
    rows,
    inside,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradients of a row's logits and weights. ``gradient`` [R, 1] is that of the row's
    loss, ``weights`` are the loaded weights, ``stats`` the tuple of statistics, ``inside`` [R, 1]
    is false for rows beyond the batch.
    """
    factors, onto_target, onto_one, labels = before_columns(
        weights, gradient, term_weights, stats, SPEC, TILE
    )
    dots = backward_columns(
        grad_logits,
        logits,
        weights,
        externals,
        target,
        rows,
        inside,
        factors,
        onto_target,
        onto_one,
        labels,
        stats,
        SPEC,
        TILE,
    )
    store_weight_gradients(
        grad_weights,
        dots,
        weights,
        rows,
        inside,
        factors,
        onto_target,
        onto_one,
        labels,
        stats,
        SPEC,
        TILE,
    )
