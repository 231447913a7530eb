"""Weights of rows: ignored labels, weights of samples and of classes, as in ``cross_entropy``."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.graph.plan import MINIMUM, SELECTION, Plan
from fastokd.ops.inputs import compute_dtype


class RowWeights(NamedTuple):
    """The target and the factors of the terms in each of N rows of logits [N, C].

    ``sums`` are the sums of the factors over the rows. A mean is over the rows that count:
    ``sum_n factors[n, t] * term[t, n] / sums[t]``, and 0 if none counts.
    """

    plan: Plan
    target: Tensor
    factors: Tensor
    """[N, T]: the sample's weight, for cross-entropies times that of the label's class."""
    sums: Tensor
    """[T]."""

    def term_weights(self, weights: Tensor, mean: bool) -> Tensor:
        """The term weights [N, T] from those of all rows [T]; for a mean such that the sum over the
        rows divided by N is the weighted mean.
        """
        if mean:
            weights = weights * (len(self.factors) / self._divisors())
        return self.factors * weights

    def term_means(self, terms: Tensor) -> Tensor:
        """The weighted mean [T] of each term [T, N]."""
        factors = self.factors.t()
        # An ignored row may have an infinite term.
        return (factors * torch.where(factors == 0, 0.0, terms)).sum(1) / self._divisors()

    def _divisors(self) -> Tensor:
        return torch.where(self.sums == 0, 1.0, self.sums)


def weigh_rows(
    plan: Plan,
    unsmoothed: Plan,
    first: Tensor,
    target: Tensor,
    ignored: Tensor | None,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
) -> RowWeights:
    """The weights of rows of logits like ``first`` [N, C], by PyTorch's ``cross_entropy``.

    Args:
        plan: the graph's.
        unsmoothed: without label smoothing, for a target that contains it and the class weights.
        target: labels [N], with a class for ignored rows, or class probabilities [N, C].
        ignored: bool [N], the rows that do not count; None for none.
        class_weight: [C], the factors of the classes in cross-entropies.
        sample_weight: [N], the factors of all terms of a row.
    """
    rows = first.new_ones(len(first), dtype=compute_dtype(first))
    if sample_weight is not None:
        rows = sample_weight.detach().to(rows.dtype)
    has_labels = not target.is_floating_point()
    if ignored is not None:
        rows = rows.masked_fill(ignored, 0.0)
    of_labels, sums = rows, rows.sum()
    sum_of_labels = sums
    if class_weight is not None:
        class_weight = class_weight.to(rows.dtype)
        if has_labels:
            label = target.clamp(0, len(class_weight) - 1)
            # A label out of range makes its row NaN, whatever the weight of the nearest class.
            of_labels = rows * class_weight[label].where(label == target, float("nan"))
            sum_of_labels = of_labels.sum()
        if not has_labels or plan.label_smoothing:
            of_labels = rows
            target = _weighted_target(plan, target, class_weight)
            plan = unsmoothed
    factors = torch.stack([of_labels if each else rows for each in plan.label_terms], 1)
    return RowWeights(
        plan,
        target,
        factors,
        torch.stack([sum_of_labels if each else sums for each in plan.label_terms]),
    )


def _weighted_target(plan: Plan, target: Tensor, class_weight: Tensor) -> Tensor:
    """The smoothed target times the weights of the classes, [N, C]; it need not add up to 1.

    Raises:
        ValueError: the graph has a node that needs probabilities.
    """
    if any(node.kind in (MINIMUM, SELECTION) for node in plan.nodes):
        raise ValueError(
            "class_weight: this graph compares rows by their cross-entropy, which supports neither"
            " class probabilities nor label smoothing with class weights; omit one of them"
        )
    if plan.needs_labels:
        raise ValueError(
            "class_weight: decoupled distillation needs labels, and label smoothing with class"
            " weights makes them probabilities; omit one of them"
        )
    num_classes, smoothing = len(class_weight), plan.label_smoothing
    if not target.is_floating_point():
        valid = (target >= 0) & (target < num_classes)
        one_hot = torch.nn.functional.one_hot(target.clamp(0, num_classes - 1), num_classes)
        target = one_hot.to(class_weight.dtype).where(valid.unsqueeze(1), float("nan"))
    target = target.to(class_weight.dtype)
    return class_weight * ((1 - smoothing) * target + smoothing / num_classes)
