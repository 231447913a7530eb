"""Runs that wait for a device; each is a separate ``fastokd train`` process."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fastokd.errors import EXIT_OK, EXIT_PREEMPTED, ConfigError
from fastokd.storage import storage_error, usable_cores, write_text
from fastokd.train.checkpoint import checkpoint_files
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import choose_device
from fastokd.train.launch import handling
from fastokd.train.progress import duration
from fastokd.train.run_folder import RunFolder, read_json_object
from fastokd.train.signals import LAUNCHER_PATIENCE, PATIENCE_VARIABLE, STOP_SIGNALS

_POLL_SECONDS = 0.2

Write = Callable[[Mapping[str, str]], object]


@dataclass(frozen=True)
class Job:
    """A run of a queue: its run folder and its configuration. The queue chooses the device."""

    path: Path
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name

    def is_finished(self) -> bool:
        """True if it has all its epochs and its summary, which is written last."""
        epochs = read_json_object(RunFolder(self.path).summary_path).get("epochs")
        return isinstance(epochs, int) and epochs >= self.config.epochs

    def is_started(self) -> bool:
        """True if its folder has a configuration and something to resume or to read."""
        run = RunFolder(self.path)
        resumable = bool(checkpoint_files(run.checkpoints))
        return run.config_path.is_file() and (resumable or self.is_finished())

    def state(self) -> str:
        """Its state in words: "finished", "12 of 300 epochs" or "not run"."""
        if self.is_finished():
            return "finished"
        run = RunFolder(self.path)
        done = len(run.read_metrics())
        started = done or checkpoint_files(run.checkpoints)
        return f"{done} of {self.config.epochs} epochs" if started else "not run"


class Outcome(NamedTuple):
    """The end of a queue: the errors of failed runs by name, one line each; 0, or the exit code of
    the first failed run, or 75 if a signal stopped the queue; and that signal's name or "".
    """

    failed: dict[str, str]
    exit_code: int
    signal: str = ""


@dataclass
class _Running:
    """A training process."""

    job: Job
    device: torch.device
    log: Path
    log_start: int
    process: "subprocess.Popen[bytes]"
    started: float = field(default_factory=time.monotonic)

    def error(self) -> str:
        """The error that it ended with, in one line."""
        if self.process.returncode < 0:
            return f"killed by {signal.Signals(-self.process.returncode).name}"
        try:
            output = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        except OSError:
            output = ""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line.removeprefix("fastokd: ") for line in lines if line.startswith("fastokd: ")]
        return (errors or lines or [f"exit code {self.process.returncode}"])[-1][:300]


def parse_devices(text: str) -> list[torch.device]:
    """The devices of a list such as "cuda:0,cuda:1"; "auto" is all GPUs, or else the CPU."""
    if text == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    devices: list[torch.device] = []
    for name in text.split(","):
        device = choose_device(name.strip())
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        if device in devices:
            fix = "use --per-device N for several runs at once on a device"
            raise ConfigError(f"--devices {text}: {device} is listed twice; {fix}")
        devices.append(device)
    return devices


def parse_per_device(text: str) -> int:
    """The number of simultaneous runs on a device; "auto" is 1. A ``ConfigError`` otherwise."""
    if text == "auto":
        return 1
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ConfigError(f"--per-device {text}: must be auto or a whole number of at least 1")
    return int(text)


@dataclass
class Queue:
    """Runs, and the devices that they run on.

    Args:
        jobs: the runs, in the order in which they start. Finished ones are skipped.
        folder: gets ``configs/`` and ``logs/``, a file for each run.
        devices: the devices of the runs.
        per_device: the number of simultaneous runs on each.
        say: prints a line about progress.
    """

    jobs: Sequence[Job]
    folder: Path
    devices: Sequence[torch.device]
    per_device: int
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._waiting = [job for job in self.jobs if not job.is_finished()]
        self._free = [*self.devices] * self.per_device
        self._running: list[_Running] = []
        self._failed: dict[str, str] = {}
        self._exit_code = EXIT_OK
        self._seconds: list[float] = []  # of the finished runs
        self._signal, self._signaled, self._kill = "", 0.0, False
        at_once = max(1, min(len(self._waiting), len(self._free)))
        self._threads = str(max(1, usable_cores() // at_once))

    def run(self, write: Write = lambda failed: None) -> Outcome:
        """Run them all. If a run fails, the others continue; a signal lets the runs save and stops
        the queue. A signal that was ignored when the process started stays ignored.

        Args:
            write: called with the errors of the runs that failed so far, by name, whenever a run
                has ended and at the end.
        """
        # SIGINT too: the runs have their own sessions, so Ctrl-C reaches only this process.
        with handling((signal.SIGINT, signal.SIGHUP, *STOP_SIGNALS), self._note_signal):
            try:
                self._train(write)
            finally:
                self._send(signal.SIGTERM)  # after an error, such as a full disk, they save
                while any(running.process.poll() is None for running in self._running):
                    if self._kill:
                        self._send(signal.SIGKILL)
                    time.sleep(_POLL_SECONDS)
                write(self._failed)
        stopped = self._signal if self._waiting else ""
        return Outcome(self._failed, EXIT_PREEMPTED if stopped else self._exit_code, stopped)

    def _note_signal(self, number: int, _: object) -> None:
        if not self._signal:
            self._signal, self._signaled = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self._signaled >= LAUNCHER_PATIENCE:
            self._kill = True

    def _send(self, number: int) -> None:
        for running in self._running:
            running.process.send_signal(number)

    def _train(self, write: Write) -> None:
        stopping = False
        while self._running or (self._waiting and not self._signal):
            ended = [running for running in self._running if running.process.poll() is not None]
            for running in ended:
                self._finish(running)
            if ended:
                write(self._failed)
            if self._signal and not stopping:
                stopping = True
                self.say(
                    f"{self._signal}: {len(self._running)} runs save and stop; another signal stops"
                    " them at once"
                )
                self._send(signal.SIGTERM)
            if self._kill:
                self._send(signal.SIGKILL)
            while self._waiting and self._free and not self._signal:
                self._start(self._waiting.pop(0), self._free.pop(0))
            time.sleep(_POLL_SECONDS)

    def _start(self, job: Job, device: torch.device) -> None:
        config = self.folder / "configs" / f"{job.name}.yaml"
        log = self.folder / "logs" / f"{job.name}.txt"
        write_text(config, job.config.to_yaml())
        defaults = {
            "OMP_NUM_THREADS": self._threads,
            "TORCHINDUCTOR_COMPILE_THREADS": self._threads,
            # A scheduler may signal the runs too, in addition to the signal of this process.
            PATIENCE_VARIABLE: str(LAUNCHER_PATIENCE),
        }
        state = job.state()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as output:
                log_start = output.tell()
                process = subprocess.Popen(
                    train_command(config, job.path, device),
                    env={**defaults, **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise storage_error(log, error) from error
        self._running.append(_Running(job, device, log, log_start, process))
        verb = "starts" if state == "not run" else f"resumes after {state}"
        self.say(f"{job.name}: {verb}, on {device}")

    def _finish(self, running: _Running) -> None:
        """Count a run that has ended as finished, waiting or failed."""
        job, code = running.job, running.process.returncode
        seconds = time.monotonic() - running.started
        self._running.remove(running)
        self._free.append(running.device)
        if code == EXIT_OK:
            self._seconds.append(seconds)
            rest, left = len(self._waiting) + len(self._running), ""
            if rest:
                at_once = len(self._running) + bool(self._waiting)  # the ended one is replaced
                left = f", about {duration(statistics.mean(self._seconds) * rest / at_once)} left"
            took = duration(seconds)
            self.say(f"{job.name}: finished in {took}; {self._progress()} runs{left}")
        elif self._signal and (code == EXIT_PREEMPTED or code < 0):
            self._waiting.insert(0, job)
            verb = "saved" if code == EXIT_PREEMPTED else "stopped"
            self.say(f"{job.name}: {verb}, {job.state()}")
        else:
            self._failed[job.name] = error = running.error()
            self._exit_code = self._exit_code or (code if code > 0 else 128 - code)
            self.say(f"{job.name}: failed: {error} (its output: {running.log})")

    def _progress(self) -> str:
        unfinished = len(self._waiting) + len(self._running) + len(self._failed)
        return f"{len(self.jobs) - unfinished} of {len(self.jobs)}"


def train_command(config: Path, path: Path, device: torch.device) -> list[str]:
    """The command line of a run."""
    train = [sys.executable, "-m", "fastokd", "train", "--config", str(config), "--out", str(path)]
    return [*train, "--resume", "auto", "--device", str(device), "--quiet"]
