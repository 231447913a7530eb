"""The run folder: ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``metrics.csv``,
``log.txt``, ``summary.json``, ``checkpoints/``, ``student.safetensors`` with ``student.json``, and
the files of TensorBoard and W&B.
"""

import contextlib
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastokd.errors import CheckpointError, ConfigError
from fastokd.ranks import rank_and_size
from fastokd.storage import (
    append_line,
    remove_temporaries,
    storage_error,
    temporaries_of,
    write_atomically,
    write_json,
    write_text,
)
from fastokd.train.checkpoint import checkpoint_files
from fastokd.train.config import TrainConfig, one_teacher
from fastokd.train.config_files import load_run_plugins, read_config
from fastokd.train.logs import csv_text
from fastokd.version import __version__


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.csv_path = path / "metrics.csv"
        self.log_path = path / "log.txt"
        self.environment_path = path / "environment.json"
        self.summary_path = path / "summary.json"
        self.student = path / "student.safetensors"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self._descriptor = -1
        self._lock: weakref.finalize[..., Any] | None = None

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Create and lock the folder, and check that it is writable. The files of a run without a
        checkpoint are replaced.

        Raises:
            ConfigError: it holds a run with a checkpoint or other files, or is locked.
            StorageError: the folder cannot be created or written.
        """
        run = cls(path)
        if checkpoint_files(run.checkpoints):
            resume = f"continue it with 'fastokd train --resume {path}'"
            raise ConfigError(f"{path} already holds a run: {resume}, or choose another --out")
        try:
            run._check_replaceable()
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise storage_error(path, error) from error
        run.lock()
        run._remove_records()
        return run

    def _check_replaceable(self) -> None:
        """Refuse a folder with other files than those of a run that ended before a checkpoint."""
        entries = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        known = {"checkpoints"} | {
            file.name for record in self._records() for file in (record, *temporaries_of(record))
        }
        if entries - known or (entries and "checkpoints" not in entries):
            names = ", ".join(sorted(entries - known or entries)[:3])
            raise ConfigError(f"{self.path} is not empty ({names}); choose another --out")

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run; a ``CheckpointError`` if this is no run folder."""
        run = cls(path)
        if not run.config_path.is_file():
            exists = path.exists()
            missing = "is not a run folder (it has no config.yaml)" if exists else "does not exist"
            raise CheckpointError(f"{path} {missing}; pass a folder created by 'fastokd train'")
        return run

    def lock(self) -> int:
        """Claim the folder for this process until ``unlock`` or its end; again has no effect.

        Returns the descriptor that holds the lock, also for processes that inherit it. Raises a
        ``ConfigError`` if another process is training there.
        """
        if self._lock is not None and self._lock.alive:
            return self._descriptor
        self._descriptor = os.open(self.path, os.O_RDONLY)
        self._lock = weakref.finalize(self, os.close, self._descriptor)
        # A loader's worker that outlives this process must not hold the folder.
        os.register_at_fork(after_in_child=self._lock)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.unlock()
            raise ConfigError(
                f"another process is training in {self.path}; wait for it, or choose another --out"
            ) from None
        return self._descriptor

    def unlock(self) -> None:
        """Release the lock, if this process holds it."""
        if self._lock is not None:
            self._lock()

    def discard_without_checkpoint(self) -> None:
        """Remove the files of a run that ended before its first checkpoint."""
        if checkpoint_files(self.checkpoints):
            return
        self._remove_records()
        for folder in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):  # not empty, or missing
                folder.rmdir()

    def _records(self) -> tuple[Path, ...]:
        """Everything a run writes except its last checkpoints."""
        return (
            self.config_path,
            self.metrics_path,
            self.csv_path,
            self.log_path,
            self.environment_path,
            self.summary_path,
            self.best,
            self.student,
            self.student.with_suffix(".json"),
            self.path / "tensorboard",
            self.path / "wandb",
        )

    def _remove_records(self) -> None:
        for path in self._records():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for path in (*self._records(), self.last):
            remove_temporaries(path)

    def load_config(self) -> TrainConfig:
        """The run's configuration; its plug-ins are imported."""
        return one_teacher(load_run_plugins(read_config(self.config_path), self.path))

    def save_config(self, config: TrainConfig) -> None:
        """Write the run's configuration."""
        write_text(self.config_path, config.to_yaml())

    def save_environment(
        self,
        device: torch.device,
        precision: str,
        data: dict[str, Any],
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Write the environment of a new run, with the precision that "auto" has chosen, the
        description of its data and the fingerprints of its frozen teacher and initial weights.
        """
        now = {**environment(device), "precision": precision}
        inputs = {"data": data, **(fingerprints or {})}
        write_json(self.environment_path, {**now, **inputs, "sessions": [_session(now)]})

    def read_environment(self) -> dict[str, Any]:
        """The content of ``environment.json``, see ``read_json_object``."""
        return read_json_object(self.environment_path)

    def add_session(self, device: torch.device, precision: str) -> None:
        """Add the environment in which the run is resumed; that of its start stays."""
        start = self.read_environment()
        if not isinstance(sessions := start.get("sessions", []), list):
            start, sessions = {}, []
        sessions = [*sessions, _session({**environment(device), "precision": precision})]
        write_json(self.environment_path, {**start, "sessions": sessions})

    def versions(self) -> dict[str, Any]:
        """The versions and the commit that started the run; empty where they are lost."""
        start = self.read_environment()
        return {name: start[name] for name in ("fastokd", "commit", "torch") if name in start}

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add the record of an epoch."""
        append_line(self.metrics_path, json.dumps(record))
        self._write_csv(self.read_metrics())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of the epochs, up to the first damaged line, which a crash may leave."""
        if not self.metrics_path.is_file():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return list(itertools.takewhile(_is_record, map(_parse_object, lines)))

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop the records of epochs that a resumed run trains again."""
        records = [record for record in self.read_metrics() if record["epoch"] < epoch]
        write_text(self.metrics_path, "".join(json.dumps(record) + "\n" for record in records))
        self._write_csv(records)

    def _write_csv(self, records: Sequence[dict[str, Any]]) -> None:
        # Always the whole file, so that it agrees with the records; it need not be durable.
        data = csv_text(records).encode()
        write_atomically(self.csv_path, lambda file: file.write(data), durable=False)


def _is_record(record: dict[str, Any]) -> bool:
    accuracies = record.get("eval")
    return (
        isinstance(record.get("epoch"), int)
        and isinstance(accuracies, dict)
        and all(isinstance(value, int | float) for value in accuracies.values())
    )


def _parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty if it is something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where it is missing or damaged."""
    try:
        return _parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def default_run_path(name: str) -> Path:
    """``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for each in names if not (path := Path("runs") / each).exists())


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and command, to repeat a run; nothing that names the machine."""
    on_gpu = device.type == "cuda"
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "fastokd": __version__,
        "commit": _commit(),
        "command": _command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "dali": _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": rank_and_size()[1],
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
    }


def _session(now: dict[str, Any]) -> dict[str, Any]:
    """The entries that may differ when a run is resumed."""
    names = ["started", "command", "commit", "fastokd", "torch", "device", "precision"]
    return {name: now[name] for name in [*names, "world_size"]}


def _version(*packages: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _command() -> str:
    """The command line of this process, without the folders of interpreter and script."""
    python, *rest = sys.orig_argv
    if rest and Path(rest[0]).name == "fastokd":
        return shlex.join(["fastokd", *rest[1:]])
    return shlex.join([Path(python).name, *rest])


def _commit() -> str | None:
    """The commit of the checkout that runs, with a + if tracked files differ; None outside one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "CMakeLists.txt").is_file():
        return None  # installed from a wheel: a repository around it is another project's
    describe = "describe --always --abbrev=12 --dirty=+ --exclude=*"
    command = ["git", "-C", str(folder), *describe.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
