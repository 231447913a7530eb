"""A roofline model of the kernels' times: ``python -m bench.roofline --chip h200``.

It predicts the time of each kernel on a chip, and the limit that binds, from the machine code
(``bench/results/machine-code.json``) and the bytes that must move. The numbers are predictions, not
measurements:

- **memory**: each logit is read once and each gradient written once, at ``MEMORY_SHARE`` of the
  chip's bandwidth. Caches are ignored, which is pessimistic if the logits fit into the L2 cache.
- **issue**: a warp runs every instruction of its kernel once, and the loop over whole chunks once
  per chunk. (This includes the second pass for rows whose maxima were estimated too low, which
  rarely runs.) Each of a multiprocessor's four schedulers issues one instruction per cycle, in
  ``BUSY_SHARE`` of the cycles. With fewer warps than schedulers, some schedulers idle. Waiting for
  results is ignored, so a few warps take longer than predicted.
- **exponentials**: the special-function units of a multiprocessor process 16 lanes per cycle, in
  the same share of the cycles.
- **launch**: the time of the smallest kernel in a CUDA graph (``LAUNCH``), added to the largest of
  the others.

The three constants are assumptions about kernels that stream memory.

For a whole training step it predicts only a lower limit, on one stream: the launches of the kernels
that were counted (``tests/kernel_counts.json``), each of which takes at least ``LAUNCH``.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine_code import PATH
from bench.suite import SIZES
from fastokd.errors import ConfigError, did_you_mean

COUNTS = Path(__file__).resolve().parent.parent / "tests" / "kernel_counts.json"
MEMORY_SHARE, BUSY_SHARE, LAUNCH = 0.9, 0.75, 2.2e-6
_SCHEDULERS = 4
"""Schedulers of a multiprocessor; each issues one instruction of a warp per cycle (CUDA C++
Programming Guide, compute capabilities).
"""
_SPECIAL_LANES = 16
"""Results of special functions per cycle and multiprocessor (the same guide, table of arithmetic
throughput: 8.0, 9.0 and 10.0).
"""
_WARP = 32
ITEMSIZE = {"bf16": 2, "fp32": 4}
_LONG_NAME = {"bf16": "bfloat16", "fp32": "float32"}
BRANCHES, PRESET = 4, "paper"
"""The predicted kernels. The preset ``code`` takes another pass over a row, which the counts in the
file do not separate.
"""
PASSES = ("forward", "backward", "forward_backward")


@dataclass(frozen=True)
class Chip:
    """Data sheet of a GPU.

    Attributes:
        title: its name.
        device: how PyTorch names it.
        capability: compute capability, 10 times.
        multiprocessors: number of them.
        clock: boost clock in Hz.
        bandwidth: of its memory, in bytes per second.
        source: where the numbers are from.
    """

    title: str
    device: str
    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float
    source: str


CHIPS = {
    "a100": Chip(
        "A100 SXM 80 GB",
        "NVIDIA A100-SXM4-80GB",
        80,
        108,
        1.41e9,
        2.039e12,
        "NVIDIA A100 data sheet and architecture white paper",
    ),
    "h100": Chip(
        "H100 SXM",
        "NVIDIA H100 80GB HBM3",
        90,
        132,
        1.98e9,
        3.35e12,
        "NVIDIA H100 data sheet; the clock from its 67 TFLOPS of float32",
    ),
    "h200": Chip(
        "H200 SXM",
        "NVIDIA H200",
        90,
        132,
        1.98e9,
        4.8e12,
        "NVIDIA H200 data sheet; the clock from its 67 TFLOPS of float32",
    ),
    "b200": Chip(
        "B200 SXM",
        "NVIDIA B200",
        100,
        148,
        1.98e9,
        7.7e12,
        "NVIDIA HGX B200 data sheet: 62 TB/s and 600 TFLOPS of float32 for eight",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one kernel by limit."""

    memory: float
    issue: float
    exponentials: float

    @property
    def seconds(self) -> float:
        """The launch plus the slowest of the other limits."""
        return LAUNCH + max(self.memory, self.issue, self.exponentials)

    @property
    def limit(self) -> str:
        """The slowest of launch, memory, issue and exponentials."""
        times = {
            "launch": LAUNCH,
            "memory": self.memory,
            "issue": self.issue,
            "exponentials": self.exponentials,
        }
        return max(times, key=lambda name: times[name])


def columns_of_a_thread(code: Mapping[str, Any]) -> int:
    """Return the number of a row's columns per thread, in whole chunks and the last."""
    return code["whole"] * code["pieces"] + code["rest_pieces"]


def exponentials_per_column(code: Mapping[str, Any]) -> float:
    """Return the exponentials per column in the loop over whole chunks, or in the whole kernel if
    it has no loop; for that, ``Cost`` divides by the columns of one chunk.
    """
    if code["whole"] > 1:
        return code["exponentials_per_column"]
    return (
        code["exponentials_per_column"]
        * (code["pieces"] if code["whole"] else code["rest_pieces"])
        / columns_of_a_thread(code)
    )


def predict(
    chip: Chip, code: Mapping[str, Any], backward: Mapping[str, Any] | None = None
) -> Prediction:
    """Predict the time of one kernel.

    Args:
        chip: the GPU.
        code: the kernel's row of the machine-code file.
        backward: for the forward_backward kernel the row of the backward kernel, whose loop over
            chunks is its second.
    """
    loops = [code] if backward is None else [code, backward]
    warps = -(-code["batch"] // code["rows"]) * code["num_warps"]
    again = max(code["whole"] - 1, 0)
    instructions = code["instructions"] + again * sum(loop["loop_instructions"] for loop in loops)
    exponentials = (
        exponentials_per_column(code)
        * columns_of_a_thread(code)
        * (len(loops) if code["whole"] > 1 else 1)
    )
    busy = min(warps, _SCHEDULERS * chip.multiprocessors) * chip.clock * BUSY_SHARE
    moved = (
        code["branches"]
        * code["batch"]
        * code["num_classes"]
        * ITEMSIZE[code["dtype"]]
        * (1 if code["kernel"] == "forward" else 2)
    )
    return Prediction(
        moved / (chip.bandwidth * MEMORY_SHARE),
        warps * instructions / busy,
        warps * exponentials * _SCHEDULERS * _WARP / _SPECIAL_LANES / busy,
    )


def predictions(
    found: Mapping[str, Any], chip: Chip, dtype: str = "bf16"
) -> Iterator[tuple[tuple[int, int], str, Prediction]]:
    """Yield size (B, C), pass and prediction of every kernel of four branches that the machine-code
    file has for this chip.
    """
    rows = {
        (row["batch"], row["num_classes"], row["kernel"]): row
        for row in found["rows"]
        if (row["branches"], row["preset"], row["dtype"], row["capability"])
        == (BRANCHES, PRESET, dtype, chip.capability)
    }
    for size in SIZES:
        for which in PASSES:
            if (code := rows.get((*size, which))) is not None:
                backward = rows[*size, "backward"] if which == "forward_backward" else None
                yield (size, which, predict(chip, code, backward))


def measured(
    folder: Path, chip: Chip, dtype: str = "bf16"
) -> dict[tuple[tuple[int, int], str], float]:
    """Return the measured seconds by size and pass of the same kernels in a CUDA graph, from result
    files of ``bench.gpu kernels`` on this chip.
    """
    found = {}
    for path in sorted(folder.glob("kernels-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"] if result["environment"]["device"] == chip.device else ():
            if (row.get("loss"), row.get("preset"), row.get("dtype")) == (
                "ahbf",
                PRESET,
                _LONG_NAME[dtype],
            ):
                for which, case in (
                    ("forward", "kernel alone graph/forward"),
                    ("forward_backward", "kernel alone graph/both"),
                ):
                    if row.get(case) is not None:
                        found[(row["batch"], row["num_classes"]), which] = row[case]
    return found


def launch_bound_steps() -> Iterator[tuple[str, int, float]]:
    """Yield name, number of kernels and the seconds of their launches for the compiled steps with
    counted kernels.
    """
    cases = json.loads(COUNTS.read_text(encoding="utf-8"))["cases"]
    for name, phases in cases.items():
        if name.endswith(", compiled"):
            kernels = sum(phases.values())
            yield name.removesuffix(", compiled"), kernels, kernels * LAUNCH


def get_chip(name: str) -> Chip:
    """Return the chip of that name.

    Raises:
        ConfigError: the name is unknown; the message suggests the closest one.
    """
    if name not in CHIPS:
        raise ConfigError(f"unknown chip '{name}'{did_you_mean(name, CHIPS)}")
    return CHIPS[name]


def main(arguments: Sequence[str]) -> int:
    """Print the predictions and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", default="h200", help=f"one of {', '.join(CHIPS)} (default: h200)")
    parser.add_argument("--dtype", default="bf16", choices=list(ITEMSIZE))
    options = parser.parse_args(arguments)
    try:
        chip = get_chip(options.chip)
    except ConfigError as error:
        print(f"bench.roofline: {error}", file=sys.stderr)
        return error.exit_code
    found = json.loads(PATH.read_text(encoding="utf-8"))
    print(
        f"{chip.title}: predictions of a model, not measurements; AHBF, {BRANCHES} branches,"
        f" {PRESET} preset, {options.dtype}; microseconds"
    )
    times = measured(PATH.parent, chip, options.dtype)
    print(
        f"{'B x C':>14}  {'kernel':16}  {'predicted':>9}  {'limit':12}  {'memory':>7} "
        f" {'issue':>7}  {'exponentials':>12}  {'measured':>8}"
    )
    for size, which, one in predictions(found, chip, options.dtype):
        print(
            f"{f'{size[0]} x {size[1]}':>14}  {which:16}  {1e6 * one.seconds:9.1f}  {one.limit:12} "
            f" {1e6 * one.memory:7.2f}  {1e6 * one.issue:7.2f}  {1e6 * one.exponentials:12.2f} "
            f" {f'{1e6 * times[size, which]:8.1f}' if (size, which) in times else '       -'}"
        )
    print(
        "\ncompiled training steps: counted kernels, and the milliseconds of their launches alone"
    )
    for name, kernels, seconds in launch_bound_steps():
        print(f"{name:28} {kernels:5}  {1e3 * seconds:6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
