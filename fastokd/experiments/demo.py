"""``fastokd demo``: a student alone and taught by AHBF, on embedded real images, in minutes."""

import re
import shutil
import time
from pathlib import Path

import torch

from fastokd.data import Dataset
from fastokd.errors import ConfigError
from fastokd.experiments.analysis.compare import compare
from fastokd.experiments.analysis.curves import draw_curves
from fastokd.experiments.analysis.figures import require_matplotlib
from fastokd.experiments.analysis.runs import read_runs
from fastokd.export import check_same_logits, load_student, measure_accuracy
from fastokd.storage import storage_error, write_json
from fastokd.train.config import TrainConfig
from fastokd.train.data import open_data
from fastokd.train.progress import OutputConsole, Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder, read_json_object
from fastokd.train.runs import load_run
from fastokd.train.trainer import Trainer

MODEL = "resnet8"
METHODS = ("baseline", "ahbf")
HELD_OUT = 0.72
"""Fraction of the training images to evaluate on: with all images every student is nearly perfect,
and with few labels a teacher has something to add.
"""
MARK = "fastokd demo 1"
"""The format in the demo's demo.json, which distinguishes it from other files of that name."""


def demo_config(method: str, seed: int, epochs: int, branches: int) -> TrainConfig:
    """The demo's settings: the papers' optimizer for few images of 8 x 8 pixels. They were chosen
    on seeds 100 to 105, which the demo does not use.
    """
    branches, aux_blocks = (branches, 1) if method == "ahbf" else (1, 0)
    return TrainConfig(
        data="digits",
        val_split=HELD_OUT,
        model=MODEL,
        method=method,
        branches=branches,
        aux_blocks=aux_blocks,
        epochs=epochs,
        batch_size=64,
        schedule="cosine",
        lr=0.05,
        precision="fp32",  # the same on processors with and without bf16 arithmetic
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
    say = OutputConsole(highlight=False, soft_wrap=True, markup=False).print
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
    paths: dict[str, list[Path]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method in METHODS:  # alternately: changes of the machine's speed affect both
            path = out / f"{method}-seed{seed}"
            paths[method].append(path)
            say(_train(path, demo_config(method, seed, epochs, branches), dataset))
    groups = read_runs([*paths["baseline"], *paths["ahbf"]])
    comparison = compare(groups, latency=False)
    *tables, _ = comparison.tables()
    say("\n" + "\n\n".join(table.as_text() for table in tables) + "\n")
    test = next(row.equal_epochs.test for row in comparison.rows if row.equal_epochs.test)
    if test.p is None:
        say(f"No test of the difference: {test.reason}.")
    else:
        size = "larger than" if test.p < 0.05 else "within"
        say(f"The difference is {size} what chance gives over {seeds} seeds (5 % level).")
    say(
        "Both students had the same number of epochs, and AHBF several times the training compute."
        " Longer training alone can gain as much: docs/results.md compares at equal compute too."
    )
    histories = {
        label: [RunFolder(path).read_metrics() for path in paths[method]]
        for label, method in (("alone", "baseline"), ("AHBF", "ahbf"))
    }
    files = draw_curves(histories, out / "curves", f"digits, {MODEL}")
    say(
        f"curves: {len(files)} PNG files in {out / 'curves'}, one per branch and teacher assistant"
        " and overview.png"
    )
    say(_check_export(paths["ahbf"][0]))
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


def _train(path: Path, config: TrainConfig, dataset: Dataset) -> str:
    """Train one run; returns its results in words."""
    # The lines of the epochs would scroll the demo's own away.
    reporter = Reporter(label=f"{config.method} seed {config.seed}", lines=False)
    trainer = Trainer(config, RunFolder.create(path), reporter, dataset)
    trainer.start()
    summary = trainer.run()
    accuracies = "  ".join(f"{name} {100 * value:.2f}" for name, value in summary.last.items())
    return (
        f"{config.method:<8} seed {config.seed}  {summary.seconds:5.1f} s  last-epoch accuracy %:"
        f" {accuracies}"
    )


def _check_export(path: Path) -> str:
    """Load the exported student of a run, without the branches, and measure it again."""
    student, record = load_student(path)
    run = load_run(path)
    student.to(run.evaluator.device)
    compared = check_same_logits(run.evaluator.model.student().eval(), student, run.loader)
    accuracy = measure_accuracy(student, run.loader)
    parameters = sum(value.numel() for value in student.parameters())
    return (
        f"exported student: {RunFolder(path).student} ({record['architecture']['name']},"
        f" {parameters:,} parameters, no branches); loaded again it gives the same logits bit for"
        f" bit on {compared} images: {100 * accuracy:.2f} % (training said"
        f" {100 * record['accuracy']['top1']:.2f} %)"
    )
