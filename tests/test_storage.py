"""Atomic writing: whatever happens during a write, the old file or the new one is there, whole."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fastokd.errors import StorageError
from fastokd.storage import append_line, write_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda file: file.write(b"one") and None)
    write_atomically(path, lambda file: file.write(b"two") and None)
    assert path.read_bytes() == b"two"
    assert [item.name for item in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_refusal_keeps_the_old_file(tmp_path, monkeypatch, number, said, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    if step != "write":
        monkeypatch.setattr(os, step, refuse)
    with pytest.raises(StorageError, match=f"cannot write {path}: {said}"):
        write_atomically(path, refuse if step == "write" else lambda file: file.write(b"new") and None)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_bug_while_writing_keeps_the_old_file_and_shows(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: 1 // 0)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_append_and_json_report_refusals(tmp_path):
    with pytest.raises(StorageError, match="cannot write"):
        append_line(tmp_path, "a folder is no file")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*x\.json: "):
        write_json(tmp_path / "file" / "x.json", {})


def test_killed_at_random_moments_the_checkpoint_always_loads(tmp_path):
    code = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from fastokd.train.checkpoint import save_checkpoint
        path = Path(sys.argv[1])
        for number in range(10**9):
            save_checkpoint(path, {
                "model": {"weight": torch.full((300_000,), float(number))}, "optimizer": {}, "criterion": {}, "epoch": number, "last": {}, "best": {},
                "best_epoch": 0, "seconds": 0.0, "classes": [], "data": {}, "config": ""})
            print(number, flush=True)
    """)
    from fastokd.train.checkpoint import load_checkpoint

    path, chance = tmp_path / "last.pt", random.Random(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        done = process.stdout.read().split()
        process.wait()
        state = load_checkpoint(path)
        assert (state["model"]["weight"] == state["epoch"]).all()
        # What it said was saved is there.
        assert not done or state["epoch"] >= int(done[-1])
