"""The machine, and the rates that everything else is measured against."""

import importlib.metadata
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.part import Context, Part, Row
from bench.gpu.results import Results

OPTIONAL = (
    "liger-kernel",
    "quack-kernels",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "torchvision",
    "pytest-xdist",
)
"""Packages that some rows of the other parts need."""
_QUERY = (
    "driver_version",
    "power.limit",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
)


def copy_bandwidth(context: Context) -> tuple[float, float, float]:
    """Bytes per second, read and written, of a large copy on the device: the median, the slowest
    and the fastest.
    """
    numel = 1 << 20 if context.dry else 1 << 30
    source = torch.empty(numel, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    median, shortest, longest = context.seconds(lambda: target.copy_(source), True)
    return 2 * numel / median, 2 * numel / longest, 2 * numel / shortest


def _copy(context: Context) -> dict[str, Any]:
    median, low, high = copy_bandwidth(context)
    return {"gb_s": median / 1e9, "spread": [low / 1e9, high / 1e9]}


def _matmul(context: Context) -> dict[str, Any]:
    side = 256 if context.dry else 8192
    left, right = (
        torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2)
    )
    median, shortest, longest = context.seconds(lambda: left @ right, True)
    return {
        "side": side,
        "tflop_s": 2 * side**3 / median / 1e12,
        "spread": [2 * side**3 / longest / 1e12, 2 * side**3 / shortest / 1e12],
    }


def _launch(context: Context) -> dict[str, Any]:
    """The time of a minimal kernel, launched one by one and in a graph."""
    one = torch.zeros(1, device=context.device)
    found = {}
    for name, graph in (("launched", False), ("in_graph", True)):
        median, low, high = context.seconds(lambda: one.add_(1), graph)
        found |= {f"{name}_us": 1e6 * median, f"{name}_spread": [1e6 * low, 1e6 * high]}
    return found


def _machine(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {
        "packages": {name: _version(name) or "not installed" for name in OPTIONAL}
    }
    if context.device.type == "cuda":
        about = torch.cuda.get_device_properties(context.device)
        found |= {
            "capability": [about.major, about.minor],
            "memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "l2_bytes": getattr(about, "L2_cache_size", None),
            **_smi(),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi() -> dict[str, Any]:
    """Properties that only the driver's tool reports; none names the machine."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    return (
        dict(zip(_QUERY, lines[0].split(", "), strict=False))
        if done.returncode == 0 and lines
        else {}
    )


def _rows(context: Context, results: Results) -> Iterator[Row]:
    for name, measure in (
        ("machine", _machine),
        ("copy", _copy),
        ("matmul bf16", _matmul),
        ("kernel launch", _launch),
    ):
        yield Row(name, 0.0, lambda measure=measure: measure(context))


def _line(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)
    )


PART = Part("environment", 0.1, _rows, _line)
