"""The tables and pictures of ``docs/performance.md`` and the table of the README, generated from
the result files: ``python -m bench.report``.

``--check`` fails if a page is not what the result files give, or a picture shows other data. A
picture is drawn anew when it shows other data, whatever version of matplotlib has drawn it; remove
it to have it drawn anew in any case.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import gpu_tables, machine_code, roofline
from bench.pages import page_with, short, update
from bench.plots import draw_speedups
from fastokd.experiments.analysis.ladder import draw_ladder
from fastokd.experiments.analysis.svg import shows
from fastokd.experiments.analysis.tables import markdown_table
from fastokd.experiments.step_benchmark import current_rows

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
ACCURACIES = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
PICTURE_FOLDER = PAGE.parent / "pictures"
RESULTS = ROOT / "bench" / "results"
END = "<!-- end -->"
PICTURES = {"small-64": "64 x 64", "large-224": "500 x 375, cropped to 224"}
SIDES = {"cifar": "32 x 32", "tiny-imagenet": "64 x 64"}
README_SIZES = ((128, 10), (96, 1000), (1024, 1000))
NOT_MEASURED = ["Not measured yet.", ""]
STEP_OF = "cifar"
"""The set whose images the step of ``bench_data_resident.py`` takes."""

Benchmark = dict[str, Any]


PROVIDERS = ("eager", "compiled", "fused")
_PROVIDER_HEAD = ("eager", "torch.compile", "fused", "p25-p75", "eager / fused", "compile / fused")


def _grouped(
    benchmarks: list[Benchmark], *keys: str
) -> dict[tuple[Any, ...], dict[str, Benchmark]]:
    """Benchmarks of one case together, by their provider; a case is what these keys of
    ``extra_info`` say.
    """
    groups: dict[tuple[Any, ...], dict[str, Benchmark]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        groups.setdefault(tuple(info[key] for key in keys), {})[info["provider"]] = benchmark
    return groups


def _ratio(providers: Mapping[str, Benchmark], one: str, other: str) -> float | None:
    """How many times as long the median of one takes as the other's; None where one of the two was
    not measured.
    """
    if one not in providers or other not in providers:
        return None
    return providers[one]["stats"]["median"] / providers[other]["stats"]["median"]


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _milliseconds(benchmark: Benchmark | None) -> tuple[str, str]:
    """Median, and p25 to p75."""
    if benchmark is None:
        return "", ""
    median, low, high = (short(1000 * benchmark["stats"][name]) for name in ("median", "q1", "q3"))
    return median, f"{low}-{high}"


def _provider_cells(providers: Mapping[str, Benchmark]) -> tuple[str, ...]:
    medians = [_milliseconds(providers.get(name))[0] for name in PROVIDERS]
    return (
        *medians,
        _milliseconds(providers.get("fused"))[1],
        *(_times(_ratio(providers, name, "fused")) for name in ("eager", "compiled")),
    )


def loss_table(path: Path) -> list[str]:
    """The AHBF loss on one machine: a row a size and mode, medians and the ratios to the baselines
    of the same run.
    """
    found = read(path)
    groups = _grouped(by_test(found)["test_loss"], "batch", "classes", "mode")
    rows = [
        (f"{batch} x {classes}", mode, *_provider_cells(providers))
        for (batch, classes, mode), providers in groups.items()
    ]
    return [
        made_by(path, found),
        "Four branches, AHBF paper preset, medians in milliseconds (p25 to p75 for the fused row).",
        "",
        *markdown_table([("B x C", "pass", *_PROVIDER_HEAD), *rows]),
    ]


def speedups(path: Path) -> dict[str, Any]:
    """What the picture of the same shows."""
    found = read(path)
    rows = []
    for (batch, classes, mode), providers in _grouped(
        by_test(found)["test_loss"], "batch", "classes", "mode"
    ).items():
        ratios = {name: _ratio(providers, name, "fused") for name in ("eager", "compiled")}
        rows.append(
            {
                "size": f"{batch} x {classes}",
                "mode": mode,
                **{name: round(value, 4) for name, value in ratios.items() if value is not None},
            }
        )
    return {"title": f"The fused AHBF loss, four branches; {_machine(found)}", "rows": rows}


def method_table(path: Path) -> list[str]:
    """Every method's graph at one size on one machine."""
    found = read(path)
    groups = _grouped(
        by_test(found)["test_method"], "method", "branches", "nodes", "terms", "batch", "classes"
    )
    if not groups:
        return NOT_MEASURED
    rows = [
        (method, str(branches), str(nodes), str(terms), *_provider_cells(providers))
        for (method, branches, nodes, terms, _, _), providers in groups.items()
    ]
    *_, batch, classes = next(iter(groups))
    return [
        made_by(path, found),
        (
            f"Forward and backward of every method's graph, paper preset, {batch} x {classes},"
            " medians in milliseconds (p25 to p75 for the fused row)."
        ),
        "",
        *markdown_table([("method", "branches", "nodes", "terms", *_PROVIDER_HEAD), *rows]),
    ]


def readme_table(path: Path) -> list[str]:
    """A few rows of ``loss_table`` for the README: three sizes, and the one where the fused loss
    does worst if it loses there.
    """
    found = read(path)
    groups = _grouped(by_test(found)["test_loss"], "batch", "classes", "mode")
    chosen = [(*size, "forward+backward") for size in README_SIZES]
    worst = min(
        groups,
        key=lambda key: min(
            value
            for name in ("eager", "compiled")
            if (value := _ratio(groups[key], name, "fused")) is not None
        ),
    )
    if worst not in chosen and any(
        (_ratio(groups[worst], name, "fused") or 1) < 1 for name in ("eager", "compiled")
    ):
        chosen.append(worst)
    rows = [
        (
            f"{key[0]} x {key[1]}",
            key[2],
            *_milliseconds(groups[key].get("fused")),
            *(_times(_ratio(groups[key], name, "fused")) for name in ("eager", "compiled")),
        )
        for key in chosen
    ]
    return [
        (
            f"The AHBF loss of four branches on a CPU ({_machine(found)}; commit"
            f" {found['machine_info']['commit']}); a ratio below 1 is a row that loses:"
        ),
        "",
        *markdown_table(
            [
                ("B x C", "pass", "fused, ms", "p25-p75", "eager / fused", "torch.compile / fused"),
                *rows,
            ]
        ),
    ]


def gate_table(path: Path) -> list[str]:
    """The gates of one machine, eager and compiled."""
    found = read(path)
    groups = _grouped(by_test(found)["test_gate"], "method", "branches", "parameters", "batch")
    rows = [
        (
            method,
            str(branches),
            f"{parameters:,}",
            *_milliseconds(providers.get("eager")),
            *_milliseconds(providers.get("compiled")),
            _times(_ratio(providers, "eager", "compiled")),
        )
        for (method, branches, parameters, _), providers in groups.items()
    ]
    return [
        made_by(path, found),
        (
            f"Forward and backward, batch {next(iter(groups))[3]}, maps of ResNet-32 on CIFAR,"
            " medians in milliseconds."
        ),
        "",
        *markdown_table(
            [
                (
                    "gates of",
                    "branches",
                    "parameters",
                    "eager",
                    "p25-p75",
                    "torch.compile",
                    "p25-p75",
                    "eager / compile",
                ),
                *rows,
            ]
        ),
    ]


def step_table(path: Path) -> list[str]:
    """The steps of ``bench_step.py`` on one machine."""
    found = read(path)
    cases = {
        benchmark["extra_info"]["case"]: benchmark for benchmark in by_test(found)["test_step"]
    }
    about = next(iter(cases.values()))["extra_info"]
    rows = [
        (
            case,
            *_milliseconds(benchmark),
            short(benchmark["extra_info"]["images_per_second"]),
            _times(_ratio(cases, "ahbf, research style", case)),
        )
        for case, benchmark in cases.items()
    ]
    return [
        made_by(path, found),
        f"{about['model']}, {about['branches']} branches, batch {about['batch']} of 32 x 32.",
        "",
        *markdown_table([("step", "ms", "p25-p75", "images/s", "x research style"), *rows]),
    ]


def start_table(path: Path) -> list[str]:
    """Imports and starts on one machine."""
    found = read(path)
    cases = {
        benchmark["extra_info"]["case"]: benchmark for benchmark in by_test(found)["test_process"]
    }
    rows = []
    for case, benchmark in cases.items():
        baseline = benchmark["extra_info"]["baseline"]
        rows.append(
            (
                f"`{case}`",
                *_milliseconds(benchmark),
                f"`{baseline}`" if baseline else "",
                _times(_ratio(cases, case, baseline)) if baseline else "",
            )
        )
    return [
        made_by(path, found),
        "Whole processes, in milliseconds.",
        "",
        *markdown_table([("what", "median", "p25-p75", "beside", "x beside"), *rows]),
    ]


def machine_code_table(path: Path) -> list[str]:
    """What the compiled kernels cost; one number for several generations of GPUs where they
    agree.
    """
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
                (
                    "for",
                    "branches",
                    "preset",
                    "dtype",
                    "B",
                    "C",
                    "kernel",
                    "registers",
                    "spills",
                    "16-byte loads",
                    "exponentials per class",
                    "instructions",
                    "per class in the loop",
                ),
                *rows,
            ]
        ),
    ]


def roofline_table(path: Path) -> list[str]:
    """What the model predicts for every chip, and what was measured of the same kernels, where it
    was.
    """
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


def data_tables(path: Path) -> list[str]:
    """The data benchmarks of one machine: loaders that decode while training, how long a step waits
    for them, the resident loader, starts.
    """
    found = read(path)
    tests = by_test(found)
    baseline = {
        info["pictures"]: info["images_per_second"]
        for benchmark in tests["test_streaming"]
        if (info := benchmark["extra_info"])["loader"] == "torchvision" and info["workers"] == 2
    }
    streams = [
        (
            PICTURES[info["pictures"]],
            info["loader"],
            str(info.get("threads", info.get("workers"))),
            *speed(benchmark),
            _times(
                info["images_per_second"] / baseline[info["pictures"]]
                if info["pictures"] in baseline
                else None
            ),
        )
        for benchmark in tests["test_streaming"]
        for info in [benchmark["extra_info"]]
    ]
    waiting = [
        (
            info["loader"],
            short(info["step_images_per_second"]),
            short(info["epoch_images_per_second"]),
            f"{info['waiting_share']:.1%}",
        )
        for benchmark in tests["test_waiting"]
        for info in [benchmark["extra_info"]]
    ]
    (step,) = tests["test_a_step_consumes"]
    consumed = step["extra_info"]["images_per_second"]
    resident = [
        (
            PICTURES[benchmark["extra_info"]["pictures"]],
            "Tiny-ImageNet, crop and flip",
            *speed(benchmark),
            "",
        )
        for benchmark in tests["test_resident"]
    ]
    for benchmark in tests["test_resident_loader"]:
        images, work = benchmark["params"]["name"], benchmark["params"]["work"]
        share = (
            f"{benchmark['extra_info']['images_per_second'] / consumed:.0f}"
            if images == STEP_OF
            else ""
        )
        resident.append((SIDES[images], work, *speed(benchmark), share))
    starts = {
        benchmark["params"]["start"]: benchmark["stats"]["median"]
        for benchmark in tests["test_start"]
    }
    return [
        made_by(path, found),
        "Images per second: of the median round, and of the slowest to the fastest.",
        "",
        *markdown_table(
            [
                (
                    "pictures",
                    "loader",
                    "threads or workers",
                    "images/s",
                    "slowest-fastest",
                    "/ torchvision, 2 workers",
                ),
                *streams,
            ]
        ),
        *markdown_table(
            [("loader", "the step alone, images/s", "with the loader", "waiting"), *waiting]
        ),
        *markdown_table(
            [
                ("images", "resident loader", "images/s", "slowest-fastest", "/ the step"),
                *resident,
                (SIDES[STEP_OF], "the step itself: ResNet-20, AHBF", *speed(step), "1"),
            ]
        ),
        (
            f"Opening 4,000 JPEG files of 64 x 64 for the resident loader: {short(starts['first'])}"
            f" s decoded, {short(starts['second'])} s from the cache."
        ),
        "",
    ]


def ladder_tables(path: Path) -> list[str]:
    """The step's ladders of one machine, each with its picture."""
    return [
        line
        for picture, ladder in ladder_pictures(path).items()
        for line in _ladder_table(path, ladder, picture)
    ]


def ladder_pictures(path: Path) -> dict[Path, dict[str, Any]]:
    """The ladders of a result file, that of ``fastokd bench step`` or those of ``bench.gpu``, and
    where the picture of each is.
    """
    found = read(path)
    ladders = [current_rows(found) for found in found.get("ladders", [found]) if "rows" in found]
    return {
        PICTURE_FOLDER
        / (f"{path.stem}.svg" if len(ladders) == 1 else f"{path.stem}-{number}.svg"): ladder
        for number, ladder in enumerate(ladders, 1)
    }


def _ladder_table(path: Path, ladder: dict[str, Any], picture: Path) -> list[str]:
    environment = ladder["environment"]
    device = (
        environment["device"]
        if environment["device"] != "cpu"
        else f"{ladder['processor']}, {_threads(environment['threads'])}"
    )
    marks = {"lever": "+ ", "alternative": "or ", "student": "= "}
    rows = []
    for row in ladder["rows"]:
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
        f" A step with all levers takes {ladder['teaching_costs']:.2f} times that of the student"
        " alone."
        if ladder["teaching_costs"]
        else ""
    )
    return [
        (
            f"{device}; torch {environment['torch']}; commit {environment['commit']};"
            f" `{path.relative_to(ROOT)}`, made by `{environment['command']}`."
        ),
        (
            f"{ladder['model']}, {ladder['method']}, {ladder['branches']} branches, batch"
            f" {ladder['batch_size']} of {' x '.join(map(str, ladder['image_size']))},"
            f" {ladder['num_classes']} classes, {ladder['data']}.{teaching}"
        ),
        "",
        *markdown_table(
            [
                (
                    "row",
                    "images/s",
                    "slowest-fastest",
                    "ms/step",
                    "x first",
                    "loss",
                    "GPU memory",
                    "start, s",
                ),
                *rows,
            ]
        ),
        *_image(f"The ladder of {ladder['model']}", picture),
    ]


def made_by(path: Path, found: dict[str, Any]) -> str:
    """The machine, the versions and the file that a table is of."""
    machine = found["machine_info"]
    command = machine.get("command", "make bench")  # not in the oldest files
    return (
        f"{_machine(found)}; commit {machine['commit']}; `{path.relative_to(ROOT)}`, made by"
        f" `{command}`."
    )


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine_info"]
    device = (
        machine["device"]
        if machine["device"] != "cpu"
        else f"{machine['cpu']}, {_threads(machine['threads'])}"
    )
    return f"{device}; torch {machine['torch']}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)} of torch"


def by_test(found: dict[str, Any]) -> dict[str, list[Benchmark]]:
    """The benchmarks of a result file by the function that measured them; none of one that was
    skipped.
    """
    tests: dict[str, list[Benchmark]] = defaultdict(list)
    for benchmark in found["benchmarks"]:
        tests[benchmark["name"].partition("[")[0]].append(benchmark)
    return tests


def speed(benchmark: Benchmark) -> tuple[str, str]:
    """Images per second of the median round, and of the slowest to the fastest."""
    stats, median = benchmark["stats"], benchmark["extra_info"]["images_per_second"]
    images = median * stats["median"]
    return short(median), f"{short(images / stats['max'])}-{short(images / stats['min'])}"


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _image(what: str, picture: Path) -> list[str]:
    return [f"![{what}]({picture.relative_to(PAGE.parent)})", ""]


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


def _speedup_picture(path: Path) -> Path:
    return PICTURE_FOLDER / f"{path.stem}.svg"


def blocks() -> dict[str, list[str]]:
    """What stands between each pair of the performance page's marks."""
    return {
        "step": _of_each(ladder_tables, "step-*.json"),
        "quick steps": _if_measured(step_table, "quickstep-cpu.json"),
        "loss": _of_each(
            lambda path: [
                *loss_table(path),
                *_image("Speed-up of the fused loss by size", _speedup_picture(path)),
            ],
            "loss-*.json",
        ),
        "methods": _of_each(method_table, "loss-*.json"),
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
    return {"accuracy": _of_part(gpu_tables.accuracy_tables, "accuracy") or NOT_MEASURED}


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


def pictures() -> dict[Path, tuple[dict[str, Any], Callable[[Mapping[str, Any], Path], Path]]]:
    """Every picture of the page: what it shows, and what draws it."""
    found: dict[Path, tuple[dict[str, Any], Callable[[Mapping[str, Any], Path], Path]]] = {}
    for path in sorted(RESULTS.glob("step-*.json")):
        found |= {
            picture: (ladder, draw_ladder) for picture, ladder in ladder_pictures(path).items()
        }
    for path in sorted(RESULTS.glob("loss-*.json")):
        found[_speedup_picture(path)] = (speedups(path), draw_speedups)
    return found


def main(arguments: list[str]) -> int:
    """Make the pages and the pictures anew, or with ``--check`` compare them; returns the exit
    code.
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
    for picture, (data, draw) in pictures().items():
        if shows(picture, data):
            continue
        if arguments == ["--check"]:
            print(f"{picture} is stale: run python -m bench.report", file=sys.stderr)
            wrong = 1
        else:
            draw(data, picture)
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
