"""The figures of ``docs/performance.md`` other than that of the step benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastokd.experiments.analysis.figures import label_log_axis, require_matplotlib, save_svg

_BASELINES = {"eager": ("eager PyTorch", "tab:gray"), "compiled": ("torch.compile", "tab:blue")}


def draw_speedups(data: Mapping[str, Any], path: Path) -> Path:
    """Bars of how often faster the fused loss is than each baseline, by size, one panel a pass, as
    an SVG file.

    Args:
        data: ``title``, and ``rows``, each with ``size``, ``mode`` and, where measured, the
            baselines' times over the fused.
        path: the file.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    plt = require_matplotlib()
    modes = list(dict.fromkeys(row["mode"] for row in data["rows"]))
    figure, panels = plt.subplots(
        1, len(modes), figsize=(5 * len(modes), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, mode in zip(panels.flat, modes, strict=True):
        rows = [row for row in data["rows"] if row["mode"] == mode]
        for place, (baseline, (label, color)) in enumerate(_BASELINES.items()):
            shown = [
                (x + 0.4 * (place - 0.5), row[baseline])
                for x, row in enumerate(rows)
                if baseline in row
            ]
            # From 1 upwards or downwards, so that a bar below the line is a size at which the fused
            # loss loses.
            bars = axes.bar(
                [x for x, _ in shown],
                [ratio - 1 for _, ratio in shown],
                0.38,
                bottom=1,
                color=color,
                label=label,
            )
            axes.bar_label(bars, [f"{ratio:.1f}" for _, ratio in shown], fontsize="x-small")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        label_log_axis(axes.yaxis)
        axes.set_xticks(
            range(len(rows)),
            [row["size"] for row in rows],
            rotation=45,
            ha="right",
            fontsize="small",
        )
        axes.set_title(mode)
        axes.margins(y=0.15)
    panels[0, 0].set_ylabel("times as fast as the baseline")
    panels[0, 0].legend(fontsize="small", loc="upper left")
    figure.suptitle(data["title"], fontsize="medium")
    return save_svg(plt, figure, path, data)
