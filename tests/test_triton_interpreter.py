"""Runs ``triton_numerics.py`` under Triton's interpreter, which a process must choose before it
imports Triton.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_state

HERE = Path(__file__).resolve().parent
REASON = triton_state.interpreter_unavailable()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("cases", ["not grid", pytest.param("grid", marks=pytest.mark.grid)])
def test_numerics_in_interpreter_pass(cases: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        cases,
        str(HERE / "triton_numerics.py"),
    ]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_numpy_incompatible_with_interpreter_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "interpreter.py").write_text("lambda self: int(self.handle.data)")
    spec = importlib.util.spec_from_file_location("triton", tmp_path / "__init__.py")
    monkeypatch.setattr(triton_state.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(triton_state.importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(triton_state.numpy, "__version__", "2.5.2")
    assert "Triton 3.6.0 fails with numpy 2.5.2" in str(triton_state.interpreter_unavailable())
    monkeypatch.setattr(triton_state.numpy, "__version__", "2.4.6")
    assert triton_state.interpreter_unavailable() is None
