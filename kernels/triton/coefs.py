"""The parts of the gradient that all columns of a row share, [R, 1] each.

These are the coefficients of each softmax's exponentials, and for each node those of the target and
of 1 (a constant added to every column). The latter two pass through the mixtures as numbers instead
of rows.
"""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import LN2, NEGATIVE_ZERO, add_at, row_constant, row_constants
from fastokd.kernels.triton.rows import linear_rows


@triton.jit
def edge_coef(
    gradient, term_weights, TERM: tl.constexpr, SCALE: tl.constexpr, TEMPERATURE: tl.constexpr
):
    """The gradient of the loss for an edge's divergence, per unit of logit / temperature."""
    return gradient * tl.load(term_weights + TERM) * (SCALE / TEMPERATURE)


@triton.jit
def cross_entropy_coefs(
    node_coefs, gradient, term_weights, sums, mass, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """``node_coefs`` (of softmaxes, the target and 1) with those of the cross-entropies added."""
    softmax_coefs, target_coefs, one_coefs = node_coefs
    for c in tl.static_range(len(SPEC.cross_entropies)):
        coef = gradient * tl.load(term_weights + SPEC.cross_entropies[c].term)
        total = mass * (1.0 - SPEC.label_smoothing) + SPEC.label_smoothing
        softmax_coefs = add_at(
            softmax_coefs,
            SPEC.cross_entropies[c].softmax,
            coef * total / sums[SPEC.cross_entropies[c].softmax],
        )
        target_coefs = add_at(
            target_coefs, SPEC.cross_entropies[c].student, coef * (SPEC.label_smoothing - 1.0)
        )
        if SPEC.label_smoothing > 0:
            one_coefs = add_at(
                one_coefs,
                SPEC.cross_entropies[c].student,
                coef * (-SPEC.label_smoothing / TILE.num_classes),
            )
    return softmax_coefs, target_coefs, one_coefs


@triton.jit
def first_order_eps_coefs(
    softmax_coefs,
    one_coefs,
    coef,
    first_coef,
    sums,
    E: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The coefficients of softmaxes and of 1 with those of an edge's eps added."""
    eps: tl.constexpr = SPEC.edges[E].eps
    one_coefs = add_at(one_coefs, SPEC.edges[E].second, coef * -eps)
    softmax_coefs = add_at(
        softmax_coefs,
        SPEC.edges[E].second_softmax,
        coef * (eps * TILE.num_classes) / sums[SPEC.edges[E].second_softmax],
    )
    if SPEC.edges[E].first_learns:
        one_coefs = add_at(one_coefs, SPEC.edges[E].first, coef * eps)
        softmax_coefs = add_at(
            softmax_coefs, SPEC.edges[E].first_softmax, first_coef * (-eps * TILE.num_classes)
        )
    return softmax_coefs, one_coefs


@triton.jit
def edge_coefs(
    node_coefs, gradient, term_weights, sums, means, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """``node_coefs`` with those of the edges added, and for each edge the coefficients of the first
    softmax's exponentials and of the moment's values.
    """
    softmax_coefs, target_coefs, one_coefs = node_coefs
    coefs = ()
    for e in tl.static_range(len(SPEC.edges)):
        coef = edge_coef(
            gradient,
            term_weights,
            SPEC.edges[e].term,
            SPEC.edges[e].scale,
            SPEC.edges[e].temperature,
        )
        first_coef = coef / sums[SPEC.edges[e].first_softmax]
        moment_coef = first_coef * LN2
        if SPEC.edges[e].second_learns:
            softmax_coefs = add_at(
                softmax_coefs,
                SPEC.edges[e].second_softmax,
                coef / sums[SPEC.edges[e].second_softmax],
            )
        if SPEC.edges[e].first_learns:
            softmax_coefs = add_at(
                softmax_coefs, SPEC.edges[e].first_softmax, -(moment_coef * means[e])
            )
        if SPEC.edges[e].eps > 0:
            softmax_coefs, one_coefs = first_order_eps_coefs(
                softmax_coefs, one_coefs, coef, first_coef, sums, e, SPEC, TILE
            )
        coefs = coefs + ((first_coef, moment_coef),)
    return (softmax_coefs, target_coefs, one_coefs), coefs


@triton.jit
def external_coefs(
    softmax_coefs, gradient, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The coefficients of softmaxes with those of the external edges added, and one by edge."""
    sums = stats[SPEC.layout.sums.start : SPEC.layout.sums.stop]
    means = stats[SPEC.layout.means.start : SPEC.layout.means.stop]
    masses = stats[SPEC.layout.external_masses.start : SPEC.layout.external_masses.stop]
    coefs = ()
    for e in tl.static_range(len(SPEC.external_edges)):
        coef = edge_coef(
            gradient,
            term_weights,
            SPEC.external_edges[e].term,
            SPEC.external_edges[e].scale,
            SPEC.external_edges[e].temperature,
        )
        total = sums[SPEC.external_edges[e].student_softmax]
        if SPEC.external_edges[e].student_first:
            coef = coef * LN2 / total
            onto_softmax = -(coef * means[SPEC.external_edges[e].moment])
        else:
            mass = (
                masses[SPEC.external_edges[e].teacher - SPEC.num_logits]
                + SPEC.external_edges[e].eps * TILE.num_classes
            )
            onto_softmax = coef * mass / total
        softmax_coefs = add_at(softmax_coefs, SPEC.external_edges[e].student_softmax, onto_softmax)
        coefs = coefs + (coef,)
    return softmax_coefs, coefs


@triton.jit
def target_edge_coefs(
    node_coefs, gradient, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """``node_coefs`` with those of the target edges added."""
    softmax_coefs, target_coefs, one_coefs = node_coefs
    sums = stats[SPEC.layout.sums.start : SPEC.layout.sums.stop]
    for t in tl.static_range(len(SPEC.target_edges)):
        coef = edge_coef(
            gradient,
            term_weights,
            SPEC.target_edges[t].term,
            SPEC.target_edges[t].scale,
            SPEC.target_edges[t].temperature,
        )
        part = coef * stats[SPEC.layout.target_slopes.start + 2 * t]
        target_coefs = add_at(target_coefs, SPEC.target_edges[t].student, part)
        part = part / -sums[SPEC.target_edges[t].student_softmax]
        softmax_coefs = add_at(softmax_coefs, SPEC.target_edges[t].student_softmax, part)
        if SPEC.target_edges[t].teacher_learns:
            part = coef * stats[SPEC.layout.target_slopes.start + 2 * t + 1]
            target_coefs = add_at(target_coefs, SPEC.target_edges[t].teacher, part)
            part = part / -sums[SPEC.target_edges[t].teacher_softmax]
            softmax_coefs = add_at(softmax_coefs, SPEC.target_edges[t].teacher_softmax, part)
    return softmax_coefs, target_coefs, one_coefs


@triton.jit
def error_coefs(gradient, term_weights, SPEC: tl.constexpr, TILE: tl.constexpr):
    """For each error the factor of the difference, or of its sign, in the gradient."""
    coefs = ()
    for e in tl.static_range(len(SPEC.main.errors)):
        coef = gradient * tl.load(term_weights + SPEC.main.errors[e].term)
        coefs = coefs + (coef * (SPEC.main.errors[e].slope / TILE.num_classes),)
    return coefs


@triton.jit
def teacher_mass(stats, E: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The sum of a normalized edge's teacher row over the classes, with its eps."""
    eps: tl.constexpr = SPEC.normalized_edges[E].eps * TILE.num_classes
    if SPEC.normalized_edges[E].prob_mixture >= 0:
        return stats[SPEC.layout.prob_masses.start + SPEC.normalized_edges[E].prob_mixture] + eps
    else:
        return row_constant(1.0, TILE) + eps


@triton.jit
def added_weight_grads(grads, coef, stats, E: tl.constexpr, SPEC: tl.constexpr):
    """The gradients for the weights of a probability mixture with those of an edge added."""
    first: tl.constexpr = SPEC.layout.products.start + SPEC.normalized_edges[E].first_product
    for k in tl.static_range(len(grads)):
        grads = add_at(grads, k, coef * SPEC.normalized_edges[E].temperature * stats[first + k])
    return grads


@triton.jit
def normalized_coefs(
    softmax_coefs, gradient, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The coefficients of softmaxes with those of the normalized edges added, one by edge, and by
    probability mixture the gradients for its weights.
    """
    sums = stats[SPEC.layout.sums.start : SPEC.layout.sums.stop]
    coefs = ()
    weight_grads = ()
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        weight_grads = weight_grads + (
            row_constants(len(SPEC.prob_mixtures[b].inputs), NEGATIVE_ZERO, TILE),
        )
    for e in tl.static_range(len(SPEC.normalized_edges)):
        coef = edge_coef(
            gradient,
            term_weights,
            SPEC.normalized_edges[e].term,
            SPEC.normalized_edges[e].scale,
            SPEC.normalized_edges[e].temperature,
        )
        if SPEC.normalized_edges[e].beta == 0 and not SPEC.normalized_edges[e].student_first:
            softmax_coefs = add_at(
                softmax_coefs,
                SPEC.normalized_edges[e].student_softmax,
                coef
                * teacher_mass(stats, e, SPEC, TILE)
                / sums[SPEC.normalized_edges[e].student_softmax],
            )
        if SPEC.normalized_edges[e].prob_mixture >= 0 and SPEC.normalized_edges[e].teacher_learns:
            grads = weight_grads[SPEC.normalized_edges[e].prob_mixture]
            weight_grads = (
                weight_grads[: SPEC.normalized_edges[e].prob_mixture]
                + (added_weight_grads(grads, coef, stats, e, SPEC),)
                + weight_grads[SPEC.normalized_edges[e].prob_mixture + 1 :]
            )
        coefs = coefs + (coef,)
    return softmax_coefs, coefs, weight_grads


@triton.jit
def mixture_input_coefs(
    softmax_coefs,
    weight_grads,
    weights,
    sums,
    B: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The coefficients of softmaxes with those of a probability mixture's inputs added."""
    for k in tl.static_range(len(SPEC.prob_mixtures[B].inputs)):
        if SPEC.input_learns(B, k):
            coef = weight_grads[k] / (
                sums[SPEC.prob_mixtures[B].softmaxes[k]] * -SPEC.prob_mixtures[B].temperature
            )
            if SPEC.prob_mixtures[B].first_weight >= 0:
                coef = coef * weights[SPEC.prob_mixtures[B].first_weight + k]
            else:
                coef = coef * SPEC.prob_mixtures[B].constants[k]
            softmax_coefs = add_at(softmax_coefs, SPEC.prob_mixtures[B].softmaxes[k], coef)
    return softmax_coefs


@triton.jit
def row_coefs(gradient, weights, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The quantities [R, 1] that all columns of a row share.

    Returns the coefficients (of each softmax's exponentials, of edges, external edges, normalized
    edges, errors), of the target by node, of 1 by node, and for each probability mixture the
    gradients for its weights.
    """
    sums = stats[SPEC.layout.sums.start : SPEC.layout.sums.stop]
    means = stats[SPEC.layout.means.start : SPEC.layout.means.stop]
    mass = stats[SPEC.layout.mass.start]
    node_coefs = (
        row_constants(len(sums), NEGATIVE_ZERO, TILE),
        row_constants(SPEC.num_nodes, NEGATIVE_ZERO, TILE),
        row_constants(SPEC.num_nodes, NEGATIVE_ZERO, TILE),
    )
    node_coefs = cross_entropy_coefs(node_coefs, gradient, term_weights, sums, mass, SPEC, TILE)
    node_coefs, edges = edge_coefs(node_coefs, gradient, term_weights, sums, means, SPEC, TILE)
    node_coefs = target_edge_coefs(node_coefs, gradient, term_weights, stats, SPEC, TILE)
    errors = error_coefs(gradient, term_weights, SPEC, TILE)
    softmaxes, target, one = node_coefs
    softmaxes, external = external_coefs(softmaxes, gradient, term_weights, stats, SPEC, TILE)
    softmaxes, normalized, weight_grads = normalized_coefs(
        softmaxes, gradient, term_weights, stats, SPEC, TILE
    )
    for b in tl.static_range(len(SPEC.prob_mixtures)):
        softmaxes = mixture_input_coefs(softmaxes, weight_grads[b], weights, sums, b, SPEC, TILE)
    return (softmaxes, edges, external, normalized, errors), target, one, weight_grads


@triton.jit
def through_mixtures(values, weights, SPEC: tl.constexpr):
    """The gradients of all nodes, after every mixture, last first, has added its part to those of
    its inputs.
    """
    for j in tl.static_range(len(SPEC.mixtures)):
        for k in tl.static_range(len(SPEC.mixtures[j].inputs)):
            part = values[SPEC.mixtures[j].node]
            if SPEC.mixtures[j].first_weight >= 0:
                part = weights[SPEC.mixtures[j].first_weight + k] * part
            else:
                part = part * SPEC.mixtures[j].constants[k]
            values = add_at(values, SPEC.mixtures[j].inputs[k], part)
    return values


@triton.jit
def before_columns(weights, gradient, term_weights, stats, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The results of ``row_coefs``, with those of the target and of 1 passed through the mixtures;
    and the label logits of all nodes.
    """
    coefs, target_coefs, one_coefs, weight_grads = row_coefs(
        gradient, weights, term_weights, stats, SPEC, TILE
    )
    target_coefs = through_mixtures(target_coefs, weights, SPEC)
    one_coefs = through_mixtures(one_coefs, weights, SPEC)
    label_logits = ()
    if SPEC.use_label_logits:
        label_logits = stats[SPEC.layout.label_logits.start : SPEC.layout.label_logits.stop]
        label_logits = linear_rows(label_logits, weights, SPEC)
    return (coefs, target_coefs, one_coefs, weight_grads), label_logits
