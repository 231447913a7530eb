"""Commands that compare and plot runs."""

from pathlib import Path
from typing import Literal

from fastokd.cli.options import Runs, say
from fastokd.experiments.analysis.compare import compare as compare_groups
from fastokd.experiments.analysis.curves import FIGURES, draw_curves
from fastokd.experiments.analysis.figures import require_matplotlib
from fastokd.experiments.analysis.report import report_page
from fastokd.experiments.analysis.runs import curve_records, read_runs, remarks_of, title
from fastokd.storage import write_text

FORMATS = {".md": "markdown", ".csv": "csv", ".html": "html"}


def compare(
    runs: Runs = (),
    out: Path | None = None,
    format: Literal["auto", "terminal", "markdown", "csv", "html"] = "auto",
    latency: bool = True,
) -> None:
    """Compare runs: errors over seeds, the costs of the students, and the costs of training
    compared with the student alone.

    Args:
        runs: Run folders. Runs that differ only in the seed are averaged
        out: Write to this file (default: print)
        format: auto: by the extension of --out (.md, .csv or .html), otherwise terminal
    """
    table = compare_groups(read_runs(runs), latency)
    by_name = FORMATS.get(out.suffix.lower() if out else "", "terminal")
    text = {
        "terminal": table.as_text,
        "markdown": table.as_markdown,
        "csv": table.as_csv,
        "html": table.as_html,
    }[by_name if format == "auto" else format]()
    if out is None:
        print(text, end="")
    else:
        _write(out, text)


def plot(runs: Runs = (), out: Path = Path("plots")) -> None:
    """Plot the records of runs as PNG and SVG files: accuracies, loss terms, schedules and
    throughput by epoch.

    Args:
        runs: Run folders. Runs that differ only in the seed are one line with a band
        out: Folder for the plots
    """
    groups = read_runs(runs)
    files = draw_curves(
        {group.label: curve_records(group) for group in groups},
        out,
        title(groups),
        ("png", "svg"),
        FIGURES,
    )
    for remark in remarks_of(groups):
        say(remark)
    names = dict.fromkeys(file.stem for file in files)
    say(f"wrote {len(files)} files to {out}: {', '.join(names)}")


def report(runs: Runs = (), out: Path = Path("report.html"), latency: bool = True) -> None:
    """Write one HTML page about runs: their comparison, differences in their configurations, their
    curves, and the results of 'fastokd analyze'. The page needs no other file and no network.

    Args:
        runs: Run folders. Runs that differ only in the seed are averaged
        out: The page
    """
    groups = read_runs(runs)
    require_matplotlib()  # before latencies are measured
    _write(out, report_page(groups, compare_groups(groups, latency)))


def _write(path: Path, text: str) -> None:
    write_text(path, text)
    say(f"wrote {path}")
