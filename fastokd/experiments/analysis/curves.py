"""Figures of runs over their epochs: accuracies, loss terms, schedules and throughput."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.experiments.analysis.figures import (
    FigureFiles,
    encoded,
    label_log_axis,
    label_of,
    panel_grid,
    require_matplotlib,
)
from fastokd.train.logs import Record

Groups = Mapping[str, Sequence[Sequence[Record]]]
"""For each label (e.g. a method) its runs, one per seed; a run is the list of its epoch records."""

Curve = Mapping[int, float]
"""Values by epoch, counted from 1."""


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: the value of a name, in a section of each record or at its top, scaled."""

    title: str
    section: str | None
    name: str
    scale: float = 1.0
    logarithmic: bool = False

    def curves(self, runs: Sequence[Sequence[Record]]) -> list[Curve]:
        """A curve for each run that has recorded the value."""
        curves: list[Curve] = []
        for records in runs:
            curve = {}
            for record in records:
                part = record if self.section is None else record.get(self.section)
                value = part.get(self.name) if isinstance(part, Mapping) else None
                if isinstance(value, int | float):
                    curve[record["epoch"] + 1] = self.scale * value
            if curve:
                curves.append(curve)
        return curves


def row_figures(groups: Groups, title: str, formats: Sequence[str]) -> Iterator[FigureFiles]:
    """A figure for each branch and teacher assistant: its accuracy on the evaluation split.

    Args:
        groups: drawn over each other. Of several seeds the mean is a line and their range a band;
            epochs that only some of them have are dotted, each run for itself.
        title: the beginning of every figure's title.
        formats: "png", "svg".
    """
    for panel in _rows(groups):
        yield _figure(
            panel.title, title, panel.title, [panel], groups, formats, unit=_ACCURACY, small=True
        )


def overview_figures(groups: Groups, title: str, formats: Sequence[str]) -> Iterator[FigureFiles]:
    """``overview``: the accuracies of all branches and teacher assistants side by side."""
    shows = "accuracy on the evaluation split"
    rows = _rows(groups)
    yield _figure("overview", title, shows, rows, groups, formats, _ACCURACY, share_scale=True)


def training_figures(groups: Groups, title: str, formats: Sequence[str]) -> Iterator[FigureFiles]:
    """``loss`` with every term, ``schedule`` with learning rate and ramp-up, ``throughput``."""
    names = [name for name in _names(groups, "train") if not name.startswith("accuracy/")]
    if names:
        terms = [_Panel(name, "train", name) for name in names]
        shows = "training loss, and its terms before they are weighted"
        yield _figure("loss", title, shows, terms, groups, formats)
    schedule = [_Panel("learning rate", None, "lr", logarithmic=True)]
    ramp_up = _Panel("ramp-up (kd_weight)", None, "kd_weight")
    if any(map(ramp_up.curves, groups.values())):
        schedule.append(ramp_up)
    yield _figure("schedule", title, "schedules", schedule, groups, formats)
    throughput = [
        _Panel("training, images/s", None, "images_per_second"),
        _Panel("waiting for images, % of the time", None, "waiting_share", 100),
    ]
    yield _figure("throughput", title, "throughput", throughput, groups, formats, from_zero=True)


FIGURES = (row_figures, overview_figures, training_figures)
"""All figures of runs."""


def draw_curves(
    groups: Groups,
    folder: Path,
    title: str,
    formats: Sequence[str] = ("png",),
    figures: Sequence[Callable[[Groups, str, Sequence[str]], Iterator[FigureFiles]]] = FIGURES[:2],
) -> list[Path]:
    """Write the figures of some functions such as ``row_figures``, and return the files."""
    drawn = (figure for draw in figures for figure in draw(groups, title, formats))
    return [file for figure in drawn for file in figure.write(folder)]


_ACCURACY = "evaluation accuracy, %"


def _rows(groups: Groups) -> list[_Panel]:
    return [_Panel(name, "eval", name, 100) for name in _names(groups, "eval")]


def _names(groups: Groups, section: str) -> list[str]:
    """The names in a section of the records, in order."""
    records = (record for runs in groups.values() for records in runs for record in records)
    parts = (record.get(section) for record in records)
    return list(dict.fromkeys(name for part in parts if isinstance(part, Mapping) for name in part))


def _figure(
    name: str,
    title: str,
    shows: str,
    panels: Sequence[_Panel],
    groups: Groups,
    formats: Sequence[str],
    unit: str = "",
    share_scale: bool = False,
    from_zero: bool = False,
    small: bool = False,
) -> FigureFiles:
    """Draw panels side by side, in figures of one width, so that a page shows all texts alike; a
    ``small`` figure has one panel without a title.
    """
    plt = require_matplotlib()
    columns = min(3 if len(panels) <= 6 else 4, len(panels))
    lines = -(-len(panels) // columns)
    width, height = (6.0, 4.0) if small else (12.0, {3: 3.0, 4: 2.6}.get(columns, 3.4) * lines)
    size = width, height + 0.2 * len(groups)
    figure, grid = panel_grid(plt, len(panels), columns, size, sharex=True, sharey=share_scale)
    last_values, handles = [], {}
    for index, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        ends = _draw_panel(axes, groups, panel)
        last_values.append(f"{panel.title}: " + (", ".join(ends) or "not recorded"))
        axes.set_ylabel("" if index % columns else unit)
        if from_zero:
            axes.set_ylim(bottom=0)
        if not small:
            axes.set_title(panel.title, fontsize="medium")
        if index + columns >= len(panels):
            axes.set_xlabel("epoch")
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize="small")
    figure.suptitle(f"{title}: {shows}", fontsize="medium" if small else "large", wrap=True)
    description = f"{title}: {shows}. Last values: {'; '.join(last_values)}."
    return FigureFiles(name, shows, description, encoded(plt, figure, formats))


def _draw_panel(axes: Any, groups: Groups, panel: _Panel) -> list[str]:
    """Draw each group's mean and range; returns their last values in words."""
    ends = []
    for number, (label, runs) in enumerate(groups.items()):
        curves = panel.curves(runs)
        if not curves:
            continue
        # Different styles show lines that coincide, and do not depend on seeing colors.
        color, style = f"C{number % 10}", ("-", "--", "-.")[number % 3]
        epochs = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        mean = [statistics.mean(each) for each in values]
        seeds = f" (mean and range of {len(curves)} seeds)" if len(curves) > 1 else ""
        marker = "." if len(epochs) == 1 else ""
        line = {"color": color, "linestyle": style, "linewidth": 2, "marker": marker}
        axes.plot(epochs, mean, **line, label=f"{label_of(label)}{seeds}")
        if len(curves) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        for curve in curves:
            rest = {
                epoch: value for epoch, value in curve.items() if not epochs or epoch >= epochs[-1]
            }
            if len(rest) > 1:
                axes.plot(list(rest), list(rest.values()), color=color, linestyle=":", linewidth=1)
        if mean:
            ends.append(f"{label} {mean[-1]:.4g} in epoch {epochs[-1]}")
    drawn = (value for line in axes.get_lines() for value in line.get_ydata())
    if panel.logarithmic and all(value > 0 for value in drawn):
        axes.set_yscale("log")
        label_log_axis(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return ends
