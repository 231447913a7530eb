"""The measures of an analysis, in NumPy float64 with scikit-learn and SciPy, or counted image by
image.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import distance
from sklearn import metrics

Array = NDArray[np.generic]


def interrater_agreement(right: Array) -> float:
    """Fleiss' kappa of K raters who put every image into one of two categories, right or wrong:
    what eq. 9 of FFM + CD comes to.
    """
    num = right.shape[0]
    counts = np.stack([right.sum(0), (~right).sum(0)], 1).astype(np.float64)
    agreeing = ((counts * (counts - 1)).sum(1) / (num * (num - 1))).mean()
    by_chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return (agreeing - by_chance) / (1 - by_chance)


def agreement(one: Array, other: Array) -> float:
    return metrics.accuracy_score(one, other)


def error_overlap(one: Array, other: Array) -> float:
    return metrics.jaccard_score(~one, ~other)


def same_error(one: Array, other: Array, labels: Array) -> float:
    both = [a == b for a, b, label in zip(one, other, labels, strict=True) if label not in (a, b)]
    return sum(both) / len(both) if both else math.nan


def q_statistic(one: Array, other: Array) -> float:
    """From the odds ratio."""
    (neither, second), (first, both) = metrics.confusion_matrix(
        one, other, labels=[False, True]
    ).astype(float)
    if first * second == 0:
        return math.nan if both * neither == 0 else 1.0
    odds = both * neither / (first * second)
    return (odds - 1) / (odds + 1)


def distances(rows: Array) -> Array:
    """[K, K, N] from [K, N, C]."""
    return np.stack([distance.cdist(image, image) for image in rows.transpose(1, 0, 2)], 2)


def confusion(predictions: Array, labels: Array, num_classes: int) -> Array:
    return metrics.confusion_matrix(labels, predictions, labels=range(num_classes))


def calibration(
    confidences: Array, right: Array, bins: int
) -> tuple[Sequence[int], Sequence[float], Sequence[float], float]:
    """Images, accuracy and mean confidence of each bin (low, high], and the expected calibration
    error.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    for image, confidence in enumerate(confidences):
        members[max(math.ceil(confidence * bins) - 1, 0)].append(image)
    accuracy = [float(np.mean(right[chosen])) if chosen else math.nan for chosen in members]
    confidence = [float(np.mean(confidences[chosen])) if chosen else math.nan for chosen in members]
    error = sum(
        len(chosen) * abs(a - c)
        for chosen, a, c in zip(members, accuracy, confidence, strict=True)
        if chosen
    ) / len(right)
    return [len(chosen) for chosen in members], accuracy, confidence, error


def class_means(values: Array, labels: Array, num_classes: int) -> Array:
    return np.array(
        [
            values[labels == place].mean() if (labels == place).any() else math.nan
            for place in range(num_classes)
        ]
    )
