"""``fastokd demo``: a student alone and taught by AHBF, on embedded real images, in minutes."""

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
from fastokd.experiments.analysis.tables import spread
from fastokd.export import check_same_logits, load_student, measure_accuracy
from fastokd.models import create_model
from fastokd.models.summary import forward_flops
from fastokd.storage import storage_error, write_json
from fastokd.train.config import TrainConfig, check_config
from fastokd.train.data import open_data
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder, read_json_object
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
    branches, aux_blocks = (branches, 1) if method == "ahbf" else (1, 0)
    return TrainConfig(
        data="digits",
        model=MODEL,
        method=method,
        branches=branches,
        aux_blocks=aux_blocks,
        epochs=epochs,
        batch_size=64,
        lr=0.05,
        seed=seed,
    )


def run_demo(out: Path, seeds: int, epochs: int, branches: int) -> None:
    """Run the demo and write everything under ``out``, which may hold nothing but a demo."""
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
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    dataset = open_data(demo_config("baseline", 0, epochs, branches), torch.device("cpu"))
    assert isinstance(dataset, Dataset)
    say(
        f"{MODEL} alone against the same {MODEL} taught by AHBF with {branches} branches; {seeds}"
        f" seeds, {epochs} epochs each"
    )
    say(
        f"data: {len(dataset.train)} training and {len(dataset.evaluation)}"
        f" {dataset.evaluation.name} images of handwritten digits, {len(dataset.classes)} classes"
    )
    runs: dict[str, list[_DemoRun]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method in METHODS:  # alternately: changes of the machine's speed affect both
            config = demo_config(method, seed, epochs, branches)
            run = _train(out / f"{method}-seed{seed}", config, dataset)
            runs[method].append(run)
            rows = "  ".join(f"{name} {100 * row:.2f}" for name, row in run.summary.last.items())
            say(
                f"{method:<8} seed {seed}  {run.summary.seconds:5.1f} s  last-epoch accuracy %:"
                f" {rows}"
            )
    say(_accuracy_table(runs))
    gain, results = _gain(runs, len(dataset.evaluation))
    costs, measured = _costs(runs, dataset, branches)
    say(gain)
    say(costs)
    histories = {
        label: [run.folder.read_metrics() for run in runs[method]]
        for label, method in (("alone", "baseline"), ("AHBF", "ahbf"))
    }
    files = draw_curves(histories, out / "curves", f"digits, {MODEL}")
    say(
        f"curves: {len(files)} PNG files in {out / 'curves'}, one per branch and teacher assistant"
        " and overview.png"
    )
    say(_check_export(runs["ahbf"][0]))
    methods = {method: [run.summary.__dict__ for run in each] for method, each in runs.items()}
    write_json(out / "demo.json", {"format": MARK, "methods": methods, **results, **measured})
    say(f"whole demo: {time.monotonic() - started:.0f} s")


def _clear_earlier_demo(out: Path) -> None:
    """Remove the files of an earlier demo; a ``ConfigError`` if the folder contains others."""
    names = re.compile(rf"demo\.json|curves|({'|'.join(METHODS)})-seed\d+")
    try:
        entries = list(out.iterdir()) if out.exists() else []
        foreign = [entry.name for entry in entries if not names.fullmatch(entry.name)]
        ours = read_json_object(out / "demo.json").get("format") == MARK
        if entries and (foreign or not ours):
            raise ConfigError(
                f"{out} holds something else than an earlier demo"
                f" ({', '.join(foreign[:3] or ['no demo.json'])}); choose another folder with --out"
            )
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise storage_error(out, error) from error


def _train(path: Path, config: TrainConfig, dataset: Dataset) -> _DemoRun:
    folder = RunFolder.create(path)
    # The lines of the epochs would scroll the demo's own away.
    reporter = Reporter(label=f"{config.method} seed {config.seed}", lines=False)
    trainer = Trainer(config, folder, reporter, dataset)
    trainer.start()
    return _DemoRun(trainer.run(), folder)


def _accuracies(runs: Sequence[_DemoRun], row: str = _STUDENT) -> list[float]:
    return [run.summary.last[row] for run in runs]


def _accuracy_table(runs: Runs) -> Table:
    table = Table(
        title="accuracy in %, mean +- standard deviation over seeds, last epoch (no seed and no"
        " epoch picked)",
        title_justify="left",
    )
    for column in ("row", "student alone", "AHBF"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name in runs["ahbf"][0].summary.last:
        alone, taught = (
            spread([100 * value for value in _accuracies(runs[method], name)])
            if method == "ahbf" or name == _STUDENT
            else ""
            for method in METHODS
        )
        table.add_row(f"{name} (the student)" if name == _STUDENT else name, alone, taught)
    return table


def _gain(runs: Runs, num_images: int) -> tuple[str, dict[str, Any]]:
    """The gain from teaching and its uncertainty, in words and as numbers."""
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
    verdict = "more than chance alone is likely to give"
    if abs(gain) <= noise:
        verdict = "within what chance alone gives"
    text = (
        f"gain from teaching: {gain:+.2f} points (seed by seed {by_seed}); one test image is"
        f" {100 / num_images:.2f} points.\n"
        f"That is {verdict}: {len(gains)} seeds and {num_images} test images leave +-{noise:.2f}"
        " points (two standard deviations). On a set this small the demo shows that everything"
        " runs, not whether the method helps; for that train on CIFAR, see 'fastokd recipes' and"
        " docs/results.md."
    )
    return text, {"gains": gains, "two_standard_deviations_points": noise}


def _costs(runs: Runs, dataset: Dataset, branches: int) -> tuple[str, dict[str, Any]]:
    """The costs of training of both methods, in words and as numbers."""
    seconds, flops = {}, {}
    for method, each in runs.items():
        seconds[method] = statistics.median(run.summary.seconds for run in each)
        layout = (None, 0) if method == "baseline" else (branches, 1)
        model = create_model(MODEL, method, len(dataset.classes), *layout)
        flops[method] = forward_flops(model, tuple(dataset.train.images.shape[1:]))
    text = (
        f"cost of teaching, in training only: {seconds['ahbf'] / seconds['baseline']:.2f}x the time"
        f" per run ({seconds['ahbf']:.1f} s against {seconds['baseline']:.1f} s, medians),"
        f" {flops['ahbf'] / flops['baseline']:.2f}x the forward FLOPs. The exported student costs"
        " the same as the one trained alone."
    )
    return text, {"seconds_median": seconds, "forward_flops": flops}


def _check_export(run: _DemoRun) -> str:
    """Load the exported student, without the branches, and measure it again."""
    path = run.folder.student
    student, record = load_student(path)
    trained = load_run(run.folder.path)
    student.to(trained.evaluator.device)
    compared = check_same_logits(trained.evaluator.model.student().eval(), student, trained.loader)
    again = measure_accuracy(student, trained.loader)
    parameters = sum(value.numel() for value in student.parameters())
    return (
        f"exported student: {path} ({record['architecture']['name']}, {parameters:,} parameters, no"
        f" branches); loaded again it gives the same logits bit for bit on {compared} images:"
        f" {100 * again:.2f} % (training said {100 * run.summary.last[_STUDENT]:.2f} %)"
    )
