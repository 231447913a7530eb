"""Tables and the figure of a result file of ``bench.accuracy``, for the pages."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.accuracy.presets import PRESETS
from bench.gpu.results import ROOT
from fastokd.experiments.analysis.compare import difference_cells, paired_test
from fastokd.experiments.analysis.figures import label_log_axis, require_matplotlib, save_svg
from fastokd.experiments.analysis.tables import markdown_table, spread
from fastokd.train.config import TrainConfig

EQUAL = 0.1
"""The largest relative difference of training compute that counts as equal; more than in ``fastokd
compare``, because the students alone are trained with a few numbers of epochs.
"""


class Row(NamedTuple):
    """The finished runs of a row.

    Attributes:
        name: of the row.
        settings: its configuration.
        errors: of the student after the last epoch in %, by seed.
        best: the same after the student's best epoch.
        ensemble: the same of the ensemble after the last epoch; empty without one.
        epochs: of each run.
        flops: of training, of each run.
        hours: of training, the mean over the runs.
        data: of rows that were trained on another list than the others, its record.
    """

    name: str
    settings: Mapping[str, Any]
    errors: Mapping[int, float]
    best: Mapping[int, float]
    ensemble: Sequence[float]
    epochs: int
    flops: int
    hours: float
    data: Mapping[str, Any] | None = None


def read_rows(found: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of a result file by name, in the file's order. Options that are newer than a row
    have their defaults.
    """
    rows, defaults = {}, yaml.safe_load(TrainConfig().to_yaml())
    for name in dict.fromkeys(run["row"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["row"] == name]
        rows[name] = Row(
            name,
            {**defaults, **found["settings"][name]},
            {run["seed"]: _error(run["last"][run["student"]]) for run in runs},
            {run["seed"]: _error(run["best"][run["student"]]) for run in runs},
            [_error(run["last"]["ensemble"]) for run in runs if "ensemble" in run["last"]],
            runs[0]["epochs"],
            runs[0]["flops"],
            statistics.mean(run["seconds"] for run in runs) / 3600,
            runs[0].get("data"),
        )
    return rows


def _error(accuracy: float) -> float:
    return 100 * (1 - accuracy)


def accuracy_tables(path: Path) -> list[str]:
    """The lines of the page about a result file: its table, and its figure."""
    found = json.loads(path.read_text(encoding="utf-8"))
    every, preset = read_rows(found), PRESETS[found["preset"]]
    rows = {name: row for name, row in every.items() if row.data is None}
    alone = rows.get(preset.alone)
    lines = [
        (
            row.name,
            ", ".join(map(str, sorted(row.errors))),
            str(row.epochs),
            spread([*row.errors.values()]),
            spread([*row.best.values()]),
            spread(row.ensemble),
            f"{row.flops / alone.flops:.2f}" if alone else "-",
            _difference(row, _equal_epochs(row, rows)),
            _difference(row, _equal_compute(row, rows)),
            f"{row.hours:.1f}",
        )
        for row in rows.values()
    ]
    head = (
        "row",
        "seeds",
        "epochs",
        "student's error, %",
        "best epoch, %",
        "ensemble's error, %",
        f"training FLOPs / {preset.alone}",
        "difference from alone, equal epochs",
        "difference from alone, equal compute",
        "hours",
    )
    return [
        f"### {preset.title}",
        "",
        _setting(path, found),
        "",
        *markdown_table([head, *lines]),
        (
            "Errors are of the last epoch, mean +- sample standard deviation over the seeds; the"
            " best epoch is selected on the evaluation images and therefore optimistic. Differences"
            " are in percentage points from the student alone with as many epochs, and with as much"
            f" training compute (within {EQUAL:.0%}), over the shared seeds (negative: a better"
            " student), with the p-value of a two-sided paired t-test. Training FLOPs count three"
            " forward passes of all trained networks for each image. Hours are of training on a"
            " shared machine."
        ),
        "",
        *(
            line
            for row in every.values()
            if row.data
            for line in (_other_images(row, row.data), "")
        ),
        *([_missing(every, preset.rows), ""] if _missing(every, preset.rows) else []),
        f"![{preset.title}: error over training compute](figures/{path.stem}.svg)",
        "",
    ]


def _setting(path: Path, found: Mapping[str, Any]) -> str:
    """The data, the shared settings, and the versions of a result file."""
    counts = [f"{count:,} {name}" for name, count in found["data"]["num_images"].items()]
    shared = found["settings"].get(PRESETS[found["preset"]].alone, {})
    settings = ", ".join(
        f"{name} {shared[name]}"
        for name in ("batch_size", "schedule", "lr", "weight_decay", "precision")
        if name in shared
    )
    machines = [run["environment"] for run in found["runs"]]
    versions = ", ".join(dict.fromkeys(each["torch"] for each in machines))
    commits = ", ".join(dict.fromkeys(str(each["commit"]) for each in machines))
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return (
        f"{' and '.join(counts)} images of {found['data']['num_classes']} classes; {settings}"
        f" (all settings: `bench/accuracy/presets.py`); {machines[0]['device']}, torch"
        f" {versions}; commit {commits}; `{where}`, made by `python -m bench.accuracy"
        f" {found['preset']}`."
    )


def _equal_epochs(row: Row, rows: Mapping[str, Row]) -> Row | None:
    """The student alone with as many epochs; None for such rows themselves."""
    if _is_alone(row):
        return None
    return next((each for each in _alone_like(row, rows) if each.epochs == row.epochs), None)


def _equal_compute(row: Row, rows: Mapping[str, Row]) -> Row | None:
    """The student alone with the closest training compute, within ``EQUAL``; None for such rows
    themselves.
    """
    others = [] if _is_alone(row) else _alone_like(row, rows)
    distances = {each.name: abs(each.flops / row.flops - 1) for each in others}
    closest = min(others, key=lambda each: distances[each.name], default=None)
    return closest if closest and distances[closest.name] <= EQUAL else None


def _is_alone(row: Row) -> bool:
    """True for the student alone, without a teacher."""
    return row.settings["method"] == "baseline" and not row.settings.get("teacher")


def _alone_like(row: Row, rows: Mapping[str, Row]) -> list[Row]:
    """The rows of the student alone, of the same network from the same weights."""
    return [
        each
        for each in rows.values()
        if _is_alone(each)
        and all(each.settings.get(name) == row.settings.get(name) for name in ("model", "weights"))
    ]


def _other_images(row: Row, data: Mapping[str, Any]) -> str:
    """A line about a row that was trained on other images."""
    counts = [f"{count:,} {name}" for name, count in data["num_images"].items()]
    return (
        f"{row.name}: {row.settings['model']}, {row.epochs} epochs on {' and '.join(counts)} images"
        f" of {data['num_classes']} other classes; error {spread([*row.errors.values()])} %."
    )


def _difference(row: Row, reference: Row | None) -> str:
    """The mean difference of the errors over shared seeds, with n and p."""
    test = paired_test(row.errors, reference.errors) if reference else None
    difference, p = difference_cells(test, False)
    return difference if p == "-" else f"{difference}, p {p}"


def _missing(rows: Mapping[str, Row], planned: Mapping[str, Any]) -> str:
    names = [name for name in planned if name not in rows]
    return f"Not trained yet: {'; '.join(names)}." if names else ""


# --- the figure


def frontier(path: Path) -> dict[str, Any]:
    """The data of the figure: series of points, the rows that differ only in epochs."""
    found = json.loads(path.read_text(encoding="utf-8"))
    series: dict[str, list[dict[str, Any]]] = {}
    labels: dict[str, str] = {}
    for row in read_rows(found).values():
        if row.data is not None:
            continue
        settings = {name: value for name, value in row.settings.items() if name != "epochs"}
        label = labels.setdefault(json.dumps(settings, sort_keys=True), row.name)
        errors = [*row.errors.values()]
        point = {
            "teraflops": row.flops / 1e12,
            "error": statistics.mean(errors),
            "deviation": statistics.stdev(errors) if len(errors) > 1 else 0.0,
            "epochs": row.epochs,
            "seeds": len(errors),
        }
        series.setdefault(label, []).append(point)
    for points in series.values():
        points.sort(key=lambda point: point["teraflops"])
    return {"title": PRESETS[found["preset"]].title, "series": series}


def draw_frontier(data: Mapping[str, Any], path: Path) -> Path:
    """Draw the student's error over the training compute, as an SVG file.

    Args:
        data: see ``frontier``. Series with several points are lines, with their epochs.
        path: the file.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    markers = "osD^vP*Xdph<>"
    for place, (label, points) in enumerate(data["series"].items()):
        x, y, deviation = (
            [point[name] for point in points] for name in ("teraflops", "error", "deviation")
        )
        axes.errorbar(
            x,
            y,
            yerr=deviation,
            label=label,
            marker=markers[place % len(markers)],
            linestyle="-" if len(points) > 1 else "none",
            capsize=3,
        )
        if len(points) > 1:
            for point in points:
                axes.annotate(
                    f"{point['epochs']}",
                    (point["teraflops"], point["error"]),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize="x-small",
                )
    axes.set_xscale("log")
    label_log_axis(axes.xaxis)
    axes.set_xlabel("training compute, TFLOPs (numbers at points: epochs)")
    axes.set_ylabel("student's error in the last epoch, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    title = f"{data['title']}; bars: sample standard deviation"
    figure.suptitle(title, fontsize="medium", wrap=True)
    return save_svg(plt, figure, path, data)
