"""From logits and a row's statistics to gradients, in one pass over the columns.

Every probability is recomputed from its logit.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.coefs import before_columns, through_mixtures
from fastokd.kernels.triton.columns import (
    FLOOR,
    LN2,
    MASKED_LOSS,
    NEGATIVE_ZERO,
    add_at,
    first_column,
    lane_constants,
    log2,
    masked,
    negated,
    piece_columns,
    row_sums,
    store_chunk,
    store_rows,
    to_compute,
)
from fastokd.kernels.triton.normalized import (
    jensen_shannon,
    log_probability,
    log_sums,
    prob_mixtures,
    teacher_row,
)
from fastokd.kernels.triton.passes import part_of_row
from fastokd.kernels.triton.rows import (
    MAIN_PASS,
    exponentials,
    linear_rows,
    load_nodes,
    load_target,
    moment_value,
    power_of,
    scaled_rows,
)


@triton.jit
def added_edges(
    grads, softmax_coefs, edges, scaled, powers, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """Gradients and coefficients of softmaxes at one piece, with those of the edges added."""
    for e in tl.static_range(len(SPEC.edges)):
        first_coef, moment_coef = edges[e]
        if SPEC.edges[e].first_learns:
            value = moment_value(scaled, e, SPEC, MAIN_PASS)
            softmax_coefs = add_at(softmax_coefs, SPEC.edges[e].first_softmax, moment_coef * value)
        if SPEC.edges[e].second_learns:
            grads = add_at(
                grads, SPEC.edges[e].second, -(first_coef * powers[SPEC.edges[e].first_softmax])
            )
    return grads, softmax_coefs


@triton.jit
def added_external_edges(
    grads, softmax_coefs, external, rows, scaled, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """Gradients and coefficients of softmaxes at one piece, with those of the external edges
    added.
    """
    for e in tl.static_range(len(SPEC.external_edges)):
        teacher = rows[SPEC.external_edges[e].teacher]
        if SPEC.external_edges[e].student_first:
            gap = moment_value(scaled, SPEC.external_edges[e].moment, SPEC, MAIN_PASS) - log2(
                tl.maximum(teacher, FLOOR), TILE
            )
            softmax_coefs = add_at(
                softmax_coefs, SPEC.external_edges[e].student_softmax, external[e] * gap
            )
        else:
            with_eps = teacher
            if SPEC.external_edges[e].eps > 0:
                student = rows[SPEC.external_edges[e].student]
                exists = (teacher > FLOOR) | (student > -MASKED_LOSS)
                with_eps = tl.where(exists, teacher + SPEC.external_edges[e].eps, 0.0)
            grads = add_at(grads, SPEC.external_edges[e].student, -(external[e] * with_eps))
    return grads, softmax_coefs


@triton.jit
def added_errors(grads, errors, rows, SPEC: tl.constexpr):
    """Gradients at one piece, with those of the errors added."""
    for e in tl.static_range(len(SPEC.main.errors)):
        part = rows[SPEC.main.errors[e].student] - rows[SPEC.main.errors[e].teacher]
        if not SPEC.main.errors[e].squared:
            part = tl.where(part > 0, 1.0, tl.where(part < 0, -1.0, 0.0))
        part = errors[e] * part
        grads = add_at(grads, SPEC.main.errors[e].student, part)
        if SPEC.main.errors[e].teacher_learns:
            grads = add_at(grads, SPEC.main.errors[e].teacher, -part)
    return grads


@triton.jit
def added_softmaxes(grads, softmax_coefs, powers, SPEC: tl.constexpr):
    """Gradients at one piece, with the softmaxes' exponentials times their coefficients added."""
    # a e + b e^3 = e (a + b e^2): the coefficient of a power is added to that of its base.
    for f in tl.static_range(len(SPEC.main.softmaxes)):
        if SPEC.main.softmaxes[f].learns and SPEC.main.softmaxes[f].power > 1:
            base = powers[SPEC.main.softmaxes[f].base]
            lower = power_of(base, 0.0, SPEC.main.softmaxes[f].power - 1, 0.0)
            softmax_coefs = add_at(
                softmax_coefs, SPEC.main.softmaxes[f].base, softmax_coefs[f] * lower
            )
    for f in tl.static_range(len(SPEC.main.softmaxes)):
        if SPEC.main.softmaxes[f].learns and SPEC.main.softmaxes[f].base == f:
            grads = add_at(grads, SPEC.main.softmaxes[f].node, softmax_coefs[f] * powers[f])
    return grads


@triton.jit
def added_normalized_edge(
    grads,
    slopes,
    coef,
    rows,
    scaled,
    mixtures,
    logs,
    stats,
    E: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients at one piece, and ``slopes`` (the gradient for log h of each probability mixture
    h), with those of a normalized edge added.
    """
    mixture: tl.constexpr = SPEC.normalized_edges[E].prob_mixture
    temperature: tl.constexpr = SPEC.normalized_edges[E].temperature
    student_node: tl.constexpr = SPEC.normalized_edges[E].student
    at: tl.constexpr = SPEC.layout.normalized.start + 2 * E
    student = log_probability(scaled, logs, SPEC.normalized_edges[E].student_softmax, SPEC)
    probability, with_eps, logarithm = teacher_row(
        rows, scaled, mixtures, logs, student, E, SPEC, TILE
    )
    gap = (logarithm - student) * LN2
    if SPEC.normalized_edges[E].beta > 0:
        of_student, of_teacher = jensen_shannon(probability, logarithm, student, E, SPEC, TILE)
        grads = add_at(grads, student_node, coef * (of_student - tl.exp2(student) * stats[at]))
        if SPEC.normalized_edges[E].teacher_learns:
            if mixture >= 0:
                slopes = add_at(slopes, mixture, coef * of_teacher * temperature)
            else:
                part = coef * (of_teacher - probability * stats[at + 1])
                grads = add_at(grads, SPEC.normalized_edges[E].teacher, part)
    elif SPEC.normalized_edges[E].student_first:
        share = coef * tl.exp2(student)
        grads = add_at(grads, student_node, -(share * (gap + stats[at])))
        if SPEC.normalized_edges[E].teacher_learns:
            slopes = add_at(slopes, mixture, -(share * temperature))
    else:
        grads = add_at(grads, student_node, -(coef * with_eps))
        if SPEC.normalized_edges[E].teacher_learns:
            if mixture >= 0:
                slopes = add_at(slopes, mixture, coef * probability * (gap + 1.0) * temperature)
            else:
                part = coef * probability * (gap - stats[at + 1])
                grads = add_at(grads, SPEC.normalized_edges[E].teacher, part)
    return grads, slopes


@triton.jit
def added_mixture_inputs(grads, slope, mixture, weights, B: tl.constexpr, SPEC: tl.constexpr):
    """Gradients at one piece, with those of a probability mixture's inputs added."""
    _probability, _logarithm, input_slopes = mixture
    for k in tl.static_range(len(SPEC.prob_mixtures[B].inputs)):
        if SPEC.input_learns(B, k):
            part = slope * input_slopes[k] * (1.0 / SPEC.prob_mixtures[B].temperature)
            if SPEC.prob_mixtures[B].first_weight >= 0:
                part = part * weights[SPEC.prob_mixtures[B].first_weight + k]
            else:
                part = part * SPEC.prob_mixtures[B].constants[k]
            grads = add_at(grads, SPEC.prob_mixtures[B].inputs[k], part)
    return grads


@triton.jit
def node_gradients(
    grads, coefs, rows, scaled, powers, weights, logs, stats, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The gradients of all nodes at one piece, from the terms at each node and the probability
    mixtures that it enters.

    ``coefs`` are the first result of ``row_coefs``. ``logs``, log2 of the sums, are needed by
    normalized edges only.
    """
    softmax_coefs, edges, external, normalized, errors = coefs
    grads, softmax_coefs = added_edges(grads, softmax_coefs, edges, scaled, powers, SPEC, TILE)
    grads, softmax_coefs = added_external_edges(
        grads, softmax_coefs, external, rows, scaled, SPEC, TILE
    )
    grads = added_softmaxes(grads, softmax_coefs, powers, SPEC)
    grads = added_errors(grads, errors, rows, SPEC)
    if len(SPEC.normalized_edges):
        mixtures = prob_mixtures(rows, scaled, weights, logs, SPEC, TILE)
        slopes = lane_constants(len(SPEC.prob_mixtures), NEGATIVE_ZERO, TILE)
        for e in tl.static_range(len(SPEC.normalized_edges)):
            grads, slopes = added_normalized_edge(
                grads, slopes, normalized[e], rows, scaled, mixtures, logs, stats, e, SPEC, TILE
            )
        for b in tl.static_range(len(SPEC.prob_mixtures)):
            grads = added_mixture_inputs(grads, slopes[b], mixtures[b], weights, b, SPEC)
    return grads


@triton.jit
def added_weight_products(
    products,
    grads,
    rows,
    PIECE: tl.constexpr,
    LIMIT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient for every run-time weight of the mixtures of logits, after one more piece."""
    for j in tl.static_range(len(SPEC.mixtures)):
        if SPEC.mixtures[j].first_weight >= 0:
            for k in tl.static_range(len(SPEC.mixtures[j].inputs)):
                product = grads[SPEC.mixtures[j].node] * rows[SPEC.mixtures[j].inputs[k]]
                products = add_at(
                    products,
                    SPEC.mixtures[j].first_weight + k,
                    masked(product, 0.0, LIMIT, PIECE, TILE),
                )
    return products


@triton.jit
def weight_gradients(totals, weights, shared, label_logits, stats, SPEC: tl.constexpr):
    """The gradients for all run-time weights. ``totals`` are the products summed over the columns,
    to which the parts of the target, of constants and of probability mixtures are added.
    """
    _coefs, target_coefs, one_coefs, weight_grads = shared
    node_sums = ()
    if SPEC.use_row_sums:
        row_sums_of_logits = stats[SPEC.layout.row_sums.start : SPEC.layout.row_sums.stop]
        node_sums = linear_rows(row_sums_of_logits, weights, SPEC)
    for j in tl.static_range(len(SPEC.mixtures)):
        if SPEC.mixtures[j].first_weight >= 0:
            for k in tl.static_range(len(SPEC.mixtures[j].inputs)):
                if SPEC.use_target_coefs:
                    label_logit = label_logits[SPEC.mixtures[j].inputs[k]]
                    part = target_coefs[SPEC.mixtures[j].node] * label_logit
                    totals = add_at(totals, SPEC.mixtures[j].first_weight + k, part)
                if SPEC.use_row_sums:
                    node_sum = node_sums[SPEC.mixtures[j].inputs[k]]
                    part = one_coefs[SPEC.mixtures[j].node] * node_sum
                    totals = add_at(totals, SPEC.mixtures[j].first_weight + k, part)
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        if SPEC.prob_mixtures[b].first_weight >= 0:
            for k in tl.static_range(len(SPEC.prob_mixtures[b].inputs)):
                part = weight_grads[b][k]
                totals = add_at(totals, SPEC.prob_mixtures[b].first_weight + k, part)
    return totals


@triton.jit
def logit_gradient(
    grad,
    targets,
    column,
    shared,
    M: tl.constexpr,
    PIECE: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of a row of logits at one piece, with the parts of constants and the target."""
    _coefs, target_coefs, one_coefs, _weight_grads = shared
    if SPEC.use_row_sums:
        grad += one_coefs[M]
    if SPEC.use_target_coefs:
        if TILE.soft_target:
            grad += target_coefs[M] * to_compute(targets[PIECE], TILE)
        else:
            is_label = piece_columns(PIECE, TILE) == column
            grad = tl.where(is_label, grad + target_coefs[M], grad)
    return grad


@triton.jit
def backward_chunk(
    products,
    grad_logits,
    row,
    base,
    LIMIT: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the gradients of the logits in a chunk; return the products for the weights. ``row`` is
    as in ``backward_columns``.
    """
    inputs, row_state, label, rows, inside, logs, shared, stats = row
    weights, _label_logits, _chosen = row_state
    coefs, _target_coefs, _one_coefs, _weight_grads = shared
    offsets = negated(stats[: SPEC.layout.maxima.stop])
    pieces = load_nodes(inputs, row_state, rows, base, LIMIT, COUNT, SPEC, MAIN_PASS, TILE)
    targets = ()
    if len(SPEC.cross_entropies) and TILE.soft_target:
        targets = load_target(inputs, rows, base, LIMIT, TILE)
    # Comparing 32 bits costs half as much as 64. It can confuse a label out of range with another,
    # but then every result is NaN.
    column = (label - base).to(tl.int32)
    chunks = ()
    for p in tl.static_range(COUNT):
        scaled = scaled_rows(pieces[p], offsets, SPEC, MAIN_PASS, TILE)
        powers = exponentials(scaled, p, 0, SPEC, MAIN_PASS, TILE)
        grads = lane_constants(SPEC.num_nodes, NEGATIVE_ZERO, TILE)
        grads = node_gradients(
            grads, coefs, pieces[p], scaled, powers, weights, logs, stats, SPEC, TILE
        )
        grads = through_mixtures(grads, weights, SPEC)
        products = added_weight_products(products, grads, pieces[p], p, LIMIT, SPEC, TILE)
        branches = ()
        for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
            grad = logit_gradient(grads[m], targets, column, shared, m, p, SPEC, TILE)
            branches = branches + (grad,)
        chunks = chunks + (branches,)
    for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
        if TILE.needs[m]:
            out = ()
            for p in tl.static_range(COUNT):
                out = out + (chunks[p][m].to(grad_logits[m].dtype.element_ty),)
            store_chunk(grad_logits[m] + rows * TILE.num_classes + base, out, inside, LIMIT, TILE)
    return products


@triton.jit
def backward_columns(
    grad_logits,
    inputs,
    weights,
    rows,
    inside,
    shared,
    label_logits,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the gradients of the logits in this program's columns; return each lane's products for
    the weights. ``shared`` and ``label_logits`` as from ``before_columns``.
    """
    rest: tl.constexpr = TILE.rest
    rest_pieces: tl.constexpr = TILE.rest_pieces
    chosen = stats[SPEC.layout.chosen.start : SPEC.layout.chosen.stop]
    row_state = (weights, label_logits, chosen)
    logs = ()
    if len(SPEC.normalized_edges):
        logs = log_sums(stats[SPEC.layout.sums.start : SPEC.layout.sums.stop], TILE)
    label = rows
    if not TILE.soft_target:
        _logits, _externals, target = inputs
        label = tl.load(target + rows * TILE.target_strides[0])
    out = lane_constants(SPEC.num_weights, 0.0, TILE)
    row = (inputs, row_state, label, rows, inside, logs, shared, stats)
    if TILE.splits > 1:
        first, end, tail = part_of_row(TILE)
        for chunk in range(first, end):
            base = first_column(chunk, TILE)
            out = backward_chunk(out, grad_logits, row, base, 0, TILE.pieces, SPEC, TILE)
        if TILE.rest:
            for chunk in range(tail, TILE.whole + 1):
                base = first_column(chunk, TILE)
                out = backward_chunk(out, grad_logits, row, base, rest, rest_pieces, SPEC, TILE)
    else:
        if TILE.whole:
            for chunk in range(TILE.whole):
                base = first_column(chunk, TILE)
                out = backward_chunk(out, grad_logits, row, base, 0, TILE.pieces, SPEC, TILE)
        if TILE.rest:
            last: tl.constexpr = TILE.whole * TILE.block
            out = backward_chunk(out, grad_logits, row, last, rest, rest_pieces, SPEC, TILE)
    return out


@triton.jit
def store_weight_gradients(
    grad_weights,
    products,
    weights,
    rows,
    inside,
    shared,
    label_logits,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the gradients of a row's weights, from its products by lane or by part of the row."""
    totals = weight_gradients(row_sums(products, TILE), weights, shared, label_logits, stats, SPEC)
    for s in tl.static_range(len(SPEC.widths)):
        if TILE.needs[SPEC.num_logits + s]:
            for k in tl.static_range(tl.constexpr(SPEC.widths[s])):
                at = grad_weights[s] + rows * SPEC.widths[s] + k
                total = totals[SPEC.first_weight(s) + k]
                store_rows(at, total.to(grad_weights[s].dtype.element_ty), inside, TILE)


@triton.jit
def backward_row(
    grad_logits,
    grad_weights,
    inputs,
    weights,
    gradient,
    term_weights,
    rows,
    inside,
    stats,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the gradients of a row's logits and weights.

    ``gradient`` [R, 1] is that of the row's loss, ``weights`` are the loaded weights, ``stats`` the
    tuple of statistics, ``inside`` [R, 1] is false for rows beyond the batch.
    """
    shared, label_logits = before_columns(weights, gradient, term_weights, stats, SPEC, TILE)
    products = backward_columns(
        grad_logits, inputs, weights, rows, inside, shared, label_logits, stats, SPEC, TILE
    )
    store_weight_gradients(
        grad_weights, products, weights, rows, inside, shared, label_logits, stats, SPEC, TILE
    )
