"""Commands that measure this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastokd.cli.options import Runs, print_table, progress_bar, say
from fastokd.data import absolute_spec
from fastokd.errors import ConfigError, MissingExtra
from fastokd.experiments.analysis.step_figure import draw_step_benchmark
from fastokd.experiments.step_benchmark import StepBenchmark, report
from fastokd.experiments.step_images import decoded_images, synthetic_images
from fastokd.experiments.step_timer import StepRow
from fastokd.storage import write_json
from fastokd.train.config import TrainConfig, check_config
from fastokd.train.data import open_data, with_augmentation
from fastokd.train.distributed import choose_device


def step(
    data: str = "synthetic",
    num_classes: int | None = None,
    seconds: float = 10.0,
    steps: int | None = None,
    out: Path = Path("bench-out"),
    profile: bool = False,
    **fields: Any,
) -> None:
    """Train in the style of research code, then with one more optimization in each row: images per
    second, memory, and the loss's share of the step. Methods with a trained teacher are not
    supported.

    Writes step-ladder.json and, if matplotlib is installed, step-ladder.svg. The rows train the
    same network on the same images.

    Args:
        data: synthetic (random images of 32 pixels), or a dataset as for 'fastokd train --data', of
            which a part is decoded
        num_classes: Classes of synthetic images (default: 10)
        seconds: Duration of each row; the first row is measured as long next to each
        steps: Steps of each of the five windows of a row, instead of --seconds
        out: Folder for the files
        profile: Also write step-trace.json, a trace of the last row for Perfetto or
            chrome://tracing, and print its most expensive operations
    """
    synthetic = data == "synthetic"
    if num_classes is not None and (not synthetic or num_classes < 2):
        reason = "it must be at least 2" if synthetic else f"{data} has its own classes; omit it"
        raise ConfigError(f"--num-classes {num_classes}: {reason}")
    config = TrainConfig(data="" if synthetic else absolute_spec(data), lr=0.01, **fields)
    where = choose_device(config.device)
    check_config(config)
    if synthetic:
        images = synthetic_images(config, 10 if num_classes is None else num_classes)
    else:
        with progress_bar("reading images") as progress:
            dataset = open_data(config, where, progress=progress)
            images = decoded_images(config, with_augmentation(config, dataset))
    benchmark = StepBenchmark(config, images, where, seconds=seconds, steps=steps)
    height, width = images.image_size
    say(
        f"{config.model}, method {config.method}, {config.num_branches()} branches, batch"
        f" {config.batch_size}, {height} x {width}, {images.num_classes} classes ({images.name}),"
        f" on {where}"
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
    marks, rows = {"lever": "+ ", "alternative": "or ", "student": "= "}, []
    for row in record["rows"]:
        name = f"{marks.get(row['kind'], '')}{row['name']}"
        if row["reason"]:
            rows.append([f"{name}: {row['reason']}"])
            continue
        median, low, high = row["images_per_second"]
        rows.append(
            [
                name,
                f"{median:,.0f}",
                f"{low:,.0f}-{high:,.0f}",
                f"{row['milliseconds']:.2f}",
                f"{row['times_first'][0]:.2f}",
                "-" if row["loss_share"] is None else f"{row['loss_share']:.1%}",
                *([f"{row['peak_bytes'] / 2**30:.2f} GiB"] if on_gpu else []),
                f"{row['start_seconds']:.1f}",
            ]
        )
    headings = ["row", "images/s", "slowest-fastest", "ms/step", "x first", "loss"]
    say("")
    print_table([*headings, *(["GPU memory"] if on_gpu else []), "start, s"], rows, wide=True)
    say(
        "\n+ one more optimization than the + rows above; or: alternative, not kept below; =: the"
        f" student without teaching. Images/s: median of {record['windows']} windows; x first:"
        " relative to the window of the first row right before;\nloss: share of a step, timed"
        " separately; start: the first steps, with compilation"
    )
    if cost := record["teaching_costs"]:
        whole = f"a step with all optimizations takes {cost:.2f} times"
        say(f"teaching costs: {whole} that of the student alone")


def _write(record: dict[str, Any], out: Path) -> None:
    path = out / "step-ladder.json"
    write_json(path, record)
    try:
        plot = f" and {draw_step_benchmark(record, path.with_suffix('.svg'))}"
    except MissingExtra as error:
        plot = f"; no plot: {error}"
    say(f"wrote {path}{plot}")


def compare(files: Runs = ()) -> None:
    """Removed: compare result files of 'make bench' with 'pytest-benchmark compare'.

    Args:
        files: Ignored
    """
    raise ConfigError("bench compare was removed; use 'pytest-benchmark compare'")
