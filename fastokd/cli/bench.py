"""Commands that measure this machine."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastokd.cli.options import Runs, console, make_table, progress_bar, say
from fastokd.data import absolute_spec
from fastokd.errors import ConfigError, MissingExtra
from fastokd.experiments.analysis.step_figure import draw_step_benchmark
from fastokd.experiments.step_benchmark import StepBenchmark, report
from fastokd.experiments.step_images import decoded_images, synthetic_images
from fastokd.experiments.step_timer import StepRow
from fastokd.storage import write_json
from fastokd.train.config import TrainConfig
from fastokd.train.data import open_data, prepared
from fastokd.train.distributed import choose_device
from fastokd.train.rules import check_config


def step(
    model: str = "resnet32",
    method: str = "ahbf",
    branches: int | None = None,
    aux_blocks: int = 4,
    at: str | None = None,
    batch_size: int = 128,
    data: str = "synthetic",
    image_size: int | None = None,
    num_classes: int | None = None,
    device: str = "auto",
    seconds: float = 10.0,
    steps: int | None = None,
    out: Path = Path("bench-out"),
    profile: bool = False,
) -> None:
    """Train in the style of research code, then with one more optimization in each row: images per
    second, memory, and the loss's share of the step.

    Writes step-ladder.json and, if matplotlib is installed, step-ladder.svg. The rows train the
    same network on the same images.

    Args:
        model: Network, as for 'fastokd train'
        method: Method; methods that need a trained teacher are not supported
        data: synthetic (random images), or a dataset as for 'fastokd train --data', of which a part
            is decoded
        image_size: Height and width in pixels (default: 32, or the data's)
        num_classes: Classes of synthetic images (default: 10)
        seconds: Duration of each row; the first row is measured as long next to each
        steps: Steps of each of the five windows of a row, instead of --seconds
        out: Folder for the files
        profile: Also write step-trace.json, a trace of the last row for Perfetto or
            chrome://tracing, and print its most expensive operations
    """
    synthetic = data == "synthetic"
    if not synthetic and num_classes is not None:
        raise ConfigError(
            f"--num-classes {num_classes}: it is for synthetic images, {data} has its own classes;"
            " omit it"
        )
    if num_classes is not None and num_classes < 2:
        raise ConfigError(f"--num-classes {num_classes}: it must be at least 2")
    config = TrainConfig(
        data="" if synthetic else absolute_spec(data),
        model=model,
        method=method,
        branches=branches,
        aux_blocks=aux_blocks,
        at=at,
        batch_size=batch_size,
        image_size=image_size,
        lr=0.01,
        device=device,
    )
    where = choose_device(device)
    check_config(config)
    if synthetic:
        images = synthetic_images(config, 10 if num_classes is None else num_classes)
    else:
        with progress_bar("reading images") as progress:
            dataset = open_data(config, where, progress=progress)
            of_data = dataclasses.replace(config, normalization="data")  # the speed is the same
            images = decoded_images(config, prepared(of_data, dataset))
    benchmark = StepBenchmark(config, images, where, seconds=seconds, steps=steps)
    height, width = images.image_size
    say(
        f"{model}, method {method}, {config.num_branches()} branches, batch {batch_size}, {height}"
        f" x {width}, {images.num_classes} classes ({images.name}), on {where}"
    )
    rows: list[StepRow] = []
    for row in benchmark.rows():
        rows.append(row)
        text = row.reason or "not measured"
        if not row.reason and row.images_per_second and row.times_first:
            text = f"{row.images_per_second[0]:,.0f} images/s, {row.times_first[0]:.2f} x"
        say(f"  {row.name}: {text}")
    record = report(benchmark, rows)
    _print_rows(record)
    _write(record, out)
    if profile:
        trace, table = benchmark.profile(out)
        say(table)
        say(f"wrote {trace}: open it in https://ui.perfetto.dev")


def _print_rows(record: Mapping[str, Any]) -> None:
    on_gpu = any(row["peak_bytes"] is not None for row in record["rows"])
    memory = ["GPU memory"] if on_gpu else []
    table = make_table(
        *("row", "images/s", "slowest-fastest", "ms/step", "x first", "loss"), *memory, "start, s"
    )
    for column in table.columns:
        column.no_wrap = True
    for row in record["rows"]:
        mark = {"lever": "+ ", "alternative": "or ", "student": "= "}.get(row["kind"], "")
        if row["reason"]:
            table.add_row(f"{mark}{row['name']}: {row['reason']}".replace("[", "\\["))
            continue
        median, low, high = row["images_per_second"]
        table.add_row(
            f"{mark}{row['name']}",
            f"{median:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            f"{row['milliseconds']:.2f}",
            f"{row['times_first'][0]:.2f}",
            "-" if row["loss_share"] is None else f"{row['loss_share']:.1%}",
            *([f"{row['peak_bytes'] / 2**30:.2f} GiB"] if on_gpu else []),
            f"{row['start_seconds']:.1f}",
        )
    wide = console()
    wide.width = max(wide.width, 120)  # wrapped lines are better than truncated numbers
    wide.print("")
    wide.print(table)
    print(
        "\n+ one more optimization than the + rows above; or: alternative, not kept below; =: the"
        f" student without teaching. Images/s: median of {record['windows']} windows; x first:"
        " relative to the"
        " window of the first row right before;\nloss: share of a step, timed separately; start:"
        " the first steps, with compilation"
    )
    if record["teaching_costs"]:
        print(
            "teaching costs: a step with all optimizations takes"
            f" {record['teaching_costs']:.2f} times that of the student alone"
        )


def _write(record: dict[str, Any], out: Path) -> None:
    path = out / "step-ladder.json"
    write_json(path, record)
    try:
        plot = f" and {draw_step_benchmark(record, path.with_suffix('.svg'))}"
    except MissingExtra as error:
        plot = f"; no plot: {error}"
    say(f"wrote {path}{plot}")


def compare(files: Runs = ()) -> None:
    """Removed: compare result files of 'make bench' with 'pytest-benchmark compare'."""
    raise ConfigError(
        "bench compare was removed; compare result files with 'pytest-benchmark compare'"
    )
