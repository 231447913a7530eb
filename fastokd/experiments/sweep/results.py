"""Errors of the runs of one configuration, and differences from the setup of a paper."""

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
    """The runs of one configuration, one for each seed: those with all epochs, in the order of
    their seeds, and the states of all by name, also of those not started.
    """

    runs: tuple[Run, ...]
    states: Mapping[str, str]

    def errors(self, row: str = "student", best: bool = False) -> list[float]:
        """``Run.error`` of a row (see ``Published.row``) in the last or best epoch of each run."""
        return [run.error(row, best) for run in self.runs]

    def progress(self) -> str:
        """Progress in words, e.g. "3 seeds", "1 of 3 seeds, 1 failed", "not run", "started"."""
        states = self.states.values()
        planned, failed = len(states), sum(state.startswith("failed") for state in states)
        if len(self.runs) == planned and planned:
            return f"{planned} seed{'s' * (planned > 1)}"
        if self.runs or 0 < failed < planned:
            return f"{len(self.runs)} of {planned} seeds{f', {failed} failed' if failed else ''}"
        if failed:
            return "failed"
        return "not run" if set(states) <= {"not run"} else "started"

    def as_json(self, row: str = "student") -> dict[str, Any]:
        """Errors of a row in %, their mean and sample standard deviation; None for too few runs."""
        values: dict[str, Any] = {"seeds": [run.config.seed for run in self.runs]}
        for name, errors in (("last", self.errors(row)), ("best", self.errors(row, best=True))):
            values[f"{name}_errors"] = errors
            values[f"{name}_error_mean"] = statistics.mean(errors) if errors else None
            values[f"{name}_error_std"] = statistics.stdev(errors) if len(errors) > 1 else None
        return {**values, "runs": dict(self.states)}


def measure(jobs: Iterable[Job], failed: Mapping[str, str]) -> Measured:
    """Read the runs of one configuration; ``failed`` has the errors of failed runs by name."""
    runs, states = [], {}
    for job in jobs:
        state = f"failed: {failed[job.name]}" if job.name in failed else job.state()
        if state == "finished":
            try:
                run = read_run(job.path)
                if run.epochs < job.config.epochs:
                    state = f"failed: {'; '.join(run.remarks)}"
                else:
                    runs.append(run)
            except (CheckpointError, ConfigError) as error:
                state = f"failed: {error}"
        states[job.name] = state
    return Measured(tuple(runs), states)


def difference(errors: Sequence[float], published: Published | None) -> str:
    """The mean error minus the published one, as text."""
    return f"{statistics.mean(errors) - published.error:+.2f}" if errors and published else "-"


def group_by_item(items: Iterable[tuple[str, Iterable[str]]]) -> dict[str, list[str]]:
    """The names that have each item, from the items of each name."""
    groups: dict[str, list[str]] = {}
    for name, own in items:
        for item in own:
            groups.setdefault(item, []).append(name)
    return groups


def setup_differences(published: TrainConfig, config: TrainConfig) -> list[str]:
    """The fields that differ from the published ones, except seed, device and speed."""
    config = replace(config, **{name: getattr(published, name) for name in SAME_RUN})
    return [f"{each} (published, here)" for each in differences(published, config)]


def data_differences(recipe: Recipe, runs: Sequence[Run]) -> list[str]:
    """Known and possible differences of the runs' data from the data of a recipe."""
    return list(dict.fromkeys(item for run in runs for item in _data_differences(recipe, run)))


def _data_differences(recipe: Recipe, run: Run) -> Iterable[str]:
    target, config, images = DATASETS[recipe.dataset], run.config, run.data.get("num_images") or {}
    classes, train = run.data.get("num_classes", target.num_classes), images.get("train")
    tested = next((count for name, count in images.items() if name != "train"), None)
    if classes != target.num_classes:
        yield (
            f"the data ({run.data.get('name')}) has {classes} classes, {target.title} has"
            f" {target.num_classes}"
        )
    if train and train != target.num_train:
        yield f"trained on {train:,} images, published on {target.num_train:,}"
    if tested and tested != target.num_test:
        yield f"tested on {tested:,} images, published on {target.num_test:,}"
    if recipe.dataset in ("cifar10", "cifar100") and not _is_of_kind(config.data, recipe.dataset):
        yield (
            f"the images come from {config.data or 'elsewhere'}, not from the published arrays of"
            f" {target.title}; if stored as JPEG, their pixels differ"
        )
    if config.val_split:
        share = f"{config.val_split:g} of the training images"
        yield f"tested on {share}, published on the test images"
    if train and (rest := train % config.batch_size):
        yield (
            f"an epoch omits the {rest} images that do not fill a batch; the papers do not describe"
            " this"
        )


def _is_of_kind(data: str, kind: str) -> bool:
    """True if data is of this kind of dataset; judged by its name if it no longer exists."""
    try:
        return resolve(data)[0] is get_dataset_kind(kind)
    except (ConfigError, DataError):
        return data.startswith(f"{kind}:")


def comparison_remarks(runs: Sequence[Run]) -> list[str]:
    """The remarks of runs, and whether they were evaluated on the same images."""
    by_remark = group_by_item((run.path.name, run.remarks) for run in runs)
    remarks = [f"{summarize(names, 4)}: {remark}" for remark, names in by_remark.items()]
    try:
        check_comparable(runs)
    except ConfigError as error:
        remarks.append(str(error))
    return remarks
