"""Every suite runs from end to end, with tiny sizes, and what it writes is what the report reads:
no typo ends an hour of measuring.
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.images import compose
from bench.suite_tables import (
    data_tables,
    gate_table,
    loss_table,
    method_table,
    speedups,
    start_table,
    step_table,
    term_table,
)
from fastokd.graph import DIVERGENCES
from fastokd.methods import list_methods

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

ROOT = Path(__file__).resolve().parent.parent
SUITES = sorted(path.name for path in (ROOT / "bench").glob("bench_*.py"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The result file of all suites together, and what pytest said."""
    folder = tmp_path_factory.mktemp("suites")
    pictures = compose(folder / "images", 10)
    path = folder / "results.json"
    variables = {
        "FASTOKD_BENCH_SMOKE": "1",
        "FASTOKD_BENCH_SMALL": str(pictures),
        "FASTOKD_BENCH_LARGE_IMAGES": str(pictures),
        "OMP_NUM_THREADS": "1",
    }
    # As a worker of these tests pytest-benchmark would write nothing.
    surroundings = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-p",
            "no:cacheprovider",
            "--benchmark-quiet",
            f"--benchmark-json={path}",
            *(f"bench/{name}" for name in SUITES),
        ],
        cwd=ROOT,
        env={**surroundings, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return path, done.stdout


def test_every_suite_runs_except_for_missing_packages(results):
    _, said = results
    for name in SUITES:
        assert re.search(rf"^bench/{name}::.* PASSED", said, re.MULTILINE), name
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)", said, re.MULTILINE)
    assert all("install" in reason or "cannot run" in reason for reason in reasons), reasons


def test_report_reads_suite_results(results, monkeypatch):
    path, said = results
    monkeypatch.setattr("bench.suite_tables.ROOT", path.parent)
    assert [line.split(" | ")[0] for line in method_table(path)[5:-1]] == [
        f"| {name}" for name in list_methods()
    ]
    assert [line.split(" | ")[1] for line in loss_table(path)[5:-1]] == [
        "forward",
        "forward+backward",
    ]
    assert (
        all(row["eager"] > 0 < row["compiled"] for row in speedups(path)["rows"])
        or "cannot run" in said
    )
    assert [line.split(" | ")[0] for line in term_table(path)[5:-1]] == [
        f"| {name}" for name in (*DIVERGENCES, "standardized kl", "standardized dkd")
    ]
    assert [line.split(" | ")[0] for line in gate_table(path)[5:-1]] == [
        "| ahbf",
        "| one",
        "| okddip",
    ]
    assert [line.split(" | ")[-1] for line in step_table(path)[5:6]] == ["1.00 |"]
    starts = start_table(path)
    assert (
        next(line for line in starts if line.startswith("| `import fastokd` ")).split(" | ")[3]
        == "`python -c pass`"
    )
    assert any(line.startswith("| 64 x 64 | torchvision | 0 |") for line in data_tables(path))


def test_results_file_has_command_without_paths(results):
    path, _ = results
    text = path.read_text()
    assert json.loads(text)["machine_info"]["command"].startswith(
        "FASTOKD_BENCH_LARGE_IMAGES=images FASTOKD_BENCH_SMALL=images FASTOKD_BENCH_SMOKE=1"
        " OMP_NUM_THREADS=1 python"
    )
    assert f'"{platform.node()}"' not in text


def test_make_bench_measures_every_suite():
    target = (
        (ROOT / "Makefile")
        .read_text(encoding="utf-8")
        .partition("\nbench:")[2]
        .partition("\nlint:")[0]
    )
    assert [name for name in SUITES if f"bench/{name}" not in target] == []
