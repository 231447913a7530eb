"""The records of run folders, grouped by runs that differ only in the seed."""

import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.errors import CheckpointError, ConfigError
from fastokd.export.record import parse_record
from fastokd.train.checkpoint import load_newest
from fastokd.train.compute import ALONE, student_alone, student_network
from fastokd.train.config import TrainConfig, fields_with_role, one_teacher
from fastokd.train.fields import Role
from fastokd.train.loss import reference_loss
from fastokd.train.run_folder import RunFolder, read_json_object
from fastokd.train.runs import by_content
from fastokd.train.step import AVERAGE

SAME_RUN = frozenset(fields_with_role(Role.REPEAT))
"""The fields in which the runs of a group may differ: the seed, the device and speed."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The records of a run.

    Attributes:
        path: the run folder.
        config: its configuration.
        records: the record of each epoch in ``metrics.jsonl``, up to the first damaged line; at
            least one.
        student: the name of the student's accuracy.
        evaluated: the images of the accuracies: the data's fingerprint, its classes, the split and
            its number of images, and their preprocessing, as far as recorded.
        data: "name", "fingerprint", "num_classes" and "image_size" of the dataset; empty if lost.
        environment: ``environment.json``, the versions and the machine; empty if damaged.
        remarks: differences from a finished and undamaged run.
    """

    path: Path
    config: TrainConfig
    records: tuple[Record, ...]
    student: str
    evaluated: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    remarks: tuple[str, ...]

    @property
    def epochs(self) -> int:
        """The number of finished epochs."""
        return int(self.last["epoch"]) + 1

    @property
    def last(self) -> Record:
        """The record of the last finished epoch."""
        return self.records[-1]

    @property
    def best(self) -> Record:
        """The record of the first epoch with the student's highest accuracy, of all epochs.

        ``summary.json`` and ``best.pt`` are of a later one if a run was resumed without its
        checkpoint.
        """
        records = (record for record in self.records if self.student in record["eval"])
        return max(records, key=lambda record: record["eval"][self.student])

    def error(self, row: str = "student", best: bool = False) -> float:
        """The error in % in the last epoch, or in the student's best.

        Args:
            row: "student", "branch_mean" for the mean over the branches, or a row's name.

        Raises:
            KeyError: the row is not recorded; the student's always is.
        """
        accuracies = (self.best if best else self.last)["eval"]
        names = [self.student if row == "student" else row]
        if row == "branch_mean":
            names = [name for name in accuracies if re.fullmatch(r"branch\d+", name)]
        return statistics.mean(100 * (1 - accuracies[name]) for name in names)

    def metric(self, name: str) -> float | None:
        """The student's "top5", "nll" or "ece" in the last epoch; None if it is not recorded."""
        return (self.last.get("metrics") or {}).get(name, {}).get(self.student)

    def shown(self, fact: str) -> str:
        """An entry of ``evaluated`` in words."""
        value = self.evaluated[fact]
        return f"{self.data.get('name', '')} {value[:12]}".strip() if fact == "data" else str(value)

    @property
    def seconds(self) -> float:
        """Seconds of training in all epochs."""
        return sum(record.get("seconds", 0.0) for record in self.records)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed, at least one, by their seeds. The label has model, method,
    and the differences from other groups with the same two.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> TrainConfig:
        """The configuration of the first run."""
        return self.runs[0].config

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs whose errors are averaged: those with the most finished epochs."""
        most = max(run.epochs for run in self.runs)
        return tuple(run for run in self.runs if run.epochs == most)

    @property
    def left_out(self) -> tuple[Run, ...]:
        """The runs that are not counted."""
        return tuple(run for run in self.runs if run not in self.counted)

    @property
    def progress(self) -> str:
        """Finished and planned epochs of the counted runs, in words."""
        return f"{self.counted[0].epochs} of {self.config.epochs}"

    @property
    def network(self) -> str:
        """The name of the student's network."""
        return student_network(self.config)


def read_run(path: Path) -> Run:
    """Read a run folder. A damaged or unfinished run is read as far as possible, with ``remarks``.

    Raises:
        CheckpointError: this is not a run folder, or no epoch was finished.
        ConfigError: its configuration is damaged.
    """
    folder = RunFolder.open(path)
    config = folder.load_config()
    student = _student_row(config, folder.config_path)
    records = tuple(folder.read_metrics())
    if not records or student not in records[-1]["eval"]:
        missing = f"its last epoch has no accuracy of {student}"
        missing = missing if records else "it has no finished epoch"
        fix = f"train it with 'fastokd train --resume {path}', or omit it"
        raise CheckpointError(f"{path}: {missing} in metrics.jsonl; {fix}")
    remarks = []
    if len(folder.metrics_path.read_bytes().splitlines()) > len(records):
        line = len(records) + 1
        remarks.append(f"metrics.jsonl is damaged in line {line}: only what is before it is used")
    if (done := records[-1]["epoch"] + 1) < config.epochs:
        progress = f"{done} of {config.epochs} epochs"
        remarks.append(f"unfinished, {progress}: its last epoch is epoch {done}")
    environment = folder.read_environment()
    if not environment:
        remarks.append("environment.json is missing or damaged: versions and machine are not known")
    data = _data(folder, environment, remarks)
    evaluated = _evaluated(folder, config, data, remarks)
    run = Run(path, config, records, student, evaluated, data, environment, ())
    summary = read_json_object(folder.summary_path)
    chosen, best = summary.get("best_epoch"), run.best["epoch"]
    current = summary.get("epochs") == run.epochs  # else it was written before the run was resumed
    if current and isinstance(chosen, int) and chosen != best:
        remarks.append(
            f"its best epoch is {best + 1}, which is used here; summary.json and best.pt are of"
            f" epoch {chosen + 1}, as after a resume without the checkpoint of epoch {best + 1}"
        )
    return dataclasses.replace(run, remarks=tuple(remarks))


def read_runs(paths: Sequence[Path]) -> list[Group]:
    """Read runs to compare, grouped by configurations that differ only in the seed, in the order of
    their first runs.

    Raises:
        CheckpointError: one is not a run folder, or has no finished epoch.
        ConfigError: no paths, a damaged configuration, the same run twice, or runs that were not
            evaluated on the same images.
    """
    if not paths:
        raise ConfigError("no runs: give run folders, for example runs/*")
    runs = [read_run(path) for path in paths]
    check_comparable(runs)
    groups: list[tuple[TrainConfig, dict[int, Run]]] = []
    defaults = {name: getattr(TrainConfig(), name) for name in SAME_RUN}
    for run in runs:
        # The files of the teacher and of the weights may have several paths.
        files = run.environment.get("teacher"), run.environment.get("weights")
        kind = by_content(dataclasses.replace(run.config, **defaults), *files)
        by_seed = next((by_seed for other, by_seed in groups if other == kind), None)
        if by_seed is None:
            groups.append((kind, by_seed := {}))
        if (other := by_seed.get(run.config.seed)) is not None:
            same = f"the same configuration with the same seed {run.config.seed}"
            raise ConfigError(f"{other.path} and {run.path} are {same}: give one of them")
        by_seed[run.config.seed] = run
    ordered = [tuple(by_seed[seed] for seed in sorted(by_seed)) for _, by_seed in groups]
    configs = [_with_fingerprints(seeds[0]) for seeds in ordered]
    return [
        Group(_label(config, configs), seeds)
        for config, seeds in zip(configs, ordered, strict=True)
    ]


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ``ConfigError`` if accuracies were measured on different images or with different
    preprocessing. Facts that a run has not recorded are not compared.
    """
    for fact in dict.fromkeys(fact for run in runs for fact in run.evaluated):
        one, *others = (run for run in runs if fact in run.evaluated)
        different = [run for run in others if run.evaluated[fact] != one.evaluated[fact]]
        if different:
            other, *rest = different
            differing = "; ".join(
                f"{name}: {one.shown(name)}, {other.shown(name)}"
                for name in one.evaluated
                if name in other.evaluated and one.evaluated[name] != other.evaluated[name]
            )
            more = f" (and {len(rest)} more)" if rest else ""
            raise ConfigError(
                f"{one.path} and {other.path}{more} were evaluated on different images, so their"
                f" numbers do not compare ({differing}); give runs of the same"
            )


def title(groups: Sequence[Group]) -> str:
    """The data and the networks, for titles."""
    models = dict.fromkeys(group.config.model for group in groups)
    return f"{groups[0].runs[0].data.get('name', 'data')}, {', '.join(models)}"


def remarks_of(groups: Sequence[Group]) -> list[str]:
    """The remarks of all runs, each with its run."""
    runs = (run for group in groups for run in group.runs)
    return [f"{run.path}: {remark}" for run in runs for remark in run.remarks]


def config_differences(configs: Sequence[TrainConfig]) -> dict[str, list[str]]:
    """The fields in which configurations differ, each with its value in every one, in words."""
    columns = {
        field.name: [value_in_words(getattr(config, field.name)) for config in configs]
        for field in dataclasses.fields(TrainConfig)
        if field.name not in SAME_RUN
    }
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def curve_records(group: Group) -> list[list[dict[str, Any]]]:
    """The records of each run for curves, without ``kd_weight`` if the method has no ramp-up."""
    without = () if group.config.ramp_length() else ("kd_weight",)
    return [
        [{name: record[name] for name in record if name not in without} for record in run.records]
        for run in group.runs
    ]


def _with_fingerprints(run: Run) -> TrainConfig:
    """The configuration with fingerprints after the paths of a teacher and of weights, for labels:
    the file at a path may have changed between runs.
    """
    config = one_teacher(run.config)
    changes: dict[str, Any] = {}
    for name in ("teacher", "weights"):
        if known := run.environment.get(name):
            changes[name] = f"{getattr(config, name)} ({known[:12]})"
    return dataclasses.replace(config, **changes)


def _label(config: TrainConfig, configs: Sequence[TrainConfig]) -> str:
    name = f"{config.model} {config.method}"
    same = [other for other in configs if f"{other.model} {other.method}" == name]
    if config.method == ALONE:  # without unused settings of branches, unless only these differ
        alone = [student_alone(other) for other in same]
        same = alone if all(alone.count(each) == 1 for each in alone) else same
    fields = dict.fromkeys(config_differences(same))
    if config.teach_from:  # whose cost is not that of the method
        fields["teach_from"] = None
    values = [f"{field} {value_in_words(getattr(config, field))}" for field in fields]
    return ", ".join([name, *values])


def value_in_words(value: Any) -> str:
    """A value of a configuration in words; different values in different words."""
    if value is None:
        return "default"
    if isinstance(value, Mapping):
        words = [f"{name}={value_in_words(item)}" for name, item in sorted(value.items())]
        return " ".join(words) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(value_in_words, value)) or "none"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _student_row(config: TrainConfig, path: Path) -> str:
    """The row of the method's graph that is the student's, without its network."""
    try:
        rows = reference_loss(config).graph.logits
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return AVERAGE if config.ema else rows[config.kept_branch()]


def _data(
    folder: RunFolder, environment: Mapping[str, Any], remarks: list[str]
) -> Mapping[str, Any]:
    """The record of the dataset, from the last checkpoint if ``environment.json`` has lost it."""
    if isinstance(data := environment.get("data"), dict):
        return data
    try:
        state = load_newest(folder.checkpoints)[0]
    except CheckpointError:
        remarks.append(
            "no record of its data is left: that it is the data of the other runs is not checked"
        )
        return {}
    return {**state["data"], "num_classes": len(state["classes"])}


def _evaluated(
    folder: RunFolder, config: TrainConfig, data: Mapping[str, Any], remarks: list[str]
) -> dict[str, Any]:
    """The recorded facts about the images of the accuracies."""
    facts: dict[str, Any] = {
        "data": data.get("fingerprint"),
        "classes": data.get("num_classes"),
        "val_split": config.val_split,
    }
    path = folder.student.with_suffix(".json")
    try:
        record = parse_record(path.read_bytes(), str(path))
    except (OSError, CheckpointError):
        remarks.append(
            "student.json is missing or damaged: that it was evaluated on the split of the other"
            " runs is not checked"
        )
    else:
        accuracy, preprocessing = record["accuracy"], record["preprocessing"]
        height, width = preprocessing["image_size"]
        shorter_side = preprocessing.get("shorter_side", min(height, width))
        facts |= {"split": accuracy["split"], "number of images": accuracy["num_images"]}
        facts |= {"image size": f"{height} x {width}", "shorter side before the crop": shorter_side}
    return {name: value for name, value in facts.items() if value is not None}
