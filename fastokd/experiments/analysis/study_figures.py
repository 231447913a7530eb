"""The figures of ``fastokd analyze``, each as SVG and PNG."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.errors import MissingExtra
from fastokd.experiments.analysis import figures
from fastokd.experiments.analysis.figures import panel_grid
from fastokd.experiments.analysis.gather import Gathered
from fastokd.metrics import ECE_BINS
from fastokd.storage import storage_error

NAMES = ("tsne", "distances", "agreement", "reliability", "confusion", "mixing", "mixing-by-epoch")
"""The names of all figures; the files are NAME.svg and NAME.png."""

MOST_CLASSES = 20
"""Classes that a figure can name one by one."""

_MARKED = 10  # classes that have distinct colors in the t-SNE


class _Undrawable(Exception):
    """The reason why there is nothing to draw."""


class _Study(NamedTuple):
    """The numbers of an analysis; ``values`` are those of its measures by key."""

    plt: Any
    found: Gathered
    values: Mapping[str, Any]
    rows: Sequence[str]
    classes: Sequence[str]
    student: str
    errors: int


Drawing = tuple[Any, str, str]
"""A figure, its title and a description."""


def draw_study(
    record: Mapping[str, Any], found: Gathered, folder: Path
) -> tuple[list[dict[str, str]], list[str]]:
    """Draw everything that a run's analysis has numbers for, and remove the files of other figures
    of ``NAMES`` from the folder. ``found`` is the data that ``record`` was computed from.

    Returns:
        Name, title and description of each figure, and a line with the reason for each figure that
        could not be drawn.
    """
    drawn: list[dict[str, str]] = []
    notes: list[str] = []
    try:
        plt = figures.require_matplotlib()
    except MissingExtra as error:
        notes.append(f"no figures: {error}")
    else:
        values = {key: measure["values"] for key, measure in record["measures"].items()}
        facts = (record[key] for key in ("rows", "classes", "student", "student_errors"))
        study = _Study(plt, found, values, *facts)
        images = f"{record['images']} {record['split']} images"
        subtitle = f"{record['run']}, {images}, epoch {record['epochs']}"
        for name, draw in _drawings(study).items():
            try:
                figure, title, description = draw(study)
            except (_Undrawable, MissingExtra) as error:
                notes.append(f"no figure {name}: {error}")
                continue
            figure.suptitle(f"{title}\n{subtitle}", fontsize="medium")
            files = figures.encoded(plt, figure, ("svg", "png"))
            figures.FigureFiles(name, title, description, files).write(folder)
            drawn.append({"name": name, "title": title, "description": description})
    stale = set(NAMES) - {drawing["name"] for drawing in drawn}
    for path in (folder / f"{name}.{ending}" for name in stale for ending in ("svg", "png")):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(path, error) from error
    return drawn, notes


def _drawings(study: _Study) -> dict[str, Callable[[_Study], Drawing]]:
    """The figures that this analysis has numbers for; its notes give the reasons for fewer."""
    several = len(study.rows) > 1
    available = {
        "tsne": study.errors and len(study.found.feature_labels) and _tsne,
        "distances": several and _distances,
        "agreement": several and _agreement,
        "reliability": _reliability,
        "confusion": _confusion,
        "mixing": "mixing" in study.values and _mixing,
        "mixing-by-epoch": "epoch_mixing" in study.values and _mixing_by_epoch,
    }
    return {name: draw for name, draw in available.items() if callable(draw)}


def _tsne(study: _Study) -> Drawing:
    """One embedding of all branches' features if these have one width, else one of each branch."""
    plt, features, labels = study.plt, study.found.features, study.found.feature_labels
    classes, student = study.classes, study.student
    together = len({values.shape[1] for values in features.values()}) == 1
    groups = [list(features)] if together else [[name] for name in features]
    embedded = [_embed(torch.cat([features[name] for name in group])) for group in groups]
    counts = torch.bincount(labels, minlength=len(classes))
    frequent = counts.argsort(descending=True, stable=True)[:_MARKED].tolist()
    marked = sorted(index for index in frequent if counts[index])
    # With few classes each has its own color in the figures of all runs.
    cmap, few = plt.get_cmap("tab10"), len(classes) <= _MARKED
    colors = {index: cmap(index if few else order) for order, index in enumerate(marked)}
    others = ~torch.isin(labels, torch.tensor(list(colors)))
    size = (7.5 if together else 4.5 * len(groups), 6)
    figure, panels = panel_grid(plt, len(groups), len(groups), size)
    numbers = {name: index for index, name in enumerate(features, start=1)}
    for axes, group, points in zip(panels, groups, embedded, strict=True):
        for name, branch in zip(group, points.chunk(len(group)), strict=True):
            style = {"marker": f"${numbers[name]}$", "s": 28, "linewidths": 0.3}
            axes.scatter(*branch[others].T, color="lightgray", **style)
            for index, color in colors.items():
                axes.scatter(*branch[labels == index].T, color=color, **style)
        names = (
            f"{numbers[name]}: {name}{' (student)' if name == student else ''}" for name in group
        )
        axes.set(xticks=[], yticks=[], xlabel="  ".join(names))
    legend = {figures.label_of(classes[index]): color for index, color in colors.items()}
    if int((counts > 0).sum()) > len(colors):
        legend["other classes"] = "lightgray"
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=color, label=label)
        for label, color in legend.items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", title="class")
    images = f"features of {len(labels)} images that {student} gets wrong"
    description = (
        f"t-SNE of the branches' pooled {images}: the colour is the class, the digit the branch."
    )
    if not together:
        description += (
            " The branches' features differ in width, so that each has a separate embedding."
        )
    return figure, f"t-SNE of the branches' {images}", description


def _embed(points: Tensor) -> Tensor:
    """[n, 2] of [n, c]: t-SNE (van der Maaten and Hinton 2008) with perplexity 30, or a third of
    the other points if there are fewer than 91.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise MissingExtra("t-SNE needs scikit-learn: pip install -e '.[plots]'") from None
    count = len(points)
    if count < 4 or not points.var(0).any():
        raise _Undrawable(
            f"t-SNE needs at least 4 points that differ, and there are {len(points.unique(dim=0))}"
        )
    embedding = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0)
    return torch.from_numpy(embedding.fit_transform(points.numpy()))


def _distances(study: _Study) -> Drawing:
    """Bars of the distance of every row from the student."""
    values, student = study.values, study.student
    wrong = f"logits, over the {study.errors} images that {student} gets wrong"
    distances = {
        wrong: values["logit_distance"][student],
        "softmax outputs, over all images": values["softmax_distance"][student],
    }
    distances = {label: each for label, each in distances.items() if None not in each.values()}
    others = [name for name in values["accuracy"] if name != student]
    count, height = len(distances), 0.35 * len(others) + 1.8
    figure, panels = panel_grid(study.plt, count, count, (5 * count, height), sharey=True)
    words = []
    for axes, (label, by_row) in zip(panels, distances.items(), strict=True):
        bars = axes.barh(others, [by_row[name] for name in others], color="tab:blue")
        axes.bar_label(bars, fmt=" {:.3g}", fontsize="small")
        axes.margins(x=0.15)
        axes.set_xlabel(f"mean Euclidean distance of {label}", fontsize="small")
        words.append(f"{label}: " + ", ".join(f"{name} {by_row[name]:.3g}" for name in others))
    panels[0].invert_yaxis()
    description = f"Mean Euclidean distance between {student} and every other row: "
    return figure, f"distance to {student}", description + "; ".join(words) + "."


def _agreement(study: _Study) -> Drawing:
    """Heat maps of the fraction of equal predictions and of shared errors of two rows."""
    rows, side = study.rows, 0.55 * len(study.rows)
    figure, panels = panel_grid(study.plt, 2, 2, (2 * (side + 2.4), side + 2.2))
    labels = {"agreement": "the same class", "error_overlap": "errors that both make"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        table = [[study.values[key][one][other] for other in rows] for one in rows]
        _percentages(figure, axes, table, rows, rows)
        axes.set_title(label, fontsize="small")
    description = (
        "Two heat maps over all pairs of rows: the fraction of images for which both name the same"
        " class, and of the images that one gets wrong the fraction that both get wrong."
    )
    return figure, "agreement and error overlap", description


def _reliability(study: _Study) -> Drawing:
    """For every row bars of the accuracy at each confidence, over the diagonal."""
    figure, panels = _small_panels(study.plt, len(study.rows))
    blues = study.plt.get_cmap("Blues")
    for axes, name in zip(panels, study.rows, strict=True):
        counts, accuracy, confidence = (
            list(study.values[key][name].values())
            for key in ("bin_count", "bin_accuracy", "bin_confidence")
        )
        bins = [index for index, count in enumerate(counts) if count]
        heights = [accuracy[index] for index in bins]
        axes.bar(
            [index / ECE_BINS for index in bins],
            heights,
            width=1 / ECE_BINS,
            align="edge",
            # Bins with few images say little and count little.
            color=[blues(0.25 + 0.6 * (counts[index] / sum(counts)) ** 0.5) for index in bins],
            edgecolor="white",
            linewidth=0.5,
        )
        axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
        means = [confidence[index] for index in bins]
        axes.plot(means, heights, color="tab:red", marker=".", linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        error = 100 * study.values["calibration_error"][name]
        axes.set_title(f"{name}\ncalibration error {error:.1f} %", fontsize="small")
    figure.supxlabel("confidence", fontsize="small")
    figure.supylabel("accuracy", fontsize="small")
    description = (
        f"For every row the accuracy over the images of each of {ECE_BINS} bins of confidence,"
        " darker with more images; on the dashed diagonal confidence is accuracy, below it too"
        " high."
    )
    return figure, "reliability: accuracy at each confidence", description


def _confusion(study: _Study) -> Drawing:
    """A heat map of the student's confusion matrix, or of its most frequent confusions."""
    confusion, student = study.values["confusion"], study.student
    mistakes = sorted(
        (-count, name, other)
        for name, counts in confusion.items()
        for other, count in counts.items()
        if name != other
    )
    frequent = dict.fromkeys(each for _, name, other in mistakes for each in (name, other))
    shown, of = _shown(study, [*frequent], "those of the most frequent mistakes")
    totals = {name: sum(confusion[name].values()) for name in shown}
    table = [
        [confusion[name].get(other, 0) / totals[name] if totals[name] else None for other in shown]
        for name in shown
    ]
    side = 0.42 * len(shown)
    figure, (axes,) = panel_grid(study.plt, 1, 1, (side + 2.4, side + 2))
    _percentages(figure, axes, table, shown, shown)
    axes.set(xlabel=f"what {student} says", ylabel="class")
    description = (
        f"Heat map of the confusion matrix of {student}, every line divided by the number of images"
        f" of its class{of}."
    )
    return figure, f"confusion of {student}: fraction of each class's images{of}", description


def _mixing(study: _Study) -> Drawing:
    """A heat map of the mean mixing weights, over all images and of some classes."""
    overall, by_class = study.values["mixing"], study.values["class_mixing"]
    lines = [(mixture, name) for mixture, weights in overall.items() for name in weights]
    labels = [f"{mixture} \N{LEFTWARDS ARROW} {name}" for mixture, name in lines]

    def deviation(each: str) -> float:
        means = ((by_class[mix][name][each], overall[mix][name]) for mix, name in lines)
        return max(0.0 if mean is None else abs(mean - total) for mean, total in means)

    ordered = sorted(study.classes, key=deviation, reverse=True)
    shown, of = _shown(study, ordered, "those that are mixed most differently")
    table = [
        [overall[mixture][name], *(by_class[mixture][name][each] for each in shown)]
        for mixture, name in lines
    ]
    size = (0.45 * len(shown) + 3.4, 0.4 * len(lines) + 2.2)
    figure, (axes,) = panel_grid(study.plt, 1, 1, size)
    _percentages(figure, axes, table, labels, ["all images", *shown])
    axes.axvline(0.5, color="white", linewidth=3)
    means = ", ".join(f"{label} {line[0]:.2f}" for label, line in zip(labels, table, strict=True))
    description = (
        "Heat map of the mean weight of each input of each mixture, over all images:"
        f" {means}; and over the images of each class{of}."
    )
    return figure, f"mean mixing weights, over all images and of each class{of}", description


def _shown(study: _Study, ordered: Sequence[str], which: str) -> tuple[list[str], str]:
    """At most ``MOST_CLASSES`` classes, the first of ``ordered``, and a remark on the selection."""
    classes = study.classes
    if len(classes) <= MOST_CLASSES:
        return list(classes), ""
    selected = set(list(dict.fromkeys([*ordered, *classes]))[:MOST_CLASSES])
    shown = [name for name in classes if name in selected]
    return shown, f"; {len(shown)} of {len(classes)} classes, {which}"


def _mixing_by_epoch(study: _Study) -> Drawing:
    """For every mixture the mean weight of each of its inputs by epoch."""
    mixtures = study.values["epoch_mixing"]
    figure, panels = _small_panels(study.plt, len(mixtures))
    for axes, (mixture, inputs) in zip(panels, mixtures.items(), strict=True):
        for name, weights in inputs.items():
            known = {int(epoch): value for epoch, value in weights.items() if value is not None}
            marker = "." if len(known) < 20 else None
            axes.plot(list(known), list(known.values()), marker=marker, label=name)
        axes.set_ylim(0, 1)
        axes.set_title(mixture, fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supxlabel("epoch", fontsize="small")
    figure.supylabel("mean weight", fontsize="small")
    description = (
        "The mean weight of each input of each mixture at the evaluation after every epoch of"
        " training."
    )
    return figure, "mixing weights by epoch", description


def _small_panels(plt: Any, count: int) -> tuple[Any, list[Any]]:
    columns = min(4, count)
    size = (2.8 * columns + 0.8, 2.7 * -(-count // columns) + 0.8)
    return panel_grid(plt, count, columns, size, sharex=True, sharey=True)


def _percentages(
    figure: Any,
    axes: Any,
    table: Sequence[Sequence[float | None]],
    lines: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Draw values in [0, 1] in percent, with numbers where these are not 0; None stays white."""
    numbers = [[None if value is None else 100 * value for value in line] for line in table]
    texts = [
        [f"{value:.0f}" if value and value >= 0.5 else "" for value in line] for line in numbers
    ]
    scale = {"vmin": 0, "vmax": 100, "cmap": "viridis"}
    image = figures.draw_heat_map(axes, numbers, texts, "x-small", **scale)
    figure.colorbar(image, ax=axes, label="%")
    lines, columns = (list(map(figures.label_of, names)) for names in (lines, columns))
    axes.set_yticks(range(len(lines)), lines, fontsize="small")
    axes.set_xticks(range(len(columns)), columns, fontsize="small", rotation=90)
