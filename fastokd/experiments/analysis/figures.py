"""Figures drawn by matplotlib; equal data give equal files with one version of matplotlib."""

import hashlib
import io
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.errors import MissingExtra, escape
from fastokd.storage import write_atomically

MOST_CHARACTERS = 40


def label_of(name: str) -> str:
    """A name of a class or run as a short line of text. matplotlib hides labels that start with an
    underscore, so these get a leading blank.
    """
    text = escape(name)
    text = text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
    return f" {text}" if text.startswith("_") else text


def require_matplotlib() -> Any:
    """``matplotlib.pyplot`` with a backend that needs no display, or a ``MissingExtra``."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("drawing needs matplotlib: pip install -e '.[plots]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names of classes and runs may contain "$"
    import matplotlib.pyplot

    return matplotlib.pyplot


class FigureFiles(NamedTuple):
    """A drawn figure: the name of its files without the ending, its title, a text for readers who
    cannot see it, and its content by format, "png" or "svg".
    """

    name: str
    title: str
    description: str
    files: Mapping[str, bytes]

    def write(self, folder: Path) -> list[Path]:
        """Write the files, and return them."""
        paths = {folder / f"{self.name}.{ending}": each for ending, each in self.files.items()}
        for path, content in paths.items():
            write_atomically(path, operator.methodcaller("write", content))
        return list(paths)


def encoded(
    plt: Any, figure: Any, formats: Sequence[str], identifier: str | None = None
) -> dict[str, bytes]:
    """Encode a figure as "png" or "svg" and close it; ``identifier`` is metadata of the SVG."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is the slowest part, and serves all formats
    files = {}
    for ending in formats:
        content = io.BytesIO()
        metadata = {"Date": None, "Identifier": identifier} if ending == "svg" else {}
        with plt.rc_context({"svg.hashsalt": "fastokd"}):
            figure.savefig(content, format=ending, dpi=120, metadata=metadata)
        files[ending] = content.getvalue()
    plt.close(figure)
    return files


def fingerprint(data: Any) -> str:
    """The digest of data that can be written as JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save_svg(plt: Any, figure: Any, path: Path, data: Any) -> Path:
    """Write a figure as an SVG file with the digest of its data, for ``shows``, and close it."""
    content = encoded(plt, figure, ["svg"], fingerprint(data))["svg"]
    write_atomically(path, lambda file: file.write(content))
    return path


def shows(path: Path, data: Any) -> bool:
    """True if a file exists and was drawn from these data, by any version of matplotlib."""
    return path.is_file() and fingerprint(data) in path.read_text(encoding="utf-8")


def panel_grid(
    plt: Any, count: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Any, list[Any]]:
    """A figure with ``count`` axes in lines of ``columns``; ``options`` are of ``plt.subplots``."""
    lines = -(-count // columns)
    options |= {"figsize": size, "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(lines, columns, **options)
    for axes in grid.flat[count:]:
        axes.remove()
    panels = list(grid.flat[:count])
    for axes in panels[-columns:]:  # no axes below these
        axes.tick_params(labelbottom=True)
    return figure, panels


def label_log_axis(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers (1, 2 and 5 times the powers of ten): matplotlib
    writes formulas, which ``require_matplotlib`` turns off.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_heat_map(
    axes: Any,
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    fontsize: str,
    **options: Any,
) -> Any:
    """Draw a table of numbers as colors with a text in each cell; returns matplotlib's image. None
    is drawn white; ``options`` are those of ``axes.imshow``.
    """
    numbers = [[float("nan") if value is None else value for value in line] for line in values]
    image = axes.imshow(numbers, aspect="auto", **options)
    style = {"fontsize": fontsize, "ha": "center", "va": "center"}
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            light = 1.0
            if value is not None:
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.21 * red + 0.72 * green + 0.07 * blue
            if texts[y][x]:
                axes.text(x, y, texts[y][x], color="white" if light < 0.5 else "black", **style)
    return image
