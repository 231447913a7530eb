"""``fastokd demo``: a student alone against the same student taught by AHBF, on real embedded
images, in minutes.
"""

import json
import math
import re
import shutil
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastokd.data import Dataset
from fastokd.errors import ConfigError
from fastokd.experiments.analysis.curves import draw_curves, require_matplotlib
from fastokd.export import check_same_logits, load_student, measure_accuracy
from fastokd.models import create_model
from fastokd.models.summary import forward_flops
from fastokd.storage import storage_error, write_json
from fastokd.train.config import TrainConfig, check_config
from fastokd.train.data import open_data
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run
from fastokd.train.trainer import Summary, Trainer

MODEL = "resnet8"
METHODS = ("baseline", "ahbf")
MARK = "fastokd demo 1"
"""What tells a demo's own demo.json from a file that happens to have its name."""


def demo_config(method: str, seed: int, epochs: int, branches: int) -> TrainConfig:
    """The demo's settings: the papers' optimizer, scaled to 1,400 images of 8 x 8 pixels."""
    taught = method == "ahbf"
    return TrainConfig(
        data="digits",
        model=MODEL,
        method=method,
        branches=branches if taught else 1,
        aux_blocks=1 if taught else 0,
        epochs=epochs,
        batch_size=64,
        lr=0.05,
        seed=seed,
    )


def run_demo(out: Path, seeds: int, epochs: int, branches: int) -> None:
    """Run the demo and write everything under ``out``.

    Raises:
        ConfigError: a value is out of range, or ``out`` holds something that is not a demo.
        MissingExtra: matplotlib is not installed.
        StorageError: the disk refused.
    """
    if seeds < 3:
        raise ConfigError(f"seeds={seeds}: use at least 3, one or two say nothing about the spread")
    if not 3 <= branches <= 8:
        raise ConfigError(f"branches={branches}: the demo takes 3 to 8")
    check_config(demo_config("ahbf", 0, epochs, branches))
    require_matplotlib()
    _clear_earlier_demo(out)
    write_json(
        out / "demo.json", {"format": MARK, "seeds": seeds, "epochs": epochs, "branches": branches}
    )

    started = time.monotonic()
    # On 64 images of 8 x 8 pixels a second thread gains nothing, and on a busy machine the threads
    # wait for each other.
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    dataset = open_data(demo_config("baseline", 0, epochs, branches), torch.device("cpu"))
    console.print(
        f"{MODEL} alone against the same {MODEL} taught by AHBF with {branches} branches; {seeds}"
        f" seeds, {epochs} epochs each",
        markup=False,
    )
    console.print(
        f"data: {len(dataset.train)} training and {len(dataset.evaluation)}"
        f" {dataset.evaluation.name} images of handwritten digits, {len(dataset.classes)} classes",
        markup=False,
    )
    runs: dict[str, list[tuple[Summary, RunFolder]]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for (
            method
        ) in METHODS:  # the methods alternate, so that a drift of the machine's speed meets both
            runs[method].append(
                _run(
                    out / f"{method}-seed{seed}",
                    demo_config(method, seed, epochs, branches),
                    dataset,
                    console,
                )
            )
    _report(out, runs, dataset, branches, console)
    console.print(f"whole demo: {time.monotonic() - started:.0f} s", markup=False)


def _clear_earlier_demo(out: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else.

    Raises:
        ConfigError: something else is there.
        StorageError: the disk refused.
    """
    try:
        entries = list(out.iterdir()) if out.exists() else []
        if not entries:
            return
        try:
            ours = json.loads((out / "demo.json").read_text(encoding="utf-8")).get("format") == MARK
        except (OSError, ValueError, AttributeError):
            ours = False
        foreign = [
            entry.name
            for entry in entries
            if entry.name not in ("demo.json", "curves")
            and not re.fullmatch(rf"({'|'.join(METHODS)})-seed\d+", entry.name)
        ]
        if not ours or foreign:
            raise ConfigError(
                f"{out} holds something else than an earlier demo"
                f" ({', '.join(foreign[:3] or ['no demo.json'])}); choose another folder with --out"
            )
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise storage_error(out, error) from error


def _run(
    path: Path, config: TrainConfig, dataset: Dataset, console: Console
) -> tuple[Summary, RunFolder]:
    run = RunFolder.create(path)
    # The line of each epoch would scroll the demo's own away.
    trainer = Trainer(
        config, run, Reporter(label=f"{config.method} seed {config.seed}", lines=False), dataset
    )
    trainer.start()
    summary = trainer.run()
    rows = "  ".join(f"{name} {100 * value:.2f}" for name, value in summary.last.items())
    console.print(
        f"{config.method:<8} seed {config.seed}  {summary.seconds:5.1f} s  last-epoch accuracy %:"
        f" {rows}",
        markup=False,
    )
    return summary, run


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} +- {100 * statistics.stdev(values):.2f}"


def _report(
    out: Path,
    runs: dict[str, list[tuple[Summary, RunFolder]]],
    dataset: Dataset,
    branches: int,
    console: Console,
) -> None:
    summaries = {method: [summary for summary, _ in pairs] for method, pairs in runs.items()}
    kept = "branch1"
    table = Table(
        title=(
            "accuracy in %, mean +- standard deviation over seeds, last epoch (no seed and no epoch"
            " picked)"
        ),
        title_justify="left",
    )
    table.add_column("row")
    table.add_column("student alone", justify="right")
    table.add_column("AHBF", justify="right")
    for name in summaries["ahbf"][0].last:
        alone = (
            _spread([summary.last[name] for summary in summaries["baseline"]])
            if name == kept
            else ""
        )
        table.add_row(
            f"{name} (the student)" if name == kept else name,
            alone,
            _spread([summary.last[name] for summary in summaries["ahbf"]]),
        )
    console.print(table)

    gains = [
        taught.last[kept] - alone.last[kept]
        for alone, taught in zip(summaries["baseline"], summaries["ahbf"], strict=True)
    ]
    gain, count = 100 * statistics.mean(gains), len(dataset.evaluation)
    # Two independent sources of chance: the seeds, and which images happen to be in the test set
    # (binomial).
    columns = [[summary.last[kept] for summary in found] for found in summaries.values()]
    seeds = 100 * math.sqrt(sum(statistics.variance(column) / len(column) for column in columns))
    images = 100 * math.sqrt(
        sum(statistics.mean(column) * (1 - statistics.mean(column)) / count for column in columns)
    )
    noise = 2 * math.hypot(seeds, images)
    seconds = {
        method: statistics.median(summary.seconds for summary in found)
        for method, found in summaries.items()
    }
    size = tuple(dataset.train.images.shape[1:])
    flops = {
        method: forward_flops(
            create_model(
                MODEL,
                method,
                len(dataset.classes),
                None if method == "baseline" else branches,
                0 if method == "baseline" else 1,
            ),
            size,
        )
        for method in METHODS
    }
    console.print(
        f"gain from teaching: {gain:+.2f} points (seed by seed"
        f" {', '.join(f'{100 * value:+.2f}' for value in gains)}); one test image is"
        f" {100 / count:.2f} points.",
        markup=False,
    )
    verdict = (
        "within what chance alone gives"
        if abs(gain) <= noise
        else "more than chance alone is likely to give"
    )
    console.print(
        f"That is {verdict}: {len(gains)} seeds and {count} test images leave +-{noise:.2f} points"
        " (two standard deviations). On a set this small the demo shows that everything runs, not"
        " whether the method helps; for that train on CIFAR, see 'fastokd recipes' and"
        " docs/results.md.",
        markup=False,
    )
    console.print(
        f"cost of teaching, in training only: {seconds['ahbf'] / seconds['baseline']:.2f}x the time"
        f" per run ({seconds['ahbf']:.1f} s against {seconds['baseline']:.1f} s, medians),"
        f" {flops['ahbf'] / flops['baseline']:.2f}x the forward FLOPs. The exported student costs"
        " the same as the one trained alone.",
        markup=False,
    )

    histories = {
        label: [run.read_metrics() for _, run in runs[method]]
        for label, method in (("alone", "baseline"), ("AHBF", "ahbf"))
    }
    files = draw_curves(histories, out / "curves", f"digits, {MODEL}")
    console.print(
        f"curves: {len(files)} PNG files in {out / 'curves'}, one per branch and teacher assistant"
        " and overview.png",
        markup=False,
    )
    _check_export(runs["ahbf"][0], dataset, kept, console)
    write_json(
        out / "demo.json",
        {
            "format": MARK,
            "methods": {
                method: [summary.__dict__ for summary in found]
                for method, found in summaries.items()
            },
            "gains": gains,
            "two_standard_deviations_points": noise,
            "seconds_median": seconds,
            "forward_flops": flops,
        },
    )


def _check_export(
    pair: tuple[Summary, RunFolder], dataset: Dataset, kept: str, console: Console
) -> None:
    """Load the exported student, without the branches, and measure it again."""
    summary, run = pair
    student, record = load_student(run.student)
    trained = load_run(run.path)
    student.to(trained.evaluator.device)
    compared = check_same_logits(trained.evaluator.model.student().eval(), student, trained.loader)
    again = measure_accuracy(student, trained.loader)
    parameters = sum(value.numel() for value in student.parameters())
    console.print(
        f"exported student: {run.student} ({record['architecture']['name']}, {parameters:,}"
        " parameters, no branches); loaded again it gives the same logits bit for bit on"
        f" {compared} images: {100 * again:.2f} % (training said {100 * summary.last[kept]:.2f} %)",
        markup=False,
    )
