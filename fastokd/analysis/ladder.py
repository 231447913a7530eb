"""The ladder of a training step as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastokd.analysis.curves import require_matplotlib
from fastokd.storage import write_atomically

_COLORS = {"first": "tab:gray", "lever": "tab:blue", "alternative": "tab:orange", "student": "tab:green"}
_MEANING = {"first": "as research code does it", "lever": "one lever more", "alternative": "instead, and not kept below", "student": "the student alone"}


def draw_ladder(found: Mapping[str, Any], path: Path) -> Path:
    """Bars of images per second as an SVG file, from the slowest to the fastest window at their ends.

    Args:
        found: as ``fastokd.train.ladder.report`` gives it.
        path: the file.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    plt = require_matplotlib()
    rows = [row for row in found["rows"] if not row["reason"]]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.4), layout="constrained")
    shown = set()
    for place, row in enumerate(rows):
        median, low, high = row["images_per_second"]
        label = _MEANING[row["kind"]] if row["kind"] not in shown else None
        shown.add(row["kind"])
        axes.barh(place, median, xerr=[[median - low], [high - median]], color=_COLORS[row["kind"]], ecolor="black", capsize=3, label=label)
        axes.annotate(f" {median:,.0f}  ({row['times_first']:.2f} x)", (high, place), va="center", fontsize="small")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(right=1.25 * max(row["images_per_second"][2] for row in rows))
    axes.set_xlabel("images per second")
    axes.legend(loc="lower right", fontsize="small")
    side = "x".join(map(str, found["image_size"]))
    machine = found["environment"]["device"] if found["environment"]["device"] != "cpu" else f"{found['processor']}, {found['environment']['threads']} threads"
    axes.set_title(f"{found['model']}, {found['method']}, {found['branches']} branches, batch {found['batch_size']}, {side}: {machine}", fontsize="medium", loc="left")
    with plt.rc_context({"svg.hashsalt": "fastokd"}):
        write_atomically(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    plt.close(figure)
    return path
