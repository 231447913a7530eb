"""Runs that wait for a device: each is a ``fastokd train`` of its own, several at once on a device
where they fit.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastokd.data import Dataset
from fastokd.errors import EXIT_OK, EXIT_PREEMPTED, ConfigError
from fastokd.experiments.analysis.runs import SAME_RUN
from fastokd.experiments.sweep.images import Datasets
from fastokd.storage import storage_error, write_atomically
from fastokd.train.checkpoint import checkpoint_files
from fastokd.train.config import TrainConfig, differences
from fastokd.train.distributed import choose_device
from fastokd.train.launch import handling
from fastokd.train.memory import FILL, estimate_memory, free_memory
from fastokd.train.progress import duration
from fastokd.train.run_folder import RunFolder, read_json_object
from fastokd.train.signals import LAUNCHER_PATIENCE, PATIENCE_VARIABLE, STOP_SIGNALS
from fastokd.train.teacher import open_teacher

PROCESS_BYTES = {"cpu": 768 * 2**20, "cuda": 2**30}
"""What a run takes beside its estimate: the interpreter and its libraries (about 700 MiB on Linux);
a CUDA context and its libraries.
"""
_POLL_SECONDS = 0.2
_NOTE_SECONDS = 60.0
"""How often it is said how far the runs are."""


@dataclass(frozen=True)
class Job:
    """A run of a queue.

    Attributes:
        path: its run folder.
        config: what is trained; on which device is the queue's to say.
    """

    path: Path
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name

    def is_finished(self) -> bool:
        """Whether it has all its epochs, and its summary, which a run writes last."""
        epochs = read_json_object(RunFolder(self.path).summary_path).get("epochs")
        return isinstance(epochs, int) and epochs >= self.config.epochs

    def state(self) -> str:
        """How far the run is in words: "finished", "12 of 300 epochs" or "not run"."""
        if self.is_finished():
            return "finished"
        run = RunFolder(self.path)
        done = len(run.read_metrics())
        return (
            f"{done} of {self.config.epochs} epochs"
            if done or checkpoint_files(run.checkpoints)
            else "not run"
        )

    def check(self, datasets: Datasets) -> None:
        """Check that a run in its folder is this one, but for where and how fast it ran, and on the
        same images.

        Args:
            datasets: opens the data, if there is a run.

        Raises:
            ConfigError: it is another, of other images, or its configuration is damaged.
            ConfigError, DataError: the data cannot be trained on.
        """
        run = RunFolder(self.path)
        if not run.config_path.is_file() or not (
            checkpoint_files(run.checkpoints) or self.is_finished()
        ):
            return
        there = run.load_config()
        if changed := differences(
            replace(there, **{name: getattr(self.config, name) for name in SAME_RUN}), self.config
        ):
            raise ConfigError(
                f"{self.path} holds a run of another configuration (there, here:"
                f" {'; '.join(changed)}): choose another --out"
            )
        seen = run.read_environment().get("data")
        if (
            self.config.data
            and isinstance(seen, dict)
            and seen.get("fingerprint")
            and datasets.are_others(self.config, seen["fingerprint"])
        ):
            raise ConfigError(
                f"{self.path} holds a run on other images (of {seen.get('name', 'unknown data')})"
                f" than {self.config.data} has now: give the data that it was trained on, or choose"
                " another --out"
            )


@dataclass(frozen=True)
class Outcome:
    """How a queue ended.

    Attributes:
        failed: the names of runs that failed, each with its error in one line.
        exit_code: 0; that of the first run that failed; or 75 where a signal ended the queue.
        signal: the name of the signal that ended it, or "".
    """

    failed: dict[str, str]
    exit_code: int
    signal: str = ""


@dataclass
class _Device:
    """A device, and what runs there."""

    device: torch.device
    free: int | None
    running: list["_Running"] = field(default_factory=list)


@dataclass
class _Running:
    """A process that trains."""

    job: Job
    place: _Device
    needs: float
    log: Path
    log_start: int
    process: "subprocess.Popen[bytes]"
    begun: float = field(default_factory=time.monotonic)
    company: bool = False
    """Whether another run was on the device while it ran."""


def parse_devices(text: str) -> list[torch.device]:
    """The devices of a list such as "cuda:0,cuda:1"; "auto" for all GPUs, or the CPU where there is
    none.

    Raises:
        ConfigError: one is not there, or is named twice.
    """
    if text == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    devices = []
    for name in text.split(","):
        device = choose_device(name.strip())
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        if device in devices:
            raise ConfigError(
                f"--devices {text}: {device} is there twice; several runs at once on a device are"
                " --per-device N"
            )
        devices.append(device)
    return devices


def parse_per_device(text: str) -> int | None:
    """How many runs a device takes at once; None for "auto".

    Raises:
        ConfigError: it is neither.
    """
    if text == "auto":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ConfigError(f"--per-device {text}: it is a whole number of runs, at least 1, or auto")
    return int(text)


class Queue:
    """Runs, and the devices that they are to run on.

    Args:
        jobs: the runs, in the order in which they begin. Finished ones are passed over, begun ones
            go on.
        folder: gets ``configs/`` and ``logs/``, a file for each run.
        devices: where they run.
        per_device: how many run at once on a device; None for as many as their estimated memory and
            the cores allow.
        say: takes the lines about what happens.
        datasets: opens the data.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        devices: Sequence[torch.device],
        per_device: int | None,
        say: Callable[[str], None],
        datasets: Datasets,
    ) -> None:
        self._jobs, self._folder, self._per_device, self._say = tuple(jobs), folder, per_device, say
        self._waiting = [job for job in jobs if not job.is_finished()]
        self._finished = len(jobs) - len(self._waiting)
        self._places = [_Device(device, None) for device in devices]
        self._failed: dict[str, str] = {}
        self._exit_code = EXIT_OK
        self._signal = ""
        self._at_once = False
        self._seconds: list[float] = []
        self._alone: set[str] = set()
        self._datasets = datasets
        self._memory = _Memory(datasets)
        cores = len(os.sched_getaffinity(0))
        self._descriptor = -1
        self._limit = per_device or max(1, cores // len(devices))
        self._threads = max(1, cores // max(1, min(len(self._waiting), self._limit * len(devices))))

    def run(
        self,
        claim: Callable[[], object] = lambda: None,
        write: Callable[[Mapping[str, str]], object] = lambda failed: None,
    ) -> Outcome:
        """Run them all. A run that fails is said, and the others go on; a signal lets the runs save
        and ends the queue.

        Args:
            claim: called when nothing stands against the first run, and the folder is this queue's
                alone.
            write: called with the runs that failed so far, by name, each with its error: whenever a
                run has ended, and at the end, whatever that is.

        Raises:
            ConfigError: another queue runs in the folder.
            ConfigError, DataError: the data cannot be trained on, found before the first run.
            ConfigError, CheckpointError: where memory is estimated, a teacher is missing or does
                not fit, found before the first run.
            StorageError: the disk refused.
        """
        if not self._waiting:
            write({})
            return Outcome({}, EXIT_OK)
        for job in self._waiting:
            self._datasets.of(job.config)
        if self._per_device is None:
            for place in self._places:
                place.free = free_memory(place.device)
        for job in self._waiting:
            for place in self._places:
                self._needs(job, place)
        held = self._hold()
        try:
            claim()
            return self._run(write)
        finally:
            held.unlock()

    def _hold(self) -> RunFolder:
        """The folder, held by this queue and its runs: another queue would find the runs locked,
        and call that a failure.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self._folder, error) from error
        held = RunFolder(self._folder)
        try:
            self._descriptor = held.lock()
        except ConfigError:
            raise ConfigError(
                f"runs in {self._folder} are still going on, of another call or of one that was"
                " killed; wait for them, or choose another --out"
            ) from None
        return held

    def _run(self, write: Callable[[Mapping[str, str]], object]) -> Outcome:
        noted, asked = time.monotonic(), False
        with self._signals_noted():
            try:
                while self._running() or (self._waiting and not self._signal):
                    if self._reap():
                        write(self._failed)
                    if self._signal and not asked:
                        asked = True
                        self._say(
                            f"{self._signal}: {len(self._running())} runs save and stop; another"
                            " signal stops them at once"
                        )
                        self._send(signal.SIGTERM)
                    if self._at_once:
                        self._send(signal.SIGKILL)  # what was saved before is intact
                    while not self._signal and self._start_one():
                        pass
                    if time.monotonic() - noted > _NOTE_SECONDS:
                        noted = time.monotonic()
                        self._note()
                    time.sleep(_POLL_SECONDS)
            finally:
                self._send(signal.SIGTERM)  # after an error of ours, such as a full disk: they save
                while any(running.process.poll() is None for running in self._running()):
                    if self._at_once:
                        self._send(signal.SIGKILL)
                    time.sleep(_POLL_SECONDS)
                write(self._failed)
        stopped = self._signal if self._waiting else ""
        return Outcome(self._failed, EXIT_PREEMPTED if stopped else self._exit_code, stopped)

    def _running(self) -> list[_Running]:
        return [running for place in self._places for running in place.running]

    def _send(self, number: int) -> None:
        for running in self._running():
            running.process.send_signal(number)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Signals that ask to stop are noted, and followed by ``run``; Ctrl-C too, because the runs
        are in sessions of their own.
        """
        begun = 0.0

        def note(number: int, _: object) -> None:
            nonlocal begun
            if not self._signal:
                self._signal, begun = signal.Signals(number).name, time.monotonic()
            elif number == signal.SIGINT or time.monotonic() - begun >= LAUNCHER_PATIENCE:
                self._at_once = True

        with handling((signal.SIGINT, signal.SIGHUP, *STOP_SIGNALS), note):
            yield

    def _start_one(self) -> bool:
        """Start the next run, on the device with the fewest, if it fits on one."""
        if not self._waiting:
            return False
        job = self._waiting[0]
        for place in sorted(self._places, key=lambda place: len(place.running)):
            needs, names = (
                self._needs(job, place),
                {job.name, *(other.job.name for other in place.running)},
            )
            if place.running and (len(place.running) >= self._limit or names & self._alone):
                continue
            if (
                place.running
                and place.free is not None
                and sum(other.needs for other in place.running) + needs > FILL * place.free
            ):
                continue
            self._waiting.pop(0)
            self._start(job, place, needs)
            return True
        return False

    def _needs(self, job: Job, place: _Device) -> float:
        """The bytes that a run takes on a device; 0 where the number of runs is given, or one."""
        return (
            self._memory.needs(job.config, place.device)
            if self._limit > 1 and place.free is not None
            else 0.0
        )

    def _start(self, job: Job, place: _Device, needs: float) -> None:
        config, log = (
            self._folder / "configs" / f"{job.name}.yaml",
            self._folder / "logs" / f"{job.name}.txt",
        )
        write_atomically(
            config, lambda file: file.write(job.config.to_yaml().encode()), durable=False
        )
        # A scheduler may signal the runs too, beside what is passed on to them.
        own = {
            "OMP_NUM_THREADS": str(self._threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(self._threads),
            PATIENCE_VARIABLE: str(LAUNCHER_PATIENCE),
        }
        began = job.state()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as output:
                start = output.tell()
                # The run holds the folder too: it trains on where this process is killed. A session
                # of its own: Ctrl-C at a terminal would reach it beside the signal that is passed
                # on, and stop it at once.
                process = subprocess.Popen(
                    _command(config, job.path, place.device),
                    env={**own, **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(self._descriptor,),
                )
        except OSError as error:
            raise storage_error(log, error) from error
        running = _Running(job, place, needs, log, start, process, company=bool(place.running))
        for other in place.running:
            other.company = True
        place.running.append(running)
        self._say(
            f"{job.name}: {'starts' if began == 'not run' else 'goes on, ' + began}, on"
            f" {place.device}"
        )

    def _reap(self) -> bool:
        """Whether a run has ended."""
        before = len(self._running())
        for place in self._places:
            for running in [each for each in place.running if each.process.poll() is not None]:
                place.running.remove(running)
                self._ended(running)
        return len(self._running()) < before

    def _ended(self, running: _Running) -> None:
        job, code, seconds = (
            running.job,
            running.process.returncode,
            time.monotonic() - running.begun,
        )
        if code == EXIT_OK:
            self._finished += 1
            self._seconds.append(seconds)
            self._say(
                f"{job.name}: finished in {duration(seconds)}; {self._finished} of"
                f" {len(self._jobs)} runs{self._left()}"
            )
            return
        if self._signal and (code == EXIT_PREEMPTED or code < 0):
            self._waiting.insert(0, job)
            self._say(
                f"{job.name}: {'saved' if code == EXIT_PREEMPTED else 'stopped'}, {job.state()}"
            )
            return
        reason = _complaint(running) if code >= 0 else f"killed by {signal.Signals(-code).name}"
        # The kernel kills the process that takes most of the main memory.
        if (
            running.company
            and ("out of memory" in reason or code == -signal.SIGKILL)
            and job.name not in self._alone
        ):
            self._alone.add(job.name)
            self._waiting.insert(0, job)
            self._say(f"{job.name}: {reason}; it is tried again alone on its device")
            return
        self._failed[job.name] = reason
        self._exit_code = self._exit_code or (code if code > 0 else 128 - code)
        self._say(f"{job.name}: failed: {reason} (all it said: {running.log})")

    def _left(self) -> str:
        rest = len(self._waiting) + len(self._running())
        if not rest:
            return ""
        at_once = len(self._running()) + bool(
            self._waiting
        )  # one will take the place of the one that ended
        return f", about {duration(statistics.mean(self._seconds) * rest / at_once)} left"

    def _note(self) -> None:
        running = [
            f"{each.job.name} {len(RunFolder(each.job.path).read_metrics())} of"
            f" {each.job.config.epochs} epochs"
            for each in self._running()
        ]
        self._say(
            f"{self._finished} of {len(self._jobs)} runs finished; running: {', '.join(running)}"
        )


class _Memory:
    """The estimated memory of runs."""

    def __init__(self, datasets: Datasets) -> None:
        self._datasets = datasets
        self._needs: dict[str, float] = {}

    def needs(self, config: TrainConfig, device: torch.device) -> float:
        """The bytes that a run takes on its device; infinity where they cannot be estimated."""
        key = repr((replace(config, seed=0), device.type))
        if key not in self._needs:
            dataset = self._datasets.of(config)
            teacher = open_teacher(config, dataset, torch.device("cpu"))
            # On a CPU the estimate leaves out the images, which that process has already; here each
            # process has its own.
            images = (
                sum(split.images.nbytes for split in dataset.splits)
                if isinstance(dataset, Dataset) and device.type == "cpu"
                else 0
            )
            try:
                self._needs[key] = (
                    estimate_memory(
                        config, dataset, device, teacher.network if teacher else None
                    ).total
                    + images
                    + PROCESS_BYTES[device.type]
                )
            except ConfigError:
                self._needs[key] = float("inf")
        return self._needs[key]


def _command(config: Path, path: Path, device: torch.device) -> list[str]:
    return [
        sys.executable,
        "-m",
        "fastokd",
        "train",
        "--config",
        str(config),
        "--out",
        str(path),
        "--resume",
        "auto",
        "--device",
        str(device),
        "--quiet",
    ]


def _complaint(running: _Running) -> str:
    """The error that a run ended with, in one line."""
    try:
        with open(running.log, "rb") as file:
            file.seek(running.log_start)
            lines = [
                line.strip()
                for line in file.read().decode(errors="replace").splitlines()
                if line.strip()
            ]
    except OSError:
        lines = []
    said = (
        [line.removeprefix("fastokd: ") for line in lines if line.startswith("fastokd: ")]
        or lines
        or [f"exit code {running.process.returncode}"]
    )
    return said[-1][:300]
