"""The pictures of ``fastokd analyze``, each as SVG and PNG."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import MissingExtra
from fastokd.experiments.analysis.curves import Picture, encoded, require_matplotlib
from fastokd.experiments.analysis.diversity import ECE_BINS
from fastokd.experiments.analysis.gather import Gathered
from fastokd.storage import storage_error

NAMES = ("tsne", "distances", "agreement", "reliability", "confusion", "mixing", "mixing-by-epoch")
"""Every picture that there may be; the files are NAME.svg and NAME.png."""

MOST_CLASSES = 20
"""Classes that a picture can name one by one."""

_MARKED = 10  # classes that the t-SNE can give colours that are told apart


class _Undrawable(Exception):
    """Why there is nothing to draw."""


def draw_study(
    record: Mapping[str, Any], found: Gathered, folder: Path
) -> tuple[list[dict[str, str]], list[str]]:
    """Draw everything that a run's analysis has numbers for.

    Args:
        record: as ``fastokd.experiments.analysis.study`` makes it.
        found: what it was computed from; the t-SNE needs its features.
        folder: where the files go. Files there with names of pictures that are not drawn are
            removed.

    Returns:
        For each picture drawn its name, title and description; and for each that could not be drawn
        a line that says why.

    Raises:
        StorageError: the disk refused.
    """
    drawn: list[dict[str, str]] = []
    notes: list[str] = []
    try:
        plt = require_matplotlib()
    except MissingExtra as error:
        notes.append(f"there are no pictures: {error}")
    else:
        values = {key: measure["values"] for key, measure in record["measures"].items()}
        where = (
            f"{record['run']}, {record['images']} {record['split']} images, epoch"
            f" {record['epochs']}"
        )
        for name, draw in _draws(plt, record, values, found).items():
            try:
                figure, title, description = draw()
            except (_Undrawable, MissingExtra) as error:
                notes.append(f"there is no picture {name}: {error}")
                continue
            figure.suptitle(f"{title}\n{where}", fontsize="medium")
            Picture(name, title, description, encoded(plt, figure, ("svg", "png"))).write(folder)
            drawn.append({"name": name, "title": title, "description": description})
    for name in set(NAMES) - {picture["name"] for picture in drawn}:
        for suffix in (".svg", ".png"):
            try:
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(folder / f"{name}{suffix}", error) from error
    return drawn, notes


Draw = Callable[[], tuple[Any, str, str]]
"""Gives a figure, its title and what it shows in a sentence."""


def _draws(
    plt: Any, record: Mapping[str, Any], values: Mapping[str, Any], found: Gathered
) -> dict[str, Draw]:
    """What can be tried for this record, by name; without errors of the student, or without a gate,
    the record's notes say why there is less.
    """
    student, errors = record["student"], record["student_errors"]
    draws: dict[str, Draw] = {}
    if errors and len(found.feature_labels):
        draws["tsne"] = lambda: _tsne(
            plt, found.features, found.feature_labels, record["classes"], student
        )
    if len(record["rows"]) > 1:
        draws["distances"] = lambda: _distances(plt, values, student, errors)
        draws["agreement"] = lambda: _agreement(plt, values, record["rows"])
    draws["reliability"] = lambda: _reliability(plt, values, record["rows"])
    draws["confusion"] = lambda: _confusion(plt, values["confusion"], record["classes"], student)
    if "mixing" in values:
        draws["mixing"] = lambda: _mixing(plt, values, record["classes"])
    if "epoch_mixing" in values:
        draws["mixing-by-epoch"] = lambda: _mixing_by_epoch(plt, values["epoch_mixing"])
    return draws


def _tsne(
    plt: Any, features: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str], student: str
) -> tuple[Any, str, str]:
    """One embedding of all branches' features where these have one width, else one of each
    branch.
    """
    together = len({values.shape[1] for values in features.values()}) == 1
    groups = [list(features)] if together else [[name] for name in features]
    embedded = [_embed(torch.cat([features[name] for name in group])) for group in groups]
    counts = torch.bincount(labels, minlength=len(classes))
    marked = [
        place
        for place in counts.argsort(descending=True, stable=True)[:_MARKED].tolist()
        if counts[place]
    ]
    # With few classes each has its colour in every run's picture.
    colors = {
        place: plt.get_cmap("tab10")(place if len(classes) <= _MARKED else index)
        for index, place in enumerate(sorted(marked))
    }
    figure, grid = plt.subplots(
        1,
        len(groups),
        figsize=(7.5 if together else 4.5 * len(groups), 6),
        layout="constrained",
        squeeze=False,
    )
    numbers = {name: index for index, name in enumerate(features, start=1)}
    for axes, group, points in zip(grid.flat, groups, embedded, strict=True):
        for name, own in zip(group, points.chunk(len(group)), strict=True):
            for place in (None, *colors):
                chosen = (
                    own[~torch.isin(labels, torch.tensor(list(colors)))]
                    if place is None
                    else own[labels == place]
                )
                axes.scatter(
                    *chosen.T,
                    marker=f"${numbers[name]}$",
                    s=28,
                    linewidths=0.3,
                    color="lightgray" if place is None else colors[place],
                )
        axes.set(
            xticks=[],
            yticks=[],
            xlabel="  ".join(
                f"{numbers[name]}: {name}{' (student)' if name == student else ''}"
                for name in group
            ),
        )
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=color, label=classes[place])
        for place, color in colors.items()
    ]
    if int((counts > 0).sum()) > len(colors):
        handles.append(
            plt.Line2D([], [], marker="o", linestyle="", color="lightgray", label="other classes")
        )
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", title="class")
    apart = (
        ""
        if together
        else " The branches' features differ in width, so that each has an embedding of its own."
    )
    return (
        figure,
        f"t-SNE of the branches' features of {len(labels)} images that {student} gets wrong",
        (
            f"t-SNE of the branches' pooled features of {len(labels)} images that {student} gets"
            f" wrong: the colour is the class, the digit the branch.{apart}"
        ),
    )


def _embed(points: Tensor) -> Tensor:
    """[n, 2] of [n, c]: t-SNE (van der Maaten and Hinton 2008) with perplexity 30, or a third of
    the other points where there are fewer than 91.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise MissingExtra("t-SNE needs scikit-learn: pip install 'fastokd[plots]'") from None
    count = len(points)
    if count < 4 or not points.var(0).any():
        raise _Undrawable(
            f"t-SNE needs at least 4 points that differ, and there are {len(points.unique(dim=0))}"
        )
    return torch.from_numpy(
        TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0).fit_transform(
            points.numpy()
        )
    )


def _distances(
    plt: Any, values: Mapping[str, Any], student: str, errors: int
) -> tuple[Any, str, str]:
    """Bars of how far every row is from the student's."""
    panels = {
        f"logits, over the {errors} images that {student} gets wrong": values["logit_distance"][
            student
        ],
        "softmax outputs, over all images": values["softmax_distance"][student],
    }
    panels = {
        label: distances for label, distances in panels.items() if None not in distances.values()
    }
    others = [name for name in values["accuracy"] if name != student]
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels), 0.35 * len(others) + 1.8),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (label, distances) in zip(grid.flat, panels.items(), strict=True):
        bars = axes.barh(others, [distances[name] for name in others], color="tab:blue")
        axes.bar_label(bars, fmt=" {:.3g}", fontsize="small")
        axes.margins(x=0.15)
        axes.set_xlabel(f"mean Euclidean distance of {label}", fontsize="small")
    grid[0, 0].invert_yaxis()
    return (
        figure,
        f"distance to {student}",
        (
            f"Mean Euclidean distance between {student} and every other row: "
            + "; ".join(
                f"{label}: " + ", ".join(f"{name} {distances[name]:.3g}" for name in others)
                for label, distances in panels.items()
            )
            + "."
        ),
    )


def _agreement(plt: Any, values: Mapping[str, Any], rows: Sequence[str]) -> tuple[Any, str, str]:
    """Heat maps of how often two rows say the same, and err together."""
    figure, grid = plt.subplots(
        1, 2, figsize=(2 * (0.55 * len(rows) + 2.4), 0.55 * len(rows) + 2.2), layout="constrained"
    )
    for axes, key, label in zip(
        grid,
        ("agreement", "error_overlap"),
        ("the same class", "errors that both make"),
        strict=True,
    ):
        table = [[values[key][one][other] for other in rows] for one in rows]
        _heat_map(figure, axes, table, rows, rows)
        axes.set_title(label, fontsize="small")
    return (
        figure,
        "agreement and error overlap",
        (
            "Two heat maps over all pairs of rows: the fraction of images for which both name the"
            " same class, and of the images that one gets wrong the fraction that both get wrong."
        ),
    )


def _reliability(plt: Any, values: Mapping[str, Any], rows: Sequence[str]) -> tuple[Any, str, str]:
    """For every row bars of the accuracy at each confidence, over the diagonal."""
    figure, panels = _panels(plt, len(rows))
    for axes, name in zip(panels, rows, strict=True):
        counts, accuracy, confidence = (
            list(values[key][name].values())
            for key in ("bin_count", "bin_accuracy", "bin_confidence")
        )
        places = [place for place, count in enumerate(counts) if count]
        left = [place / ECE_BINS for place in places]
        total = sum(counts)
        # Bins with few images say little and count little.
        colors = [
            plt.get_cmap("Blues")(0.25 + 0.6 * (counts[place] / total) ** 0.5) for place in places
        ]
        axes.bar(
            left,
            [accuracy[place] for place in places],
            width=1 / ECE_BINS,
            align="edge",
            color=colors,
            edgecolor="white",
            linewidth=0.5,
        )
        axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
        axes.plot(
            [confidence[place] for place in places],
            [accuracy[place] for place in places],
            color="tab:red",
            marker=".",
            linewidth=1,
        )
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_title(
            f"{name}\ncalibration error {100 * values['calibration_error'][name]:.1f} %",
            fontsize="small",
        )
    figure.supxlabel("confidence", fontsize="small")
    figure.supylabel("accuracy", fontsize="small")
    return (
        figure,
        "reliability: accuracy at each confidence",
        (
            f"For every row the accuracy over the images of each of {ECE_BINS} bins of confidence,"
            " darker with more images; on the dashed diagonal confidence is accuracy, below it too"
            " high."
        ),
    )


def _confusion(
    plt: Any, confusion: Mapping[str, Mapping[str, int]], classes: Sequence[str], student: str
) -> tuple[Any, str, str]:
    """A heat map of the student's confusion matrix; of many classes those of its most frequent
    confusions.
    """
    shown = list(classes)
    if len(classes) > MOST_CLASSES:
        mistakes = [
            (-count, name, other)
            for name, found in confusion.items()
            for other, count in found.items()
            if name != other
        ]
        often = dict.fromkeys(
            [*(each for _, name, other in sorted(mistakes) for each in (name, other)), *classes]
        )
        most = set(list(often)[:MOST_CLASSES])
        shown = [name for name in classes if name in most]
    totals = {name: sum(confusion[name].values()) for name in shown}
    table = [
        [confusion[name].get(other, 0) / totals[name] if totals[name] else None for other in shown]
        for name in shown
    ]
    figure, axes = plt.subplots(
        figsize=(0.42 * len(shown) + 2.4, 0.42 * len(shown) + 2), layout="constrained"
    )
    _heat_map(figure, axes, table, shown, shown)
    axes.set(xlabel=f"what {student} says", ylabel="class")
    of = (
        f"; {len(shown)} of {len(classes)} classes, those of the most frequent mistakes"
        if len(shown) < len(classes)
        else ""
    )
    return (
        figure,
        f"confusion of {student}: fraction of each class's images{of}",
        (
            f"Heat map of the confusion matrix of {student}, every line divided by the number of"
            f" images of its class{of}."
        ),
    )


def _mixing(plt: Any, values: Mapping[str, Any], classes: Sequence[str]) -> tuple[Any, str, str]:
    """A heat map of the mean mixing weights, over all images and of each class; of many classes
    those that are mixed most differently.
    """
    lines = [(mixture, name) for mixture, weights in values["mixing"].items() for name in weights]
    labels = [f"{mixture} \N{LEFTWARDS ARROW} {name}" for mixture, name in lines]

    def apart(each: str) -> float:
        means = [
            (values["class_mixing"][mixture][name][each], values["mixing"][mixture][name])
            for mixture, name in lines
        ]
        return max(abs(mean - overall) if mean is not None else 0.0 for mean, overall in means)

    most = set(sorted(classes, key=apart, reverse=True)[:MOST_CLASSES])
    shown = [each for each in classes if each in most]
    of = (
        f"; {len(shown)} of {len(classes)} classes, those that are mixed most differently"
        if len(shown) < len(classes)
        else ""
    )
    table = [
        [
            values["mixing"][mixture][name],
            *(values["class_mixing"][mixture][name][each] for each in shown),
        ]
        for mixture, name in lines
    ]
    figure, axes = plt.subplots(
        figsize=(0.45 * len(shown) + 3.4, 0.4 * len(lines) + 2.2), layout="constrained"
    )
    _heat_map(figure, axes, table, labels, ["all images", *shown])
    axes.axvline(0.5, color="white", linewidth=3)
    return (
        figure,
        f"mean mixing weights, over all images and of each class{of}",
        (
            "Heat map of the mean weight of each input of each mixture, over all images: "
            + ", ".join(f"{label} {line[0]:.2f}" for label, line in zip(labels, table, strict=True))
            + f"; and over the images of each class{of}."
        ),
    )


def _mixing_by_epoch(
    plt: Any, weights: Mapping[str, Mapping[str, Mapping[str, float | None]]]
) -> tuple[Any, str, str]:
    """For every mixture the mean weight of each of its inputs, epoch by epoch."""
    figure, panels = _panels(plt, len(weights))
    for axes, (mixture, inputs) in zip(panels, weights.items(), strict=True):
        for name, by_epoch in inputs.items():
            epochs = [int(epoch) for epoch, value in by_epoch.items() if value is not None]
            axes.plot(
                epochs,
                [by_epoch[str(epoch)] for epoch in epochs],
                marker="." if len(epochs) < 20 else None,
                label=name,
            )
        axes.set_ylim(0, 1)
        axes.set_title(mixture, fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supxlabel("epoch", fontsize="small")
    figure.supylabel("mean weight", fontsize="small")
    return (
        figure,
        "mixing weights by epoch",
        (
            "The mean weight of each input of each mixture at the evaluation after every epoch of"
            " training."
        ),
    )


def _panels(plt: Any, count: int) -> tuple[Any, list[Any]]:
    """A figure with so many small panels, four in a line, that share their axes."""
    columns = min(4, count)
    lines = -(-count // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(2.8 * columns + 0.8, 2.7 * lines + 0.8),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes in grid.flat[count:]:
        axes.remove()
    panels = list(grid.flat[:count])
    for axes in panels[-columns:]:
        axes.tick_params(labelbottom=True)
    return figure, panels


def _heat_map(
    figure: Any,
    axes: Any,
    table: Sequence[Sequence[float | None]],
    lines: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Values in [0, 1] in percent, as colours and as numbers where these are not 0; None stays
    white.
    """
    numbers = [[math.nan if value is None else 100 * value for value in line] for line in table]
    image = axes.imshow(numbers, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, label="%")
    axes.set_yticks(range(len(lines)), lines, fontsize="small")
    axes.set_xticks(range(len(columns)), columns, fontsize="small", rotation=90)
    for y, line in enumerate(numbers):
        for x, value in enumerate(line):
            if value >= 0.5:
                axes.text(
                    x,
                    y,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize="x-small",
                    color="white" if value < 60 else "black",
                )
