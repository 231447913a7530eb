"""ResNet-32 alone and taught, on CIFAR-10: the papers' recipes, with their schedule scaled to the
plan's epochs.

The first call writes the plan (epochs, seeds, runs) into the result file, and later calls continue
with it: run after run, seed after seed, and within a run where it was stopped, if its folder is
still there.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from bench.accuracy.images import find_archive, unpacked
from bench.accuracy.matrix import measured
from bench.gpu.part import Context, OutOfMinutes, Part, Refused, Row
from bench.gpu.results import Results
from fastokd.data.registry import get_dataset_kind, resolve
from fastokd.errors import Preempted
from fastokd.experiments.analysis.runs import read_run
from fastokd.experiments.recipes import get_recipe
from fastokd.train.config import TrainConfig
from fastokd.train.progress import Reporter
from fastokd.train.session import begin_run
from fastokd.train.signals import StopSignals
from fastokd.train.trainer import RunIsFinished

EPOCHS = 60
"""The default of the plan: by estimate, five runs then take about ten minutes on one H200. The
papers use 300.
"""
ARCHIVE = "cifar10-jpeg.tar.xz"
"""Without ``--data``: the images of CIFAR-10 as JPEG files in folders train/CLASS and test/CLASS,
next to the checkout or in it (a borrowed machine receives only the checkout's folder).
"""
SEEDS = 3
"""The papers' number of runs."""
SAVE_MINUTES = 0.4
"""Before the minutes are spent a run is stopped, and saves."""


class Run(NamedTuple):
    """A network and method of the plan: a published recipe, with its preset or another."""

    recipe: str
    preset: str | None = None

    @property
    def name(self) -> str:
        return f"{self.recipe}, {self.preset}" if self.preset else self.recipe


FIRST = (
    Run("cifar10-resnet32-baseline"),
    Run("cifar10-resnet32-ahbf", "paper"),
    Run("cifar10-resnet32-ahbf", "code"),
    Run("cifar10-resnet32-one"),
    Run("cifar10-resnet32-okddip"),
)
"""Of all seeds before the others."""
MORE = tuple(Run(f"cifar10-resnet32-{method}") for method in ("cl-ilr", "ffsd", "afid", "ffm"))


class Deadline(StopSignals):
    """Signals that ask a run to stop, and the end of the minutes, which a run follows as one.

    Args:
        spent: whether the minutes are.
    """

    def __init__(self, spent: Callable[[], bool]) -> None:
        super().__init__()
        self._spent = spent

    @property
    def received(self) -> int:
        return self.heard or (
            int(signal.SIGUSR1) if self._spent() else 0
        )  # plain, because ranks send it each other


def configuration(context: Context, run: Run, epochs: int, seed: int) -> TrainConfig:
    """The recipe's configuration with the plan's epochs; for the dry run of a small network."""
    config = get_recipe(run.recipe).config
    config = dataclasses.replace(
        config,
        data=_data(context),
        epochs=epochs,
        seed=seed,
        preset=run.preset or config.preset,
        device=str(context.device),
    )
    return (
        dataclasses.replace(config, model="resnet8", aux_blocks=0, batch_size=64)
        if context.dry
        else config
    )


def _data(context: Context) -> str | None:
    """``--data``; by default CIFAR-10 (JPEG) next to the checkout, unpacked once;
    the dry run has small images.
    """
    if context.data is not None or context.dry:
        return context.data or "digits"
    folder = context.runs / ARCHIVE.partition(".")[0]
    if not folder.is_dir() and find_archive(ARCHIVE) is None:
        return None
    return str(unpacked([ARCHIVE], folder))


def _refusal(context: Context) -> str | None:
    """The reason why it cannot run.

    Raises:
        ConfigError, DataError: there is no such dataset.
    """
    if (data := _data(context)) is None:
        return (
            f"no --data, and no {ARCHIVE} in a folder shared/data: give the folder of the CIFAR-10"
            " images, or cifar10:FOLDER"
        )
    resolve(data)
    return None


def _plan(context: Context, results: Results) -> dict[str, Any]:
    """The plan of the result file, made by the first call.

    Raises:
        Refused: another was asked for.
    """
    if "plan" not in results.values:
        epochs, seeds = (1, 1) if context.dry else (EPOCHS, SEEDS)
        results.head(
            plan={
                "id": datetime.now().strftime("%Y%m%d-%H%M%S"),
                "epochs": context.epochs or epochs,
                "seeds": context.seeds or seeds,
            }
        )
    plan: dict[str, Any] = results.values["plan"]
    for name, wanted in (("epochs", context.epochs), ("seeds", context.seeds)):
        if wanted is not None and wanted != plan[name]:
            raise Refused(
                f"--{name} {wanted}: the plan in {results.path} has {plan[name]}; leave it out to"
                " continue with that, or start again with --again"
            )
    return plan


def _rows(context: Context, results: Results) -> Iterator[Row]:
    plan = _plan(context, results)
    for runs in (FIRST, *(() if context.dry else (MORE,))):
        for seed in range(plan["seeds"]):
            for run in runs:
                yield Row(
                    f"{run.name}, seed {seed}",
                    context.needs(2.5),
                    lambda run=run, seed=seed: _train(context, results, plan, run, seed),
                )


def _train(
    context: Context, results: Results, plan: dict[str, Any], run: Run, seed: int
) -> dict[str, Any]:
    """Train from the beginning, or from where a call before stopped."""
    config = configuration(context, run, plan["epochs"], seed)
    folder = context.runs / f"accuracy-{plan['id']}" / f"{run.name.replace(', ', '-')}-{seed}"
    signals = Deadline(lambda: context.minutes_left() < context.needs(SAVE_MINUTES))
    try:
        trainer = begin_run(
            config, folder, folder.name, Reporter(quiet=True), resume=True, signals=signals
        )
        _note_data(context, results, trainer.dataset.describe())
        trainer.run()
    except RunIsFinished:  # and its row was lost
        pass
    except Preempted:
        if signals.heard:
            raise
        raise OutOfMinutes(
            f"stopped in epoch {trainer.epoch + 1} of {config.epochs}; a later call continues there"
            f" if {folder} is still there"
        ) from None
    return {
        "method": config.method,
        "preset": config.preset,
        "recipe": run.recipe,
        "seed": seed,
        "branches": config.num_branches(),
        **measured(read_run(folder)),
    }


def _note_data(context: Context, results: Results, about: dict[str, Any]) -> None:
    """Write what the runs are trained on; all of them on the same.

    Raises:
        Refused: the rows before are of other images.
    """
    kind, _ = resolve(_data(context))
    now = {
        **{name: about[name] for name in ("name", "num_images", "image_size", "fingerprint")},
        "original_files": kind is get_dataset_kind("cifar10"),
    }
    before = results.values.get("data")
    if before is None:
        results.head(data=now)
    elif before["fingerprint"] != now["fingerprint"]:
        raise Refused(
            f"the rows in {results.path} are of other images ('{before['name']}') than"
            f" {_data(context)} has; pass those, or start again with --again"
        )


def _line(row: dict[str, Any]) -> str:
    error = {when: 100 * (1 - row[when][row["student"]]) for when in ("last", "best")}
    return (
        f"student's error {error['last']:.2f} %, best {error['best']:.2f} %;"
        f" {row['seconds'] / 60:.1f} minutes, {row['images_per_second']:,.0f} images/s"
    )


PART = Part("accuracy", 2.5, _rows, _line, _refusal, sources=("bench/accuracy",))
