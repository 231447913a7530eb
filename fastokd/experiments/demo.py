"""``fastokd demo``: a student alone compared with the same student taught by AHBF, on embedded real
images, in minutes.
"""

import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fastokd.data import Dataset
from fastokd.errors import ConfigError
from fastokd.experiments.analysis.curves import draw_curves
from fastokd.experiments.analysis.figures import require_matplotlib
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
"""The format in the demo's demo.json, which distinguishes it from other files of that name."""
_STUDENT = "branch1"


class _DemoRun(NamedTuple):
    summary: Summary
    folder: RunFolder


Runs = Mapping[str, Sequence[_DemoRun]]
"""The runs of each method, one for each seed."""


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
        ConfigError: a value is out of range, or ``out`` contains files that are not of a demo.
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
    options = {"seeds": seeds, "epochs": epochs, "branches": branches}
    write_json(out / "demo.json", {"format": MARK, **options})

    started = time.monotonic()
    # On 64 images of 8 x 8 pixels a second thread gains nothing, and on a busy machine the threads
    # wait for each other.
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    dataset = open_data(demo_config("baseline", 0, epochs, branches), torch.device("cpu"))
    assert isinstance(dataset, Dataset)
    console.print(
        f"{MODEL} alone against the same {MODEL} taught by AHBF with {branches} branches; {seeds}"
        f" seeds, {epochs} epochs each"
    )
    console.print(
        f"data: {len(dataset.train)} training and {len(dataset.evaluation)}"
        f" {dataset.evaluation.name} images of handwritten digits, {len(dataset.classes)} classes"
    )
    runs: dict[str, list[_DemoRun]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method in METHODS:  # alternately: changes of the machine's speed affect both
            config = demo_config(method, seed, epochs, branches)
            run = _train(out / f"{method}-seed{seed}", config, dataset, console)
            runs[method].append(run)
    _print_table(runs, console)
    results = _print_gain(runs, len(dataset.evaluation), console)
    results |= _print_costs(runs, dataset, branches, console)
    histories = {
        label: [run.folder.read_metrics() for run in runs[method]]
        for label, method in (("alone", "baseline"), ("AHBF", "ahbf"))
    }
    files = draw_curves(histories, out / "curves", f"digits, {MODEL}")
    console.print(
        f"curves: {len(files)} PNG files in {out / 'curves'}, one per branch and teacher assistant"
        " and overview.png"
    )
    _check_export(runs["ahbf"][0], console)
    methods = {method: [run.summary.__dict__ for run in each] for method, each in runs.items()}
    write_json(out / "demo.json", {"format": MARK, "methods": methods, **results})
    console.print(f"whole demo: {time.monotonic() - started:.0f} s")


def _clear_earlier_demo(out: Path) -> None:
    """Remove the files of an earlier demo, and nothing else.

    Raises:
        ConfigError: the folder contains other files.
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
        names = rf"demo\.json|curves|({'|'.join(METHODS)})-seed\d+"
        foreign = [entry.name for entry in entries if not re.fullmatch(names, entry.name)]
        if not ours or foreign:
            raise ConfigError(
                f"{out} holds something else than an earlier demo"
                f" ({', '.join(foreign[:3] or ['no demo.json'])}); choose another folder with --out"
            )
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise storage_error(out, error) from error


def _train(path: Path, config: TrainConfig, dataset: Dataset, console: Console) -> _DemoRun:
    folder = RunFolder.create(path)
    # The lines of the epochs would scroll the demo's own away.
    reporter = Reporter(label=f"{config.method} seed {config.seed}", lines=False)
    trainer = Trainer(config, folder, reporter, dataset)
    trainer.start()
    summary = trainer.run()
    rows = "  ".join(f"{name} {100 * value:.2f}" for name, value in summary.last.items())
    console.print(
        f"{config.method:<8} seed {config.seed}  {summary.seconds:5.1f} s  last-epoch accuracy %:"
        f" {rows}"
    )
    return _DemoRun(summary, folder)


def _accuracies(runs: Sequence[_DemoRun], row: str = _STUDENT) -> list[float]:
    return [run.summary.last[row] for run in runs]


def _spread(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} +- {100 * statistics.stdev(values):.2f}"


def _print_table(runs: Runs, console: Console) -> None:
    table = Table(
        title="accuracy in %, mean +- standard deviation over seeds, last epoch (no seed and no"
        " epoch picked)",
        title_justify="left",
    )
    table.add_column("row")
    table.add_column("student alone", justify="right")
    table.add_column("AHBF", justify="right")
    for name in runs["ahbf"][0].summary.last:
        taught = _spread(_accuracies(runs["ahbf"], name))
        if name == _STUDENT:
            alone = _spread(_accuracies(runs["baseline"], name))
            table.add_row(f"{name} (the student)", alone, taught)
        else:
            table.add_row(name, "", taught)
    console.print(table)


def _print_gain(runs: Runs, num_images: int, console: Console) -> dict[str, Any]:
    """Print the gain from teaching and its uncertainty, and return both."""
    columns = [_accuracies(runs[method]) for method in METHODS]
    gains = [taught - alone for alone, taught in zip(*columns, strict=True)]
    gain = 100 * statistics.mean(gains)
    # Two independent sources of chance: the seeds, and which images happen to be in the test set
    # (binomial).
    seeds = sum(statistics.variance(column) / len(column) for column in columns)
    means = [statistics.mean(column) for column in columns]
    images = sum(mean * (1 - mean) / num_images for mean in means)
    noise = 2 * math.hypot(100 * math.sqrt(seeds), 100 * math.sqrt(images))
    by_seed = ", ".join(f"{100 * value:+.2f}" for value in gains)
    console.print(
        f"gain from teaching: {gain:+.2f} points (seed by seed {by_seed}); one test image is"
        f" {100 / num_images:.2f} points."
    )
    verdict = "more than chance alone is likely to give"
    if abs(gain) <= noise:
        verdict = "within what chance alone gives"
    console.print(
        f"That is {verdict}: {len(gains)} seeds and {num_images} test images leave +-{noise:.2f}"
        " points (two standard deviations). On a set this small the demo shows that everything"
        " runs, not whether the method helps; for that train on CIFAR, see 'fastokd recipes' and"
        " docs/results.md."
    )
    return {"gains": gains, "two_standard_deviations_points": noise}


def _print_costs(runs: Runs, dataset: Dataset, branches: int, console: Console) -> dict[str, Any]:
    """Print the costs of training of both methods, and return them."""
    seconds, flops = {}, {}
    for method, each in runs.items():
        seconds[method] = statistics.median(run.summary.seconds for run in each)
        layout = (None, 0) if method == "baseline" else (branches, 1)
        model = create_model(MODEL, method, len(dataset.classes), *layout)
        flops[method] = forward_flops(model, tuple(dataset.train.images.shape[1:]))
    console.print(
        f"cost of teaching, in training only: {seconds['ahbf'] / seconds['baseline']:.2f}x the time"
        f" per run ({seconds['ahbf']:.1f} s against {seconds['baseline']:.1f} s, medians),"
        f" {flops['ahbf'] / flops['baseline']:.2f}x the forward FLOPs. The exported student costs"
        " the same as the one trained alone."
    )
    return {"seconds_median": seconds, "forward_flops": flops}


def _check_export(run: _DemoRun, console: Console) -> None:
    """Load the exported student, without the branches, and measure it again."""
    path = run.folder.student
    student, record = load_student(path)
    trained = load_run(run.folder.path)
    student.to(trained.evaluator.device)
    compared = check_same_logits(trained.evaluator.model.student().eval(), student, trained.loader)
    again = measure_accuracy(student, trained.loader)
    parameters = sum(value.numel() for value in student.parameters())
    console.print(
        f"exported student: {path} ({record['architecture']['name']}, {parameters:,} parameters, no"
        f" branches); loaded again it gives the same logits bit for bit on {compared} images:"
        f" {100 * again:.2f} % (training said {100 * run.summary.last[_STUDENT]:.2f} %)"
    )
