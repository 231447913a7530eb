"""The run folder: ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``,
``student.safetensors`` with ``student.json``."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastokd.errors import CheckpointError, ConfigError
from fastokd.storage import append_line, storage_error, write_atomically, write_json
from fastokd.train.config import TrainConfig, load_config
from fastokd.version import __version__


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.environment_path = path / "environment.json"
        self.summary_path = path / "summary.json"
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"
        self.student = path / "student.safetensors"

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Make the folder and check that it can be written to.

        Raises:
            ConfigError: a run is there already.
            StorageError: the folder cannot be made or written to.
        """
        run = cls(path)
        if run.config_path.exists():
            raise ConfigError(f"{path} holds a run already: continue it with 'fastokd train --resume {path}', or choose another --out")
        try:
            run.last.parent.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise storage_error(path, error) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            CheckpointError: this is not a run folder.
        """
        run = cls(path)
        if not run.config_path.is_file():
            what = "does not exist" if not path.exists() else "is not a run folder (it has no config.yaml)"
            raise CheckpointError(f"{path} {what}")
        return run

    def discard_if_unused(self) -> None:
        """Remove the folder again if nothing was written into it: the run did not start."""
        for folder in (self.last.parent, self.path):
            with contextlib.suppress(OSError):  # not empty, or not there
                folder.rmdir()

    def load_config(self) -> TrainConfig:
        return load_config(self.config_path.read_text(encoding="utf-8"), str(self.config_path))

    def save_config(self, config: TrainConfig) -> None:
        write_atomically(self.config_path, lambda file: file.write(config.to_yaml().encode()) and None)

    def save_environment(self, device: torch.device, data: dict[str, Any]) -> None:
        write_json(self.environment_path, {**environment(device), "data": data})

    def append_metrics(self, record: dict[str, Any]) -> None:
        append_line(self.metrics_path, json.dumps(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The record of each epoch; a last line cut short by a crash is left out."""
        if not self.metrics_path.is_file():
            return []
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop the records of epochs that will be trained again after a resume."""
        kept = [json.dumps(record) for record in self.read_metrics() if record["epoch"] < epoch]
        text = "".join(line + "\n" for line in kept)
        write_atomically(self.metrics_path, lambda file: file.write(text.encode()) and None)


def default_run_path(name: str) -> Path:
    """``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that does not exist."""
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and command: what is needed to run the same thing again."""
    return {
        "fastokd": __version__,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _commit() -> str | None:
    """The commit of the checkout that runs, with a + if files differ from it; None outside one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "CMakeLists.txt").is_file():
        return None  # installed from a wheel: a repository around it would be somebody else's
    try:
        # Untracked files (data, runs) do not change what the commit means.
        found = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
                               capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
