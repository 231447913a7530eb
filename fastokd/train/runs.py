"""The identity of a run, and loading a run for evaluation and export."""

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.data import FileSplit, Loader, Split, absolute_spec, list_evaluation
from fastokd.data.images import Progress
from fastokd.errors import CheckpointError, ConfigError, class_differences, summarize
from fastokd.export import load_weights
from fastokd.train.build import before_teaching, build_model, is_before_teaching
from fastokd.train.checkpoint import checkpoint_files, load_checkpoint, load_newest
from fastokd.train.config import (
    TrainConfig,
    differences,
    fields_with_role,
    identity_fields,
    one_teacher,
)
from fastokd.train.config_files import load_config
from fastokd.train.data import AnyDataset, loader_for, open_data, prepared
from fastokd.train.distributed import Ranks, choose_device, from_main
from fastokd.train.ema import StudentAverage
from fastokd.train.fields import Role
from fastokd.train.initial import InitialWeights
from fastokd.train.late_teaching import student_loss
from fastokd.train.launch import STARTED_HERE
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.step import BranchEvaluator
from fastokd.train.teacher import Teacher

MAY_CHANGE = fields_with_role(Role.RESUME)
"""Fields that may change when a run is resumed; those that determine its results may not."""

_RECORDED = ("aux_blocks", "compression", "seed", "epochs")
"""Further fields in the record of a student."""


def fingerprints(
    config: TrainConfig, teacher: Teacher | None, initial: Sequence[InitialWeights]
) -> dict[str, str]:
    """The fingerprints of a new run's frozen teacher and files of initial weights, which several
    networks have separated by commas.
    """
    weights = ",".join(each.fingerprint for each in initial if config.weights)
    known = {"teacher": teacher.fingerprint if teacher else "", "weights": weights}
    return {name: value for name, value in known.items() if value}


def by_content(config: TrainConfig, teacher: str | None, weights: str | None) -> TrainConfig:
    """The configuration with fingerprints of the frozen teacher and the initial weights, as far as
    they are known, instead of the paths of their files.
    """
    config = dataclasses.replace(one_teacher(config), teacher=teacher) if teacher else config
    return dataclasses.replace(config, weights=weights) if weights else config


def run_identity(
    config: TrainConfig,
    fingerprint: str | None,
    teacher: str | None = None,
    weights: str | None = None,
) -> str:
    """A hash of the fields outside ``MAY_CHANGE`` and the data's fingerprint. Further arguments are
    as for ``by_content``.
    """
    config = by_content(config, teacher, weights)
    return hashlib.sha256(repr((identity_fields(config), fingerprint)).encode()).hexdigest()


def provenance(
    config: TrainConfig,
    run: RunFolder,
    fingerprint: str | None,
    teacher: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """The origin of a student, for its record: method settings and the versions that started the
    run. Its entry ``run`` is the same for all exports of a run, however often it was resumed.
    Arguments as for ``run_identity``.
    """
    return {
        "run": run_identity(config, fingerprint, teacher, weights)[:12],
        "method": config.method,
        "preset": config.preset,
        "branches": config.num_branches(),
        **{name: getattr(config, name) for name in _RECORDED},
        **({"teach_from": config.teach_from} if config.teach_from else {}),
        **run.versions(),
    }


def check_classes(where: str, state: Mapping[str, Any], dataset: AnyDataset) -> None:
    """Raise a CheckpointError if a dataset has other classes than a checkpoint."""
    if list(state["classes"]) != list(dataset.classes):
        theirs, ours = summarize(state["classes"], 4), summarize(dataset.classes, 4)
        which = class_differences(state["classes"], dataset.classes)
        raise CheckpointError(
            f"{where} was trained on the classes {theirs}, the data has {ours}{which}"
        )


def check_same_run(
    where: str,
    state: Mapping[str, Any],
    before: TrainConfig,
    config: TrainConfig,
    dataset: AnyDataset,
    teacher: Teacher | None,
    allow_config_change: bool,
) -> list[str]:
    """Check that the checkpoint ``where``, with content ``state`` and configuration ``before``,
    belongs to a run with this configuration, dataset and teacher.

    Returns:
        The changed fields that are not in ``MAY_CHANGE``.

    Raises:
        CheckpointError: it has other classes, images or another teacher.
        ConfigError: the configuration changed and that is not allowed.
    """
    check_classes(where, state, dataset)
    if state["data"].get("fingerprint") != dataset.fingerprint:
        problem = f"{where} was trained on other images than {config.data} holds now"
        raise CheckpointError(f"{problem}; restore them, or start a new run")
    if config.normalization != before.normalization:
        raise ConfigError(
            f"normalization={config.normalization}: the run has trained with"
            f" {before.normalization}, which cannot change; start a new run"
        )
    adjusted = {name: getattr(config, name) for name in MAY_CHANGE}
    if teacher and state.get("teacher") == teacher.fingerprint:
        adjusted["teacher"] = config.teacher  # another path of the same file is no change
    changed = differences(dataclasses.replace(before, **adjusted), config)
    if changed and not allow_config_change:
        raise ConfigError(
            f"the configuration differs from the checkpoint's (old, new: {'; '.join(changed)}):"
            " undo the change, pass --allow-config-change, or start a new run"
        )
    if teacher and state.get("teacher") != teacher.fingerprint:
        problem = f"{where} was distilled from another teacher than {teacher.description}"
        raise CheckpointError(f"{problem}; restore that teacher, or start a new run")
    return changed


def newest_checkpoint(
    run: RunFolder, report: Callable[[str], object]
) -> tuple[dict[str, Any], str]:
    """The content and path of the newest complete checkpoint, read by the main process and sent to
    all; ``report`` gets an error message for each newer one that is damaged.
    """
    loaded: Any = load_newest(run.checkpoints) if Ranks.current().is_main else None
    state, path, complaints = from_main(loaded)
    for complaint in complaints:
        report(complaint)
    return state, str(path)


@dataclass(frozen=True)
class LoadedRun:
    """A run's weights and images, ready for evaluation or export."""

    config: TrainConfig
    """Of the loaded networks: ``before_teaching(config)`` for checkpoints before ``teach_from``."""
    dataset: AnyDataset
    evaluator: BranchEvaluator
    images: Split | FileSplit
    """The split of the dataset to evaluate on."""
    loader: Loader
    """Of these images."""
    state: dict[str, Any]


def load_run(
    path: Path,
    which: str = "last",
    data: str | None = None,
    device: str = "auto",
    split: str | None = None,
    progress: Progress | None = None,
) -> LoadedRun:
    """Load a run, finished or not; a damaged last checkpoint is skipped with a warning.

    Args:
        which: "last" or "best".
        data: a dataset other than the run's, with the same classes; its images are prepared like
            the run's. It may be a folder or list without splits.
        split: "train", "val" or "test"; by default the split the run is evaluated on.
        progress: called with (files done, files in all) while files are decoded.

    Raises:
        CheckpointError: no run folder, no such checkpoint, damaged, or other classes.
    """
    run = RunFolder.open(path)
    config = run.load_config()
    evaluation = None
    if data is not None and absolute_spec(data) != config.data:
        evaluation = list_evaluation(data, split)
    config = dataclasses.replace(config, device=device, data=data or config.data)
    # Evaluation needs no optimizer, and an old run may have used one that was removed.
    check_config(dataclasses.replace(config, optimizer="adamw"))
    where = choose_device(device)
    if config.precision == "tf32" and where.type != "cuda":
        config = dataclasses.replace(config, precision="fp32")  # the same numbers with more bits
    if which == "last":
        state, file, complaints = load_newest(run.checkpoints)
        for complaint in complaints:
            warnings.warn(complaint, stacklevel=2)
    else:
        state, file = load_checkpoint(run.best), run.best
    opened = open_data(config, where, state["data"], progress, evaluation)
    dataset = prepared(config, opened, state["data"])
    check_classes(str(path), state, dataset)
    criterion = None
    if is_before_teaching(load_config(state["config"], str(file)), state):
        criterion, config = student_loss(config), before_teaching(config)
    model = build_model(config, len(dataset.classes), where)
    load_weights(model, state["model"], str(file))
    evaluator = BranchEvaluator(config, model.eval(), where, criterion)
    if state["ema"]:
        evaluator.average = StudentAverage(model, config.ema)
        evaluator.average.load_state_dict(state["ema"])
    # Not strict: mixing weights are restored, memories of single images are not needed.
    evaluator.criterion.load_state_dict(state["criterion"], strict=False)
    images: Split | FileSplit = dataset.evaluation
    if split is not None and evaluation is None:
        images = dataset.split(split)
    loader = loader_for(config, dataset, images, False, where, state["data"])
    return LoadedRun(config, dataset, evaluator, images, loader, state)


def resume_hint(run: RunFolder, batch_size: int) -> str:
    """The newest checkpoint on the disk and the command that resumes from it."""
    if not checkpoint_files(run.checkpoints):
        return "no epoch was saved, so there is no checkpoint"
    state = load_newest(run.checkpoints)[0]
    done = f"{state['epoch']} finished epoch{'s' * (state['epoch'] != 1)}"
    if state["loader"]:
        done += f" and {state['loader']['position'] // batch_size} steps of the next"
    processes = os.environ.get(STARTED_HERE)
    command = f"fastokd train --resume {run.path}{f' --gpus {processes}' if processes else ''}"
    return f"the last checkpoint has {done}; continue with '{command}'"
