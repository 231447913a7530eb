"""Checkpoints with numbers, the expected files of a store, and processes that are killed
while they save.

As a program (python checkpoint_saver.py FOLDER), the processes of ``test_checkpoints.py``: forked
from one that has imported everything, so that a hundred of them take seconds. Prints what was found
as JSON.
"""

import builtins
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastokd import storage
from fastokd.train.checkpoint import CheckpointStore, checkpoint_files, load_checkpoint, load_newest

KEEP = 3


def make_state(number: int, size: int = 5_000) -> dict[str, Any]:
    """A state that says which one it is, and with a checksum of its tensors."""
    generator = torch.Generator().manual_seed(number)
    weights = {name: torch.randn(size, generator=generator) for name in ("trunk", "branch")}
    return {
        "model": weights,
        "optimizer": {"sgd": {name: torch.randn(size, generator=generator) for name in weights}},
        "criterion": {},
        "epoch": number,
        "last": {"branch1": 0.5},
        "best": {},
        "best_epoch": 0,
        "seconds": 1.5,
        "classes": ["a", "b"],
        "data": {"fingerprint": None},
        "config": "",
        "step": 10 * number,
        "loader": {"epoch": number},
        "sums": {"names": ["loss"], "values": torch.ones(1), "count": 3, "seconds": 0.5},
        "ema": {},
        "scaler": {},
        "ranks": [{"rng": {"cpu": torch.get_rng_state()}, "buffers": {}}],
        "config_hash": _checksum(weights),
    }


def _checksum(weights: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(
        b"".join(value.numpy().tobytes() for value in weights.values())
    ).hexdigest()


def number_of(state: dict[str, Any]) -> int:
    """The number of a state, which is checked to be complete."""
    number = state["epoch"]
    assert _checksum(state["model"]) == state["config_hash"]
    expected = make_state(number, len(state["model"]["trunk"]))
    assert state["config_hash"] == expected["config_hash"]
    assert all(
        torch.equal(value, expected["optimizer"]["sgd"][name])
        for name, value in state["optimizer"]["sgd"].items()
    )
    assert state["step"] == 10 * number
    return number


def numbers_in(folder: Path) -> list[int]:
    """The numbers of the newest checkpoints, in the order of their names; all are whole."""
    return [number_of(load_checkpoint(path)) for path in checkpoint_files(folder)]


def temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def save_up_to(folder: Path, number: int, keep: int = KEEP) -> CheckpointStore:
    """A store that has saved the states 1 to ``number``; every third was the best."""
    store = CheckpointStore(folder, keep)
    for i in range(1, number + 1):
        store.save(make_state(i), is_best=i % 3 == 0)
    return store


def tap(
    hook: Callable[[str, str], object], put: Callable[[Any, str, Any], object] = setattr
) -> None:
    """Call ``hook(call, file)`` before each system call by which a checkpoint reaches the disk; it
    may raise for the call.
    """

    def before(
        call: str, function: Callable[..., Any], name: Callable[..., str]
    ) -> Callable[..., Any]:
        def tapped(*arguments: Any, **options: Any) -> Any:
            hook(call, Path(name(*arguments)).name)
            return function(*arguments, **options)

        return tapped

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        hook(
            "fsync folder" if folder else "fsync",
            Path(os.readlink(f"/proc/self/fd/{descriptor}")).name,
        )
        real_fsync(descriptor)

    class Tapped:
        """A file whose writes are tapped."""

        def __init__(self, file: Any) -> None:
            self.file = file
            self.write = before("write", file.write, lambda *_: file.name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Tapped":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

    def tapped_open(path: Any, mode: str = "r", **options: Any) -> Any:
        if mode[0] == "r":
            return builtins.open(path, mode, **options)
        hook("open", Path(path).name)
        return Tapped(builtins.open(path, mode, **options))

    real_fsync = os.fsync
    put(os, "fsync", fsync)
    put(os, "replace", before("replace", os.replace, lambda old, new: str(new)))
    vars(storage).setdefault("open", builtins.open)
    put(storage, "open", tapped_open)


def _forked(work: Callable[[int], object]) -> tuple[int, int]:
    """A new process that does some work, given where to report; its id, and where its reports are
    read.
    """
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        try:
            work(write)
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    return process, read


def _reports(process: int, read: int) -> tuple[list[str], bool]:
    """The reports of a process until its end, and whether it was killed."""
    with os.fdopen(read) as file:
        lines = file.read().split("\n")[:-1]
    _, status = os.waitpid(process, 0)
    return lines, os.WIFSIGNALED(status)


def _found(folder: Path, reported: int) -> dict[str, Any]:
    """The files left by a process that had reported a number as saved."""
    left = temporaries(folder)
    state, path, complaints = load_newest(folder)
    best = folder / "best.pt"
    return {
        "reported": reported,
        "newest": number_of(state),
        "file": path.name,
        "complaints": complaints,
        "kept": numbers_in(folder),
        "best": number_of(load_checkpoint(best)) if best.exists() else 0,
        "temporaries": left,
    }


def killed_at_random(folder: Path, times: int) -> list[dict[str, Any]]:
    """Processes that save on and on, each killed at a random moment; the next one goes on from what
    is there.
    """
    begun = time.monotonic()
    save_up_to(folder, KEEP)
    pace = (time.monotonic() - begun) / KEEP
    chance, found = random.Random(0), []
    for _ in range(times):
        start, _, _ = load_newest(folder)

        def work(report: int, number: int = start["epoch"]) -> None:
            store = CheckpointStore(folder, KEEP)
            os.write(report, b".")
            while True:
                number += 1
                store.save(make_state(number), is_best=number % 3 == 0)
                os.write(report, f"{number}\n".encode())

        process, read = _forked(work)
        os.read(read, 1)  # it begins
        time.sleep(chance.uniform(0, 4 * pace))
        os.kill(process, signal.SIGKILL)
        lines, killed = _reports(process, read)
        assert killed, lines
        found.append(_found(folder, int(lines[-1]) if lines else start["epoch"]))
    return found


def killed_at_each_call(folder: Path) -> list[dict[str, Any]]:
    """One save, the best so far, by processes that are killed before its first call, its second,
    and so on; the last one lives.
    """
    before, number = folder / "before", 2 * KEEP
    save_up_to(before, number - 1)
    found: list[dict[str, Any]] = []
    while True:
        here = folder / str(len(found))
        shutil.copytree(before, here)

        def work(report: int, here: Path = here, last: int = len(found)) -> None:
            count = 0

            def hook(call: str, file: str) -> None:
                nonlocal count
                if count == last:
                    os.write(report, f"{call} {file}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

            tap(hook)
            store = CheckpointStore(here, KEEP)
            store.save(make_state(number), is_best=True)

        lines, killed = _reports(*_forked(work))
        assert killed or not lines, lines
        after = _found(here, number - 1 if killed else number)
        CheckpointStore(here, KEEP)
        found.append({**after, "call": lines[0] if lines else "", "left_over": temporaries(here)})
        shutil.rmtree(here)
        if not killed:
            return found


def with_a_limit_of_size(folder: Path) -> dict[str, Any]:
    """A save past the size that the system allows for a file."""
    save_up_to(folder, 2)

    def work(report: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        half = (folder / "last.pt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        store = CheckpointStore(folder, KEEP)
        store.save(make_state(3))
        os.write(report, b"saved\n")

    lines, _ = _reports(*_forked(work))
    return {**_found(folder, 2), "said": lines}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {
        "random": killed_at_random(folder / "random", 50),
        "calls": killed_at_each_call(folder / "calls"),
        "limit": with_a_limit_of_size(folder / "limit"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
