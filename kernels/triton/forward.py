"""From logits to the loss of a row: one pass over its columns, two where terms need normalised
probabilities.
"""

import triton
import triton.language as tl

from fastokd.kernels.triton.columns import (
    LN2,
    NOTHING,
    computed,
    linear_rows,
    log2,
    row_constant,
    row_constants,
)
from fastokd.kernels.triton.normal import normal_sweep
from fastokd.kernels.triton.sweep import sweep


@triton.jit
def log_sum(
    maxima, sums, SOFT: tl.constexpr, SPEC: tl.constexpr, WHICH: tl.constexpr, TILE: tl.constexpr
):
    """log2 of the sum of exponentials of a soft."""
    return maxima[SPEC.passes[WHICH].softmaxes[SOFT].scaled_node] * SPEC.passes[WHICH].softmaxes[
        SOFT
    ].ratio + log2(sums[SOFT], TILE)


@triton.jit
def label_logits(logits, target, rows, SPEC: tl.constexpr, TILE: tl.constexpr):
    """The label's logit of each logits row [R, 1] and the mass of the target: 1, or NaN for a label
    out of range.
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
        out = out + (computed(tl.load(at), TILE) * mass,)
    return out, mass


@triton.jit
def chosen_inputs(maxima, sums, labels, mass, SPEC: tl.constexpr, TILE: tl.constexpr):
    """For each selection the position of its input with the lowest cross-entropy, the first if
    equal, as a float.
    """
    losses = labels
    for s in tl.static_range(len(SPEC.first.scaled_nodes)):
        value = entropy(
            maxima, sums, labels, mass, s, SPEC.first.scaled_nodes[s].node, SPEC, 0, TILE
        )
        losses = (
            losses[: SPEC.first.scaled_nodes[s].node]
            + (value,)
            + losses[SPEC.first.scaled_nodes[s].node + 1 :]
        )
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
def entropy(
    maxima,
    sums,
    labels,
    mass,
    SOFT: tl.constexpr,
    NODE: tl.constexpr,
    SPEC: tl.constexpr,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The cross-entropy of a node at temperature 1, without label smoothing."""
    slot: tl.constexpr = SPEC.passes[WHICH].softmaxes[SOFT].scaled_node
    # The difference first: both are large where the logits are, and it is not.
    gap = maxima[slot] * mass - labels[NODE] * SPEC.passes[WHICH].scaled_nodes[slot].scale
    return (gap * SPEC.passes[WHICH].softmaxes[SOFT].ratio + log2(sums[SOFT], TILE) * mass) * LN2


@triton.jit
def placed(terms, INDEX: tl.constexpr, value):
    """The tuple with one entry replaced."""
    return terms[:INDEX] + (value,) + terms[INDEX + 1 :]


@triton.jit
def before_main(
    logits, externals, target, rows, weights, partials, SPEC: tl.constexpr, TILE: tl.constexpr
):
    """What is known before the main pass: the label logits of the logits rows and of all nodes, the
    mass of the target, choices. Label logits are unknown yet where the target is soft and no pass
    ahead was needed.
    """
    labels = ()
    node_labels = ()
    choices = ()
    mass = row_constant(1.0, TILE)
    if SPEC.use_label_logits and not TILE.soft_target:
        labels, mass = label_logits(logits, target, rows, SPEC, TILE)
        node_labels = linear_rows(labels, weights, SPEC)
    if SPEC.needs_first_pass(TILE.soft_target):
        maxima0, sums0, _none, dots0 = sweep(
            logits,
            externals,
            target,
            rows,
            weights,
            (),
            (),
            partials,
            SPEC,
            0,
            TILE.soft_target,
            SPEC.num_logits + 1 if TILE.soft_target else 0,
            TILE,
        )
        if TILE.soft_target:
            labels = dots0[: SPEC.num_logits]
            mass = dots0[SPEC.num_logits]
            node_labels = linear_rows(labels, weights, SPEC)
        if len(SPEC.selections):
            choices = chosen_inputs(maxima0, sums0, node_labels, mass, SPEC, TILE)
    return labels, node_labels, mass, choices


@triton.jit
def forward_row(
    logits,
    weights,
    externals,
    target,
    term_weights,
    rows,
    partials,
    SPEC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Loss [R, 1], values of the terms, and the statistics that the gradient needs, in the order of
    ``SPEC.layout``.

    ``weights`` are the loaded weights, ``partials`` is read where rows are split (``split``).
    """
    dots: tl.constexpr = (
        TILE.soft_target and SPEC.use_label_logits and not SPEC.needs_first_pass(TILE.soft_target)
    )
    skip: tl.constexpr = SPEC.num_logits + 1 if dots else 0

    labels, node_labels, mass, choices = before_main(
        logits, externals, target, rows, weights, partials, SPEC, TILE
    )
    maxima, sums, means, plain = sweep(
        logits,
        externals,
        target,
        rows,
        weights,
        node_labels,
        choices,
        partials,
        SPEC,
        1,
        dots,
        skip + SPEC.num_plain,
        TILE,
    )
    if dots:
        labels = plain[: SPEC.num_logits]
        mass = plain[SPEC.num_logits]
        node_labels = linear_rows(labels, weights, SPEC)
    plain = plain[skip:]
    node_sums = ()
    if SPEC.use_row_sums:
        node_sums = linear_rows(plain[: SPEC.num_logits], weights, SPEC)
        for n in tl.static_range(len(SPEC.main.summed_nodes)):
            node_sums = placed(node_sums, SPEC.main.summed_nodes[n], plain[SPEC.num_logits + n])

    terms = row_constants(SPEC.num_terms, 0.0, TILE)
    for c in tl.static_range(len(SPEC.cross_entropies)):
        value = entropy(
            maxima,
            sums,
            node_labels,
            mass,
            SPEC.cross_entropies[c].softmax,
            SPEC.cross_entropies[c].student,
            SPEC,
            1,
            TILE,
        )
        if SPEC.label_smoothing > 0:
            spread = log_sum(maxima, sums, SPEC.cross_entropies[c].softmax, SPEC, 1, TILE) * LN2
            spread -= node_sums[SPEC.cross_entropies[c].student] * (1.0 / TILE.num_classes)
            value = value * (1.0 - SPEC.label_smoothing) + spread * SPEC.label_smoothing
        terms = placed(terms, SPEC.cross_entropies[c].term, value)
    for e in tl.static_range(len(SPEC.edges)):
        value = (
            means[e]
            + log2(sums[SPEC.edges[e].second_softmax] / sums[SPEC.edges[e].first_softmax], TILE)
        ) * LN2
        if SPEC.edges[e].eps > 0:
            level = (
                log_sum(maxima, sums, SPEC.edges[e].second_softmax, SPEC, 1, TILE)
                - log_sum(maxima, sums, SPEC.edges[e].first_softmax, SPEC, 1, TILE)
            ) * LN2
            gap = (node_sums[SPEC.edges[e].first] - node_sums[SPEC.edges[e].second]) * (
                1.0 / SPEC.edges[e].temperature
            )
            value += (gap + (level + 1.0) * TILE.num_classes) * SPEC.edges[e].eps
        terms = placed(terms, SPEC.edges[e].term, value * SPEC.edges[e].scale)
    outer_masses = ()
    outer_crosses = ()
    if len(SPEC.main.external_products):
        outer_masses = plain[SPEC.first_external_sum : SPEC.first_external_sum + SPEC.num_externals]
        outer_crosses = plain[SPEC.first_external_sum + SPEC.num_externals :]
    for o in tl.static_range(len(SPEC.external_edges)):
        if SPEC.external_edges[o].student_first:
            value = means[SPEC.external_edges[o].moment] - log2(
                sums[SPEC.external_edges[o].student_softmax], TILE
            )
        else:
            heavy = (
                outer_masses[SPEC.external_edges[o].teacher - SPEC.num_logits]
                + SPEC.external_edges[o].eps * TILE.num_classes
            )
            value = outer_crosses[SPEC.external_edges[o].product] + heavy * log_sum(
                maxima, sums, SPEC.external_edges[o].student_softmax, SPEC, 1, TILE
            )
        terms = placed(
            terms, SPEC.external_edges[o].term, value * (LN2 * SPEC.external_edges[o].scale)
        )
    normal = ()
    if len(SPEC.normalized_edges):
        normal = normal_sweep(
            logits,
            externals,
            rows,
            weights,
            node_labels,
            choices,
            maxima,
            sums,
            partials,
            SPEC,
            TILE,
        )
        for e in tl.static_range(len(SPEC.normalized_edges)):
            terms = placed(
                terms, SPEC.normalized_edges[e].term, normal[2 * e] * SPEC.normalized_edges[e].scale
            )

    loss = row_constant(NOTHING, TILE)
    for t in tl.static_range(tl.constexpr(SPEC.num_terms)):
        loss += terms[t] * tl.load(term_weights + t)
    stats = maxima + sums + means
    if SPEC.use_label_logits:
        stats = stats + labels
    stats = stats + plain[: SPEC.first_external_sum] + (mass,) + choices + outer_masses + normal
    return loss, terms, stats
