"""What run folders have recorded, read as far as it is whole, and grouped by what is the same but
for the seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.errors import CheckpointError, ConfigError
from fastokd.export.record import parse_record
from fastokd.methods import get_method
from fastokd.train.checkpoint import load_newest
from fastokd.train.config import TrainConfig, reference_loss
from fastokd.train.run_folder import RunFolder, read_json_object
from fastokd.train.runs import MAY_CHANGE
from fastokd.train.step import AVERAGE

SAME_RUN = frozenset({"seed", *MAY_CHANGE}) - {"epochs"}
"""The fields of a configuration in which the runs of a group may differ: the seed, and where and
how fast they ran.
"""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run has recorded.

    Attributes:
        path: the run folder.
        config: its configuration.
        records: what ``metrics.jsonl`` says of each epoch, up to the first line that is damaged; at
            least one.
        student: the name of the accuracy that is the student's.
        evaluated: what the accuracies were measured on: the data's fingerprint, its classes, the
            split and its number of images, how the images were brought to their size. What is not
            recorded is left out.
        data: what is known of the dataset: "name", "fingerprint", "num_classes" and "image_size";
            empty where that is lost.
        environment: what ``environment.json`` says of the versions and the machine; empty where
            that is damaged.
        remarks: what is not as in a finished run.
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
        return self.records[-1]["epoch"] + 1

    @property
    def last(self) -> Record:
        """The record of the last finished epoch."""
        return self.records[-1]

    @property
    def best(self) -> Record:
        """The record of the first epoch with the student's highest accuracy, of all epochs.

        ``summary.json`` and ``best.pt`` are of a later one where a run was resumed without the
        checkpoint of this; ``remarks`` say so.
        """
        return max(
            (record for record in self.records if self.student in record["eval"]),
            key=lambda record: record["eval"][self.student],
        )

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
    """Runs that are the same but for the seed, by their seeds.

    Attributes:
        label: model, method, and in what the configuration differs from that of other groups of the
            same two.
        runs: at least one, of different seeds.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> TrainConfig:
        """The configuration of the first run."""
        return self.runs[0].config

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs whose errors make one mean: those with the most finished epochs, which are the
        finished ones if there are any.
        """
        most = max(run.epochs for run in self.runs)
        return tuple(run for run in self.runs if run.epochs == most)

    @property
    def left_out(self) -> tuple[Run, ...]:
        """The runs that are not counted."""
        return tuple(run for run in self.runs if run.epochs < self.counted[0].epochs)

    @property
    def progress(self) -> str:
        """Finished and planned epochs of the runs that are counted, in words."""
        return f"{self.counted[0].epochs} of {self.config.epochs}"

    @property
    def network(self) -> str:
        """The name of the network that the student is, or is made of."""
        names = self.config.model_names()
        return names[0] if len(names) == 1 else names[_kept_branch(self.config)]


def read_run(path: Path) -> Run:
    """Read a run folder. A damaged or unfinished run is read as far as it goes, and its ``remarks``
    say so.

    Raises:
        CheckpointError: this is not a run folder, or no epoch was finished.
        ConfigError: its configuration is damaged.
    """
    folder = RunFolder.open(path)
    config = folder.load_config()
    student = _student_row(config, folder.config_path)
    records = tuple(folder.read_metrics())
    if not records or student not in records[-1]["eval"]:
        what = (
            f"its last epoch has no accuracy of {student}"
            if records
            else "it has no finished epoch"
        )
        raise CheckpointError(
            f"{path}: {what} in metrics.jsonl; train it with 'fastokd train --resume {path}', or"
            " leave it out"
        )
    remarks = []
    lines = folder.metrics_path.read_bytes().splitlines()
    if len(lines) > len(records):
        remarks.append(
            f"metrics.jsonl is damaged in line {len(records) + 1}: only what is before it is used"
        )
    if (done := records[-1]["epoch"] + 1) < config.epochs:
        remarks.append(
            f"unfinished, {done} of {config.epochs} epochs: its last epoch here is epoch {done}"
        )
    environment = folder.read_environment()
    if not environment:
        remarks.append("environment.json is missing or damaged: versions and machine are not known")
    data = _data(folder, environment, remarks)
    evaluated = _evaluated(folder, config, data, remarks)
    run = Run(path, config, records, student, evaluated, data, environment, ())
    summary = read_json_object(folder.summary_path)
    chosen, best = summary.get("best_epoch"), run.best["epoch"]
    if (
        summary.get("epochs") == run.epochs and isinstance(chosen, int) and chosen != best
    ):  # else it is of before the run went on
        remarks.append(
            f"its best epoch is {best + 1}, which is used here; summary.json and best.pt are of"
            f" epoch {chosen + 1}, as after a resume without the checkpoint of epoch {best + 1}"
        )
    return dataclasses.replace(run, remarks=tuple(remarks))


def read_runs(paths: Sequence[Path]) -> list[Group]:
    """Read runs that are to be compared, grouped by what is the same but for the seed, in the order
    of their first runs.

    Raises:
        CheckpointError: one is not a run folder, or has no finished epoch.
        ConfigError: there is none, a configuration is damaged, one is there twice, or they were not
            evaluated on the same images.
    """
    if not paths:
        raise ConfigError("no runs: give run folders, for example runs/*")
    runs = [read_run(path) for path in paths]
    check_comparable(runs)
    found: list[tuple[TrainConfig, dict[int, Run]]] = []
    defaults = {name: getattr(TrainConfig(), name) for name in SAME_RUN}
    for run in runs:
        kind = dataclasses.replace(run.config, **defaults)
        same = next((same for other, same in found if other == kind), None)
        if same is None:
            found.append((kind, same := {}))
        if (other := same.get(run.config.seed)) is not None:
            raise ConfigError(
                f"{other.path} and {run.path} are the same configuration with the same seed"
                f" {run.config.seed}, which would count twice: give one of them"
            )
        same[run.config.seed] = run
    groups = [[same[seed] for seed in sorted(same)] for _, same in found]
    configs = [runs[0].config for runs in groups]
    return [
        Group(_label(config, configs), tuple(runs))
        for config, runs in zip(configs, groups, strict=True)
    ]


def check_comparable(runs: Sequence[Run]) -> None:
    """Check that accuracies were measured on the same images, prepared in the same way. What a run
    has not recorded is not compared.

    Raises:
        ConfigError: they were not; the message says what differs, and between which runs.
    """
    for fact in dict.fromkeys(fact for run in runs for fact in run.evaluated):
        known = [run for run in runs if fact in run.evaluated]
        different = [run for run in known if run.evaluated[fact] != known[0].evaluated[fact]]
        if different:
            one, other = known[0], different[0]
            differing = [
                f"{name}: {one.shown(name)}, {other.shown(name)}"
                for name in one.evaluated
                if name in other.evaluated and one.evaluated[name] != other.evaluated[name]
            ]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise ConfigError(
                f"{one.path} and {other.path}{more} were evaluated on different images, so their"
                f" numbers do not compare ({'; '.join(differing)}); give runs of the same"
            )


def title(groups: Sequence[Group]) -> str:
    """The data and the networks, for titles."""
    models = dict.fromkeys(group.config.model for group in groups)
    return f"{groups[0].runs[0].data.get('name', 'data')}, {', '.join(models)}"


def remarks_of(groups: Sequence[Group]) -> list[str]:
    """What is not as in finished and whole runs, each with its run."""
    return [
        f"{run.path}: {remark}" for group in groups for run in group.runs for remark in run.remarks
    ]


def config_differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The fields in which the groups' configurations differ, each with its value in every group, in
    words.
    """
    return _differing([group.config for group in groups])


def _differing(configs: Sequence[TrainConfig]) -> dict[str, list[str]]:
    names = [item.name for item in dataclasses.fields(TrainConfig) if item.name not in SAME_RUN]
    columns = {
        name: [value_in_words(getattr(config, name)) for config in configs] for name in names
    }
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _label(config: TrainConfig, configs: Sequence[TrainConfig]) -> str:
    alike = [
        other for other in configs if (other.model, other.method) == (config.model, config.method)
    ]
    differing = [f"{name} {value_in_words(getattr(config, name))}" for name in _differing(alike)]
    return ", ".join([f"{config.model} {config.method}", *differing])


def value_in_words(value: Any) -> str:
    """A value of a configuration in words; different values in different words."""
    if value is None:
        return "default"
    if isinstance(value, Mapping):
        return (
            " ".join(f"{name}={value_in_words(item)}" for name, item in sorted(value.items()))
            or "none"
        )
    if isinstance(value, list | tuple):
        return " ".join(map(value_in_words, value)) or "none"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _student_row(config: TrainConfig, where: Path) -> str:
    """The row of the method's graph that is the student's, without its network."""
    try:
        rows = reference_loss(config).graph.logits
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return AVERAGE if config.ema else rows[_kept_branch(config)]


def _kept_branch(config: TrainConfig) -> int:
    return range(config.num_branches())[
        -1 if config.compression else get_method(config.method).kept
    ]


def _data(
    folder: RunFolder, environment: Mapping[str, Any], remarks: list[str]
) -> Mapping[str, Any]:
    """What is recorded of the dataset, from the run's last checkpoint if ``environment.json`` has
    lost it.
    """
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
    """What is recorded of the images that the accuracies were measured on; what is lost is said in
    ``remarks``.
    """
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
        facts |= {
            "split": accuracy["split"],
            "number of images": accuracy["num_images"],
            "image size": f"{height} x {width}",
            "shorter side before the crop": preprocessing.get("shorter_side", min(height, width)),
        }
    return {name: value for name, value in facts.items() if value is not None}
