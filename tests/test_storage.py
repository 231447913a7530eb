"""Atomic writing: whatever happens during a write, the old file or the new one is there, whole."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastokd.errors import StorageError
from fastokd.storage import (
    append_line,
    format_bytes,
    remove_temporaries,
    usable_cores,
    write_atomically,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent


def test_write_replaces_the_file(tmp_path):
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


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, number, said, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    if step != "write":
        monkeypatch.setattr(os, step, refuse)
    with pytest.raises(StorageError, match=f"cannot write {path}: {said}"):
        write_atomically(
            path, refuse if step == "write" else lambda file: file.write(b"new") and None
        )
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_bug_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: 1 // 0)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_append_and_json_report_failures(tmp_path):
    with pytest.raises(StorageError, match="cannot write"):
        append_line(tmp_path, "a folder is no file")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*x\.json: "):
        write_json(tmp_path / "file" / "x.json", {})


def test_partial_line_is_removed(tmp_path):
    """A limit on the size of files stands in for a disk that is full in the middle of a line."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from fastokd.storage import"
        " append_line; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (12, 12)); append_line(Path(sys.argv[1]),"
        " 'short'); append_line(Path(sys.argv[1]), 'too long')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lines")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "StorageError: cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert (tmp_path / "lines").read_text() == "short\n"


def test_folder_flush_failure_is_reported(tmp_path, monkeypatch):
    """The file system may not know how (EINVAL), but one that fails has perhaps not kept the new
    name.
    """
    flush = os.fsync

    def refuse(descriptor, number):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, errno.EINVAL))
    write_atomically(tmp_path / "file", lambda file: file.write(b"one"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(tmp_path / "file", lambda file: file.write(b"two"))


def test_remove_temporaries_removes_nothing_else(tmp_path):
    names = [
        ".file.0123abcd",
        ".file.swp",
        ".file.pt.0123abcd",
        ".file",
        "file.1",
        ".other.0123abcd",
        "file",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    remove_temporaries(tmp_path / "missing" / "file")


def test_format_bytes_uses_binary_units():
    values = (512, 10_000, 2**20, 50 * 2**20, 1.94 * 2**30, 139.4 * 2**30)
    texts = ["0.5 KiB", "9.8 KiB", "1.0 MiB", "50 MiB", "1.9 GiB", "139 GiB"]
    assert [format_bytes(value) for value in values] == texts


def test_usable_cores_respect_affinity_and_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr("fastokd.storage.CONTROL_GROUP", tmp_path)
    assert usable_cores() == 64
    for text, cores in (("max 100000", 64), ("800000 100000", 8), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert usable_cores() == cores
