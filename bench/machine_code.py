"""Cost of the compiled kernels, as a result file: ``python -m bench.machine_code``.

Compiles AHBF's kernels for three generations of GPUs and writes the counts from their machine code
to ``bench/results/machine-code.json``. It needs Triton but no GPU, and measures no time.
``tests/test_triton_budget.py`` checks the same numbers against budgets, with the same code
(``fastokd.kernels.triton.budget``).
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.suite import SIZES
from fastokd.graph import lower
from fastokd.graph.plan import Plan
from fastokd.methods.ahbf import PRESETS, ahbf_graph
from fastokd.storage import write_json
from fastokd.train.run_folder import environment

PATH = Path(__file__).resolve().parent / "results" / "machine-code.json"
KERNELS = ("forward", "backward", "forward_backward")
VARIANTS = (
    (4, "paper", "bf16", tuple(SIZES), (80, 90, 100)),
    (4, "paper", "fp32", tuple(SIZES), (90,)),
    (4, "code", "bf16", tuple(SIZES), (90,)),
    (2, "paper", "bf16", ((1024, 1000),), (90,)),
    (8, "paper", "bf16", ((1024, 1000),), (90,)),
)
"""Branches, preset, dtype, sizes (B, C), and compute capabilities."""


@cache  # batches that share a tile share its kernel
def _cost(which: str, plan: Plan, tile: Any, dtype: str, capability: int) -> dict[str, Any]:
    from fastokd.kernels.triton.budget import compile_kernel, measure

    return dataclasses.asdict(measure(compile_kernel(which, plan, tile, dtype, capability), tile))


def row(
    which: str,
    branches: int,
    preset: str,
    dtype: str,
    batch: int,
    num_classes: int,
    capability: int,
) -> dict[str, Any]:
    """Return one row of the file: a kernel's case, its tile, and its ``Cost``."""
    from fastokd.kernels.triton.budget import launch_tile

    plan = lower(ahbf_graph(branches, **PRESETS[preset]))
    tile = launch_tile(
        plan, batch, num_classes, dtype, forward_backward=which == "forward_backward"
    )
    assert tile.splits == 1, "rows of these sizes are not split"
    return {
        "kernel": which,
        "branches": branches,
        "preset": preset,
        "dtype": dtype,
        "batch": batch,
        "num_classes": num_classes,
        "capability": capability,
        "rows": tile.rows,
        "num_warps": tile.num_warps,
        "pieces": tile.pieces,
        "whole": tile.whole,
        "rest_pieces": tile.rest_pieces if tile.rest else 0,
        **_cost(which, plan, tile, dtype, capability),
    }


def all_rows() -> Iterator[dict[str, Any]]:
    """Compile and yield every row of the file."""
    for branches, preset, dtype, sizes, capabilities in VARIANTS:
        for batch, num_classes in sizes:
            for which in KERNELS:
                for capability in capabilities:
                    yield row(which, branches, preset, dtype, batch, num_classes, capability)


def main(arguments: list[str]) -> int:
    """Write the file and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.machine_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=PATH, help="output file (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        import triton  # noqa: F401
    except ImportError:
        print("bench.machine_code: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    about, rows = environment(torch.device("cpu")), []
    for found in all_rows():
        rows.append(found)
        print(
            f"{found['branches']} branches, {found['preset']}, {found['dtype']}, {found['batch']} x"
            f" {found['num_classes']}, {found['kernel']}, sm_{found['capability']}:"
            f" {found['registers']} registers, {found['per_column']:.1f} instructions a column",
            flush=True,
        )
    write_json(
        options.out,
        {**{name: about[name] for name in ("triton", "commit", "command")}, "rows": rows},
    )
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main(sys.argv[1:]))
