"""Starting the processes of a run on this machine. Imports no torch: whoever starts them computes
nothing.
"""

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

LEAVE_SECONDS = 30.0
"""How long processes get to end by themselves after one of them has."""


def launched() -> bool:
    """Whether torchrun or ``launch`` started this process. Others set RANK and WORLD_SIZE too, but
    not LOCAL_RANK.
    """
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def check_launched(processes: int) -> None:
    """Refuse to be told another number of processes for this machine than were started.

    Raises:
        ConfigError: it is another.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if started != str(processes):
        raise ConfigError(
            f"--gpus {processes} under a launcher that started {started or 'another number of'}"
            " processes here; leave it out, or give it without the launcher"
        )


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``fastokd ARGUMENTS`` in several processes on this machine, which train together, until
    all have ended.

    What torchrun does for one machine without restarts, and what it does not: signals that ask a
    run to stop are passed on without a deadline, and the exit code is the processes'.

    Returns:
        0 if all returned 0, else the exit code of one that did not, and was not just left behind;
        128 + N if signal N killed it.
    """
    if processes < 1:
        raise ConfigError(f"gpus={processes}; it is how many processes train together, at least 1")
    # Bound and not listening, with the option that rank 0 sets too: rank 0 can listen there, and
    # nobody else is given it.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(reserved.getsockname()[1]),
            "OMP_NUM_THREADS": os.environ.get(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))
            ),
        }
        children: list[subprocess.Popen[bytes]] = []
        with _passed_on(children) as passed:
            try:
                for rank in range(processes):
                    children.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "fastokd", *arguments],
                            env={
                                **os.environ,
                                **shared,
                                "RANK": str(rank),
                                "LOCAL_RANK": str(rank),
                            },
                        )
                    )
                return _wait(children, passed)
            finally:
                for child in children:
                    if child.poll() is None:
                        child.kill()
                    child.wait()


@contextlib.contextmanager
def handling(numbers: Collection[int], handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Within it a handler has these signals, but for those that this process was started to ignore,
    as by nohup.
    """
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(
                number, signal.SIG_DFL if former is None else former
            )  # None: not set from Python


@contextlib.contextmanager
def _passed_on(children: Sequence["subprocess.Popen[bytes]"]) -> Iterator[set[int]]:
    """Signals to this process go on to its children; which did is yielded. For SIGINT see
    ``_wait``.
    """
    passed: set[int] = set()

    def pass_on(number: int, _: object) -> None:
        passed.add(number)
        for child in list(children):
            child.send_signal(number)

    with handling((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), pass_on):
        yield passed


def _wait(children: Sequence["subprocess.Popen[bytes]"], passed: Collection[int]) -> int:
    """Wait for all; where one fails, the others get ``LEAVE_SECONDS`` to notice."""
    deadline = float("inf")
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT}
    )  # the children, who would inherit it, are there already
    try:
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            if deadline == float("inf") and any(child.poll() for child in children):
                deadline = time.monotonic() + LEAVE_SECONDS
            # Ctrl-C comes from the terminal, which sends it to the children too; what a process
            # sent came here alone.
            received = signal.sigtimedwait({signal.SIGINT}, 0.1)
            if received is not None and received.si_code <= 0:
                for child in children:
                    child.send_signal(signal.SIGINT)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    failed = {rank: code for rank, child in enumerate(children) if (code := child.poll())}
    if not failed:
        return 0
    rank = min(
        failed, key=lambda rank: failed[rank] == EXIT_PEER
    )  # the loss of another process is never what came first
    if (code := failed[rank]) > 0:
        return code
    if -code in passed:  # it came before the process could hear it
        print(
            f"fastokd: stopped by {signal.Signals(-code).name} before the run began",
            file=sys.stderr,
        )
        return EXIT_PREEMPTED
    print(
        f"fastokd: rank {rank} of {len(children)} was killed by {signal.Signals(-code).name}; the"
        " last checkpoint is intact",
        file=sys.stderr,
    )
    return 128 - code
