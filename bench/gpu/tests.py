"""The tests that need a GPU, in a few groups, each in separate processes that are ended when they
take too long.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import recorder
from bench.gpu.part import Context, Part, Row
from bench.gpu.results import ROOT, Results

_PUBLISHED, _RANDOM = "every_published_graph", "random_graphs"
ALONE = {
    "kernels, published graphs": ("test_triton_gpu.py", _PUBLISHED),
    "kernels, random graphs": ("test_triton_gpu.py", _RANDOM),
    "kernels, others": ("test_triton_gpu.py", f"not {_PUBLISHED} and not {_RANDOM}"),
    "step": ("test_step_gpu.py", ""),
}
"""Groups that run first: a file, and the names of its tests for pytest's ``-k``. Compiling all
kernels takes longer than a group may take. The remaining files are one group.
"""
LIMIT_SECONDS = 300.0
"""Of one group. A test that hangs must not eat the minutes of the others."""
COUNTED = ("passed", "failed", "errors", "skipped")
"""The kinds of outcomes."""
_HANG_SECONDS = 60
"""After which pytest says where a test stands."""


def gpu_files() -> list[str]:
    """The files with tests that are marked ``gpu``."""
    return [
        path.name
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]


def run_files(files: Sequence[str], seconds: float, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Run the marked tests of some files.

    Args:
        files: paths.
        seconds: after which all their processes are killed.
        extra: further arguments of pytest.

    Returns:
        The counts of outcomes and the message of each failure; after a failure also the reason
        (``partial``), the unfinished tests, and the end of the output.
    """
    started, killed = time.monotonic(), False
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        options = (
            "-v --tb=short --continue-on-collection-errors -m gpu -p no:cacheprovider"
            f" -p {recorder.__name__} -o faulthandler_timeout={_HANG_SECONDS}"
        )
        command = [sys.executable, "-m", "pytest", *options.split(), *files, *extra]
        # A new session, so that processes started by tests are killed with them. Variables of
        # pytest-xdist are removed: this is not one of its workers.
        surroundings = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")
        }
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**surroundings, recorder.VARIABLE: str(outcomes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            killed, output = True, _kill(process)
        except BaseException:
            _kill(process)
            raise
        lines = [
            json.loads(line)
            for line in outcomes.read_text(encoding="utf-8").splitlines()
            if line.endswith("}")
        ]
    found: dict[str, Any] = {
        "files": list(files),
        "returncode": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        **_outcomes(lines),
    }
    wrong = [f"{found[kind]} {kind}" for kind in ("failed", "errors") if found[kind]]
    if killed:
        wrong.append(f"killed after {seconds:.0f} s")
    elif process.returncode not in (0, 1, 5) or (
        process.returncode == 1 and not wrong
    ):  # 5: there are no such tests
        wrong.append(f"pytest ended with {process.returncode}")
    if wrong:
        found |= {"partial": ", ".join(wrong), "output": output[-4000:]}
    return found


def _kill(process: subprocess.Popen[str]) -> str:
    """Kill a process with all that it started; what it had printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def _outcomes(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcomes that the recorder wrote."""
    ended = {line["ended"] for line in lines if "ended" in line}
    found: dict[str, Any] = {
        kind: sum(line.get("outcome") == kind for line in lines) for kind in COUNTED
    }
    failures = [
        {"test": line["ended"], "message": line["message"], "end": line["end"]}
        for line in lines
        if "message" in line
    ]
    return found | {
        "failures": failures,
        "unfinished": [
            line["begun"] for line in lines if "begun" in line and line["begun"] not in ended
        ],
    }


def _rows(context: Context, results: Results) -> Iterator[Row]:
    files = gpu_files()
    first = {file for file, _ in ALONE.values()}
    others = {"others": ([file for file in files if file not in first], "")}
    groups = {name: ([file], selected) for name, (file, selected) in ALONE.items()} | others
    if context.dry:
        groups = {"all": (files, "")}
    # Most of the time goes into compiling kernels, which one process does one after the other;
    # nothing here is timed.
    workers = min(12, (os.cpu_count() or 1) * 3 // 4)
    extra = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    for name, (group, selected) in groups.items():
        options = ["--collect-only"] if context.dry else extra + ["-k", selected] * bool(selected)

        def measure(
            paths: Sequence[str] = [f"tests/{file}" for file in group],
            options: Sequence[str] = options,
        ) -> dict[str, Any]:
            seconds = max(10.0, min(LIMIT_SECONDS, 60 * context.minutes_left()))
            return run_files(paths, seconds, options)

        yield Row(name, context.needs(1.0), measure)


def _line(row: dict[str, Any]) -> str:
    words = [f"{row[kind]} {kind}" for kind in COUNTED if row[kind]]
    tests = [failure["test"] for failure in row["failures"]]
    return (
        ", ".join([*words, *([row["partial"]] if "partial" in row else []), *tests[:5]])
        or "nothing ran"
    )


def _refusal(context: Context) -> str | None:
    return (
        None
        if importlib.util.find_spec("pytest")
        else "pytest is not installed: pip install pytest"
    )


PART = Part("tests", 1.0, _rows, _line, _refusal, sources=("tests",))
