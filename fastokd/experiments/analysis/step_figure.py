"""The step benchmark as a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastokd.experiments.analysis.curves import require_matplotlib
from fastokd.experiments.analysis.svg import save_svg

_COLORS = {
    "first": "tab:gray",
    "lever": "tab:blue",
    "alternative": "tab:orange",
    "student": "tab:green",
}
_MEANING = {
    "first": "research style",
    "lever": "one more optimization",
    "alternative": "an alternative, not kept below",
    "student": "the student alone",
}


def draw_step_benchmark(found: Mapping[str, Any], path: Path) -> Path:
    """Draw the speed-up of each row over the first, with the lowest and highest of its windows, as
    an SVG file.

    Args:
        found: see ``fastokd.experiments.step_benchmark.report``.
        path: the file.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    plt = require_matplotlib()
    rows = [row for row in found["rows"] if not row["reason"]]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(rows) + 1.6), layout="constrained")
    shown = set()
    for position, row in enumerate(rows):
        median, low, high = row["times_first"]
        label = _MEANING[row["kind"]] if row["kind"] not in shown else None
        shown.add(row["kind"])
        axes.barh(
            position,
            median,
            xerr=[[median - low], [high - median]],
            color=_COLORS[row["kind"]],
            ecolor="black",
            capsize=3,
            label=label,
        )
        axes.annotate(
            f" {median:.2f} x, {row['images_per_second'][0]:,.0f} images/s",
            (high, position),
            va="center",
            fontsize="small",
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(right=1.4 * max(row["times_first"][2] for row in rows))
    axes.set_xlabel("speed-up over the first row")
    figure.legend(loc="outside lower center", ncols=len(shown), fontsize="small")
    machine = (
        found["environment"]["device"]
        if found["environment"]["device"] != "cpu"
        else f"{found['processor']}, threads: {found['environment']['threads']}"
    )
    side = " x ".join(map(str, found["image_size"]))
    figure.suptitle(
        f"{found['model']}, {found['method']}, {found['branches']} branches, batch"
        f" {found['batch_size']} of {side}\n{machine}",
        fontsize="medium",
    )
    return save_svg(plt, figure, path, found)
