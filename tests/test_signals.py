"""SIGTERM and SIGUSR1 are noted and nothing else; a second one ends the process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launching import default_signals

from fastokd.train.launch import _passed_on
from fastokd.train.signals import PATIENCE_VARIABLE, StopSignals

ROOT = Path(__file__).resolve().parent.parent
RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_recorded_and_reported(number, capfd, monkeypatch):
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(number)
    with StopSignals() as signals:
        with signals:
            assert signals.received == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher passes on what it got
        assert signals.received == number
    assert signal.getsignal(number) is before
    assert (
        capfd.readouterr().err
        == f"fastokd: rank 1: {signal.Signals(number).name}: saving after this step, then stopping;"
        " another signal stops at once\n"
    )


def run(patience, **environment):
    code = f"""
        import os, signal
        from fastokd.train.signals import StopSignals
        with StopSignals({patience}) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            print("still here", flush=True)
    """
    return subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_second_signal_ends_the_process():
    done = run("")
    assert done.returncode == 128 + signal.SIGUSR1
    assert done.stdout == ""
    assert (
        done.stderr.splitlines()[-1]
        == "fastokd: SIGUSR1: stopping at once; the last checkpoint is intact"
    )


def test_second_signal_within_patience_is_ignored():
    done = run("patience=60.0")
    assert (done.returncode, done.stdout) == (0, "still here\n")
    assert len(done.stderr.splitlines()) == 1


def test_patience_variable_is_used():
    done = run("", **{PATIENCE_VARIABLE: "60"})
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_handlers_are_unchanged_outside_main_thread():
    found = []

    def enter():
        with StopSignals() as signals:
            found.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, signal.getsignal(signal.SIGTERM))]


def test_launcher_forwards_signals_not_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        # Private, because a launcher passes signals on only while its processes run.
        with _passed_on([]) as passed:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert passed == {signal.SIGUSR1}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_ctrl_c_is_recorded_only_in_interrupts(capfd):
    with default_signals(), StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with signals.interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err == (
        "fastokd: Ctrl-C: saving after this step, then stopping; a second Ctrl-C stops at once\n"
    )


def test_second_ctrl_c_ends_the_process_at_once():
    """Under a launcher, which sends Ctrl-C a second time, after a second."""
    code = """
        import os, signal, time
        from fastokd.train.signals import StopSignals
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with StopSignals() as signals, signals.interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            print("still here", flush=True)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
            print("not here", flush=True)
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    for ranks, output in (({}, ""), (RANKS, "still here\n")):
        environment = {**os.environ, **ranks}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert (done.returncode, done.stdout) == (130, output), done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.endswith("Ctrl-C: stopping at once; the last checkpoint is intact")
