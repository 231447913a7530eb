"""The AHBF loss (paper preset, four branches): the fused executors against the reference, eager and compiled.

    pytest bench/bench_loss.py --benchmark-group-by=group --benchmark-columns=min,median,rounds

``FASTOKD_BENCH_LARGE=1`` adds the sizes beyond 4 million logits, ``FASTOKD_BENCH_DEVICE=cuda`` measures on the GPU (in
bfloat16; on the CPU in float32). Each result's ``extra_info`` holds the least number of bytes that the logits and
their gradients need, and the share of the time that moving these takes at the measured bandwidth of a copy.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastokd.losses import AHBFLoss
from fastokd.ops.executors import executor_states

pytest.importorskip("pytest_benchmark", reason="pip install 'fastokd[bench]'")

DEVICE = os.environ.get("FASTOKD_BENCH_DEVICE", "cpu")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BRANCHES = 4
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
LARGE = 4_000_000
EXECUTOR = {"cpu": "cpu", "cuda": "triton"}[DEVICE]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 256 MB: the roofline of a loss that touches each logit once."""
    source = torch.ones(32 * 2**20, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / best


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_loss(provider: str) -> Callable[..., torch.Tensor]:
    if provider == "fused":
        reason = executor_states().get(EXECUTOR, "this fastokd does not have it")
        if reason:
            pytest.skip(f"impl='{EXECUTOR}' cannot run: {reason}")
        return AHBFLoss.preset("paper", BRANCHES, impl=EXECUTOR)
    loss = AHBFLoss.preset("paper", BRANCHES, impl="reference")
    return torch.compile(loss, dynamic=False) if provider == "compiled" else loss


@pytest.mark.parametrize("provider", ["eager", "compiled", "fused"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_loss(benchmark: Any, size: tuple[int, int], mode: str, provider: str) -> None:
    batch, classes = size
    if batch * classes * BRANCHES > LARGE * 1.5 and os.environ.get("FASTOKD_BENCH_LARGE") != "1":
        pytest.skip("large: set FASTOKD_BENCH_LARGE=1")
    backward = mode == "forward+backward"
    torch.manual_seed(0)
    torch._dynamo.reset()
    logits = [torch.randn(batch, classes, device=DEVICE).mul(3).to(DTYPE).requires_grad_(backward) for _ in range(BRANCHES)]
    scores = [torch.rand(batch, 2, device=DEVICE).softmax(1).requires_grad_(backward) for _ in range(BRANCHES - 1)]
    target = torch.randint(classes, (batch,), device=DEVICE)
    loss = make_loss(provider)

    def step() -> None:
        if backward:
            for leaf in (*logits, *scores):
                leaf.grad = None
            loss(logits, target, scores=scores, kd_weight=0.5).backward()
        else:
            with torch.no_grad():
                loss(logits, target, scores=scores, kd_weight=0.5)
        synchronize()

    step()  # compiles
    started = time.perf_counter()
    step()
    rounds = max(3, min(200, int(SECONDS_PER_CASE / max(time.perf_counter() - started, 1e-6))))
    benchmark.group = f"{batch}x{classes} {mode}"
    # Forward reads the logits; backward reads them again and writes as much.
    moved = BRANCHES * batch * classes * logits[0].element_size() * (3 if backward else 1)
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        provider=provider, mode=mode, batch=batch, classes=classes, case=SIZES[size], dtype=str(DTYPE), bytes=moved,
        bytes_per_second=moved / median, roofline_share=moved / copy_bandwidth() / median)
