"""Markdown of the result files of the suites: a function for each suite, which takes the file and
returns lines.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.pages import short
from fastokd.experiments.analysis.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = ["Not measured yet.", ""]
IMAGES = {"small-64": "64 x 64", "large-224": "500 x 375, cropped to 224"}
SIDES = {"cifar": "32 x 32", "tiny-imagenet": "64 x 64"}
README_SIZES = ((128, 10), (96, 1000), (1024, 1000))
STEP_OF = "cifar"
"""The set whose images the step of ``bench_data_resident.py`` takes."""

Benchmark = dict[str, Any]


def kernel_count_table(path: Path) -> list[str]:
    """The kernels of a step, counted on the pretend CUDA device, by case and phase."""
    found = read(path)
    (phases,) = {tuple(counts) for counts in found["cases"].values()}
    head = ("network", "method", "networks", "all", *phases)
    rows = [
        (*name.split(", "), *map(str, (sum(counts.values()), *counts.values())))
        for name, counts in found["cases"].items()
    ]
    versions = "; ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        f"{versions}; `{path.relative_to(ROOT)}`, made by `{found['command']}`.",
        "",
        *markdown_table([head, *rows]),
    ]


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
    """The median of one provider divided by another's; None if one was not measured."""
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
    """The data of the figure."""
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
    return {"title": f"The fused AHBF loss, four branches; {machine(found)}", "rows": rows}


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


def term_table(path: Path) -> list[str]:
    """Every divergence from a frozen teacher on one machine."""
    found = read(path)
    groups = _grouped(by_test(found)["test_term"], "divergence", "batch", "classes")
    rows = [
        (divergence, f"{batch} x {classes}", *_provider_cells(providers))
        for (divergence, batch, classes), providers in groups.items()
    ]
    return [
        made_by(path, found),
        (
            "Forward and backward of a student's cross-entropy and one term from a frozen teacher,"
            " T = 4, medians in milliseconds (p25 to p75 for the fused row)."
        ),
        "",
        *markdown_table([("divergence", "B x C", *_PROVIDER_HEAD), *rows]),
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
            f"The AHBF loss of four branches on a CPU ({machine(found)}; commit"
            f" {found['machine_info']['commit']}). Ratios below 1 mean that fastokd is slower:"
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
        *markdown_table([("process", "median", "p25-p75", "baseline", "x baseline"), *rows]),
    ]


def data_tables(path: Path) -> list[str]:
    """The data benchmarks of one machine: loaders that decode during training, how long a step
    waits for them, the resident loader, starts.
    """
    found = read(path)
    tests = by_test(found)
    waiting = [
        (
            info["loader"],
            short(info["step_images_per_second"]),
            short(info["epoch_images_per_second"]),
            f"{info['waiting_share']:.1%}",
        )
        for info in (benchmark["extra_info"] for benchmark in tests["test_waiting"])
    ]
    starts = {
        benchmark["params"]["start"]: benchmark["stats"]["median"]
        for benchmark in tests["test_start"]
    }
    return [
        made_by(path, found),
        "Images per second: of the median round, and of the slowest to the fastest.",
        "",
        *_streaming_table(tests["test_streaming"]),
        *markdown_table(
            [("loader", "the step alone, images/s", "with the loader", "waiting"), *waiting]
        ),
        *_resident_table(tests),
        (
            f"Opening 4,000 JPEG files of 64 x 64 for the resident loader: {short(starts['first'])}"
            f" s decoded, {short(starts['second'])} s from the cache."
        ),
        "",
    ]


def _streaming_table(benchmarks: list[Benchmark]) -> list[str]:
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    baseline = {
        info["dataset"]: info["images_per_second"]
        for info in infos
        if info["loader"] == "torchvision" and info["workers"] == 2
    }
    rows = []
    for benchmark, info in zip(benchmarks, infos, strict=True):
        reference = baseline.get(info["dataset"])
        rows.append(
            (
                IMAGES[info["dataset"]],
                info["loader"],
                str(info.get("threads", info.get("workers"))),
                *speed(benchmark),
                _times(info["images_per_second"] / reference if reference else None),
            )
        )
    head = (
        "images",
        "loader",
        "threads or workers",
        "images/s",
        "slowest-fastest",
        "/ torchvision, 2 workers",
    )
    return markdown_table([head, *rows])


def _resident_table(tests: Mapping[str, list[Benchmark]]) -> list[str]:
    (step,) = tests["test_a_step_consumes"]
    consumed = step["extra_info"]["images_per_second"]
    rows = [
        (
            IMAGES[benchmark["extra_info"]["dataset"]],
            "Tiny-ImageNet, crop and flip",
            *speed(benchmark),
            "",
        )
        for benchmark in tests["test_resident"]
    ]
    for benchmark in tests["test_resident_loader"]:
        images, work = benchmark["params"]["name"], benchmark["params"]["work"]
        ratio = benchmark["extra_info"]["images_per_second"] / consumed
        share = f"{ratio:.0f}" if images == STEP_OF else ""
        rows.append((SIDES[images], work, *speed(benchmark), share))
    return markdown_table(
        [
            ("images", "resident loader", "images/s", "slowest-fastest", "/ the step"),
            *rows,
            (SIDES[STEP_OF], "the step itself: ResNet-20, AHBF", *speed(step), "1"),
        ]
    )


def made_by(path: Path, found: dict[str, Any]) -> str:
    """The machine, the versions and the file that a table is of."""
    info = found["machine_info"]
    command = info.get("command", "make bench")  # not in the oldest files
    return (
        f"{machine(found)}; commit {info['commit']}; `{path.relative_to(ROOT)}`, made by"
        f" `{command}`."
    )


def machine(found: dict[str, Any]) -> str:
    info = found["machine_info"]
    device = (
        info["device"] if info["device"] != "cpu" else f"{info['cpu']}, {threads(info['threads'])}"
    )
    return f"{device}; torch {info['torch']}"


def threads(count: int) -> str:
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
