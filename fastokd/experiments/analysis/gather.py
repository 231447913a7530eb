"""Running a model once over a split, and keeping what its analysis needs."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastokd.data import Batch
from fastokd.errors import CheckpointError
from fastokd.experiments.analysis.diversity import pairwise_distances
from fastokd.metrics import in_top5
from fastokd.train.step import BranchEvaluator


@dataclass(frozen=True)
class Gathered:
    """The predictions of R rows of logits (branches, heads, teacher assistants, the ensemble) for N
    images; on the CPU.

    Attributes:
        rows: their names.
        student: the index of the student's row.
        labels: int64 [N].
        predictions: int64 [R, N].
        confidences: of the predictions, float64 [R, N].
        cross_entropies: the mean over the images, float64 [R].
        top5: the top-5 accuracies, float64 [R]; None for up to five classes.
        softmax_distances: float64 [R, R], the mean Euclidean distance of softmax outputs over all
            images.
        logit_distances: float64 [R, R], that of logits over the images that the student gets wrong;
            NaN without such images.
        mixing: for each mixture with weights given at run time, the weights of each of its inputs,
            float64 [N].
        features: the pooled features [n, c_m] of each branch for some images that the student gets
            wrong.
        feature_labels: the classes of these images, int64 [n].
    """

    rows: tuple[str, ...]
    student: int
    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    cross_entropies: Tensor
    top5: Tensor | None
    softmax_distances: Tensor
    logit_distances: Tensor
    mixing: dict[str, dict[str, Tensor]]
    features: dict[str, Tensor]
    feature_labels: Tensor

    @property
    def right(self) -> Tensor:
        """bool [R, N]."""
        return self.predictions == self.labels

    @property
    def student_errors(self) -> int:
        """The number of images that the student gets wrong."""
        return int((~self.right[self.student]).sum())


def gather(
    evaluator: BranchEvaluator,
    batches: Iterable[Batch],
    max_images: int,
    progress: Callable[[int], object] | None = None,
) -> Gathered:
    """Run the model once over every image.

    Memory does not grow with the classes: four numbers are kept for each image and row, and the
    features of at most ``max_images`` images that the student gets wrong. These are drawn by random
    numbers that are fixed for each index, so that runs on the same split show the same images as
    far as they make the same mistakes.

    Batches are of the split, in a fixed order, with labels as targets. ``progress`` is called with
    the number of images done.

    Raises:
        CheckpointError: non-finite logits.
    """
    drawn = torch.Generator().manual_seed(0)
    columns: list[tuple[Tensor, ...]] = []  # of every batch: labels, predictions, confidences
    mixing: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    kept: list[Tensor] = []  # of the errors that are shown: keys, labels, features of every branch
    rows: tuple[str, ...] = ()
    sums: tuple[Tensor, ...] = (torch.zeros((), dtype=torch.float64),) * 4
    done = num_classes = 0
    for result, named, target in evaluator.measured(batches):
        rows = tuple(named)
        logits = torch.stack([row.double() for row in named.values()])
        if not logits.isfinite().all():
            problem = f"the logits are non-finite from image {done + 1} on"
            raise CheckpointError(f"{problem}; choose another checkpoint with --which")
        num_classes = logits.shape[2]
        log_p = logits.log_softmax(2)
        confidences, predictions = log_p.exp().max(2)
        wrong = predictions[rows.index(evaluator.reported)] != target
        cross_entropies = -log_p.gather(2, target.expand(len(rows), -1)[..., None]).sum((1, 2))
        batch_sums = (
            cross_entropies,
            in_top5(logits, target).sum(1),
            pairwise_distances(log_p.exp()).sum(2),
            pairwise_distances(logits[:, wrong]).sum(2),
        )
        sums = tuple(before + new for before, new in zip(sums, batch_sums, strict=True))
        columns.append((target.cpu(), predictions.cpu(), confidences.cpu()))
        for mixture, weights in evaluator.mixing_weights(result, target).items():
            for name, weight in weights.items():
                mixing[mixture][name].append(weight.double().cpu())
        keys = torch.rand(len(target), generator=drawn)
        pooled = [maps[wrong].float().mean((2, 3)).cpu() for maps in result.features]
        kept = _first(max_images, kept, [keys[wrong.cpu()], target[wrong].cpu(), *pooled])
        done += len(target)
        if progress is not None:
            progress(done)
    labels, predictions, confidences = (
        torch.cat(parts, -1) for parts in zip(*columns, strict=True)
    )
    student = rows.index(evaluator.reported)
    cross_entropies, top5s, softmax_sums, logit_sums = (value.cpu() for value in sums)
    errors = int((predictions[student] != labels).sum())
    branches = evaluator.criterion.graph.logits[: evaluator.criterion.num_branches]
    features = dict(zip(branches, kept[2:], strict=True))
    return Gathered(
        rows,
        student,
        labels,
        predictions,
        confidences,
        cross_entropies / done,
        top5s / done if num_classes > 5 else None,
        softmax_sums / done,
        logit_sums / errors,
        {
            mixture: {name: torch.cat(parts) for name, parts in by_input.items()}
            for mixture, by_input in mixing.items()
        },
        features,
        kept[1],
    )


def _first(count: int, before: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """The ``count`` entries with the smallest keys, which are the first tensor."""
    both = [torch.cat(pair) for pair in zip(before, new, strict=True)] if before else new
    order = both[0].argsort()[:count]
    return [value[order] for value in both]
