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
    sums = stats[SPEC.layout.sums.start : SPEC.layout.sums.stop]
    means = stats[SPEC.layout.means.start : SPEC.layout.means.stop]
    mass = stats[SPEC.layout.mass.start]
    pulls = row_constants(len(sums), NOTHING, TILE)
    onto_target = row_constants(SPEC.num_nodes, NOTHING, TILE)
    onto_one = row_constants(SPEC.num_nodes, NOTHING, TILE)
    for c in tl.static_range(len(SPEC.cross_entropies)):
        factor = gradient * tl.load(term_weights + SPEC.cross_entropies[c].term)
        total = mass * (1.0 - SPEC.label_smoothing) + SPEC.label_smoothing
        pulls = added(
            pulls,
            SPEC.cross_entropies[c].softmax,
            factor * total / sums[SPEC.cross_entropies[c].softmax],
        )
        onto_target = added(
            onto_target, SPEC.cross_entropies[c].student, factor * (SPEC.label_smoothing - 1.0)
        )
        if SPEC.label_smoothing > 0:
            onto_one = added(
                onto_one,
                SPEC.cross_entropies[c].student,
                factor * (-SPEC.label_smoothing / TILE.num_classes),
            )
    edges = ()
    for e in tl.static_range(len(SPEC.edges)):
        factor = (
            gradient
            * tl.load(term_weights + SPEC.edges[e].term)
            * (SPEC.edges[e].scale / SPEC.edges[e].temperature)
        )
        onto_other = factor / sums[SPEC.edges[e].first_softmax]
        onto_gap = onto_other * LN2
        if SPEC.edges[e].second_learns:
            pulls = added(
                pulls, SPEC.edges[e].second_softmax, factor / sums[SPEC.edges[e].second_softmax]
            )
        if SPEC.edges[e].first_learns:
            pulls = added(pulls, SPEC.edges[e].first_softmax, -(onto_gap * means[e]))
        if SPEC.edges[e].eps > 0:
            onto_one = added(onto_one, SPEC.edges[e].second, factor * -SPEC.edges[e].eps)
            pulls = added(
                pulls,
                SPEC.edges[e].second_softmax,
                factor
                * (SPEC.edges[e].eps * TILE.num_classes)
                / sums[SPEC.edges[e].second_softmax],
            )
            if SPEC.edges[e].first_learns:
                onto_one = added(onto_one, SPEC.edges[e].first, factor * SPEC.edges[e].eps)
                pulls = added(
                    pulls,
                    SPEC.edges[e].first_softmax,
                    onto_other * (-SPEC.edges[e].eps * TILE.num_classes),
                )
        edges = edges + ((onto_other, onto_gap),)
    outer = ()
    for o in tl.static_range(len(SPEC.external_edges)):
        factor = (
            gradient
            * tl.load(term_weights + SPEC.external_edges[o].term)
            * (SPEC.external_edges[o].scale / SPEC.external_edges[o].temperature)
        )
        if SPEC.external_edges[o].student_first:
            factor = factor * LN2 / sums[SPEC.external_edges[o].student_softmax]
            pulls = added(
                pulls,
                SPEC.external_edges[o].student_softmax,
                -(factor * means[SPEC.external_edges[o].moment]),
            )
        else:
            heavy = (
                stats[
                    SPEC.layout.external_masses.start
                    + SPEC.external_edges[o].teacher
                    - SPEC.num_logits
                ]
                + SPEC.external_edges[o].eps * TILE.num_classes
            )
            pulls = added(
                pulls,
                SPEC.external_edges[o].student_softmax,
                factor * heavy / sums[SPEC.external_edges[o].student_softmax],
            )
        outer = outer + (factor,)
    normal = ()
    onto_blends = ()
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        onto_blends = onto_blends + (
            row_constants(len(SPEC.prob_mixtures[b].inputs), NOTHING, TILE),
        )
    for e in tl.static_range(len(SPEC.normalized_edges)):
        factor = (
            gradient
            * tl.load(term_weights + SPEC.normalized_edges[e].term)
            * (SPEC.normalized_edges[e].scale / SPEC.normalized_edges[e].temperature)
        )
        if not SPEC.normalized_edges[e].student_first:
            if SPEC.normalized_edges[e].prob_mixture >= 0:
                heavy = (
                    stats[SPEC.layout.prob_masses.start + SPEC.normalized_edges[e].prob_mixture]
                    + SPEC.normalized_edges[e].eps * TILE.num_classes
                )
            else:
                heavy = row_constant(1.0, TILE) + SPEC.normalized_edges[e].eps * TILE.num_classes
            pulls = added(
                pulls,
                SPEC.normalized_edges[e].student_softmax,
                factor * heavy / sums[SPEC.normalized_edges[e].student_softmax],
            )
        if SPEC.normalized_edges[e].prob_mixture >= 0 and SPEC.normalized_edges[e].teacher_learns:
            inputs = onto_blends[SPEC.normalized_edges[e].prob_mixture]
            for k in tl.static_range(len(inputs)):
                product = stats[
                    SPEC.layout.products.start + SPEC.normalized_edges[e].first_product + k
                ]
                inputs = added(inputs, k, factor * SPEC.normalized_edges[e].temperature * product)
            onto_blends = (
                onto_blends[: SPEC.normalized_edges[e].prob_mixture]
                + (inputs,)
                + onto_blends[SPEC.normalized_edges[e].prob_mixture + 1 :]
            )
        normal = normal + (factor,)
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        for k in tl.static_range(len(SPEC.prob_mixtures[b].inputs)):
            if (
                SPEC.prob_mixtures[b].softmaxes[k] >= 0
                and SPEC.main.softmaxes[SPEC.prob_mixtures[b].softmaxes[k]].learns
            ):
                pull = onto_blends[b][k] / (
                    sums[SPEC.prob_mixtures[b].softmaxes[k]] * -SPEC.prob_mixtures[b].temperature
                )
                if SPEC.prob_mixtures[b].first_weight >= 0:
                    pull = pull * weights[SPEC.prob_mixtures[b].first_weight + k]
                else:
                    pull = pull * SPEC.prob_mixtures[b].constants[k]
                pulls = added(pulls, SPEC.prob_mixtures[b].softmaxes[k], pull)
    return pulls, onto_target, onto_one, edges, outer, normal, onto_blends


@triton.jit
def through_mixtures(values, weights, SPEC: tl.constexpr):
    """Gradients of all nodes after every mixture, last first, has passed its own on to its
    inputs.
    """
    for j in tl.static_range(len(SPEC.mixtures)):
        for k in tl.static_range(len(SPEC.mixtures[j].inputs)):
            if SPEC.mixtures[j].first_weight >= 0:
                part = weights[SPEC.mixtures[j].first_weight + k] * values[SPEC.mixtures[j].node]
            else:
                part = values[SPEC.mixtures[j].node] * SPEC.mixtures[j].constants[k]
            values = added(values, SPEC.mixtures[j].inputs[k], part)
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
        if SPEC.edges[e].first_learns:
            pulls = added(
                pulls, SPEC.edges[e].first_softmax, edges[e][1] * moment_value(scaled, e, SPEC, 1)
            )
        if SPEC.edges[e].second_learns:
            grads = added(
                grads, SPEC.edges[e].second, -(edges[e][0] * powers[SPEC.edges[e].first_softmax])
            )
    for o in tl.static_range(len(SPEC.external_edges)):
        outside = rows[SPEC.external_edges[o].teacher]
        if SPEC.external_edges[o].student_first:
            gap = moment_value(scaled, SPEC.external_edges[o].moment, SPEC, 1) - log2(
                tl.maximum(outside, FLOOR), TILE
            )
            pulls = added(pulls, SPEC.external_edges[o].student_softmax, outer[o] * gap)
        else:
            grads = added(
                grads,
                SPEC.external_edges[o].student,
                -(outer[o] * (outside + SPEC.external_edges[o].eps)),
            )
    # a e + b e^3 = e (a + b e^2): what a power pulls is added to what its base pulls.
    for f in tl.static_range(len(SPEC.main.softmaxes)):
        if SPEC.main.softmaxes[f].learns and SPEC.main.softmaxes[f].power > 1:
            lower = powered(
                powers[SPEC.main.softmaxes[f].base], 0.0, SPEC.main.softmaxes[f].power - 1, 0.0
            )
            pulls = added(pulls, SPEC.main.softmaxes[f].base, pulls[f] * lower)
    for f in tl.static_range(len(SPEC.main.softmaxes)):
        if SPEC.main.softmaxes[f].learns and SPEC.main.softmaxes[f].base == f:
            grads = added(grads, SPEC.main.softmaxes[f].node, pulls[f] * powers[f])
    if len(SPEC.normalized_edges):
        blends = blend_rows(rows, scaled, weights, logs, SPEC, TILE)
        onto = lane_constants(len(SPEC.prob_mixtures), NOTHING, TILE)
        for e in tl.static_range(len(SPEC.normalized_edges)):
            probability, weight, logarithm = teacher_row(scaled, blends, logs, e, SPEC, TILE)
            student = log_probability(scaled, logs, SPEC.normalized_edges[e].student_softmax, SPEC)
            gap = (logarithm - student) * LN2
            if SPEC.normalized_edges[e].student_first:
                share = normal[e] * tl.exp2(student)
                grads = added(
                    grads,
                    SPEC.normalized_edges[e].student,
                    -(share * (gap + stats[SPEC.layout.normalized.start + 2 * e])),
                )
                if SPEC.normalized_edges[e].teacher_learns:
                    onto = added(
                        onto,
                        SPEC.normalized_edges[e].prob_mixture,
                        -(share * SPEC.normalized_edges[e].temperature),
                    )
            else:
                grads = added(grads, SPEC.normalized_edges[e].student, -(normal[e] * weight))
                if SPEC.normalized_edges[e].teacher_learns:
                    if SPEC.normalized_edges[e].prob_mixture >= 0:
                        onto = added(
                            onto,
                            SPEC.normalized_edges[e].prob_mixture,
                            normal[e]
                            * probability
                            * (gap + 1.0)
                            * SPEC.normalized_edges[e].temperature,
                        )
                    else:
                        pull = (
                            normal[e]
                            * probability
                            * (gap - stats[SPEC.layout.normalized.start + 2 * e + 1])
                        )
                        grads = added(grads, SPEC.normalized_edges[e].teacher, pull)
        for b in tl.static_range(len(SPEC.prob_mixtures)):
            for k in tl.static_range(len(SPEC.prob_mixtures[b].inputs)):
                if (
                    SPEC.prob_mixtures[b].softmaxes[k] >= 0
                    and SPEC.main.softmaxes[SPEC.prob_mixtures[b].softmaxes[k]].learns
                ):
                    slope = onto[b] * blends[b][2][k] * (1.0 / SPEC.prob_mixtures[b].temperature)
                    if SPEC.prob_mixtures[b].first_weight >= 0:
                        slope = slope * weights[SPEC.prob_mixtures[b].first_weight + k]
                    else:
                        slope = slope * SPEC.prob_mixtures[b].constants[k]
                    grads = added(grads, SPEC.prob_mixtures[b].inputs[k], slope)
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
        if SPEC.mixtures[j].first_weight >= 0:
            for k in tl.static_range(len(SPEC.mixtures[j].inputs)):
                product = grads[SPEC.mixtures[j].node] * rows[SPEC.mixtures[j].inputs[k]]
                dots = added(
                    dots,
                    SPEC.mixtures[j].first_weight + k,
                    masked(product, 0.0, LIMIT, PIECE, TILE),
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
    if SPEC.use_row_sums:
        node_sums = linear_rows(
            stats[SPEC.layout.row_sums.start : SPEC.layout.row_sums.stop], weights, SPEC
        )
    for j in tl.static_range(len(SPEC.mixtures)):
        if SPEC.mixtures[j].first_weight >= 0:
            for k in tl.static_range(len(SPEC.mixtures[j].inputs)):
                if len(SPEC.cross_entropies):
                    part = onto_target[SPEC.mixtures[j].node] * labels[SPEC.mixtures[j].inputs[k]]
                    totals = added(totals, SPEC.mixtures[j].first_weight + k, part)
                if SPEC.use_row_sums:
                    part = onto_one[SPEC.mixtures[j].node] * node_sums[SPEC.mixtures[j].inputs[k]]
                    totals = added(totals, SPEC.mixtures[j].first_weight + k, part)
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        if SPEC.prob_mixtures[b].first_weight >= 0:
            for k in tl.static_range(len(SPEC.prob_mixtures[b].inputs)):
                totals = added(totals, SPEC.prob_mixtures[b].first_weight + k, onto_blends[b][k])
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
    if len(SPEC.cross_entropies) and len(TILE.target_strides) == 2:
        start = target + rows * TILE.target_strides[0] + base * TILE.target_strides[1]
        targets = load_chunk(start, TILE.target_strides[1], LIMIT, TILE)
    # 32 bits are compared at half the cost of 64. That may take a label out of range for another,
    # but then all is NaN.
    column = (label - base).to(tl.int32)
    chunks = ()
    for p in tl.static_range(COUNT):
        scaled = scaled_rows(pieces[p], maxima, SPEC, 1, TILE)
        powers = exponentials(scaled, p, 0, SPEC, 1, TILE)
        grads = lane_constants(SPEC.num_nodes, NOTHING, TILE)
        grads = edge_gradients(
            grads, pieces[p], scaled, powers, weights, logs, factors, stats, SPEC, TILE
        )
        grads = through_mixtures(grads, weights, SPEC)
        dots = weight_products(dots, grads, pieces[p], p, LIMIT, SPEC, TILE)
        branches = ()
        for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
            grad = grads[m]
            if SPEC.use_row_sums:
                grad += onto_one[m]
            if len(SPEC.cross_entropies):
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
    if SPEC.use_label_logits:
        labels = linear_rows(
            stats[SPEC.layout.label_logits.start : SPEC.layout.label_logits.stop], weights, SPEC
        )
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
    maxima = stats[: SPEC.layout.maxima.stop]
    choices = stats[SPEC.layout.chosen.start : SPEC.layout.chosen.stop]
    logs = ()
    if len(SPEC.normalized_edges):
        logs = log_sums(stats[SPEC.layout.sums.start : SPEC.layout.sums.stop], TILE)
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
