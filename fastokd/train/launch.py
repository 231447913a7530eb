"""Starting the processes of a run on this machine, without importing torch."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from fastokd.errors import EXIT_PEER, EXIT_PREEMPTED, ConfigError
from fastokd.storage import usable_cores

STARTED_HERE = "FASTOKD_GPUS"
"""The environment variable with the number of processes that ``launch`` started."""

LEAVE_SECONDS = 30.0
"""Time for the other processes to exit after one has."""


def launched() -> bool:
    """True if torchrun or ``launch`` started this process; others do not set LOCAL_RANK."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def check_launched(processes: int) -> None:
    """Raise a ``ConfigError`` if the launcher started another number of processes here."""
    started = os.environ.get("LOCAL_WORLD_SIZE", "another number of")
    if started != str(processes):
        conflict = f"a launcher that started {started} local processes"
        raise ConfigError(f"--gpus {processes} conflicts with {conflict}; drop --gpus")


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``fastokd ARGUMENTS`` in several processes on this machine that train together.

    Like torchrun on one machine without restarts, but signals are forwarded without a deadline.
    Returns 0 if all processes return 0, else the exit code of one that failed first, or 128 + N if
    signal N killed it.
    """
    if processes < 1:
        raise ConfigError(f"gpus={processes}: the number of processes must be at least 1")
    # Bound but not listening, with the option that rank 0 sets too: rank 0 can listen there, and
    # no other program gets the port.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        threads = str(max(1, usable_cores() // processes))
        environment = {
            "OMP_NUM_THREADS": threads,
            **os.environ,
            STARTED_HERE: str(processes),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(reserved.getsockname()[1]),
        }
        children: list[subprocess.Popen[bytes]] = []
        with _passed_on(children) as passed:
            try:
                for rank in range(processes):
                    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    command = [sys.executable, "-m", "fastokd", *arguments]
                    children.append(subprocess.Popen(command, env={**environment, **ranks}))
                return _wait(children, passed)
            finally:
                for child in children:
                    child.kill()  # nothing if it has exited
                    child.wait()


@contextlib.contextmanager
def handling(
    numbers: Collection[int], handler: Callable[[int, Any], object], ignored_too: bool = False
) -> Iterator[None]:
    """Handle signals, but not those that this process was started to ignore, as by nohup."""
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if ignored_too or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in before.items():  # None: not set from Python
            signal.signal(number, signal.SIG_DFL if former is None else former)


@contextlib.contextmanager
def _passed_on(children: Sequence["subprocess.Popen[bytes]"]) -> Iterator[set[int]]:
    """Forward signals to children, SIGINT by ``_wait``; yields those that were forwarded."""
    passed: set[int] = set()

    def pass_on(number: int, _: object) -> None:
        passed.add(number)
        for child in list(children):
            child.send_signal(number)

    with handling((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), pass_on):
        yield passed


def _wait(children: Sequence["subprocess.Popen[bytes]"], passed: Collection[int]) -> int:
    """Wait for all; when one fails, the others get ``LEAVE_SECONDS`` to notice."""
    deadline = float("inf")
    # After the children were started, which would inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            if deadline == float("inf") and any(child.poll() for child in children):
                deadline = time.monotonic() + LEAVE_SECONDS
            # The terminal sends Ctrl-C to the children too; a signal of a process came here alone.
            received = signal.sigtimedwait({signal.SIGINT}, 0.1)
            if received is not None and received.si_code <= 0:
                for child in children:
                    child.send_signal(signal.SIGINT)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    failed = {rank: code for rank, child in enumerate(children) if (code := child.poll())}
    if not failed:
        return 0
    # The loss of a peer is never the first failure.
    rank = min(failed, key=lambda rank: failed[rank] == EXIT_PEER)
    if (code := failed[rank]) > 0:
        return code
    name = signal.Signals(-code).name
    if -code in passed:  # before the process had installed its handlers
        print(f"fastokd: stopped by {name} before the run began", file=sys.stderr)
        return EXIT_PREEMPTED
    text = f"rank {rank} of {len(children)} was killed by {name}; the last checkpoint is intact"
    print(f"fastokd: {text}", file=sys.stderr)
    return 128 - code
