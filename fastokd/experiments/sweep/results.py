"""What the runs of one configuration measured, and in what they are not what a paper describes."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastokd.data.registry import get_dataset_kind, resolve
from fastokd.errors import CheckpointError, ConfigError, DataError, summarize
from fastokd.experiments.analysis.runs import SAME_RUN, Run, check_comparable, read_run
from fastokd.experiments.recipes import DATASETS, Published, Recipe
from fastokd.experiments.sweep.queue import Job
from fastokd.train.config import TrainConfig, differences


@dataclass(frozen=True)
class Measured:
    """The runs of one configuration, one for each seed.

    Attributes:
        runs: those with all epochs, in the order of their seeds.
        states: of every run, also those not begun, by its name.
    """

    runs: tuple[Run, ...]
    states: Mapping[str, str]

    def errors(self, row: str = "student", best: bool = False) -> list[float]:
        """Errors in %, one for each run in ``runs``, in the last epoch or in the student's best
        one.

        Args:
            row: as ``Published.row`` has it.
            best: whether of the best epoch.
        """
        return [_error(run, row, best) for run in self.runs]

    def progress(self) -> str:
        """How far the runs are: "3 seeds", "1 of 3 seeds", "1 of 3 seeds, 1 failed", "not run",
        "begun" or "failed".
        """
        planned, failed = (
            len(self.states),
            sum(state.startswith("failed") for state in self.states.values()),
        )
        if len(self.runs) == planned and planned:
            return f"{planned} seed{'s' * (planned > 1)}"
        if self.runs or 0 < failed < planned:
            return f"{len(self.runs)} of {planned} seeds{f', {failed} failed' if failed else ''}"
        if failed:
            return "failed"
        return "not run" if set(self.states.values()) <= {"not run"} else "begun"

    def as_json(self, row: str = "student") -> dict[str, Any]:
        """Errors of a row in %, not rounded, with their mean and sample standard deviation; None
        where there are too few runs.
        """
        found: dict[str, Any] = {}
        for name, errors in (("last", self.errors(row)), ("best", self.errors(row, best=True))):
            found[f"{name}_errors"] = errors
            found[f"{name}_error_mean"] = statistics.mean(errors) if errors else None
            found[f"{name}_error_std"] = statistics.stdev(errors) if len(errors) > 1 else None
        return {"seeds": [run.config.seed for run in self.runs], **found, "runs": dict(self.states)}


def measure(jobs: Iterable[Job], failed: Mapping[str, str]) -> Measured:
    """What the runs of one configuration measured so far.

    Args:
        jobs: the runs.
        failed: those that failed just now, by name, each with its error.
    """
    runs, states = [], {}
    for job in jobs:
        states[job.name] = f"failed: {failed[job.name]}" if job.name in failed else job.state()
        if states[job.name] == "finished":
            try:
                run = read_run(job.path)
            except (CheckpointError, ConfigError) as error:
                states[job.name] = f"failed: {error}"
                continue
            if run.epochs < job.config.epochs:
                states[job.name] = f"failed: {'; '.join(run.remarks)}"
            else:
                runs.append(run)
    return Measured(tuple(runs), states)


def _error(run: Run, row: str, best: bool) -> float:
    accuracies = (run.best if best else run.last)["eval"]
    if row == "branch_mean":
        return statistics.mean(
            100 * (1 - value)
            for name, value in accuracies.items()
            if re.fullmatch(r"branch\d+", name)
        )
    return 100 * (1 - accuracies[run.student if row == "student" else row])


def difference(errors: Sequence[float], published: Published | None) -> str:
    """The mean of the errors less what is published, in words."""
    return f"{statistics.mean(errors) - published.error:+.2f}" if errors and published else "-"


def setup_differences(published: TrainConfig, config: TrainConfig) -> list[str]:
    """In which fields a configuration is not the published one, but for the seed, and where and how
    fast it runs.
    """
    here = replace(config, **{name: getattr(published, name) for name in SAME_RUN})
    return [f"{each} (published, here)" for each in differences(published, here)]


def data_differences(recipe: Recipe, runs: Sequence[Run]) -> list[str]:
    """In what the data of runs is not, or may not be, what the recipe is for, as far as they have
    recorded it.
    """
    target = DATASETS[recipe.dataset]
    found = []
    for run in runs:
        if run.data.get("num_classes", target.num_classes) != target.num_classes:
            found.append(
                f"the data ({run.data.get('name')}) has {run.data['num_classes']} classes,"
                f" {target.title} has {target.num_classes}"
            )
        images = run.data.get("num_images") or {}
        train, tested = (
            images.get("train"),
            next((count for name, count in images.items() if name != "train"), None),
        )
        if train and train != target.num_train:
            found.append(f"trained on {train:,} images, published on {target.num_train:,}")
        if tested and tested != target.num_test:
            found.append(f"tested on {tested:,} images, published on {target.num_test:,}")
        if recipe.dataset in ("cifar10", "cifar100") and not _is_of_kind(
            run.config.data, recipe.dataset
        ):
            found.append(
                f"the images come from {run.config.data or 'elsewhere'}, not from the published"
                f" arrays of {target.title}; if stored as JPEG, their pixels are others"
            )
        if run.config.val_split:
            found.append(
                f"tested on {run.config.val_split:g} of the training images, published on the test"
                " images"
            )
        if train and (rest := train % run.config.batch_size):
            found.append(
                f"an epoch leaves out the {rest} images that do not fill a batch; the papers do not"
                " say what they do with them"
            )
    return list(dict.fromkeys(found))


def _is_of_kind(data: str, kind: str) -> bool:
    """Whether a run's data is of this kind of dataset, as far as its name tells where it is no
    longer there.
    """
    try:
        return resolve(data)[0] is get_dataset_kind(kind)
    except (ConfigError, DataError):
        return data.startswith(f"{kind}:")


def comparison_remarks(runs: Sequence[Run]) -> list[str]:
    """That runs were not evaluated on the same images, and what is not as in whole runs."""
    said: dict[str, list[str]] = {}
    for run in runs:
        for remark in run.remarks:
            said.setdefault(remark, []).append(run.path.name)
    remarks = [f"{summarize(names, 4)}: {remark}" for remark, names in said.items()]
    try:
        check_comparable(runs)
    except ConfigError as error:
        remarks.append(str(error))
    return remarks
