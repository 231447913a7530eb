"""The runs of a matrix and its result file."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from bench.accuracy.presets import Preset
from bench.gpu.results import check_writable
from fastokd.errors import EXIT_OK, ConfigError
from fastokd.experiments.analysis.runs import SAME_RUN, Run
from fastokd.experiments.analysis.tables import Table, spread
from fastokd.experiments.sweep.plan import Plan, Record, Results, plan_runs
from fastokd.experiments.sweep.queue import Job, Outcome
from fastokd.storage import write_json
from fastokd.train.compute import total_training_flops, training_flops
from fastokd.train.config import TrainConfig, differences
from fastokd.train.config_files import config_from_mapping
from fastokd.train.run_folder import read_json_object

Entry = dict[str, Any]


def measured(run: Run) -> Entry:
    """The results of a finished run.

    Returns:
        ``student`` (the name of its accuracy), the accuracies in [0, 1] of every row of logits
        after the ``last`` epoch and after the student's ``best`` (``best_epoch`` is numbered from
        1), the ``seconds`` of training alone, the ``images_per_second`` of the median epoch, the
        ``flops`` of training, and versions and machine.
    """
    environment, speeds = run.environment, [each["images_per_second"] for each in run.records]
    versions = ("fastokd", "commit", "python", "torch")
    machine = ("device", "precision", "platform", "cpus", "threads")
    return {
        "epochs": run.config.epochs,
        "student": run.student,
        "last": run.last["eval"],
        "best": run.best["eval"],
        "best_epoch": run.best["epoch"] + 1,
        "seconds": round(run.seconds, 1),
        "images_per_second": round(statistics.median(speeds), 1),
        "flops": _total_flops(run),
        "environment": {name: environment.get(name) for name in (*versions, *machine)},
    }


def _total_flops(run: Run) -> int:
    """``total_training_flops`` of a run."""
    data = run.data
    flops = training_flops(run.config, data["num_classes"], data["image_size"])
    return round(total_training_flops(run.config, flops, data["num_images"]["train"]))


@dataclass(frozen=True, kw_only=True)
class Matrix(Plan):
    """The runs of a preset: those whose results the file lacks are trained.

    Attributes:
        preset: the rows and their order.
        file: the result file. Unlike ``out``, the run folders, it is committed.
        wanted: the rows and seeds to train now, in this order.
    """

    kind: ClassVar[str] = "accuracy"

    preset: Preset
    file: Path
    wanted: tuple[tuple[str, int], ...]

    @property
    def queue(self) -> list[Job]:
        """The runs of ``wanted`` that the file lacks."""
        existing = {(entry["row"], entry["seed"]) for entry in self.content["runs"]}
        jobs = {(row, job.config.seed): job for row in self.jobs for job in self.jobs[row]}
        return [jobs[each] for each in self.wanted if each not in existing]

    @property
    def record(self) -> Record:
        return {"format": "fastokd accuracy 1", "preset": self.preset.name}

    @property
    def content(self) -> dict[str, Any]:
        """The content of the result file; without runs if it does not exist.

        Raises:
            ConfigError: the file is damaged.
        """
        empty = {"preset": self.preset.name, "data": {}, "settings": {}, "runs": []}
        if not self.file.exists():
            return empty
        found = read_json_object(self.file)
        if not empty.keys() <= found.keys():
            raise ConfigError(f"{self.file} is damaged; restore it from git, or delete it")
        return found

    def check(self) -> None:
        """As ``Plan.check``, and check that the result file has the same settings and images."""
        content = self.content
        if content["preset"] != self.preset.name:
            raise ConfigError(
                f"{self.file} is of the preset {content['preset']}, not {self.preset.name}; pass"
                " another --out"
            )
        for row, settings in content["settings"].items():
            if row in self.jobs:
                before = config_from_mapping(settings, f"{self.file}, row '{row}'")
                if changed := differences(before, _settings(self.preset.rows[row])):
                    raise ConfigError(
                        f"{self.file} has results of the row '{row}' with other settings (in the"
                        f" file, now: {'; '.join(changed)}); add a row for these settings instead"
                    )
        compared = [row for row in self.jobs if not self.preset.rows[row].data]
        images = [(row, content["data"]) for row in compared[:1] if content["data"]]
        images += [(run["row"], run["data"]) for run in content["runs"] if "data" in run]
        for row, data in images:
            if row in self.jobs:
                self._check_images(row, data)
        super().check()

    def _check_images(self, row: str, data: Mapping[str, Any]) -> None:
        """Check that the images of a row are still those in the result file's record ``data``."""
        before, now = data["fingerprint"], self.dataset(self.jobs[row][0].config).fingerprint
        if before != now:
            raise ConfigError(
                f"{self.file} has results on other images ({data['name']}, fingerprint"
                f" {before[:12]}) than --data has now ({now[:12]}); pass the same images, or"
                " another --out"
            )

    def run(
        self, devices: Sequence[torch.device], per_device: int, say: Callable[[str], None]
    ) -> Outcome:
        """As ``Plan.run``; rows that others start from or learn from are trained before these."""
        outcome = Outcome({}, EXIT_OK)
        for wanted in self._stages():
            stage = replace(self, wanted=wanted)
            outcome = super(Matrix, stage).run(devices, per_device, say)
            if outcome.exit_code != EXIT_OK:
                break
        return outcome

    def _stages(self) -> list[tuple[tuple[str, int], ...]]:
        """The runs of ``wanted``, each with its needed runs in an earlier part."""

        def depth(row: str) -> int:
            return max((1 + depth(other) for other, _ in self.preset.needed(row)), default=0)

        depths = {row: depth(row) for row, _ in self.wanted}
        return [
            tuple(run for run in self.wanted if depths[run[0]] == stage)
            for stage in sorted(set(depths.values()))
        ]

    def _fingerprints(self, configs: Iterable[TrainConfig]) -> dict[str, str]:
        """The fingerprints of the lists, by their names."""
        return {Path(each.data).name: self.dataset(each).fingerprint for each in configs}

    def results(self, failed: Mapping[str, str]) -> "MatrixResults":
        return MatrixResults(self.measured(failed), (), self.out, self)


def _settings(config: TrainConfig) -> TrainConfig:
    """The configuration without the fields that may differ between the runs of a row."""
    defaults = TrainConfig()
    return replace(config, **{name: getattr(defaults, name) for name in SAME_RUN})


def wanted_runs(
    preset: Preset, rows: Sequence[str] = (), seeds: int | None = None
) -> tuple[tuple[str, int], ...]:
    """The rows and seeds of a preset that are chosen, in its order, each after the runs that it
    needs; see ``plan_matrix``.
    """
    for row in rows:
        if row not in preset.rows:
            raise ConfigError(f"unknown row '{row}' of {preset.name}: {', '.join(preset.rows)}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    chosen = [
        (row, seed)
        for row, seed in preset.runs
        if (not rows or row in rows) and (seeds is None or seed < seeds)
    ]
    wanted: dict[tuple[str, int], None] = {}
    for run in chosen:
        _add_needed(preset, run, wanted)
    return tuple(wanted)


def _add_needed(preset: Preset, run: tuple[str, int], wanted: dict[tuple[str, int], None]) -> None:
    """Add a run to ``wanted``, after the runs that it needs."""
    for needed in preset.needed(run[0]):
        _add_needed(preset, needed, wanted)
    wanted[run] = None


def plan_matrix(
    preset: Preset,
    data: Path,
    out: Path,
    file: Path,
    rows: Sequence[str] = (),
    seeds: int | None = None,
) -> Matrix:
    """Plan the runs of a preset.

    Args:
        preset: the matrix.
        data: the prepared images.
        out: for the run folders.
        file: the result file.
        rows: only these rows; all if empty.
        seeds: only seeds below this number.

    Raises:
        ConfigError: an unknown row, or fewer than one seed.
        StorageError: a folder cannot be written.
    """
    wanted = wanted_runs(preset, rows, seeds)
    configs, jobs = {}, {}
    for row, config in preset.rows.items():
        seeds_of_row = [seed for name, seed in preset.runs if name == row]
        configs[row] = _with_paths(preset, config, data, out)
        jobs[row] = plan_runs(out, _folder(row), configs[row], seeds_of_row)
    for folder in (out, file.parent):
        check_writable(folder)
    return Matrix(
        out=out,
        jobs=jobs,
        configs=configs,
        rows=tuple(dict.fromkeys(row for row, _ in wanted)),
        seeds=max(seed for _, seed in wanted) + 1,
        preset=preset,
        file=file,
        wanted=wanted,
    )


def _folder(row: str) -> str:
    """The name of a row in those of its run folders."""
    return row.replace(", ", "-").replace(" ", "-")


def _with_paths(preset: Preset, config: TrainConfig, data: Path, out: Path) -> TrainConfig:
    """The configuration with the paths of its images and of the runs that it needs."""
    images = (data.with_name(config.data) if config.data else data).absolute()
    changes = {"data": str(images)}
    for name in ("weights", "teacher"):
        if row := getattr(config, name):
            seed = next(seed for other, seed in preset.runs if other == row)
            (job,) = plan_runs(out.absolute(), _folder(row), preset.rows[row], [seed])
            changes[name] = str(job.path)
    return replace(config, **changes)


@dataclass(frozen=True)
class MatrixResults(Results):
    """The finished runs; ``write`` adds them to the result file."""

    matrix: Matrix

    def as_json(self) -> dict[str, Any]:
        """The content of the result file with the finished runs, in the order of the preset."""
        content = self.matrix.content
        runs = {(entry["row"], entry["seed"]): entry for entry in content["runs"]}
        for row, each in self.measured.items():
            for run in each.runs:
                key = (row, run.config.seed)
                if key not in runs:
                    runs[key] = {"row": row, "seed": run.config.seed, **measured(run)}
                    settings = self.matrix.preset.rows[row]
                    content["settings"][row] = _as_mapping(_settings(settings))
                    names = ("name", "num_images", "num_classes", "image_size", "fingerprint")
                    data = {name: run.data[name] for name in names}
                    (runs[key] if settings.data else content)["data"] = data
        order = {pair: place for place, pair in enumerate(self.matrix.preset.runs)}
        content["runs"] = sorted(
            runs.values(), key=lambda entry: order.get((entry["row"], entry["seed"]), len(order))
        )
        return content

    def write(self) -> None:
        """Write the result file, if a run has finished."""
        content = self.as_json()
        if content["runs"]:
            write_json(self.matrix.file, content)

    def files(self) -> dict[str, str]:
        return {}

    def tables(self) -> list[Table]:
        """The errors of the students by row."""
        entries = self.as_json()["runs"]
        rows = []
        for row in self.measured:
            own = [entry for entry in entries if entry["row"] == row]
            errors = [100 * (1 - entry["last"][entry["student"]]) for entry in own]
            state = f"{len(own)} of {len(self.matrix.jobs[row])} seeds"
            rows.append({"row": row, "runs": state, "error, last epoch": spread(errors)})
        return [Table.of(f"{self.matrix.preset.title}: errors of the student in %", rows)]


def _as_mapping(config: TrainConfig) -> dict[str, Any]:
    """The configuration without the fields that may differ between runs, as JSON has it.

    Defaults are included: a later version may have others.
    """
    fields = yaml.safe_load(config.to_yaml())
    return json.loads(
        json.dumps({name: value for name, value in fields.items() if name not in SAME_RUN})
    )
