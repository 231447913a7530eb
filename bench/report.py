"""The tables and figures of ``docs/performance.md`` and the table of the README, generated from the
result files: ``python -m bench.report``.

``--check`` fails if a page differs from the result files, or a figure shows other data. A figure is
drawn again when it shows other data, whatever version of matplotlib has drawn it; delete it to
force that.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import gpu_tables, machine_code, roofline
from bench.accuracy import tables as accuracy
from bench.pages import columns, page_with, short, update
from bench.plots import draw_speedups
from bench.suite_tables import (
    NOT_MEASURED,
    data_tables,
    gate_table,
    kernel_count_table,
    loss_table,
    method_table,
    read,
    readme_table,
    speedups,
    start_table,
    step_table,
    term_table,
    threads,
)
from fastokd.experiments.analysis.figures import shows
from fastokd.experiments.analysis.step_figure import draw_step_benchmark
from fastokd.experiments.analysis.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
ACCURACIES = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
FIGURE_FOLDER = PAGE.parent / "figures"
RESULTS = ROOT / "bench" / "results"
ACCURACY_FILES = "accuracy-*-cpu.json"
"""The result files of ``bench.accuracy``."""
END = "<!-- end -->"


def machine_code_table(path: Path) -> list[str]:
    """The costs of the compiled kernels; one number for GPU generations that agree."""
    found = read(path)
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in found["rows"]:
        groups[
            row["branches"],
            row["preset"],
            row["dtype"],
            row["num_classes"],
            row["kernel"],
            row["batch"],
        ][row["capability"]] = row

    def cell(
        rows: Mapping[int, Mapping[str, Any]], show: Callable[[Mapping[str, Any]], str]
    ) -> str:
        values = [show(rows[capability]) for capability in sorted(rows)]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    batches: dict[tuple[str, ...], list[int]] = {}
    for (branches, preset, dtype, classes, kernel, batch), group in groups.items():
        shown = (
            " / ".join(f"sm_{capability}" for capability in sorted(group)),
            str(branches),
            preset,
            dtype,
            str(classes),
            kernel,
            cell(group, lambda row: str(row["registers"])),
            cell(group, lambda row: str(row["spills"])),
            cell(group, lambda row: str(row["vector_loads"])),
            cell(group, lambda row: f"{roofline.exponentials_per_column(row):.3g}"),
            cell(group, lambda row: str(row["instructions"])),
            cell(group, lambda row: f"{row['per_column']:.1f}" if row["whole"] > 1 else ""),
        )
        batches.setdefault(shown, []).append(batch)  # many batches have one kernel
    rows = [
        (*shown[:4], ", ".join(map(str, found)), *shown[4:]) for shown, found in batches.items()
    ]
    return [
        (
            f"AHBF; Triton {found['triton']}; commit {found['commit']}; "
            f"`{path.relative_to(ROOT)}`, made by `{found['command']}`."
        ),
        "",
        *markdown_table(
            [
                columns(
                    "for | branches | preset | dtype | B | C | kernel | registers | spills | "
                    "16-byte loads | exponentials per class | instructions | "
                    "per class in the loop"
                ),
                *rows,
            ]
        ),
    ]


def roofline_table(path: Path) -> list[str]:
    """The model's predictions for every chip, and the measured times of the same kernels."""
    found = read(path)
    chips = roofline.CHIPS.values()
    predicted = [
        {(size, which): one for size, which, one in roofline.predictions(found, chip)}
        for chip in chips
    ]
    measured = [roofline.measured(RESULTS, chip) for chip in roofline.CHIPS.values()]
    heads, cells = [], []
    for chip, mine, times in zip(chips, predicted, measured, strict=True):
        heads += [f"{chip.title}, predicted", *([f"{chip.title}, measured"] if times else [])]
        cells.append(
            {
                key: (
                    f"{short(1e6 * one.seconds)}, {one.limit}",
                    *([short(1e6 * times[key]) if key in times else ""] if times else []),
                )
                for key, one in mine.items()
            }
        )
    rows = [
        (
            f"{size[0]} x {size[1]}",
            which,
            *(text for column in cells for text in column[size, which]),
        )
        for size, which in predicted[0]
    ]
    return [
        (
            "**Predictions of a model, not measurements**, in microseconds, with the limit that"
            f" binds: AHBF, {roofline.BRANCHES} branches, paper preset, bfloat16; `python -m"
            " bench.roofline` prints the parts."
        ),
        "",
        *markdown_table([("B x C", "kernel", *heads), *rows]),
    ]


def step_benchmark_tables(path: Path) -> list[str]:
    """The step benchmarks of one machine, each with its figure."""
    return [
        line
        for figure, found in step_figures(path).items()
        for line in _step_benchmark_table(path, found, figure)
    ]


def step_figures(path: Path) -> dict[Path, dict[str, Any]]:
    """The step benchmarks of a result file of ``fastokd bench step`` or ``bench.gpu``, by the path
    of their figures.
    """
    result = read(path)
    found = [each for each in result.get("ladders", [result]) if "rows" in each]
    if len(found) == 1:
        return {FIGURE_FOLDER / f"{path.stem}.svg": found[0]}
    return {
        FIGURE_FOLDER / f"{path.stem}-{number}.svg": each for number, each in enumerate(found, 1)
    }


def _step_benchmark_table(path: Path, found: dict[str, Any], figure: Path) -> list[str]:
    environment = found["environment"]
    device = (
        environment["device"]
        if environment["device"] != "cpu"
        else f"{found['processor']}, {threads(environment['threads'])}"
    )
    marks = {"lever": "+ ", "alternative": "or ", "student": "= "}
    rows = []
    for row in found["rows"]:
        name = marks.get(row["kind"], "") + row["name"]
        if row["reason"]:
            rows.append((f"{name}: {row['reason']}", *[""] * 7))
            continue
        images, low, high = map(short, row["images_per_second"])
        ratio, least, most = (f"{value:.2f}" for value in row["times_first"])
        rows.append(
            (
                name,
                images,
                f"{low}-{high}",
                short(row["milliseconds"]),
                f"{ratio} ({least}-{most})",
                "" if row["loss_share"] is None else f"{row['loss_share']:.1%}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB",
                short(row["start_seconds"]),
            )
        )
    teaching = (
        f" A step with all optimizations takes {found['teaching_costs']:.2f} times that of the"
        " student alone."
        if found["teaching_costs"]
        else ""
    )
    return [
        (
            f"{device}; torch {environment['torch']}; commit {environment['commit']};"
            f" `{path.relative_to(ROOT)}`, made by `{environment['command']}`."
        ),
        (
            f"{found['model']}, {found['method']}, {found['branches']} branches, batch"
            f" {found['batch_size']} of {' x '.join(map(str, found['image_size']))},"
            f" {found['num_classes']} classes, {found['data']}.{teaching}"
        ),
        "",
        *markdown_table(
            [
                columns(
                    "row | images/s | slowest-fastest | ms/step | x first | loss | GPU memory | "
                    "start, s"
                ),
                *rows,
            ]
        ),
        *_image(f"The step benchmark of {found['model']}", figure),
    ]


def _image(what: str, figure: Path) -> list[str]:
    return [f"![{what}]({figure.relative_to(PAGE.parent)})", ""]


def _if_measured(make: Callable[[Path], list[str]], name: str) -> list[str]:
    path = RESULTS / name
    return make(path) if path.is_file() else NOT_MEASURED


def _of_each(make: Callable[[Path], list[str]], pattern: str) -> list[str]:
    """The tables of all machines of which there is a result file."""
    return [line for path in sorted(RESULTS.glob(pattern)) for line in make(path)] or NOT_MEASURED


def _of_part(make: Callable[[Path], list[str]], part: str) -> list[str]:
    """The tables of a part of ``bench.gpu``, on every GPU of which there is a file; suites have
    files of such names too.
    """
    paths = [
        path
        for path in sorted(RESULTS.glob(f"{part}-*.json"))
        if json.loads(path.read_text(encoding="utf-8")).get("part") == part
    ]
    return [line for path in paths for line in make(path)]


def _speedup_figure(path: Path) -> Path:
    return FIGURE_FOLDER / f"{path.stem}.svg"


def blocks() -> dict[str, list[str]]:
    """The content between each pair of marks on the performance page."""
    return {
        "step": _of_each(step_benchmark_tables, "step-*.json"),
        "quick steps": _if_measured(step_table, "quickstep-cpu.json"),
        "kernels per step": kernel_count_table(roofline.COUNTS),
        "loss": _of_each(
            lambda path: [
                *loss_table(path),
                *_image("Speed-up of the fused loss by size", _speedup_figure(path)),
            ],
            "loss-*.json",
        ),
        "methods": _of_each(method_table, "loss-*.json"),
        "terms": _if_measured(term_table, "terms-cpu.json"),
        "gates": _if_measured(gate_table, "gate-cpu.json"),
        "start": _if_measured(start_table, "start-cpu.json"),
        "data": _if_measured(data_tables, "data-cpu.json"),
        "gpu": (
            [
                *_of_part(gpu_tables.environment_lines, "environment"),
                *_of_part(gpu_tables.tests_lines, "tests"),
            ]
            or NOT_MEASURED
        ),
        "kernels": _of_part(gpu_tables.kernel_tables, "kernels") or NOT_MEASURED,
        "profile": _of_part(gpu_tables.profile_tables, "profile") or NOT_MEASURED,
        "gpu data": _of_part(gpu_tables.data_tables, "data") or NOT_MEASURED,
        "machine code": _if_measured(machine_code_table, machine_code.PATH.name),
        "roofline": _if_measured(roofline_table, machine_code.PATH.name),
    }


def accuracy_blocks() -> dict[str, list[str]]:
    """The same for the page of accuracies."""
    return {
        "accuracy": _of_part(gpu_tables.accuracy_tables, "accuracy") or NOT_MEASURED,
        "accuracy on CPUs": _of_each(accuracy.accuracy_tables, ACCURACY_FILES),
    }


def readme_blocks() -> dict[str, list[str]]:
    """The same for the README."""
    gpu = _of_part(gpu_tables.readme_lines, "kernels") or ["On GPUs: not measured yet."]
    return {"speed": [*_if_measured(readme_table, "loss-cpu.json"), *gpu]}


def current(text: str, parts: Mapping[str, list[str]], page: Path) -> str:
    """A page's text with its blocks as the result files give them.

    Raises:
        ValueError: the page lacks a block's first mark.
    """
    for name, lines in parts.items():
        mark = f"<!-- {name}, generated by python -m bench.report -->"
        if mark not in text:
            raise ValueError(
                f"{page} has no line '{mark}'; write it where the table is to stand, and '{END}'"
                " after it"
            )
        text = page_with(text, "\n".join([mark, *lines, END]))
    return text


def figures() -> dict[Path, tuple[dict[str, Any], Callable[[Mapping[str, Any], Path], Path]]]:
    """Every figure of the page: its data, and the function that draws it."""
    found: dict[Path, tuple[dict[str, Any], Callable[[Mapping[str, Any], Path], Path]]] = {}
    for path in sorted(RESULTS.glob("step-*.json")):
        found |= {
            figure: (ladder, draw_step_benchmark) for figure, ladder in step_figures(path).items()
        }
    for path in sorted(RESULTS.glob("loss-*.json")):
        found[_speedup_figure(path)] = (speedups(path), draw_speedups)
    for path in sorted(RESULTS.glob(ACCURACY_FILES)):
        figure = FIGURE_FOLDER / f"{path.stem}.svg"
        found[figure] = (accuracy.frontier(path), accuracy.draw_frontier)
    return found


def main(arguments: list[str]) -> int:
    """Generate the pages and the figures, or with ``--check`` compare them.

    Returns the exit code.
    """
    wrong = 0
    for page, parts in (
        (PAGE, blocks()),
        (ACCURACIES, accuracy_blocks()),
        (README, readme_blocks()),
    ):
        wrong |= update(
            page,
            lambda text, page=page, parts=parts: current(text, parts, page),
            "bench.report",
            arguments,
        )
    for figure, (data, draw) in figures().items():
        if shows(figure, data):
            continue
        if arguments == ["--check"]:
            print(f"{figure} is stale: run python -m bench.report", file=sys.stderr)
            wrong = 1
        else:
            draw(data, figure)
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
