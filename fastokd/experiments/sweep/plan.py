"""Runs in one folder and their results: the common part of sweeps and reproduced tables."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastokd.data import Dataset
from fastokd.errors import EXIT_OK, ConfigError
from fastokd.experiments.analysis.runs import SAME_RUN
from fastokd.experiments.analysis.tables import Table
from fastokd.experiments.sweep.queue import Job, Outcome, Queue
from fastokd.experiments.sweep.results import Measured, measure
from fastokd.storage import storage_error, write_json, write_text
from fastokd.train.config import TrainConfig, differences
from fastokd.train.config_files import completed
from fastokd.train.data import AnyDataset, open_data
from fastokd.train.initial import check_initial
from fastokd.train.progress import Counter
from fastokd.train.run_folder import RunFolder, read_json_object
from fastokd.train.teacher import open_teacher

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Runs in one folder.

    Attributes:
        out: the folder.
        jobs: the runs of each row of the results, by the row's name.
        configs: the configuration of each row, with seed 0, except of those that ``alone`` adds.
        rows: the rows to run now.
        seeds: the number of runs of each of these, with seeds from 0.
        alone: the row of the student alone with as much training compute, by the name of the row
            that is taught; empty without --equal-compute.
    """

    kind: ClassVar[str]
    """The command; ``KIND.json`` in the folder has the plan's record."""

    out: Path
    jobs: Mapping[str, tuple[Job, ...]]
    configs: Mapping[str, TrainConfig]
    rows: tuple[str, ...]
    seeds: int
    alone: Mapping[str, str] = field(default_factory=dict)
    _opened: dict[str, AnyDataset] = field(default_factory=dict, repr=False)

    @property
    def queue(self) -> list[Job]:
        """The runs to train now: all rows with the first seed, then with the next."""
        jobs = [job for name in self.rows for job in self.jobs[name]]
        return [job for seed in range(self.seeds) for job in jobs if job.config.seed == seed]

    @property
    @abstractmethod
    def record(self) -> Record:
        """A description of the plan, as JSON has it."""

    def differences(self, existing: Record) -> list[str]:
        """Differences from the folder's record that prevent reusing the folder."""
        return [
            f"{name}: {existing[name]!r}, {value!r}"
            for name, value in self.record.items()
            if existing[name] != value
        ]

    @abstractmethod
    def results(self, failed: Mapping[str, str]) -> "Results":
        """Read the results; ``failed`` has the errors of failed runs by name."""

    def measured(self, failed: Mapping[str, str]) -> dict[str, Measured]:
        """The finished runs of each row, by its name."""
        return {name: measure(jobs, failed) for name, jobs in self.jobs.items()}

    def check(self) -> None:
        """Check that the folder, if it exists, belongs to this plan and to the same images.

        Raises:
            ConfigError: it does not, or contains other files or runs.
            ConfigError, DataError: the data cannot be trained on.
        """
        text = self._read_record()
        if text is None:
            return
        try:
            record = json.loads(text)
            different = self.differences(record)
            if record.get("equal_compute") and not self.alone:
                different.append("equal_compute: True, False")
            images = dict(record.get("data", {}))
        except (KeyError, TypeError, AttributeError, ValueError):
            fix = "choose another --out, or delete that file if its runs belong to this command"
            raise ConfigError(f"{self.out / self.kind}.json is damaged; {fix}") from None
        if different:
            changes = f"existing vs requested: {'; '.join(different)}"
            fix = "repeat that command to resume it, or choose another --out"
            raise ConfigError(f"{self.out} belongs to a different '{self.kind}' ({changes}); {fix}")
        jobs = [job for row in self.jobs.values() for job in row]
        configs = [job.config for job in jobs if job.config.data]
        for name, fingerprint in self._fingerprints(configs).items():
            if images.get(name, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{self.out} belongs to other images than {configs[0].data} has now: pass the"
                    " data that its runs are trained on, or choose another --out"
                )
        for job in filter(Job.is_started, jobs):
            existing = RunFolder(job.path).load_config()
            same = replace(existing, **{name: getattr(job.config, name) for name in SAME_RUN})
            if changed := differences(same, job.config):
                raise ConfigError(
                    f"{job.path} contains a run with a different configuration (existing vs"
                    f" requested: {'; '.join(changed)}); choose another --out"
                )

    def _read_record(self) -> bytes | None:
        """The text of the folder's record; None for a new folder."""
        try:
            names = sorted(entry.name for entry in self.out.iterdir())
            if f"{self.kind}.json" in names:
                return (self.out / f"{self.kind}.json").read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(self.out, error) from error
        if names:
            foreign = f"is not empty ({', '.join(names[:3])}) and was not written by"
            raise ConfigError(f"{self.out} {foreign} 'fastokd {self.kind}'; choose another --out")
        return None

    def run(
        self, devices: Sequence[torch.device], per_device: int, say: Callable[[str], None]
    ) -> Outcome:
        """Train the runs that are not finished, ``per_device`` at once on each device, and write
        the results after each of them. ``say`` prints a line about progress.

        Raises:
            ConfigError: see ``check``, or runs in the folder are still active.
            ConfigError, DataError, CheckpointError: unusable data or teachers, before any run.
        """
        self.check()
        waiting = [job for job in self.queue if not job.is_finished()]
        if not waiting:
            self.results({}).write()
            return Outcome({}, EXIT_OK)
        self._check_inputs([job.config for job in waiting])
        folder = self._lock(waiting)
        try:
            self.check()  # another process may have written here since
            path = self.out / f"{self.kind}.json"
            images = self._fingerprints(job.config for job in self.queue)
            data = {**read_json_object(path).get("data", {}), **images}
            record = {**self.record, "equal_compute": bool(self.alone), "data": data}
            write_json(path, record)
            queue = Queue(self.queue, self.out, devices, per_device, say)
            return queue.run(lambda failed: self.results(failed).write())
        finally:
            folder.unlock()

    def _lock(self, waiting: Iterable[Job]) -> RunFolder:
        """Lock the folder; refuse if runs of an earlier, killed process are still active in it."""
        folder = RunFolder(self.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            folder.lock()
            for run in [RunFolder(job.path) for job in waiting if job.path.is_dir()]:
                run.lock()
                run.unlock()
        except OSError as error:
            raise storage_error(self.out, error) from error
        except ConfigError:
            folder.unlock()
            raise ConfigError(
                f"{self.out} is locked: runs started by another '{self.kind}' process are still"
                " active; wait for them, or choose another --out"
            ) from None
        return folder

    def _check_inputs(self, configs: Iterable[TrainConfig]) -> None:
        """Open the data and the teachers of all runs, to find mistakes before the first run."""
        checked = set()
        for config in configs:
            check_initial(config)
            dataset = self.dataset(config)
            teacher = config.teacher_spec()
            if teacher and (key := (teacher, config.model, config.data)) not in checked:
                open_teacher(config, dataset, torch.device("cpu"))
                checked.add(key)

    def dataset(self, config: TrainConfig) -> AnyDataset:
        """The dataset of a configuration as its runs open it, opened once."""
        fields = ("data", "image_size", "val_split", "loader", "bad_images")
        key = repr([getattr(config, name) for name in fields])
        if key not in self._opened:
            with closing(Counter("reading images")) as counter:
                self._opened[key] = open_data(config, torch.device("cpu"), progress=counter)
        return self._opened[key]

    def _fingerprints(self, configs: Iterable[TrainConfig]) -> dict[str, str]:
        """The fingerprints of the datasets, by form: files, or decoded images of a size."""
        datasets = ((config.image_size, self.dataset(config)) for config in configs)
        return {
            f"images of size {size}" if isinstance(data, Dataset) else "files": data.fingerprint
            for size, data in datasets
        }


@dataclass(frozen=True)
class Results(ABC):
    """The results of a plan's runs so far, of each row by its name, with notes."""

    measured: Mapping[str, Measured]
    notes: tuple[str, ...]
    out: Path

    @abstractmethod
    def tables(self) -> list[Table]:
        """The tables of the results."""

    @abstractmethod
    def as_json(self) -> Record:
        """The content of ``results.json``."""

    @abstractmethod
    def files(self) -> dict[str, str]:
        """The texts of the other files, by name."""

    def write(self) -> None:
        """Write all files into the plan's folder."""
        for name, text in self.files().items():
            write_text(self.out / name, text)
        write_json(self.out / "results.json", self.as_json())

    def as_text(self) -> str:
        """The tables for a terminal."""
        return "\n\n".join(table.as_text() for table in self.tables())


def plan_runs(out: Path, row: str, config: TrainConfig, seeds: Iterable[int]) -> tuple[Job, ...]:
    """The runs of a row of the results, one for each seed, see ``completed``."""
    config = completed(config)
    return tuple(
        Job(out / "runs" / f"{row}-seed{seed}", replace(config, seed=seed)) for seed in seeds
    )


def check_seeds(seeds: int) -> None:
    """Raise ``ConfigError`` unless there is at least one seed."""
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: must be at least 1, for seeds 0 to N-1")
