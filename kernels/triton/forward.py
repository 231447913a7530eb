"""From logits to the loss of a row."""

# mypy: ignore-errors (Triton's language, not Python's)

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    LN2,
    MASKED_LOSS,
    NEGATIVE_ZERO,
    add_at,
    log2,
    row_constant,
    row_constants,
    set_at,
    to_compute,
    to_finite,
)
from fastokd.kernels.triton.normalized import normalized_pass
from fastokd.kernels.triton.passes import run_pass
from fastokd.kernels.triton.rows import FIRST_PASS, MAIN_PASS, linear_rows


@triton.jit
def log_sum(
    maxima, sums, F: tl.constexpr, SPEC: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr
):
    """log2 of the sum of exponentials of a softmax."""
    peak = maxima[SPEC.passes[PASS].softmaxes[F].scaled_node]
    return peak * SPEC.passes[PASS].softmaxes[F].ratio + log2(sums[F], TILE)


@triton.jit
def load_label_logits(logits, target, rows, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The label's logit in each row of logits [R, 1], and the mass of the target: 1, or NaN if the
    label is out of range.
    """
    label = tl.load(target + rows * TILE.target_strides[0])
    valid = (label >= 0) & (label < TILE.num_classes)
    one = row_constant(1.0, TILE)
    mass = tl.where(valid, one, float("nan"))
    out = ()
    for m in tl.static_range(tl.constexpr(SPEC.num_logits)):
        at = (
            logits[m]
            + rows * TILE.logit_strides[m][0]
            + tl.where(valid, label, 0) * TILE.logit_strides[m][1]
        )
        out = out + (to_finite(to_compute(tl.load(at), TILE)) * mass,)
    return out, mass


@triton.jit
def cross_entropy(
    maxima,
    sums,
    label_logits,
    mass,
    F: tl.constexpr,
    SPEC: tl.constexpr,
    PASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The cross-entropy of a node at temperature 1, without label smoothing."""
    scaled_node: tl.constexpr = SPEC.passes[PASS].softmaxes[F].scaled_node
    scale: tl.constexpr = SPEC.passes[PASS].scaled_nodes[scaled_node].scale
    # The difference first: both values can be large where it is small.
    gap = maxima[scaled_node] * mass - label_logits[SPEC.passes[PASS].softmaxes[F].node] * scale
    return (gap * SPEC.passes[PASS].softmaxes[F].ratio + log2(sums[F], TILE) * mass) * LN2


@triton.jit
def chosen_inputs(maxima, sums, label_logits, mass, SPEC: tl.constexpr, TILE: tl.constexpr):
    """For each selection the position of its input with the lowest cross-entropy, the first if
    equal, as a float.
    """
    losses = label_logits
    for f in tl.static_range(len(SPEC.first.softmaxes)):
        value = cross_entropy(maxima, sums, label_logits, mass, f, SPEC, FIRST_PASS, TILE)
        losses = set_at(losses, SPEC.first.softmaxes[f].node, value)
    out = ()
    for c in tl.static_range(len(SPEC.selections)):
        best = losses[SPEC.main.nodes[SPEC.selections[c]].inputs[0]]
        position = row_constant(0.0, TILE)
        for k in tl.static_range(1, len(SPEC.main.nodes[SPEC.selections[c]].inputs)):
            value = losses[SPEC.main.nodes[SPEC.selections[c]].inputs[k]]
            position = tl.where(value < best, k, position)
            best = tl.where(value < best, value, best)
        out = out + (position,)
    return out


@triton.jit
def before_main_pass(inputs, weights, rows, partials, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The quantities that are known before the main pass: the label logits of the rows of logits
    and of all nodes, the mass of the target, the chosen inputs. With a soft target and no first
    pass, the label logits are unknown so far.
    """
    logits, _externals, target = inputs
    label_logits = ()
    node_label_logits = ()
    chosen = ()
    mass = row_constant(1.0, TILE)
    if SPEC.use_label_logits and not TILE.soft_target:
        label_logits, mass = load_label_logits(logits, target, rows, SPEC, TILE)
        node_label_logits = linear_rows(label_logits, weights, SPEC)
    if SPEC.needs_first_pass(TILE.soft_target):
        num_plain: tl.constexpr = SPEC.num_logits + 1 if TILE.soft_target else 0
        maxima, sums, _means, plain = run_pass(
            inputs,
            (weights, (), ()),
            rows,
            partials,
            SPEC,
            FIRST_PASS,
            TILE.soft_target,
            num_plain,
            TILE,
        )
        if TILE.soft_target:
            label_logits = plain[: SPEC.num_logits]
            mass = plain[SPEC.num_logits]
            node_label_logits = linear_rows(label_logits, weights, SPEC)
        if len(SPEC.selections):
            chosen = chosen_inputs(maxima, sums, node_label_logits, mass, SPEC, TILE)
    return label_logits, node_label_logits, mass, chosen


@triton.jit
def smoothed_cross_entropy(
    maxima,
    sums,
    label_logits,
    node_sums,
    mass,
    C: tl.constexpr,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """The value of a cross-entropy term, with label smoothing."""
    softmax: tl.constexpr = SPEC.cross_entropies[C].softmax
    value = cross_entropy(maxima, sums, label_logits, mass, softmax, SPEC, MAIN_PASS, TILE)
    if SPEC.label_smoothing > 0:
        spread = log_sum(maxima, sums, softmax, SPEC, MAIN_PASS, TILE) * LN2
        spread -= node_sums[SPEC.cross_entropies[C].student] * (1.0 / TILE.num_classes)
        value = value * (1.0 - SPEC.label_smoothing) + spread * SPEC.label_smoothing
    return value


@triton.jit
def first_order_eps(
    maxima, sums, node_sums, E: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The first-order change of an edge's value by its eps."""
    level = (
        log_sum(maxima, sums, SPEC.edges[E].second_softmax, SPEC, MAIN_PASS, TILE)
        - log_sum(maxima, sums, SPEC.edges[E].first_softmax, SPEC, MAIN_PASS, TILE)
    ) * LN2
    gap = node_sums[SPEC.edges[E].first] - node_sums[SPEC.edges[E].second]
    gap = gap * (1.0 / SPEC.edges[E].temperature)
    return (gap + (level + 1.0) * TILE.num_classes) * SPEC.edges[E].eps


@triton.jit
def edge_values(terms, maxima, sums, means, node_sums, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The terms with the values of the edges between rows of logits."""
    for e in tl.static_range(len(SPEC.edges)):
        ratio = sums[SPEC.edges[e].second_softmax] / sums[SPEC.edges[e].first_softmax]
        value = (means[e] + log2(ratio, TILE)) * LN2
        if SPEC.edges[e].eps > 0:
            value += first_order_eps(maxima, sums, node_sums, e, SPEC, TILE)
        terms = add_at(terms, SPEC.edges[e].term, value * SPEC.edges[e].scale)
    return terms


@triton.jit
def external_values(
    terms, maxima, sums, means, masses, products, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """The terms with the values of the edges from external rows."""
    for e in tl.static_range(len(SPEC.external_edges)):
        if SPEC.external_edges[e].student_first:
            value = means[SPEC.external_edges[e].moment] - log2(
                sums[SPEC.external_edges[e].student_softmax], TILE
            )
        else:
            mass = (
                masses[SPEC.external_edges[e].teacher - SPEC.num_logits]
                + SPEC.external_edges[e].eps * TILE.num_classes
            )
            value = products[SPEC.external_edges[e].product] + mass * log_sum(
                maxima, sums, SPEC.external_edges[e].student_softmax, SPEC, MAIN_PASS, TILE
            )
        value = value * (LN2 * SPEC.external_edges[e].scale)
        terms = add_at(terms, SPEC.external_edges[e].term, value)
    return terms


@triton.jit
def log_odds(maxima, sums, label_logit, F: tl.constexpr, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The logit of the label's probability, from a node's label logit and non-target softmax."""
    scaled_node: tl.constexpr = SPEC.main.softmaxes[F].scaled_node
    gap = label_logit * SPEC.main.scaled_nodes[scaled_node].scale - maxima[scaled_node]
    return (gap * SPEC.main.softmaxes[F].ratio - log2(sums[F], TILE)) * LN2


@triton.jit
def softplus(x, TILE: tl.constexpr):
    """log(1 + exp(x))."""
    e = tl.exp2(-tl.abs(x) * (1.0 / LN2))
    total = 1.0 + e
    # The first term of its series replaces what 1 + e rounds away.
    return tl.maximum(x, 0.0) + log2(total, TILE) * LN2 + (e - (total - 1.0)) / total


@triton.jit
def target_values(terms, maxima, sums, label_logits, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The terms with the values of the target edges, and the slopes of ``SPEC.layout``."""
    slopes = ()
    for t in tl.static_range(len(SPEC.target_edges)):
        student = log_odds(
            maxima,
            sums,
            label_logits[SPEC.target_edges[t].student],
            SPEC.target_edges[t].student_softmax,
            SPEC,
            TILE,
        )
        teacher = log_odds(
            maxima,
            sums,
            label_logits[SPEC.target_edges[t].teacher],
            SPEC.target_edges[t].teacher_softmax,
            SPEC,
            TILE,
        )
        # Of two equal forms, the one whose terms are small where probabilities are near 0 or 1.
        sign = tl.where(teacher > 0, -1.0, 1.0)
        gap = (teacher - student) * sign
        lost = softplus(teacher * sign, TILE)
        likely = tl.exp2((teacher * sign - lost) * (1.0 / LN2))
        value = likely * gap - lost + softplus(student * sign, TILE)
        terms = add_at(terms, SPEC.target_edges[t].term, value * SPEC.target_edges[t].scale)
        rest = 1.0 - likely
        q = tl.exp2((student - softplus(student, TILE)) * (1.0 / LN2))
        p = tl.where(teacher > 0, rest, likely)
        slopes = slopes + (q - p, likely * rest * (teacher - student))
    return terms, slopes


@triton.jit
def normalized_values(terms, normalized, SPEC: tl.constexpr):
    """The terms with the values of the normalized edges."""
    for e in tl.static_range(len(SPEC.normalized_edges)):
        value = normalized[2 * e]
        if SPEC.normalized_edges[e].beta > 0:
            value += normalized[2 * e + 1]
        value = value * SPEC.normalized_edges[e].scale
        terms = add_at(terms, SPEC.normalized_edges[e].term, value)
    return terms


@triton.jit
def error_values(terms, plain, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The terms with the values of the errors."""
    for e in tl.static_range(len(SPEC.main.errors)):
        value = plain[SPEC.first_error + e] * (SPEC.main.errors[e].scale / TILE.num_classes)
        terms = add_at(terms, SPEC.main.errors[e].term, value)
    return terms


@triton.jit
def all_node_sums(plain, weights, SPEC: tl.constexpr):
    """The sums of all nodes over the classes, from the plain sums of the main pass."""
    node_sums = linear_rows(plain[: SPEC.num_logits], weights, SPEC)
    for n in tl.static_range(len(SPEC.main.summed_nodes)):
        node_sums = set_at(node_sums, SPEC.main.summed_nodes[n], plain[SPEC.num_logits + n])
    return node_sums


@triton.jit
def forward_row(
    inputs, weights, term_weights, rows, partials, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """Loss [R, 1], values of the terms, and statistics in the order of ``SPEC.layout``.

    ``weights`` are the loaded weights. ``partials`` is read only for split rows (``split``).
    """
    use_target: tl.constexpr = (
        TILE.soft_target and SPEC.use_label_logits and not SPEC.needs_first_pass(TILE.soft_target)
    )
    num_target: tl.constexpr = SPEC.num_logits + 1 if use_target else 0
    label_logits, node_label_logits, mass, chosen = before_main_pass(
        inputs, weights, rows, partials, SPEC, TILE
    )
    row_state = (weights, node_label_logits, chosen)
    num_plain: tl.constexpr = num_target + SPEC.num_plain
    maxima, sums, means, plain = run_pass(
        inputs, row_state, rows, partials, SPEC, MAIN_PASS, use_target, num_plain, TILE
    )
    if use_target:
        label_logits = plain[: SPEC.num_logits]
        mass = plain[SPEC.num_logits]
        node_label_logits = linear_rows(label_logits, weights, SPEC)
    plain = plain[num_target:]
    node_sums = ()
    if SPEC.use_row_sums:
        node_sums = all_node_sums(plain, weights, SPEC)
    masses = ()
    products = ()
    if len(SPEC.main.external_products):
        first: tl.constexpr = SPEC.first_external_sum
        masses = plain[first : first + SPEC.num_externals]
        products = plain[first + SPEC.num_externals :]

    terms = row_constants(SPEC.num_terms, NEGATIVE_ZERO, TILE)
    for c in tl.static_range(len(SPEC.cross_entropies)):
        value = smoothed_cross_entropy(
            maxima, sums, node_label_logits, node_sums, mass, c, SPEC, TILE
        )
        terms = add_at(terms, SPEC.cross_entropies[c].term, value)
    terms = edge_values(terms, maxima, sums, means, node_sums, SPEC, TILE)
    terms = external_values(terms, maxima, sums, means, masses, products, SPEC, TILE)
    normalized = ()
    if len(SPEC.normalized_edges):
        # A soft target gives the label logits only now.
        row_state = (weights, node_label_logits, chosen)
        normalized = normalized_pass(inputs, row_state, rows, maxima, sums, partials, SPEC, TILE)
        terms = normalized_values(terms, normalized, SPEC)
    terms, slopes = target_values(terms, maxima, sums, node_label_logits, SPEC, TILE)
    terms = error_values(terms, plain, SPEC, TILE)

    for t in tl.static_range(tl.constexpr(SPEC.num_terms)):
        value = tl.where(terms[t] > MASKED_LOSS, float("inf"), terms[t])
        terms = set_at(terms, t, value)
    loss = row_constant(NEGATIVE_ZERO, TILE)
    for t in tl.static_range(tl.constexpr(SPEC.num_terms)):
        weight = tl.load(term_weights + t)
        if TILE.weights_per_row:
            loss += tl.where(weight == 0, 0, terms[t] * weight)
        else:
            loss += terms[t] * weight
    stats = maxima + sums + means
    if SPEC.use_label_logits:
        stats = stats + label_logits
    stats = stats + plain[: SPEC.first_external_sum] + (mass,) + chosen + masses + normalized
    stats = stats + slopes
    return loss, terms, stats
