"""Start-up times: imports, commands without training, and a first loss, each in a new
process.

    pytest bench/bench_start.py --benchmark-columns=min,median,rounds

The interpreter, torch and torch's own loss are measured for comparison. Times are of
whole processes, on the CPU, with their files in the system's cache.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.suite import rounds

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

ROOT = Path(__file__).resolve().parent.parent
_LOGITS = (
    "import torch; z = torch.randn(2, 128, 100, requires_grad=True); y = torch.randint(100,"
    " (128,)); "
)
_FIRST = "from fastokd.losses import DMLLoss; DMLLoss(2, impl='{}')(z, y).backward()"
CASES: dict[str, tuple[list[str], str | None]] = {
    "python -c pass": (["-c", "pass"], None),
    "import fastokd": (["-c", "import fastokd"], "python -c pass"),
    "fastokd --version": (["-m", "fastokd", "--version"], "python -c pass"),
    "fastokd --help": (["-m", "fastokd", "--help"], "python -c pass"),
    "import torch": (["-c", "import torch"], None),
    "import fastokd.losses": (["-c", "import fastokd.losses"], "import torch"),
    "first loss and backward, torch": (
        [
            "-c",
            _LOGITS + "(torch.nn.functional.cross_entropy(z[0], y) +"
            " torch.nn.functional.cross_entropy(z[1], y)).backward()",
        ],
        None,
    ),
    "first loss and backward, impl='reference'": (
        ["-c", _LOGITS + _FIRST.format("reference")],
        "first loss and backward, torch",
    ),
    "first loss and backward, impl='auto'": (
        ["-c", _LOGITS + _FIRST.format("auto")],
        "first loss and backward, torch",
    ),
}
"""Arguments of the interpreter, and the case that each is to be compared with."""


@pytest.mark.parametrize("case", CASES)
def test_process(benchmark: Any, case: str) -> None:
    arguments, baseline = CASES[case]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> None:
        subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, check=True
        )

    benchmark.extra_info.update(case=case, baseline=baseline)
    benchmark.pedantic(start, **rounds(9))
