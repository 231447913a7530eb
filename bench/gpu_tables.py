"""Markdown of the result files of ``python -m bench.gpu``: a function for each part, which takes
the file and gives lines.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.kernels import TEMPERATURE
from bench.gpu.tests import COUNTED
from bench.pages import columns, short
from fastokd.experiments.analysis.tables import markdown_table
from fastokd.experiments.recipes import get_recipe

ROOT = Path(__file__).resolve().parent.parent
KERNELS_SHOWN = 12
"""Of each profile; the file has more."""
_FAILURES_SHOWN = 20
_README_SIZES = ((128, 10), (1024, 1000), (1024, 21841))

Rows = list[dict[str, Any]]


def environment_lines(path: Path) -> list[str]:
    """The machine, and the rates that the other parts are measured against."""
    found, rows = _read(path)
    named = {row["row"]: row for row in rows if "error" not in row}
    about, facts = named.get("machine", {}), []
    if "capability" in about:
        facts.append(
            f"sm_{''.join(map(str, about['capability']))}, {about['multiprocessors']}"
            f" multiprocessors, {about['memory_bytes'] / 2**30:.0f} GiB"
        )
    if "driver_version" in about:
        facts.append(f"driver {about['driver_version']}, power limit {about['power.limit']}")
    if copy := named.get("copy"):
        facts.append(
            f"a large copy moves {short(copy['gb_s'])} GB/s, read and written"
            f" ({_between(copy['spread'])})"
        )
    if matmul := named.get("matmul bf16"):
        facts.append(
            f"a bf16 product of {matmul['side']} x {matmul['side']} matrices runs at"
            f" {short(matmul['tflop_s'])} TFLOP/s ({_between(matmul['spread'])})"
        )
    if launch := named.get("kernel launch"):
        facts.append(
            f"a kernel that does next to nothing takes {short(launch['in_graph_us'])} us in a CUDA"
            f" graph and {short(launch['launched_us'])} us launched"
        )
    return [_made_by(path, found), "; ".join(facts) + ".", ""]


def tests_lines(path: Path) -> list[str]:
    """The counts of passed GPU tests, and the failures."""
    found, rows = _read(path)
    groups = [
        (
            row["row"],
            *(str(row.get(kind, 0)) for kind in COUNTED),
            row.get("error") or row.get("partial", ""),
        )
        for row in rows
    ]
    failures = [failure for row in rows for failure in row.get("failures", ())]
    lines = [
        f"- `{failure['test']}`: {_one_line(failure['message'])}"
        for failure in failures[:_FAILURES_SHOWN]
    ]
    if len(failures) > _FAILURES_SHOWN:
        lines.append(f"- and {len(failures) - _FAILURES_SHOWN} more, in the file")
    return [
        _made_by(path, found),
        "",
        *markdown_table([("tests", *COUNTED, ""), *groups]),
        *lines,
        *[""] * bool(lines),
    ]


def kernel_tables(path: Path) -> list[str]:
    """The losses alone: medians, their spread, the ratios to the baselines of the same run, and the
    share of the memory floor.
    """
    found, rows = _read(path)
    rows = [row for row in rows if "error" not in row]
    graphs, singles = ([row for row in rows if ("preset" in row) == kind] for kind in (True, False))
    bandwidth = 1e9 * found["copy_bandwidth_gb_s"]
    lines = [
        _made_by(path, found),
        (
            "Medians in microseconds. *Ours* is what a training step runs, in a CUDA graph: for"
            " gradients the one kernel that makes loss and gradients, else the forward kernel. The"
            " floor is the least number of bytes (each row of logits read once, each gradient"
            f" written once) at this GPU's measured copy bandwidth of {short(bandwidth / 1e9)}"
            " GB/s; a share above 100% means that the rows lie in its caches, as they do in a"
            " step. *Eager* is fastokd's reference executor, plain PyTorch for the same graph and"
            " not the published code; *compile* is that compiled."
        ),
        "",
        *markdown_table(
            [
                columns(
                    "loss | B x C | dtype | pass | eager | eager, graph | compile, graph | "
                    "fused | fused, graph | ours | fastest-slowest | eager, graph / ours | "
                    "compile / ours | floor | share"
                ),
                *_all_kernel_rows(
                    graphs,
                    bandwidth,
                    ("eager", "eager graph", "compiled graph", "fused", "fused graph"),
                    ("eager graph", "compiled graph"),
                ),
            ]
        ),
    ]
    if singles:
        lines += _single_table(singles, bandwidth)
    return [*lines, *_reasons(rows), *_missing(found)]


def _single_table(singles: Rows, bandwidth: float) -> list[str]:
    return [
        (
            "Single losses, compared with other libraries: the cross-entropy of a batch, and the KL"
            f" to a constant teacher at T = {TEMPERATURE:g} from both rows of logits. PyTorch's"
            " functions compute in the dtype of the logits, where ours computes in float32."
            " Liger-Kernel's cross-entropy overwrites the logits, and is timed on what its"
            " last call left there."
        ),
        "",
        *markdown_table(
            [
                columns(
                    "loss | B x C | dtype | pass | torch, graph | compile, graph | Liger | "
                    "Liger, graph | QuACK | QuACK, graph | ours | fastest-slowest | "
                    "compile / ours | Liger / ours | QuACK / ours | floor | share"
                ),
                *_all_kernel_rows(
                    singles,
                    bandwidth,
                    columns(
                        "eager graph | compiled graph | liger | liger graph | quack | quack graph"
                    ),
                    ("compiled graph", "liger", "quack"),
                ),
            ]
        ),
    ]


def _reasons(rows: Rows) -> list[str]:
    """A list of the cases that could not be measured, and of their rows."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name, reason in row["reasons"].items():
            reasons[f"{name}: {reason}"].append(row["row"])
    lines = []
    for reason, names in reasons.items():
        more = f", and {len(names) - 1} more rows" if len(names) > 1 else ""
        lines.append(f"- {reason} ({names[0]}{more})")
    return [*lines, *[""] * bool(reasons)]


def readme_lines(path: Path) -> list[str]:
    """A few rows of the kernel table: the AHBF loss with its gradients, in a CUDA graph."""
    found, rows = _read(path)
    bandwidth = 1e9 * found["copy_bandwidth_gb_s"]
    shown = [
        row
        for row in rows
        if "error" not in row
        and (row["loss"], row.get("preset"), row["dtype"]) == ("ahbf", "paper", "bfloat16")
        and (row["batch"], row["num_classes"]) in _README_SIZES
    ]
    if not shown:
        return []
    baselines = ("eager graph", "compiled graph")
    cells = [
        cells
        for cells in _all_kernel_rows(shown, bandwidth, baselines, baselines)
        if cells[3] == "with gradients"
    ]
    return [
        _made_by(path, found),
        "",
        *markdown_table(
            [
                columns(
                    "loss | B x C | dtype | pass | eager, graph, us | compile, graph, us | "
                    "ours, us | fastest-slowest | eager / ours | compile / ours | floor, us | "
                    "share"
                ),
                *cells,
            ]
        ),
    ]


def _all_kernel_rows(
    rows: Rows, bandwidth: float, shown: Sequence[str], against: Sequence[str]
) -> list[tuple[str, ...]]:
    return [cells for row in rows for cells in _kernel_rows(row, bandwidth, shown, against)]


def _kernel_rows(
    row: dict[str, Any], bandwidth: float, shown: Sequence[str], against: Sequence[str]
) -> list[tuple[str, ...]]:
    """The row's passes that were measured: the times of ``shown``, ours, how often faster ours is
    than each of ``against``.

    A library is compared in a graph if it can be captured, else launched.
    """
    name = f"{row['loss']} ({row['preset']})" if "preset" in row else row["loss"]
    cells = []
    for which, title in (("forward", "forward"), ("both", "with gradients")):
        key = f"one kernel graph/{which}" if which == "both" else f"fused graph/{which}"
        if key not in row:
            continue
        ours, floor = row[key], row[f"bytes_{which}"] / bandwidth

        def us(value: float | None) -> str:
            return "-" if value is None else short(1e6 * value)

        def ratio(name: str, which: str = which, ours: float | None = ours) -> str:
            theirs = next(
                (
                    value
                    for label in (f"{name} graph", name)
                    if (value := row.get(f"{label}/{which}")) is not None
                ),
                None,
            )
            return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"

        cells.append(
            (
                name,
                f"{row['batch']} x {row['num_classes']}",
                row["dtype"],
                title,
                *(us(row.get(f"{each}/{which}")) for each in shown),
                us(ours),
                "-" if ours is None else _between([1e6 * value for value in row["spread"][key]]),
                *map(ratio, against),
                us(floor),
                "-" if ours is None else f"{floor / ours:.0%}",
            )
        )
    return cells


def profile_tables(path: Path) -> list[str]:
    """The time of a step with every optimization, by kernel."""
    found, rows = _read(path)
    lines = [_made_by(path, found), ""]
    for row in rows:
        if "error" in row:
            lines += [f"{row['row']}: {row['error']}", ""]
            continue
        lines += [
            (
                f"AHBF, four branches, {row['row']}; {row['levers']}; {row['precision']}:"
                f" {short(row['step_ms'])} ms a step without the profiler. {_device_time(row)}"
                f" Trace for Perfetto: `{row['trace']}`."
            ),
            "",
        ]
        lines += markdown_table(
            [
                ("kernel", "calls a step", "us a step", "share"),
                *(
                    (
                        f"`{kernel['name'][:80]}`",
                        short(kernel["calls"]),
                        short(kernel["us"]),
                        f"{kernel['share']:.1%}",
                    )
                    for kernel in row["kernels"][:KERNELS_SHOWN]
                ),
            ]
        )
    return [*lines, *_missing(found)]


def _device_time(row: dict[str, Any]) -> str:
    if not row["kernels"]:
        return "The profiler saw no kernels."
    return (
        f"With it, {short(row['span_ms'])} ms from the first kernel to the last, with"
        f" {short(row['calls'])} of them and one running {row['busy_share']:.1%} of the time;"
        f" {short(row['gaps'])} gaps, the longest {short(row['longest_gap_us'])} us; their times"
        f" add up to {row['overlap']:.2f} times that in which any ran."
    )


def data_tables(path: Path) -> list[str]:
    """The loaders on a GPU, and how long a step waits for the fastest that decodes."""
    found, rows = _read(path)
    speeds = [
        (
            row["row"],
            f"{row['size']} x {row['size']}",
            str(row["batch"]),
            row["skipped"] if "skipped" in row else short(row["images_per_second"]),
        )
        for row in rows
        if "loader" in row
    ]
    lines = [
        _made_by(path, found),
        "",
        *markdown_table([("loader", "images", "batch", "images/s"), *speeds]),
    ]
    waiting = next(
        (row for row in rows if row["row"] == "waiting" and "waiting_share" in row), None
    )
    if waiting:
        lines += [
            (
                f"{waiting['model']}, {waiting['method']}, {waiting['branches']} branches, batch"
                f" {waiting['batch']}, fed by {waiting['fed_by']}:"
                f" {short(waiting['step_images_per_second'])} images/s of the step alone,"
                f" {short(waiting['epoch_images_per_second'])} with the loader;"
                f" {waiting['waiting_share']:.1%} of the time it waits."
            ),
            "",
        ]
    return [*lines, *_missing(found)]


def accuracy_tables(path: Path) -> list[str]:
    """The runs' errors and the papers', with the differences of their settings; then the
    errors of all rows of logits.
    """
    found, rows = _read(path)
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            groups[row["recipe"], row["preset"]].append(row)
    head = [_made_by(path, found)]
    if not groups:
        return [*head, "", "No run has ended yet.", "", *_missing(found)]
    lines, inner = [], []
    for (recipe, preset), runs in groups.items():
        student = runs[0]["student"]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        published = get_recipe(recipe)
        lines.append(
            (
                f"`{recipe}`, {preset}",
                seeds,
                _errors(run["last"][student] for run in runs),
                _errors(run["best"][student] for run in runs),
                published.reported(),
                short(statistics.mean(run["seconds"] for run in runs) / 60),
                short(statistics.median(run["images_per_second"] for run in runs)),
            )
        )
        for when in ("last", "best"):
            inner.append(
                (
                    f"`{recipe}`, {preset}",
                    when,
                    "; ".join(
                        f"{name} {_errors(run[when][name] for run in runs)}"
                        for name in runs[0][when]
                    ),
                )
            )
    return [
        *head,
        _differences(found),
        "",
        *markdown_table(
            [
                columns(
                    "recipe, preset | seeds | student's error, last epoch, % | best epoch, % | "
                    "published error, % | minutes of training a run | images/s"
                ),
                *lines,
            ]
        ),
        (
            "The errors of every row of logits after the last epoch and after the student's best,"
            " in %:"
        ),
        "",
        *markdown_table([("recipe, preset", "epoch", "error"), *inner]),
        *_missing(found),
    ]


def _differences(found: dict[str, Any]) -> str:
    data, plan = found["data"], found["plan"]
    counts = ", ".join(f"{count:,} {name}" for name, count in data["num_images"].items())
    files = (
        "the original files of CIFAR-10"
        if data["original_files"]
        else (
            "not the original files of CIFAR-10, so that errors compare with each other and not"
            " with the papers'"
        )
    )
    schedule = (
        "the papers' 300 epochs"
        if plan["epochs"] == 300
        else (
            f"{plan['epochs']} epoch{'s' * (plan['epochs'] > 1)} instead of the papers' 300, with"
            " the same schedule scaled to them"
        )
    )
    return (
        f"What differs from the papers: the data is '{data['name']}' ({counts} images), {files};"
        f" {schedule}; seeds as listed, of {plan['seeds']} planned (the papers: 3 runs, seeds not"
        " given). The papers do not say whether their numbers are of the last epoch or the best,"
        " and which of AHBF's two losses they are of."
    )


def _errors(accuracies: Any) -> str:
    """Errors in % of some accuracies: the mean, and their standard deviation if there are
    several.
    """
    errors = [100 * (1 - accuracy) for accuracy in accuracies]
    return f"{statistics.mean(errors):.2f}" + (
        f" +- {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    )


def _read(path: Path) -> tuple[dict[str, Any], Rows]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found, found["rows"]


def _made_by(path: Path, found: dict[str, Any]) -> str:
    """The machine, the versions and the file that a table is of."""
    environment = found["environment"]
    device = (
        environment["device"]
        if environment["device"] != "cpu"
        else f"a dry run on {found['processor']}"
    )
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    # A copy that was sent to a machine has no repository; the hash of its sources is always there.
    commits = dict.fromkeys(session["commit"] for session in found["sessions"] if session["commit"])
    code = f"commit {', '.join(commits)}" if commits else f"sources {found['identity']['code']}"
    return (
        f"{device}; torch {environment['torch']}, Triton {environment['triton']}; {code};"
        f" `{where}`, made by `{environment['command']}`."
    )


def _missing(found: dict[str, Any]) -> list[str]:
    """The missing rows."""
    if found["complete"]:
        return []
    left = list(found["left"])
    names = f": {'; '.join(left[:4])}" + (", ..." if len(left) > 4 else "") if left else ""
    return [f"Not complete{f', {len(left)} rows to go' if left else ''}{names}.", ""]


def _between(values: Sequence[float]) -> str:
    return f"{short(values[0])}-{short(values[1])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
