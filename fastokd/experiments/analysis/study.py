"""``fastokd analyze``: what the papers measure about their branches, of a run and a split, as one
JSON record.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.data.images import Progress
from fastokd.errors import ConfigError
from fastokd.experiments.analysis import diversity
from fastokd.experiments.analysis.gather import Gathered, gather
from fastokd.experiments.analysis.pictures import draw_study
from fastokd.storage import write_json
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import LoadedRun, load_run
from fastokd.version import __version__

FORMAT = "fastokd analysis 1"
FILE = "analysis.json"


@dataclass(frozen=True)
class Measure:
    """A number that an analysis gives, alone or for every name along its axes.

    ``axes`` say what the keys of its values are, from the outermost: none for a number alone, "row"
    for a branch, teacher assistant or other row of logits, "class", "bin", "epoch", "mixture" and
    "input".
    """

    title: str
    description: str
    axes: tuple[str, ...] = ()


MEASURES = {
    "accuracy": Measure(
        "accuracy", "Fraction of images whose class has the largest logit.", ("row",)
    ),
    "cross_entropy": Measure("cross-entropy", "Mean of -log p(label), in nats.", ("row",)),
    "confidence": Measure("mean confidence", "Mean of the largest softmax probability.", ("row",)),
    "calibration_error": Measure(
        "expected calibration error",
        f"Mean gap between accuracy and confidence over {diversity.ECE_BINS} bins of equal width,"
        " weighted by the images in them (Guo et al. 2017, eq. 3).",
        ("row",),
    ),
    "interrater_agreement": Measure(
        "interrater agreement",
        "Over the branches: 1 where all are right on the same images, 0 where they err"
        " independently; smaller is more diverse (FFM + CD, eq. 9).",
    ),
    "branch_softmax_distance": Measure(
        "softmax distance of the branches",
        "Mean Euclidean distance of softmax outputs over the images and the pairs of branches"
        " (OKDDip's code).",
    ),
    "branch_logit_distance": Measure(
        "logit distance of the branches",
        "Mean Euclidean distance of logits over the images that the student gets wrong and the"
        " pairs of branches.",
    ),
    "any_branch_right": Measure(
        "any branch right",
        "Fraction of images that at least one branch gets right (the union accuracy of FFSD's"
        " code).",
    ),
    "softmax_distance": Measure(
        "softmax distance",
        "Mean Euclidean distance of two rows' softmax outputs over all images.",
        ("row", "row"),
    ),
    "logit_distance": Measure(
        "logit distance",
        "Mean Euclidean distance of two rows' logits over the images that the student gets wrong"
        " (AHBF Fig. 5).",
        ("row", "row"),
    ),
    "agreement": Measure(
        "agreement",
        "Fraction of images for which two rows name the same class, right or wrong.",
        ("row", "row"),
    ),
    "error_overlap": Measure(
        "error overlap",
        "Of the images that one of two rows gets wrong, the fraction that both get wrong (Jaccard"
        " index).",
        ("row", "row"),
    ),
    "same_error": Measure(
        "same error",
        "Of the images that two rows both get wrong, the fraction for which they name the same"
        " wrong class.",
        ("row", "row"),
    ),
    "q_statistic": Measure(
        "Q statistic",
        "Yule's Q of being right: 0 where two rows err independently, 1 where together (Kuncheva"
        " and Whitaker 2003).",
        ("row", "row"),
    ),
    "class_accuracy": Measure(
        "accuracy per class",
        "Fraction of every class's images that is recognised.",
        ("row", "class"),
    ),
    "confusion": Measure(
        "confusion",
        "Images of each class by what the student says, where there are any.",
        ("class", "predicted class"),
    ),
    "bin_count": Measure(
        "images per bin", "Images whose confidence lies in each bin (low, high].", ("row", "bin")
    ),
    "bin_accuracy": Measure(
        "accuracy per bin", "Accuracy over the images of each bin.", ("row", "bin")
    ),
    "bin_confidence": Measure(
        "confidence per bin", "Mean confidence over the images of each bin.", ("row", "bin")
    ),
    "mixing": Measure(
        "mixing weights",
        "Mean weight of each input of the mixtures that a gate or the loss weighs.",
        ("mixture", "input"),
    ),
    "mixing_deviation": Measure(
        "deviation of the mixing weights",
        "Their standard deviation over the images: 0 where every image is mixed alike.",
        ("mixture", "input"),
    ),
    "class_mixing": Measure(
        "mixing weights per class",
        "Mean weight over the images of each class.",
        ("mixture", "input", "class"),
    ),
    "epoch_mixing": Measure(
        "mixing weights by epoch",
        "Mean weight at each epoch's evaluation in training, from metrics.jsonl.",
        ("mixture", "input", "epoch"),
    ),
}
"""What ``analysis.json`` has under "measures", by its key; docs/analyze.md says how to read
each.
"""


@dataclass(frozen=True)
class Analysis:
    """An analysis: the record that is written, and what the t-SNE is made of.

    Attributes:
        record: as docs/analyze.md describes it.
        gathered: what it was computed from, with the features that the t-SNE shows.
    """

    record: dict[str, Any]
    gathered: Gathered

    def write(self, folder: Path) -> list[str]:
        """Write ``analysis.json``, and each picture as SVG and PNG; pictures of an earlier analysis
        that are not drawn now are removed.

        Returns:
            The names of the pictures. What could not be drawn is in the record's notes.

        Raises:
            StorageError: the disk refused.
        """
        write_json(
            folder / FILE, self.record
        )  # first the numbers, whatever becomes of the pictures
        drawn, notes = draw_study(self.record, self.gathered, folder)
        self.record["pictures"] = drawn
        self.record["notes"] += notes
        write_json(folder / FILE, self.record)
        return [picture["name"] for picture in drawn]


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
        max_images: how many of the images that the student gets wrong the t-SNE shows at most.
        decoding: called with (files done, files in all) while files are decoded.
        progress: called with (images done, images in all) while the model looks at them.

    Raises:
        ConfigError: ``max_images`` is negative.
        CheckpointError: as ``load_run``, or logits that are not finite.
    """
    if max_images < 0:
        raise ConfigError(
            f"max_images={max_images}: use 0 for no t-SNE, or how many images it shows at most"
        )
    run = load_run(path, which, data, device, split, decoding)
    images = run.dataset.evaluation if split is None else run.dataset.split(split)
    total = len(images)
    gathered = gather(
        run.evaluator,
        run.loader,
        max_images,
        lambda done: progress(done, total) if progress else None,
    )
    records = RunFolder.open(path).read_metrics()
    history = {
        record["epoch"] + 1: record["mixing"]
        for record in records
        if isinstance(record.get("mixing"), dict)
    }
    done = (
        run.state["epoch"]
        if which == "last"
        else max((record["epoch"] + 1 for record in records), default=run.state["epoch"])
    )
    members = run.evaluator.criterion.ensemble_members
    header = {
        "format": FORMAT,
        "fastokd": __version__,
        "run": path.resolve().name,
        "method": run.config.method,
        "preset": run.config.preset,
        "model": run.config.model,
        "data": run.dataset.name,
        "split": images.name,
        "images": total,
        "checkpoint": which,
        "epochs": run.state["epoch"],
        "planned_epochs": run.config.epochs,
        "student": gathered.rows[gathered.student],
        "student_errors": gathered.student_errors,
        "rows": list(gathered.rows),
        "branches": list(gathered.features),
        "ensemble_members": list(members),
        "classes": list(run.dataset.classes),
    }
    record = {
        **header,
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
    """Every measure of ``MEASURES`` that there is for this run, with its values.

    Args:
        found: what the model says.
        members: the names of the rows that the measures over branches are over.
        classes: the C class names.
        history: by epoch, counted from 1, the mean mixing weights that training has recorded.
    """
    rows, right, count = found.rows, found.right, len(classes)
    chosen = [rows.index(name) for name in members]
    confusion = diversity.confusion_matrix(found.predictions[found.student], found.labels, count)
    bins = [
        diversity.calibration(confidence, hit)
        for confidence, hit in zip(found.confidences, right, strict=True)
    ]
    edges = [
        f"{place / diversity.ECE_BINS:.3f}-{(place + 1) / diversity.ECE_BINS:.3f}"
        for place in range(diversity.ECE_BINS)
    ]
    per_class = torch.stack([diversity.class_means(hit, found.labels, count) for hit in right])
    values: dict[str, Any] = {
        "accuracy": _named(right.double().mean(1), rows),
        "cross_entropy": _named(found.cross_entropies, rows),
        "confidence": _named(found.confidences.mean(1), rows),
        "calibration_error": {
            name: _plain(calibration.error) for name, calibration in zip(rows, bins, strict=True)
        },
        "interrater_agreement": _plain(diversity.interrater_agreement(right[chosen])),
        "branch_softmax_distance": _plain(
            diversity.mean_over_pairs(found.softmax_distances[chosen][:, chosen])
        ),
        "branch_logit_distance": _plain(
            diversity.mean_over_pairs(found.logit_distances[chosen][:, chosen])
        ),
        "any_branch_right": diversity.any_right(right[chosen]),
        "softmax_distance": _named(found.softmax_distances, rows, rows),
        "logit_distance": _named(found.logit_distances, rows, rows),
        "agreement": _named(diversity.agreement(found.predictions), rows, rows),
        "error_overlap": _named(diversity.error_overlap(right), rows, rows),
        "same_error": _named(diversity.same_error(found.predictions, found.labels), rows, rows),
        "q_statistic": _named(diversity.q_statistic(right), rows, rows),
        "class_accuracy": _named(per_class, rows, classes),
        "confusion": {
            name: {classes[other]: int(line[other]) for other in line.nonzero().flatten().tolist()}
            for name, line in zip(classes, confusion, strict=True)
        },
        "bin_count": {
            name: {edge: int(number) for edge, number in zip(edges, calibration.count, strict=True)}
            for name, calibration in zip(rows, bins, strict=True)
        },
        "bin_accuracy": _named(
            torch.stack([calibration.accuracy for calibration in bins]), rows, edges
        ),
        "bin_confidence": _named(
            torch.stack([calibration.confidence for calibration in bins]), rows, edges
        ),
    }
    if found.mixing:
        values["mixing"] = {
            mixture: {name: _plain(float(weight.mean())) for name, weight in weights.items()}
            for mixture, weights in found.mixing.items()
        }
        values["mixing_deviation"] = {
            mixture: {
                name: _plain(float(weight.std(correction=0))) for name, weight in weights.items()
            }
            for mixture, weights in found.mixing.items()
        }
        values["class_mixing"] = {
            mixture: {
                name: _named(diversity.class_means(weight, found.labels, count), classes)
                for name, weight in weights.items()
            }
            for mixture, weights in found.mixing.items()
        }
        if history:
            values["epoch_mixing"] = {
                mixture: {
                    name: {
                        str(epoch): means.get(mixture, {}).get(name)
                        for epoch, means in history.items()
                    }
                    for name in weights
                }
                for mixture, weights in found.mixing.items()
            }
    return {
        key: {
            "title": MEASURES[key].title,
            "description": MEASURES[key].description,
            "axes": list(MEASURES[key].axes),
            "values": value,
        }
        for key, value in values.items()
    }


def _notes(
    run: LoadedRun, found: Gathered, done: int, history: Mapping[int, Any], max_images: int
) -> list[str]:
    """What a reader of the numbers has to know; ``done`` is the number of the run's finished
    epochs.
    """
    notes = []
    wrong, student = found.student_errors, found.rows[found.student]
    if done < run.config.epochs:
        notes.append(f"the run is not finished: {done} of {run.config.epochs} epochs are done")
    if run.state["loader"]:
        notes.append(f"the checkpoint was written within epoch {run.state['epoch'] + 1}")
    if not found.mixing:
        notes.append(
            f"method {run.config.method} has no mixture of rows whose weights a gate or the loss"
            " finds, so there are no mixing weights"
        )
    elif not history:
        notes.append(
            "mixing weights by epoch were not recorded: the run is of an earlier version, or its"
            " metrics.jsonl is lost"
        )
    if len(run.evaluator.criterion.ensemble_members) < 2:
        notes.append("there is one branch, so nothing is measured over pairs of branches")
    if not wrong:
        notes.append(
            f"{student} gets every image right, so there are no distances of logits on its errors"
            " and no t-SNE"
        )
    elif 0 < max_images < wrong:
        notes.append(
            f"the t-SNE shows {max_images} of the {wrong} images that {student} gets wrong"
            " (--max-images)"
        )
    return notes


def _named(values: Tensor, names: Sequence[str], *more: Sequence[str]) -> dict[str, Any]:
    """A tensor as nested dicts, with a tuple of names for each dimension."""
    return {
        name: _named(value, *more) if more else _plain(float(value))
        for name, value in zip(names, values, strict=True)
    }


def _plain(value: float) -> float | None:
    """A number as JSON has it, which knows no NaN."""
    return None if math.isnan(value) else value
