"""The tests that need a GPU, in a few groups, each in processes of its own that are ended when they take too long."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.part import Context, Part, Row
from bench.gpu.results import ROOT, Results

ALONE = ("test_triton_gpu.py", "test_step_gpu.py")
"""Files that are a group of their own, and come first: the kernels, then the step; the others are one group."""
LIMIT_SECONDS = 300.0
"""Of one group. A test that hangs must not eat the minutes of the others."""
COUNTED = ("passed", "failed", "errors", "skipped")
"""The kinds of outcomes."""
_HANG_SECONDS = 60
"""After which pytest says where a test stands."""
_PATIENCE_SECONDS = 15.0
"""Between interrupting pytest and killing it."""
_MESSAGE = 600
"""Characters of a failure's message that are kept; the rest is to be had by running that test."""


def gpu_files() -> list[str]:
    """The files with tests that are marked ``gpu``."""
    return [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def run_files(files: Sequence[str], seconds: float, extra: Sequence[str] = (), mark: str = "gpu") -> dict[str, Any]:
    """Run the marked tests of some files.

    Args:
        files: paths.
        seconds: after which its processes are ended.
        extra: further arguments of pytest.
        mark: the expression that chooses the tests.

    Returns:
        How many passed, failed and so on, the beginning and the end of every failure's message, whether it was ended, and the
        end of what was printed where something went wrong.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={_HANG_SECONDS}",
                   "-m", mark, f"--junitxml={report}", *files, *extra]
        # A session of its own: what the tests start is ended with them.
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        ended = ""
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            ended, output = f"ended after {seconds:.0f} s", _end(process)
        except BaseException:
            _end(process)
            raise
        found: dict[str, Any] = {"files": list(files), "returncode": process.returncode, "seconds": round(time.monotonic() - started, 1)}
        found |= _outcomes(report) if report.is_file() else {**dict.fromkeys(COUNTED, 0), "failures": []}
        ended = ended or ("" if report.is_file() else "pytest ended without a report")
    if process.returncode not in (0, 5):  # 5: there are no such tests
        found["output"] = output[-4000:]
    return {**found, "ended": ended} if ended else found


def _end(process: subprocess.Popen[str]) -> str:
    """End a process with all that it started; what it had printed.

    Interrupted, pytest still reports what had run, unless it is within a call that does not return.
    """
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_PATIENCE_SECONDS)  # and not wait, which a full pipe would keep from ending
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def _outcomes(report: Path) -> dict[str, Any]:
    """What a JUnit report says."""
    counts = dict.fromkeys(COUNTED, 0)
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = {"failed": case.find("failure"), "errors": case.find("error"), "skipped": case.find("skipped")}
        kind = next((name for name, element in bad.items() if element is not None), "passed")
        counts[kind] += 1
        if kind in ("failed", "errors"):
            element = bad[kind]
            text = (element.get("message") or "") + "\n" + (element.text or "")
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "message": text.strip()[:_MESSAGE], "end": text.strip()[-_MESSAGE:]})
    return {**counts, "failures": failures}


def _rows(context: Context, results: Results) -> Iterator[Row]:
    files = gpu_files()
    groups = {"all": files} if context.dry else {**{name: [name] for name in ALONE}, "the others": [name for name in files if name not in ALONE]}
    # Most of the time goes into compiling kernels, which one process does one after the other; nothing here is timed.
    workers = min(12, (os.cpu_count() or 1) * 3 // 4)
    extra = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    for name, group in groups.items():
        def measure(paths: Sequence[str] = [f"tests/{file}" for file in group]) -> dict[str, Any]:
            seconds = max(10.0, min(LIMIT_SECONDS, 60 * context.minutes_left()))
            return run_files(paths, seconds, ["--collect-only"] if context.dry else extra)
        yield Row(name, context.needs(1.0), measure)


def _line(row: dict[str, Any]) -> str:
    words = [f"{row[kind]} {kind}" for kind in COUNTED if row[kind]]
    tests = [failure["test"] for failure in row["failures"]]
    return ", ".join([*words, *([row["ended"]] if "ended" in row else []), *tests[:5]]) or "nothing ran"


PART = Part("tests", 1.0, _rows, _line)
