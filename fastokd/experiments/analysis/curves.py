"""What runs have recorded, over their epochs: accuracies, loss terms, schedules and throughput as
pictures.
"""

import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.errors import MissingExtra
from fastokd.storage import write_atomically
from fastokd.train.logs import Record

Groups = Mapping[str, Sequence[Sequence[Record]]]
"""For each label (e.g. a method) its runs, one per seed; a run is the list of its epoch records."""

Curve = Mapping[int, float]
"""Epochs, counted from 1, and values."""


def require_matplotlib() -> Any:
    """matplotlib with a backend that needs no display.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("drawing needs matplotlib: pip install 'fastokd[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Attributes:
        name: of its files, without the ending.
        title: what it shows.
        description: that with the last values, for who cannot see it.
        files: its content by format, "png" or "svg".
    """

    name: str
    title: str
    description: str
    files: Mapping[str, bytes]

    def write(self, folder: Path) -> list[Path]:
        """Write the files, and return them.

        Raises:
            StorageError: the disk refused.
        """
        written = []
        for ending, content in self.files.items():
            written.append(folder / f"{self.name}.{ending}")
            write_atomically(written[-1], lambda file, content=content: file.write(content))
        return written


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: of each record the value of a name, in a section of the record or at its
    top, scaled.
    """

    title: str
    section: str | None
    name: str
    scale: float = 1.0
    logarithmic: bool = False

    def value(self, record: Record) -> float | None:
        part = record if self.section is None else record.get(self.section)
        value = part.get(self.name) if isinstance(part, Mapping) else None
        return self.scale * value if isinstance(value, int | float) else None


def row_names(runs: Sequence[Sequence[Record]]) -> list[str]:
    """The branches and teacher assistants that appear in the runs' evaluations, in order."""
    return _names(runs, "eval")


def row_pictures(groups: Groups, title: str, formats: Sequence[str]) -> Iterator[Picture]:
    """A picture for each branch and teacher assistant: its accuracy on the evaluation split.

    Args:
        groups: what is drawn over each other. Of several seeds the mean is a line and their range a
            band; epochs that only some of them have are dotted, each run for itself.
        title: what comes before every picture's own title.
        formats: "png", "svg".

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    for panel in _rows(groups):
        yield _picture(panel.title, title, panel.title, [panel], groups, formats, unit=_ACCURACY)


def overview_pictures(groups: Groups, title: str, formats: Sequence[str]) -> Iterator[Picture]:
    """``overview``: the accuracies of all branches and teacher assistants side by side. Arguments
    and errors as ``row_pictures``.
    """
    yield _picture(
        "overview",
        title,
        "accuracy on the evaluation split",
        _rows(groups),
        groups,
        formats,
        unit=_ACCURACY,
        share_scale=True,
    )


def training_pictures(groups: Groups, title: str, formats: Sequence[str]) -> Iterator[Picture]:
    """``loss`` with every term, ``schedule`` with learning rate and ramp-up, ``throughput``.
    Arguments and errors as ``row_pictures``.
    """
    terms = [
        _Panel(name, "train", name)
        for name in _names(_runs(groups), "train")
        if not name.startswith("accuracy/")
    ]
    if terms:
        yield _picture(
            "loss",
            title,
            "training loss, and its terms before they are weighted",
            terms,
            groups,
            formats,
        )
    schedule = [
        _Panel("learning rate", None, "lr", logarithmic=True),
        _Panel("ramp-up (kd_weight)", None, "kd_weight"),
    ]
    yield _picture("schedule", title, "schedules", schedule, groups, formats)
    throughput = [
        _Panel("training, images/s", None, "images_per_second"),
        _Panel("waiting for images, % of the time", None, "waiting_share", 100),
    ]
    yield _picture("throughput", title, "throughput", throughput, groups, formats, from_zero=True)


def draw_curves(
    groups: Groups,
    folder: Path,
    title: str,
    formats: Sequence[str] = ("png",),
    pictures: Sequence[Callable[[Groups, str, Sequence[str]], Iterator[Picture]]] = (
        row_pictures,
        overview_pictures,
    ),
) -> list[Path]:
    """Write pictures of runs as files, and return these.

    Args:
        groups, title, formats: see ``row_pictures``.
        folder: where the files go.
        pictures: which.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    return [
        file
        for draw in pictures
        for picture in draw(groups, title, formats)
        for file in picture.write(folder)
    ]


PICTURES = (row_pictures, overview_pictures, training_pictures)
"""Everything that is drawn of runs."""

_ACCURACY = "evaluation accuracy, %"


def _rows(groups: Groups) -> list[_Panel]:
    return [_Panel(name, "eval", name, 100) for name in row_names(_runs(groups))]


def _runs(groups: Groups) -> list[Sequence[Record]]:
    return [records for runs in groups.values() for records in runs]


def _names(runs: Sequence[Sequence[Record]], section: str) -> list[str]:
    """The names in a section of the records, in order."""
    parts = [record.get(section) for records in runs for record in records]
    return list(dict.fromkeys(name for part in parts if isinstance(part, Mapping) for name in part))


def _curves(runs: Sequence[Sequence[Record]], panel: _Panel) -> list[Curve]:
    """A curve for each run that has recorded the panel's value."""
    curves = [
        {
            record["epoch"] + 1: value
            for record in records
            if (value := panel.value(record)) is not None
        }
        for records in runs
    ]
    return [curve for curve in curves if curve]


def _mean_curve(curves: Sequence[Curve]) -> dict[int, list[float]]:
    """Where all curves have a value: the values."""
    return {
        epoch: [curve[epoch] for curve in curves]
        for epoch in curves[0]
        if all(epoch in curve for curve in curves)
    }


def _picture(
    name: str,
    title: str,
    shows: str,
    panels: Sequence[_Panel],
    groups: Groups,
    formats: Sequence[str],
    unit: str = "",
    share_scale: bool = False,
    from_zero: bool = False,
) -> Picture:
    plt = require_matplotlib()
    columns = min(3 if len(panels) <= 6 else 4, len(panels))
    lines = -(-len(panels) // columns)
    size = (6.0, 4.0) if len(panels) == 1 else (4.0 * columns, 3.0 * lines)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(size[0], size[1] + 0.2 * len(groups)),
        layout="constrained",
        sharex=True,
        sharey=share_scale,
        squeeze=False,
    )
    words = []
    for axes, panel in zip(grid.flat, panels, strict=False):
        ends = _draw_panel(axes, groups, panel)
        axes.set_ylabel(unit)
        if from_zero:
            axes.set_ylim(bottom=0)
        words.append(f"{panel.title}: " + (", ".join(ends) or "not recorded"))
        if len(panels) > 1:
            axes.set_title(panel.title, fontsize="medium")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for place, axes in enumerate(grid.flat[: len(panels)]):
        if place + columns >= len(panels):  # nothing is drawn below it
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
        if place % columns:
            axes.set_ylabel("")
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize="small")
    figure.suptitle(
        f"{title}: {shows}", fontsize="medium" if len(panels) == 1 else "large", wrap=True
    )
    return Picture(
        name,
        shows,
        f"{title}: {shows}. Last values: {'; '.join(words)}.",
        encoded(plt, figure, formats),
    )


def _draw_panel(axes: Any, groups: Groups, panel: _Panel) -> list[str]:
    """Draw each group's mean and range; returns their last values in words."""
    ends = []
    for number, (label, runs) in enumerate(groups.items()):
        curves = _curves(runs, panel)
        if not curves:
            continue
        # Lines that lie on each other show, and colours need not be told apart.
        color, style = f"C{number % 10}", ("-", "--", "-.")[number % 3]
        shared = _mean_curve(curves)
        epochs, values = list(shared), list(shared.values())
        mean = [statistics.mean(each) for each in values]
        seeds = f" (mean and range of {len(curves)} seeds)" if len(curves) > 1 else ""
        axes.plot(
            epochs,
            mean,
            color=color,
            linestyle=style,
            linewidth=2,
            marker="." if len(epochs) == 1 else "",
            label=f"{label}{seeds}",
        )
        if len(curves) > 1:
            axes.fill_between(
                epochs,
                [min(each) for each in values],
                [max(each) for each in values],
                color=color,
                alpha=0.2,
                linewidth=0,
            )
        for curve in curves:
            rest = {
                epoch: value for epoch, value in curve.items() if not epochs or epoch >= epochs[-1]
            }
            if len(rest) > 1:
                axes.plot(list(rest), list(rest.values()), color=color, linestyle=":", linewidth=1)
        if mean:
            ends.append(f"{label} {mean[-1]:.4g} in epoch {epochs[-1]}")
    if panel.logarithmic and all(
        value > 0 for line in axes.get_lines() for value in line.get_ydata()
    ):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return ends


def encoded(plt: Any, figure: Any, formats: Sequence[str]) -> dict[str, bytes]:
    """A figure in each of the formats, "png" or "svg". It is closed."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough for all formats, and it takes longest
    files = {ending: _encoded(plt, figure, ending) for ending in formats}
    plt.close(figure)
    return files


def _encoded(plt: Any, figure: Any, ending: str) -> bytes:
    content = io.BytesIO()
    # The same runs give the same file: no date, and names of parts that do not depend on chance.
    with plt.rc_context({"svg.hashsalt": "fastokd"}):
        figure.savefig(
            content, format=ending, dpi=120, metadata={"Date": None} if ending == "svg" else {}
        )
    return content.getvalue()
