"""The figure of the step benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastokd.experiments.analysis.figures import panel_grid, require_matplotlib, save_svg

_KINDS = {
    "first": ("research style", "tab:gray"),
    "lever": ("one more optimization", "tab:blue"),
    "alternative": ("an alternative, not kept below", "tab:orange"),
    "student": ("the student alone", "tab:green"),
}


def draw_step_benchmark(found: Mapping[str, Any], path: Path) -> Path:
    """Draw the speed-up of each row over the first, with the lowest and highest of its windows, as
    an SVG file. ``found`` is of ``fastokd.experiments.step_benchmark.report``.
    """
    plt = require_matplotlib()
    rows = [row for row in found["rows"] if not row["reason"]]
    figure, (axes,) = panel_grid(plt, 1, 1, (9, 0.4 * len(rows) + 1.6))
    shown: dict[str, None] = {}
    for position, row in enumerate(rows):
        median, low, high = row["times_first"]
        label, color = _KINDS[row["kind"]]
        axes.barh(
            position,
            median,
            xerr=[[median - low], [high - median]],
            color=color,
            ecolor="black",
            capsize=3,
            label=None if label in shown else label,
        )
        shown[label] = None
        text = f" {median:.2f} x, {row['images_per_second'][0]:,.0f} images/s"
        axes.annotate(text, (high, position), va="center", fontsize="small")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(right=1.4 * max(row["times_first"][2] for row in rows))
    axes.set_xlabel("speed-up over the first row")
    figure.legend(loc="outside lower center", ncols=len(shown), fontsize="small")
    environment = found["environment"]
    machine = environment["device"]
    if machine == "cpu":
        machine = f"{found['processor']}, threads: {environment['threads']}"
    batch = f"batch {found['batch_size']} of {' x '.join(map(str, found['image_size']))}"
    title = f"{found['model']}, {found['method']}, {found['branches']} branches, {batch}"
    figure.suptitle(f"{title}\n{machine}", fontsize="medium")
    return save_svg(plt, figure, path, found)
