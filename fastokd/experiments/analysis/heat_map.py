"""A table of numbers as colours."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastokd.experiments.analysis.curves import Picture, encoded, require_matplotlib


class Panel(NamedTuple):
    """One table.

    Attributes:
        title: whose numbers they are.
        values: a number for each row and column; None where there is none.
        texts: what is written there.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]]


def draw_heat_map(
    panels: Sequence[Panel],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    title: str,
    path: Path,
) -> None:
    """Tables of the same rows and columns side by side, each with its own colours, as a PNG and an
    SVG file.

    Args:
        panels: the tables; less is drawn brighter.
        rows, columns: what they are of, and the label of each.
        title: of the picture.
        path: the files, without their ending.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    plt = require_matplotlib()
    width, height = max(3.5, 1.1 * len(columns[1]) + 1.5), max(2.6, 0.6 * len(rows[1]) + 1.6)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(width * len(panels), height), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid.flat, panels, strict=True):
        numbers = [
            [float("nan") if value is None else value for value in row] for row in panel.values
        ]
        image = axes.imshow(numbers, cmap="viridis_r", aspect="auto")
        for place, row in enumerate(panel.texts):
            for column, text in enumerate(row):
                value = panel.values[place][column]
                dark = value is not None and image.norm(value) > 0.5
                axes.text(
                    column,
                    place,
                    text,
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="white" if dark else "black",
                )
        axes.set_xticks(range(len(columns[1])), columns[1])
        axes.set_yticks(range(len(rows[1])), rows[1])
        axes.set_xlabel(columns[0])
        axes.set_ylabel(rows[0])
        axes.set_title(textwrap.fill(panel.title, int(11 * width)), fontsize="medium")
        if any(value is not None for row in panel.values for value in row):
            figure.colorbar(
                image,
                ax=axes,
                label="error, %; own colour scale" if len(panels) > 1 else "error, %",
            )
    figure.suptitle(title, fontsize="medium", wrap=True)
    Picture(path.name, title, title, encoded(plt, figure, ("png", "svg"))).write(path.parent)
