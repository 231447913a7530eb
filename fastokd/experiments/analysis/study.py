"""``fastokd analyze``: the papers' measures of a run's branches on a split, as one JSON record."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.data.images import Progress
from fastokd.errors import ConfigError
from fastokd.experiments.analysis import diversity
from fastokd.experiments.analysis.gather import Gathered, gather
from fastokd.experiments.analysis.study_figures import draw_study
from fastokd.metrics import ECE_BINS, calibration
from fastokd.storage import write_json
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import LoadedRun, load_run
from fastokd.version import __version__

FORMAT = "fastokd analysis 1"
FILE = "analysis.json"


class Measure(NamedTuple):
    """A number that an analysis gives, alone or for every name along its axes.

    ``axes`` are the keys of its values, from the outermost: none for a number alone, "row" for a
    branch, teacher assistant or other row of logits, "class", "bin", "epoch", "mixture" and
    "input".
    """

    title: str
    description: str
    axes: tuple[str, ...] = ()


# The key [axes]: title of every measure, and its description.
_TABLE = """
accuracy [row]: accuracy
    Fraction of images whose class has the largest logit.
top5_accuracy [row]: top-5 accuracy
    Fraction of images whose class is among the five largest logits.
cross_entropy [row]: cross-entropy
    Mean of -log p(label), in nats.
confidence [row]: mean confidence
    Mean of the largest softmax probability.
calibration_error [row]: expected calibration error
    Mean gap between accuracy and confidence over 15 bins of equal width, weighted by the images in
    them (Guo et al. 2017, eq. 3).
interrater_agreement []: interrater agreement
    Over the branches: 1 where all are right on the same images, 0 where they err independently;
    smaller is more diverse (FFM + CD, eq. 9).
branch_softmax_distance []: softmax distance of the branches
    Mean Euclidean distance of softmax outputs over the images and the pairs of branches (OKDDip's
    code).
branch_logit_distance []: logit distance of the branches
    Mean Euclidean distance of logits over the images that the student gets wrong and the pairs of
    branches.
any_branch_right []: any branch right
    Fraction of images that at least one branch gets right (the union accuracy of FFSD's code).
softmax_distance [row, row]: softmax distance
    Mean Euclidean distance of two rows' softmax outputs over all images.
logit_distance [row, row]: logit distance
    Mean Euclidean distance of two rows' logits over the images that the student gets wrong (AHBF
    Fig. 5).
agreement [row, row]: agreement
    Fraction of images for which two rows name the same class, right or wrong.
error_overlap [row, row]: error overlap
    Of the images that one of two rows gets wrong, the fraction that both get wrong (Jaccard index).
same_error [row, row]: same error
    Of the images that two rows both get wrong, the fraction for which they name the same wrong
    class.
q_statistic [row, row]: Q statistic
    Yule's Q of being right: 0 where two rows err independently, 1 where together (Kuncheva and
    Whitaker 2003).
class_accuracy [row, class]: accuracy per class
    Fraction of every class's images that is recognised.
confusion [class, predicted class]: confusion
    Images of each class by what the student says, where there are any.
bin_count [row, bin]: images per bin
    Images whose confidence lies in each bin (low, high].
bin_accuracy [row, bin]: accuracy per bin
    Accuracy over the images of each bin.
bin_confidence [row, bin]: confidence per bin
    Mean confidence over the images of each bin.
mixing [mixture, input]: mixing weights
    Mean weight of each input of the mixtures that a gate or the loss weighs.
mixing_deviation [mixture, input]: deviation of the mixing weights
    Their standard deviation over the images: 0 where every image is mixed alike.
class_mixing [mixture, input, class]: mixing weights per class
    Mean weight over the images of each class.
epoch_mixing [mixture, input, epoch]: mixing weights by epoch
    Mean weight at each epoch's evaluation in training, from metrics.jsonl.
"""
MEASURES = {
    key: Measure(title, " ".join(text.split()), tuple(axes.split(", ")) if axes else ())
    for key, axes, title, text in re.findall(
        r"^(\w+) \[(.*)\]: (.*)\n((?:    .*\n)+)", _TABLE, re.MULTILINE
    )
}
"""The entries of "measures" in ``analysis.json`` by key; docs/analyze.md explains each."""


@dataclass(frozen=True)
class Analysis:
    """An analysis: the record that is written (docs/analyze.md describes it), and the data it was
    computed from, with the features of the t-SNE.
    """

    record: dict[str, Any]
    gathered: Gathered

    def write(self, folder: Path) -> list[str]:
        """Write ``analysis.json`` and the figures, and return the names of the figures."""
        write_json(folder / FILE, self.record)  # the numbers are kept if drawing fails
        drawn, notes = draw_study(self.record, self.gathered, folder)
        self.record["pictures"] = drawn
        self.record["notes"] += notes
        write_json(folder / FILE, self.record)
        return [drawing["name"] for drawing in drawn]


def analyze_run(
    path: Path,
    which: str = "last",
    data: str | None = None,
    split: str | None = None,
    max_images: int = 500,
    device: str = "auto",
    decoding: Progress | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse a finished or interrupted run.

    Args:
        path: the run folder.
        which, data, split, device: as in ``load_run``.
        max_images: the most images that the t-SNE shows of those that the student gets wrong.
        decoding: called with (files done, files in all) while files are decoded.
        progress: called with (images done, images in all) while the model runs.

    Raises:
        ConfigError: ``max_images`` is negative.
        CheckpointError: as ``load_run``, or non-finite logits.
    """
    if max_images < 0:
        raise ConfigError(
            f"max_images={max_images}: use 0 for no t-SNE, or how many images it shows at most"
        )
    run = load_run(path, which, data, device, split, decoding)
    images = run.images
    show = None if progress is None else lambda done: progress(done, len(images))
    gathered = gather(run.evaluator, run.loader, max_images, show)
    records = RunFolder.open(path).read_metrics()
    history = {
        record["epoch"] + 1: record["mixing"]
        for record in records
        if isinstance(record.get("mixing"), dict)
    }
    done = run.state["epoch"]
    if which != "last":
        done = max((record["epoch"] + 1 for record in records), default=done)
    members = run.evaluator.criterion.ensemble_members
    record = {
        "format": FORMAT,
        "fastokd": __version__,
        "run": path.resolve().name,
        "method": run.config.method,
        "preset": run.config.preset,
        "model": run.config.model,
        "data": run.dataset.name,
        "split": images.name,
        "images": len(images),
        "checkpoint": which,
        "epochs": run.state["epoch"],
        "planned_epochs": run.config.epochs,
        "student": gathered.rows[gathered.student],
        "student_errors": gathered.student_errors,
        "rows": list(gathered.rows),
        "branches": list(gathered.features),
        "ensemble_members": list(members),
        "classes": list(run.dataset.classes),
        "notes": _notes(run, gathered, done, history, max_images),
        "measures": measures(gathered, members, run.dataset.classes, history),
    }
    return Analysis(record, gathered)


def measures(
    found: Gathered,
    members: Sequence[str],
    classes: Sequence[str],
    history: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """Every entry of ``MEASURES`` that this run has, with its values. Those over branches are over
    ``members``, names of rows; ``history`` has the mean mixing weights by epoch, counted from 1.
    """
    values = {
        **_row_measures(found, classes),
        **_branch_measures(found, [found.rows.index(name) for name in members]),
        **_pair_measures(found),
        **(_mixing_measures(found, classes, history) if found.mixing else {}),
    }
    return {
        key: {**measure._asdict(), "axes": list(measure.axes), "values": values[key]}
        for key, measure in MEASURES.items()
        if key in values
    }


def _row_measures(found: Gathered, classes: Sequence[str]) -> dict[str, Any]:
    rows, right, labels = found.rows, found.right, found.labels
    width = 1 / ECE_BINS
    edges = [f"{i * width:.3f}-{(i + 1) * width:.3f}" for i in range(ECE_BINS)]
    bins = list(map(calibration, found.confidences, right))
    class_accuracy = [diversity.class_means(hit, labels, len(classes)) for hit in right]
    predictions = found.predictions[found.student]
    confusion = diversity.confusion_matrix(predictions, labels, len(classes)).tolist()
    top5 = {} if found.top5 is None else {"top5_accuracy": _named(found.top5, rows)}
    return {
        "accuracy": _named(right.double().mean(1), rows),
        **top5,
        "cross_entropy": _named(found.cross_entropies, rows),
        "confidence": _named(found.confidences.mean(1), rows),
        "calibration_error": _named([each.error for each in bins], rows),
        "class_accuracy": _named(torch.stack(class_accuracy), rows, classes),
        "confusion": {
            name: {other: count for other, count in zip(classes, line, strict=True) if count}
            for name, line in zip(classes, confusion, strict=True)
        },
        "bin_count": {
            name: dict(zip(edges, map(int, each.images), strict=True))
            for name, each in zip(rows, bins, strict=True)
        },
        "bin_accuracy": _named(torch.stack([each.accuracy for each in bins]), rows, edges),
        "bin_confidence": _named(torch.stack([each.confidence for each in bins]), rows, edges),
    }


def _branch_measures(found: Gathered, chosen: Sequence[int]) -> dict[str, Any]:
    def mean_distance(distances: Tensor) -> float | None:
        return _plain(diversity.mean_over_pairs(distances[chosen][:, chosen]))

    return {
        "interrater_agreement": _plain(diversity.interrater_agreement(found.right[chosen])),
        "branch_softmax_distance": mean_distance(found.softmax_distances),
        "branch_logit_distance": mean_distance(found.logit_distances),
        "any_branch_right": diversity.any_right(found.right[chosen]),
    }


def _pair_measures(found: Gathered) -> dict[str, Any]:
    pairs = {
        "softmax_distance": found.softmax_distances,
        "logit_distance": found.logit_distances,
        "agreement": diversity.agreement(found.predictions),
        "error_overlap": diversity.error_overlap(found.right),
        "same_error": diversity.same_error(found.predictions, found.labels),
        "q_statistic": diversity.q_statistic(found.right),
    }
    return {key: _named(values, found.rows, found.rows) for key, values in pairs.items()}


def _mixing_measures(
    found: Gathered,
    classes: Sequence[str],
    history: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    values: dict[str, Any] = {"mixing": {}, "mixing_deviation": {}, "class_mixing": {}}
    if history:
        values["epoch_mixing"] = {}
    for mixture, weights in found.mixing.items():
        for name, weight in weights.items():
            by_class = diversity.class_means(weight, found.labels, len(classes))
            entries = {
                "mixing": _plain(float(weight.mean())),
                "mixing_deviation": _plain(float(weight.std(correction=0))),
                "class_mixing": _named(by_class, classes),
                "epoch_mixing": {
                    str(epoch): means.get(mixture, {}).get(name) for epoch, means in history.items()
                },
            }
            for key, by_mixture in values.items():
                by_mixture.setdefault(mixture, {})[name] = entries[key]
    return values


def _notes(
    run: LoadedRun, found: Gathered, done: int, history: Mapping[int, Any], max_images: int
) -> list[str]:
    """Remarks for readers of the numbers; ``done`` is the number of the run's finished epochs."""
    wrong, student = found.student_errors, found.rows[found.student]
    method, planned = run.config.method, run.config.epochs
    unfinished = f"the run is not finished: {done} of {planned} epochs are done"
    within = f"the checkpoint was written within epoch {run.state['epoch'] + 1}"
    no_mixture = (
        f"method {method} has no mixture of rows whose weights a gate or the loss finds, so there"
        " are no mixing weights"
    )
    no_history = (
        "mixing weights by epoch were not recorded: the run is of an earlier version, or its"
        " metrics.jsonl is lost"
    )
    one_branch = "there is one branch, so nothing is measured over pairs of branches"
    no_errors = (
        f"{student} gets every image right, so there are no distances of logits on its errors and"
        " no t-SNE"
    )
    shown = (
        f"the t-SNE shows {max_images} of the {wrong} images that {student} gets wrong"
        " (--max-images)"
    )
    notes = {
        unfinished: done < planned,
        within: run.state["loader"],
        no_mixture: not found.mixing,
        no_history: found.mixing and not history,
        one_branch: len(run.evaluator.criterion.ensemble_members) < 2,
        no_errors: not wrong,
        shown: 0 < max_images < wrong,
    }
    return [note for note, applies in notes.items() if applies]


def _named(values: Tensor | Sequence[Any], names: Sequence[str], *more: Sequence[str]) -> Any:
    """Numbers as nested dicts, with the names along each dimension."""
    return {
        name: _named(value, *more) if more else _plain(float(value))
        for name, value in zip(names, values, strict=True)
    }


def _plain(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else value
