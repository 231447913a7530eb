"""Starts processes that train together, as a launcher does."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}
"""The handlers of a Python program that was started with default dispositions."""


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Give this process default signal handlers.

    ``nohup`` and the background of a script start processes with SIGHUP or SIGINT ignored. A test
    that sends itself one of these signals needs the default.
    """
    before = {number: signal.signal(number, handler) for number, handler in _HANDLERS.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reset_signals() -> None:
    """Give a child process default dispositions, as ``preexec_fn`` of ``subprocess.Popen``."""
    for number in _HANDLERS:
        signal.signal(number, signal.SIG_DFL)


def replace_training(monkeypatch: pytest.MonkeyPatch, command: Sequence[str]) -> None:
    """Let sweeps start a command with the arguments of ``fastokd train`` instead of training."""
    real = subprocess.Popen

    def start(arguments: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        if list(arguments[1:4]) == ["-m", "fastokd", "train"]:
            arguments = [*command, *arguments[4:]]
        return real(arguments, **options)

    monkeypatch.setattr("fastokd.experiments.sweep.queue.subprocess.Popen", start)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments: Sequence[object], **given: str) -> "subprocess.Popen[str]":
    """Start a Python process at the root of the repository, with one thread and default signal
    dispositions even if these tests run in the background.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        **given,
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=reset_signals,
    )


def start_ranks(size: int, arguments: Sequence[object]) -> list["subprocess.Popen[str]"]:
    """That many of them in torchrun's environment."""
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        start(arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)
    ]


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Its exit code, output and errors; killed if it hangs."""
    try:
        output, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"it hung: {output}\n{errors}") from None
    return process.returncode, output, errors
