"""Cost of the compiled kernels, read from their machine code: registers, spills, vector loads,
instructions per column.

It needs neither a GPU nor torch, so tests on any machine detect a change that makes a kernel spill.
``python -m fastokd.kernels.triton.budget`` prints a table.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture, lower
from fastokd.graph.plan import Plan
from fastokd.kernels.triton import split
from fastokd.kernels.triton.kernels import KERNELS
from fastokd.kernels.triton.spec import FIRST_PASS, MAIN_PASS, NORMALIZED_PASS, Spec
from fastokd.kernels.triton.specialize import specialize
from fastokd.kernels.triton.tile import (
    VECTOR_BYTES,
    Tile,
    choose_splits,
    choose_tile,
    register_limit,
)

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
SPLIT_KERNELS = {
    "first": split.partial_kernel,
    "main": split.partial_kernel,
    "normalized": split.partial_kernel,
    "merge": split.merge_kernel,
    "columns": split.columns_kernel,
    "weights": split.weights_kernel,
}
"""Kernels for split rows: the three passes, the merge, and the two parts of the backward pass."""
PASSES = {"first": FIRST_PASS, "main": MAIN_PASS, "normalized": NORMALIZED_PASS}


@dataclass(frozen=True)
class Cost:
    """Cost of one compiled kernel.

    Counts per column are those of the first loop over whole chunks, or of the whole kernel if a row
    is a single chunk. A column is one class in all M rows. In a forward kernel, the loop that
    computes exact maxima follows and is not counted: few rows need it.
    """

    registers: int
    stack: int
    spills: int
    vector_loads: int
    vector_stores: int
    barriers: int
    shuffles: int
    instructions: int
    loop_instructions: int
    per_column: float
    exponentials_per_column: float


def cascade(num_branches: int, lambda_self: float = 0.0) -> Plan:
    """Return AHBF's plan for M branches: 2 (M - 1) KL edges, or 3 (M - 1) with ``lambda_self``."""
    branches = [f"branch{m}" for m in range(num_branches)]
    tas = ["branch0"] + [f"ta{m}" for m in range(1, num_branches)]
    nodes: list[Logits | Mixture] = [Logits(name) for name in branches]
    terms: list[CrossEntropy | KL] = [CrossEntropy(name) for name in (*branches, *tas[1:])]
    for m in range(1, num_branches):
        nodes.append(Mixture(tas[m], (branches[m], tas[m - 1]), f"scores{m}"))
        terms += [KL(tas[m], tas[m - 1], 4.0, 3.0), KL(branches[m], tas[m - 1], 2.0, 3.0)]
        if lambda_self:
            terms.append(KL(tas[m], branches[m], lambda_self, 3.0))
    return lower(Graph("cascade", tuple(nodes), tuple(terms)))


def launch_tile(
    plan: Plan,
    batch: int,
    num_classes: int,
    dtype: str,
    stride: int = 0,
    soft_target: bool = False,
    forward_backward: bool = False,
) -> Tile:
    """Return the executor's tile for rows of this stride (0: contiguous) if all gradients are
    needed.
    """
    spec, size = specialize(plan), SIZES[dtype]
    stride = stride or num_classes
    aligned = stride * size % VECTOR_BYTES == 0
    rows, lanes, pieces, vector, warps = choose_tile(
        batch,
        num_classes,
        size,
        spec.num_nodes,
        aligned,
        forward_backward and choose_splits(batch, num_classes) == 1,
    )
    return Tile(
        num_classes,
        rows,
        lanes,
        pieces,
        vector,
        warps,
        choose_splits(batch, num_classes),
        logit_strides=((stride, 1),) * plan.num_logits,
        weight_strides=tuple((width, 1) for width in plan.weight_widths),
        external_strides=((num_classes, 1),) * plan.num_externals,
        target_strides=(num_classes, 1) if soft_target else (1,),
        grad_stride=1,
        needs=(1,) * (plan.num_logits + len(plan.weight_widths)),
        double=int(dtype == "fp64"),
        hardware=int(dtype != "fp64"),
    )


def compile_kernel(which: str, plan: Plan, tile: Tile, dtype: str, capability: int = 90) -> Any:
    """Compile one of ``KERNELS`` (``SPLIT_KERNELS`` if the tile splits rows) for a compute
    capability such as 90. Needs no GPU.
    """
    spec: Spec = specialize(plan)
    compute = "*fp64" if tile.double else "*fp32"
    logits, weights = (f"*{dtype}",) * plan.num_logits, (compute,) * len(plan.weight_widths)
    types: dict[str, str | tuple[str, ...]] = {
        "logits": logits,
        "grad_logits": logits,
        "weights": weights,
        "grad_weights": weights,
        "externals": (compute,) * plan.num_externals,
        "target": "*i64" if len(tile.target_strides) == 1 else compute,
        "batch": "i32",
        "shift": "i32",
        "PASS": "constexpr",
        "SPEC": "constexpr",
        "TILE": "constexpr",
    }
    kernel = (SPLIT_KERNELS if tile.splits > 1 else KERNELS)[which]
    signature: dict[str, str | tuple[str, ...]] = {
        name: types.get(name, compute) for name in kernel.arg_names
    }
    attributes: dict[tuple[int, ...], list[list[str | int]]] = {}
    for position, value in enumerate(signature.values()):
        if isinstance(value, tuple):
            attributes.update({(position, k): [["tt.divisibility", 16]] for k in range(len(value))})
        elif value.startswith("*"):
            attributes[position,] = [["tt.divisibility", 16]]
    values = {"PASS": PASSES.get(which), "SPEC": spec, "TILE": tile}
    constants = {
        (position,): values[name]
        for position, name in enumerate(kernel.arg_names)
        if name in values
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": 1 if which in ("merge", "weights") else tile.num_warps,
            "enable_fp_fusion": True,
            "maxnreg": register_limit(which, spec.num_nodes),
        },
    )


def measure(compiled: Any, tile: Tile) -> Cost:
    """Return a compiled kernel's cost, from its cubin and PTX."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        listing = _run(tools / "nvdisasm", "-c", file.name)
    ptx = compiled.asm["ptx"]
    code, loops = _instructions(listing)
    body = loops[0] if tile.whole > 1 and loops else (0, len(code))
    inside = code[body[0] : body[1]]
    columns = tile.pieces if tile.whole else tile.rest_pieces
    return Cost(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spills=sum(op.startswith(("LDL", "STL")) for op in code),
        vector_loads=len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", ptx)),
        vector_stores=len(
            re.findall(r"st\.global[\w.:]*\.v4\.b32|st\.global[\w.:]*\.v2\.b64", ptx)
        ),
        barriers=sum(op.startswith("BAR.SYNC") for op in code),
        shuffles=sum(op.startswith("SHFL") for op in code),
        instructions=len(code),
        loop_instructions=len(inside),
        per_column=len(inside) / columns,
        exponentials_per_column=sum(op.startswith("MUFU.EX2") for op in inside) / columns,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in the output of cuobjdump"
    return int(found[1])


def _run(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def _instructions(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the operations of a disassembly without padding, and its loops as (first, end)
    positions.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if not found or found[1] == "NOP":
            continue
        target = re.search(r"`\((\.L_x_\d+)\)", found[2])
        if found[1].startswith("BRA") and target:
            branches.append((len(code), target[1]))
        code.append(found[1])
    # The code ends with a branch to itself, which is not a loop.
    loops = [
        (labels[name], position + 1)
        for position, name in branches
        if labels.get(name, position) < position
    ]
    return code, loops


def main(argv: Sequence[str] | None = None) -> int:
    """Print the costs of AHBF's kernels; the exit code is 1 if one spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--branches", type=int, nargs="+", default=[4])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000, 1001, 21841])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(SIZES))
    parser.add_argument("--capabilities", type=int, nargs="+", default=[90])
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=[*KERNELS, "main", "merge", "columns", "weights"],
        choices=[*KERNELS, *SPLIT_KERNELS],
        help="print those that run for each batch size and class count",
    )
    parser.add_argument(
        "--lambda-self", type=float, default=0.0, help="above 0: AHBF with 3 (M - 1) edges"
    )
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}")
    print(
        "kernel            sm   M  dtype  B     C      tile            regs  spill  ld16  st16 "
        "  bar  shfl  instr  instr/col  ex2/col"
    )
    spilled = False
    for capability, branches, dtype, batch, num_classes in itertools.product(
        args.capabilities, args.branches, args.dtypes, args.batches, args.classes
    ):
        plan = cascade(branches, args.lambda_self)
        split_rows = choose_splits(batch, num_classes) > 1
        for which in args.kernels:
            if which not in (SPLIT_KERNELS if split_rows else KERNELS):
                continue
            tile = launch_tile(
                plan, batch, num_classes, dtype, forward_backward=which == "forward_backward"
            )
            cost = measure(compile_kernel(which, plan, tile, dtype, capability), tile)
            spilled |= cost.stack + cost.spills > 0
            head = f"{which:16}  {capability:3}  {branches}  {dtype:5}  {batch:4}  {num_classes:6}"
            print(f"{head}  {_columns(tile, cost)}", flush=True)
    return int(spilled)


def _columns(tile: Tile, cost: Cost) -> str:
    vector = "v" if tile.vector else ""
    splits = f"/{tile.splits}" if tile.splits > 1 else ""
    layout = f"{tile.rows}x{tile.lanes}x{tile.pieces}{vector}{splits}"
    return (
        f"{layout:14}  {cost.registers:4}  {cost.spills:5}  {cost.vector_loads:4} "
        f" {cost.vector_stores:4}  {cost.barriers:3}  {cost.shuffles:4}  {cost.instructions:5} "
        f" {cost.per_column:9.1f}  {cost.exponentials_per_column:7.2f}"
    )


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
