"""Accuracy curves of one or several runs as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastokd.errors import MissingExtra
from fastokd.storage import write_atomically


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


def row_names(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The branches and teacher assistants that appear in the runs' evaluations, in order."""
    names: dict[str, None] = {}
    for records in runs:
        for record in records:
            names.update(dict.fromkeys(record["eval"]))
    return list(names)


def draw_curves(groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], folder: Path, title: str) -> list[Path]:
    """One PNG for each branch and teacher assistant, and ``overview.png`` with all of them.

    Args:
        groups: for each label (e.g. a method) its runs, one per seed; a run is the list of its epoch records.
        folder: where the files go.
        title: the title of every picture.

    Returns:
        The files written.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    plt = require_matplotlib()
    names = row_names([records for runs in groups.values() for records in runs])
    files = []
    for name in names:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        _draw_row(axes, groups, name)
        axes.set_title(f"{title}: {name}")
        files.append(_save(plt, figure, folder / f"{name}.png"))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), layout="constrained", sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(names):]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        _draw_row(axes, groups, name)
        axes.set_title(name)
        axes.label_outer()
    figure.suptitle(title)
    files.append(_save(plt, figure, folder / "overview.png"))
    return files


def _draw_row(axes: Any, groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], name: str) -> None:
    """Each seed as a thin line, their mean as a thick one."""
    for color, (label, runs) in zip(("tab:gray", "tab:blue", "tab:orange", "tab:green"), groups.items(), strict=False):
        curves = [[100 * record["eval"][name] for record in records] for records in runs if name in records[0]["eval"]]
        if not curves:
            continue
        epochs = range(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(epochs, curve, color=color, linewidth=0.7, alpha=0.5)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, mean, color=color, linewidth=2, label=f"{label} (mean of {len(curves)} seeds)")
    axes.set_xlabel("epoch")
    axes.set_ylabel("evaluation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")


def _save(plt: Any, figure: Any, path: Path) -> Path:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
    return path
