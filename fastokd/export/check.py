"""Evaluation of networks and exported files on real images, and their comparison."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastokd.data import Batch
from fastokd.errors import CheckpointError
from fastokd.metrics import metric_sums, metrics_of

Network = nn.Module | Callable[[Tensor], Tensor]
"""A function from images [B, 3, H, W] to logits [B, C]."""

_FAILED = "export failed verification"


class Comparison(NamedTuple):
    """The outputs of two networks for the same images: the largest difference between two logits,
    the number of images with the same top-1 class, and the second network's top-1 accuracy in [0,
    1].
    """

    num_images: int
    difference: float
    same_top1: int
    accuracy: float


def measure_accuracy(student: Network, batches: Iterable[Batch]) -> float:
    """The top-1 accuracy in [0, 1] of a plain network over all batches."""
    return measure_metrics(student, batches)["accuracy"]


@torch.no_grad()
def measure_metrics(student: Network, batches: Iterable[Batch]) -> dict[str, float]:
    """The metrics of a plain network over all batches, at least one, see ``metrics_of``."""
    first, *rest = (metric_sums(student(batch.images), batch.target) for batch in batches)
    return metrics_of(sum(rest, first))


@torch.no_grad()
def compare_logits(
    first: Network, second: Network, batches: Iterable[Batch], tolerance: float = 0.0
) -> Comparison:
    """Compare two networks' logits on real images, starting with batches of 1, 3 and 7.

    Args:
        first: the trained network.
        second: the exported one.
        batches: the images.
        tolerance: largest difference allowed, as a fraction of the largest logit of a batch (or of
            1); 0 requires equal bits.

    Raises:
        CheckpointError: they differ by more.
    """
    count = same = right = 0
    largest = 0.0
    for images, target in _in_odd_batches(batches):
        left, other = first(images), second(images)
        if left.shape != other.shape:
            shapes = f"{list(other.shape)}, the trained branch's are {list(left.shape)}"
            raise CheckpointError(f"the exported student's logits are {shapes}: {_FAILED}")
        difference = (left - other).abs().max().item()
        allowed = tolerance * max(1.0, left.abs().max().item())
        if not (difference <= allowed if tolerance else torch.equal(left, other)):
            more = f", more than the {allowed:g} allowed" if tolerance else ""
            gap = f"differ by up to {difference:g} from the trained branch's{more}"
            raise CheckpointError(f"the exported student's logits {gap}: {_FAILED}")
        largest = max(largest, difference)
        count += len(images)
        same += int((left.argmax(1) == other.argmax(1)).sum())
        right += int((other.argmax(1) == target).sum())
    return Comparison(count, largest, same, right / count)


def check_same_logits(first: Network, second: Network, batches: Iterable[Batch]) -> int:
    """Compare two networks' logits on real images bit by bit; returns the number of images.

    Raises:
        CheckpointError: they differ.
    """
    return compare_logits(first, second, batches).num_images


def _in_odd_batches(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels; the first batch is split, to detect a constant batch size."""
    for number, batch in enumerate(batches):
        sizes = [1, 3, 7] if number == 0 else []
        start = 0
        for size in (*sizes, len(batch.images)):
            if start < len(batch.images):
                yield batch.images[start : start + size], batch.target[start : start + size]
            start += size
