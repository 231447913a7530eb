"""The tables of ``docs/performance.md``, generated from the result files: ``python -m bench.report``.

``--check`` fails if the page is not what the result files give.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.pages import page_with, short, update
from fastokd.analysis.tables import markdown_table as table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
END = "<!-- end -->"
PICTURES = {"small-64": "64 x 64", "large-224": "500 x 375, cropped to 224"}
SIDES = {"cifar": "32 x 32", "tiny-imagenet": "64 x 64"}
STEP_OF = "cifar"
"""The set whose images the step of ``bench_data_resident.py`` takes."""

Benchmark = dict[str, Any]


def loss_table(path: Path) -> list[str]:
    """The loss benchmark of one machine: a row a size and mode, medians and the ratios to the baselines of the same run."""
    found = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[tuple[int, int, str], dict[str, Benchmark]] = {}
    for benchmark in found["benchmarks"]:
        info = benchmark["extra_info"]
        groups.setdefault((info["batch"], info["classes"], info["mode"]), {})[info["provider"]] = benchmark
    rows = []
    for (batch, classes, mode), providers in groups.items():
        medians = {name: 1000 * benchmark["stats"]["median"] for name, benchmark in providers.items()}
        fused = providers.get("fused")
        spread = f"{short(1000 * fused['stats']['q1'])}-{short(1000 * fused['stats']['q3'])}" if fused else ""

        def ratio(name: str, medians: dict[str, float] = medians) -> str:
            return f"{medians[name] / medians['fused']:.2f}" if name in medians and "fused" in medians else ""

        cells = [short(medians[name]) if name in medians else "" for name in ("eager", "compiled", "fused")]
        rows.append((f"{batch} x {classes}", mode, *cells, spread, ratio("eager"), ratio("compiled")))
    return [
        made_by(path, found), "Four branches, AHBF paper preset, medians in milliseconds (p25 to p75 for the fused row).", "",
        *table([("B x C", "pass", "eager", "torch.compile", "fused", "p25-p75", "eager / fused", "compile / fused"), *rows]),
    ]


def data_tables(path: Path) -> list[str]:
    """The data benchmarks of one machine: loaders that decode while training, how long a step waits for them, the resident loader, starts."""
    found = json.loads(path.read_text(encoding="utf-8"))
    tests = by_test(found)
    baseline = {
        info["pictures"]: info["images_per_second"] for benchmark in tests["test_streaming"]
        if (info := benchmark["extra_info"])["loader"] == "torchvision" and info["workers"] == 2}
    streams = [
        (PICTURES[info["pictures"]], info["loader"], str(info.get("threads", info.get("workers"))), *speed(benchmark),
         f"{info['images_per_second'] / baseline[info['pictures']]:.2f}")
        for benchmark in tests["test_streaming"] for info in [benchmark["extra_info"]]]
    waiting = [
        (info["loader"], short(info["step_images_per_second"]), short(info["epoch_images_per_second"]), f"{info['waiting_share']:.1%}")
        for benchmark in tests["test_waiting"] for info in [benchmark["extra_info"]]]
    (step,) = tests["test_a_step_consumes"]
    consumed = step["extra_info"]["images_per_second"]
    resident = [(PICTURES[benchmark["extra_info"]["pictures"]], "Tiny-ImageNet, crop and flip", *speed(benchmark), "") for benchmark in tests["test_resident"]]
    for benchmark in tests["test_resident_loader"]:
        images, work = benchmark["params"]["name"], benchmark["params"]["work"]
        share = f"{benchmark['extra_info']['images_per_second'] / consumed:.0f}" if images == STEP_OF else ""
        resident.append((SIDES[images], work, *speed(benchmark), share))
    starts = {benchmark["params"]["start"]: benchmark["stats"]["median"] for benchmark in tests["test_start"]}
    return [
        made_by(path, found), "Images per second: of the median round, and of the slowest to the fastest.", "",
        *table([("pictures", "loader", "threads or workers", "images/s", "slowest-fastest", "/ torchvision, 2 workers"), *streams]),
        *table([("loader", "the step alone, images/s", "with the loader", "waiting"), *waiting]),
        *table([
            ("images", "resident loader", "images/s", "slowest-fastest", "/ the step"), *resident, (SIDES[STEP_OF], "the step itself: ResNet-20, AHBF", *speed(step), "1")]),
        f"Opening 4,000 JPEG files of 64 x 64 for the resident loader: {short(starts['first'])} s decoded, {short(starts['second'])} s from the cache.", "",
    ]


def merge_table(path: Path) -> list[str]:
    """The branches' first convolutions one by one and merged, on one machine."""
    found = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, dict[bool, Benchmark]] = {}
    for benchmark in by_test(found)["test_first_convs"]:
        groups.setdefault(benchmark["group"], {})[benchmark["extra_info"]["merged"]] = benchmark

    def cell(benchmark: Benchmark) -> str:
        median, low, high = (short(1000 * benchmark["stats"][name]) for name in ("median", "min", "max"))
        return f"{median} ({low}-{high})"

    return [made_by(path, found), "Forward and backward of the whole branched network: median milliseconds (fastest to slowest).", "", *table([
        ("network and batch", "one by one", "merged", "one by one / merged"),
        *((group, cell(pair[False]), cell(pair[True]), f"{pair[False]['stats']['median'] / pair[True]['stats']['median']:.2f}") for group, pair in groups.items())])]


def ladder_tables(path: Path) -> list[str]:
    """The step's ladder of one machine: that of ``fastokd bench step``, or those of ``bench.gpu``."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [line for ladder in found.get("ladders", [found]) for line in _ladder_table(path, ladder)]


def _ladder_table(path: Path, ladder: dict[str, Any]) -> list[str]:
    environment = ladder["environment"]
    device = environment["device"] if environment["device"] != "cpu" else f"{ladder['processor']}, {_threads(environment['threads'])}"
    marks = {"lever": "+ ", "alternative": "or ", "student": "= "}
    rows = []
    for row in ladder["rows"]:
        name = marks.get(row["kind"], "") + row["name"]
        if row["reason"]:
            rows.append((f"{name}: {row['reason']}", *[""] * 7))
            continue
        images, low, high = map(short, row["images_per_second"])
        ratio, least, most = (f"{value:.2f}" for value in row["times_first"])
        rows.append((name, images, f"{low}-{high}", short(row["milliseconds"]), f"{ratio} ({least}-{most})", "" if row["loss_share"] is None else f"{row['loss_share']:.1%}",
                     "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB", short(row["start_seconds"])))
    teaching = f" A step with all levers takes {ladder['teaching_costs']:.2f} times that of the student alone." if ladder["teaching_costs"] else ""
    return [
        f"{device}; torch {environment['torch']}; commit {environment['commit']}; `{path.relative_to(ROOT)}`, made by `{environment['command']}`.",
        f"{ladder['model']}, {ladder['method']}, {ladder['branches']} branches, batch {ladder['batch_size']} of {' x '.join(map(str, ladder['image_size']))}, "
        f"{ladder['num_classes']} classes, {ladder['data']}.{teaching}", "",
        *table([("row", "images/s", "slowest-fastest", "ms/step", "x first", "loss", "GPU memory", "start, s"), *rows])]


def made_by(path: Path, found: dict[str, Any]) -> str:
    """The machine, the versions and the file that a table is of."""
    machine = found["machine_info"]
    device = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {_threads(machine['threads'])}"
    return f"{device}; torch {machine['torch']}; commit {machine['commit']}; `{path.relative_to(ROOT)}`, made by `make bench`."


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)} of torch"


def by_test(found: dict[str, Any]) -> dict[str, list[Benchmark]]:
    """The benchmarks of a result file by the function that measured them; none of one that was skipped."""
    tests: dict[str, list[Benchmark]] = defaultdict(list)
    for benchmark in found["benchmarks"]:
        tests[benchmark["name"].partition("[")[0]].append(benchmark)
    return tests


def speed(benchmark: Benchmark) -> tuple[str, str]:
    """Images per second of the median round, and of the slowest to the fastest."""
    stats, median = benchmark["stats"], benchmark["extra_info"]["images_per_second"]
    images = median * stats["median"]
    return short(median), f"{short(images / stats['max'])}-{short(images / stats['min'])}"


def blocks() -> list[str]:
    """What stands between each pair of the page's marks, with the marks."""
    data = RESULTS / "data-cpu.json"
    ladders = [line for path in sorted(RESULTS.glob("step-*.json")) for line in ladder_tables(path)]
    parts = {
        "step": ladders or ["Not measured yet."],
        "loss": [line for path in sorted(RESULTS.glob("loss-*.json")) for line in loss_table(path)],
        "data": data_tables(data), "merged convolutions": merge_table(data),
    }
    return ["\n".join([f"<!-- {name}, generated by python -m bench.report -->", *lines, END]) for name, lines in parts.items()]


def current(text: str) -> str:
    """The page as the result files give it.

    Raises:
        ValueError: the page lacks a block's first mark.
    """
    for block in blocks():
        if (mark := block.partition("\n")[0]) not in text:
            raise ValueError(f"{PAGE} has no line '{mark}'; write it where the table is to stand, and '{END}' after it")
        text = page_with(text, block)
    return text


if __name__ == "__main__":
    raise SystemExit(update(PAGE, current, "bench.report", sys.argv[1:]))
