"""Measuring networks and files on real images, and comparing them."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastokd.data import Batch
from fastokd.errors import CheckpointError

Network = nn.Module | Callable[[Tensor], Tensor]
"""Anything that maps images [B, 3, H, W] to logits [B, C]."""


class Comparison(NamedTuple):
    """What two networks say to the same images."""

    num_images: int
    difference: float
    """The largest difference between two logits."""
    same_top1: int
    """For how many images both choose the same class."""
    accuracy: float
    """The top-1 accuracy in [0, 1] of the second network."""


@torch.no_grad()
def measure_accuracy(student: Network, batches: Iterable[Batch]) -> float:
    """The top-1 accuracy in [0, 1] of a plain network over all batches, each sample counted
    once.
    """
    right, count = torch.zeros((), dtype=torch.int64), 0
    for batch in batches:
        right = (
            right.to(batch.target.device) + (student(batch.images).argmax(1) == batch.target).sum()
        )
        count += batch.target.shape[0]
    return int(right) / count


@torch.no_grad()
def compare_logits(
    first: Network, second: Network, batches: Iterable[Batch], tolerance: float = 0.0
) -> Comparison:
    """Compare two networks' logits on real images, in batches of 1, 3 and 7 first and then as they
    come.

    Args:
        first: the trained network.
        second: what was made of it.
        batches: the images.
        tolerance: largest difference allowed, as a fraction of the largest logit of a batch (or of
            1); 0 asks for the same bits.

    Raises:
        CheckpointError: they differ by more.
    """
    count = same = right = 0
    largest = 0.0
    for images, target in _in_odd_batches(batches):
        left, other = first(images), second(images)
        if left.shape != other.shape:
            raise CheckpointError(
                f"the exported student gives logits {list(other.shape)} for {len(images)} images,"
                f" the trained branch {list(left.shape)}: the export is not good"
            )
        difference = (left - other).abs().max().item()
        allowed = tolerance * max(1.0, left.abs().max().item())
        if not (difference <= allowed if tolerance else torch.equal(left, other)):
            more = f", more than the {allowed:g} allowed" if tolerance else ""
            raise CheckpointError(
                f"the exported student's logits differ by up to {difference:g} from the trained"
                f" branch's{more}: the export is not good"
            )
        chosen = other.argmax(1)
        largest = max(largest, difference)
        count += len(images)
        same += int((left.argmax(1) == chosen).sum())
        right += int((chosen == target).sum())
    return Comparison(count, largest, same, right / count)


def check_same_logits(first: Network, second: Network, batches: Iterable[Batch]) -> int:
    """Compare two networks' logits on real images bit by bit; returns how many images were
    compared.

    Raises:
        CheckpointError: they differ.
    """
    return compare_logits(first, second, batches).num_images


def _in_odd_batches(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels, the first batch cut so that a batch size that was frozen into a
    program shows.
    """
    for number, batch in enumerate(batches):
        sizes = []
        left = len(batch.images)
        for wanted in (1, 3, 7) if number == 0 else ():
            sizes.append(min(wanted, left))
            left -= sizes[-1]
        sizes = [size for size in (*sizes, left) if size]
        yield from zip(batch.images.split(sizes), batch.target.split(sizes), strict=True)
