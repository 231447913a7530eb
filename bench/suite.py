"""Shared code of the suites (``bench_*.py``): the device, the sizes, the number of timed calls, and
the smoke run.

``FASTOKD_BENCH_DEVICE=cuda`` measures on the GPU, in bfloat16 (on the CPU in float32).
``FASTOKD_BENCH_SMOKE=1`` runs the same code with tiny sizes, each case once and without
compilation; its numbers are meaningless.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.loaders import synchronize as wait_for

DEVICE = torch.device(os.environ.get("FASTOKD_BENCH_DEVICE", "cpu"))
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SMOKE = os.environ.get("FASTOKD_BENCH_SMOKE") == "1"
SECONDS_PER_CASE = 2.0
SIZES = {
    (128, 10): "CIFAR-10",
    (128, 100): "CIFAR-100",
    (96, 1000): "ImageNet, one GPU's share",
    (1024, 1000): "ImageNet, a large batch",
    (4096, 1000): "ImageNet, beyond the caches",
    (1024, 21841): "ImageNet-21k",
    (256, 100000): "a large vocabulary",
}
"""(B, C) of the loss, and what has them."""


def synchronize() -> None:
    """Wait for the device."""
    wait_for(DEVICE)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under ``torch.compile``, for one set of shapes."""
    torch.compiler.reset()  # what other cases compiled counts against a limit
    return torch.compile(function, dynamic=False, backend="eager" if SMOKE else "inductor")


def rounds(count: int) -> dict[str, int]:
    """Arguments of ``benchmark.pedantic``: timed rounds, and one warm-up round."""
    return {"rounds": 1, "warmup_rounds": 0} if SMOKE else {"rounds": count, "warmup_rounds": 1}


def measure(benchmark: Any, call: Callable[[], Any], **info: Any) -> float | None:
    """Time a call that waits for the device by itself, as often as goes into two seconds; the first
    three calls are not timed.

    Args:
        benchmark: the fixture of pytest-benchmark.
        call: the timed function.
        info: further properties of the case for the result.

    Returns:
        The median in seconds; None under ``--benchmark-disable``.
    """
    call()  # compiles
    started = time.perf_counter()
    call()
    count = max(3, min(200, int(SECONDS_PER_CASE / max(time.perf_counter() - started, 1e-6))))
    benchmark.extra_info.update(info)
    benchmark.pedantic(call, **rounds(count))
    return None if benchmark.stats is None else benchmark.stats.stats.median
