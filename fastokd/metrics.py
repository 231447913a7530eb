"""Metrics of a row of logits: accuracy, top-5 accuracy, negative log-likelihood and calibration."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ECE_BINS = 15
"""Bins of the calibration error, of equal width (Guo et al. use 15)."""


class Metric(NamedTuple):
    """The heading of a metric in tables, the factor of its numbers and their decimal places."""

    heading: str
    scale: float
    digits: int

    def text(self, value: float | None) -> str:
        """The number in a table; empty if it was not measured."""
        return "" if value is None else f"{self.scale * value:.{self.digits}f}"

    def words(self, value: float) -> str:
        """The number in a sentence: "ECE 1.50 %"."""
        name, _, unit = self.heading.partition(" ")
        return f"{name} {self.text(value)} {unit}".rstrip()


METRICS = {
    "top5": Metric("top-5 %", 100, 2),
    "nll": Metric("NLL", 1, 4),
    "ece": Metric("ECE %", 100, 2),
}
"""The metrics of ``metrics_of`` in addition to the accuracy."""


class Calibration(NamedTuple):
    """The images of a classifier by its confidence, in bins (low, high] of equal width over [0, 1];
    each [bins].
    """

    images: Tensor
    """Their number."""
    accuracy: Tensor
    """Of the bin's images; NaN in an empty bin."""
    confidence: Tensor
    """The mean over the bin's images; NaN in an empty bin."""

    @property
    def error(self) -> float:
        """The expected calibration error, ``sum_b n_b / N |accuracy_b - confidence_b|`` (Guo et
        al., ICML 2017, eq. 3); NaN if a confidence is.
        """
        gaps = self.images * (self.accuracy - self.confidence).abs()
        return float(gaps[self.images > 0].sum() / self.images.sum())


def calibration(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> Calibration:
    """The accuracy at each confidence, from the largest softmax probability of each image, float64
    [N], and ``right``, bool [N].
    """
    return _calibration(_bin_sums(confidences, right, bins))


def _bin_sums(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> Tensor:
    """float64 [3, bins]: the images of each bin, the right ones, and the sum of confidences."""
    device = confidences.device
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=device)[1:-1]
    places = torch.bucketize(confidences, inner)
    # Sums instead of index_add_, which adds in any order on a GPU.
    members = places[:, None] == torch.arange(bins, device=device)
    hits = members & right[:, None]
    totals = torch.where(members, confidences[:, None], 0.0)
    return torch.stack([each.sum(0, dtype=torch.float64) for each in (members, hits, totals)])


def _calibration(sums: Tensor) -> Calibration:
    images, right, confidence = sums
    return Calibration(images, right / images, confidence / images)


def in_top5(logits: Tensor, target: Tensor) -> Tensor:
    """bool [..., B]: the label is among the five largest of C > 5 logits [..., B, C]; of equal
    logits the first count, as in ``argmax``, and NaN is the largest.
    """
    target = target.expand(logits.shape[:-1])[..., None]
    of_label = logits.gather(-1, target)
    first = torch.arange(logits.shape[-1], device=logits.device) < target
    larger = ~(logits <= of_label) | ((logits == of_label) & first)
    return larger.sum(-1) < 5


@torch.no_grad()
def metric_sums(logits: Tensor, target: Tensor) -> Tensor:
    """Sums over a batch for ``metrics_of``; those of several batches can be added.

    Args:
        logits: [B, C] in any floating dtype; log-probabilities are logits, too.
        target: int64 [B], or the classes' shares [B, C], of which the largest counts.

    Returns:
        float64 [3 + 3 * ECE_BINS] on the device of the logits, without waiting for it.
    """
    if target.is_floating_point():
        target = target.argmax(1)
    logits = logits.double()
    log_p = logits.log_softmax(1)
    right = logits.argmax(1) == target
    few = logits.shape[1] <= 5
    top5 = log_p.new_full((), math.nan) if few else in_top5(logits, target).sum()
    nll = -log_p.gather(1, target[:, None]).sum()
    bins = _bin_sums(log_p.amax(1).exp(), right)
    return torch.cat([torch.stack([right.sum().double(), top5.double(), nll]), bins.flatten()])


def metrics_of(sums: Tensor) -> dict[str, float]:
    """Metrics from the sums of all batches (``metric_sums``); waits for the device.

    Returns:
        "accuracy"; "top5", the top-5 accuracy, if there are more than five classes; "nll", the mean
        of ``-log p(label)`` in nats; "ece", the expected calibration error (``Calibration.error``)
        with 15 bins of the confidence. Fractions are in [0, 1], and p is the softmax at temperature
        1. Non-finite logits of any image make the last two NaN or infinite.
    """
    sums = sums.cpu()
    bins = _calibration(sums[3:].view(3, ECE_BINS))
    accuracy, top5, nll = (sums[:3] / bins.images.sum()).tolist()
    top5s = {} if math.isnan(top5) else {"top5": top5}
    return {"accuracy": accuracy, **top5s, "nll": nll, "ece": bins.error}
