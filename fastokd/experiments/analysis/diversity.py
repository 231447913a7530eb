"""Diversity of classifiers: formulas on tensors.

K classifiers look at N images of C classes. ``predictions`` [K, N] and ``labels`` [N] are int64,
``right`` [K, N] is bool; results are float64. A value that is not defined, such as a mean over no
images, is NaN.
"""

import torch
from torch import Tensor


def interrater_agreement(right: Tensor) -> float:
    """Interrater agreement of K classifiers: 1 if all are right on the same images, smaller for
    more diverse ones.

    ``s = 1 - [ (1/K) sum_x rho(x) (K - rho(x)) ] / [ N (K-1) p (1-p) ]``; rho(x) of the K
    classifiers are right on image x, and p is their mean accuracy (FFM + CD, ACCV 2020, eq. 9;
    Fleiss 1981). It is 0 for independent errors, and negative if they err on different images more
    often than by chance. NaN for fewer than two classifiers, and if all are always or never right.
    """
    num, count = right.shape
    rho = right.double().sum(0)
    mean = rho.sum() / (num * count)
    return float(1 - (rho * (num - rho)).sum() / num / (count * (num - 1) * mean * (1 - mean)))


def agreement(predictions: Tensor) -> Tensor:
    """[K, K]: the fraction of images for which two classifiers name the same class."""
    same = predictions[:, None] == predictions[None]
    return _fractions(same, torch.ones_like(same))


def error_overlap(right: Tensor) -> Tensor:
    """[K, K]: of the images that at least one of two classifiers gets wrong, the fraction that both
    get wrong: the Jaccard index of their errors. NaN if neither errs.
    """
    wrong = ~right
    return _fractions(wrong[:, None] & wrong[None], wrong[:, None] | wrong[None])


def same_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """[K, K]: of the images that two classifiers both get wrong, the fraction with the same wrong
    class. NaN if they are never both wrong.
    """
    wrong = predictions != labels
    both = wrong[:, None] & wrong[None]
    return _fractions(both & (predictions[:, None] == predictions[None]), both)


def q_statistic(right: Tensor) -> Tensor:
    """[K, K]: Yule's Q of being right, ``(a d - b c) / (a d + b c)``: 0 for independent errors, 1
    for common ones.

    a and d count the images that both get right and wrong, b and c those that only one gets right
    (Yule 1900; Kuncheva and Whitaker 2003, eq. 1). NaN if the denominator is 0.
    """
    right = right.double()
    wrong = 1 - right
    together = (right @ right.T) * (wrong @ wrong.T)
    apart = (right @ wrong.T) * (wrong @ right.T)
    return (together - apart) / (together + apart)


def any_right(right: Tensor) -> float:
    """The fraction of images that at least one classifier gets right: FFSD's "ensemble"."""
    return float(right.any(0).double().mean())


def pairwise_distances(rows: Tensor) -> Tensor:
    """[K, K, N]: the Euclidean distance between every two of K rows for each image, from float64
    [K, N, C].

    With logits this is the distance of AHBF (AAAI 2023, Fig. 5), with softmax outputs that of
    OKDDip, whose code adds 1e-6 to every difference.
    """
    per_image = rows.transpose(0, 1)
    # The other way of computing it loses digits where rows are alike.
    return torch.cdist(per_image, per_image, compute_mode="donot_use_mm_for_euclid_dist").movedim(
        0, 2
    )


def mean_over_pairs(matrix: Tensor) -> float:
    """The mean of a symmetric [K, K] over pairs of different classifiers; NaN if K < 2."""
    first, second = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return float(matrix[first, second].mean())


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [C, C]: the number of images of each class (lines) by prediction (columns)."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


def class_means(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C]: the mean of ``values`` [N] over the images of each class; NaN without images."""
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, values.double())
    return sums / torch.bincount(labels, minlength=num_classes)


def _fractions(chosen: Tensor, among: Tensor) -> Tensor:
    """The sum of bools over the last dimension as a fraction of the sum of others."""
    return chosen.sum(-1).double() / among.sum(-1)
