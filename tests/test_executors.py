"""Every executor on every published graph, and on random graphs."""

import os
import subprocess
import sys
from pathlib import Path

import executor_properties
import opaque_executor
import pytest
import triton_state

from fastokd.ops.executors import executor_states

HERE = Path(__file__).resolve().parent
STATE = executor_states()["cpu"]
INTERPRETER = triton_state.interpreter_unavailable()
WANTED = 300
INTERPRETED = 50
"""Random graphs for Triton's interpreter, which takes a second for four; all are in the grid, and
there the catalog has each of its graphs in every shape instead of one."""


@pytest.mark.skipif(STATE is not None, reason=f"the cpu executor cannot run: {STATE}")
def test_cpu_on_catalog_matches_reference():
    shapes = executor_properties.CATALOG_SHAPES + executor_properties.MORE_SHAPES
    assert executor_properties.check_catalog("cpu", shapes=shapes) >= 48 * 10


@pytest.mark.skipif(STATE is not None, reason=f"the cpu executor cannot run: {STATE}")
def test_cpu_on_random_graphs_matches_reference():
    assert executor_properties.check_random("cpu", WANTED) == WANTED


def test_operator_on_random_graphs_matches_reference():
    assert executor_properties.check_random(opaque_executor.register(), WANTED) == WANTED


@pytest.mark.skipif(INTERPRETER is not None, reason=str(INTERPRETER))
@pytest.mark.parametrize("wanted", [INTERPRETED, pytest.param(WANTED, marks=pytest.mark.grid)])
def test_triton_interpreter_matches_reference(wanted):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
    }
    arguments = f"{wanted}, every_shape={wanted == WANTED}"
    code = f"import executor_properties; executor_properties.main({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    catalog, random = map(int, done.stdout.split())
    assert catalog >= 48 * (1 if wanted == INTERPRETED else 3)
    assert random == wanted
