"""The branches' first convolutions one by one and merged: forward and backward of the whole branched network.

    pytest bench/bench_merge.py --benchmark-group-by=group --benchmark-columns=min,median,rounds

``FASTOKD_BENCH_DEVICE=cuda`` measures on the GPU, in bfloat16 autocast; ``FASTOKD_BENCH_COMPILE=1`` compiles both.
"""

import os
import time
from typing import Any

import pytest
import torch

from fastokd.models import create_model

pytest.importorskip("pytest_benchmark", reason="pip install 'fastokd[bench]'")

DEVICE = os.environ.get("FASTOKD_BENCH_DEVICE", "cpu")
COMPILE = os.environ.get("FASTOKD_BENCH_COMPILE") == "1"
SECONDS_PER_CASE = 2.0
# (network, where, image size, batch on a CPU, batch on a GPU)
CASES = [("resnet32", None, 32, 16, 128), ("resnet110", None, 32, 8, 128), ("torchvision:resnet18", "layer3", 224, 2, 96)]


@pytest.mark.parametrize("merged", [False, True], ids=["one by one", "merged"])
@pytest.mark.parametrize(("name", "at", "size", "on_cpu", "on_gpu"), CASES, ids=lambda value: str(value))
def test_first_convs(benchmark: Any, name: str, at: str | None, size: int, on_cpu: int, on_gpu: int, merged: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    batch = on_gpu if DEVICE == "cuda" else on_cpu
    model = create_model(name, "ahbf", 100, num_branches=4, aux_blocks=2, at=at).to(DEVICE, memory_format=torch.channels_last)
    model.merged_first_conv = merged
    network = torch.compile(model, fullgraph=True) if COMPILE else model
    images = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            result = network(images)
        torch.stack([row.float().square().mean() for row in (*result.logits, *result.scores)]).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    step()  # compiles
    started = time.perf_counter()
    step()
    rounds = max(3, min(200, int(SECONDS_PER_CASE / max(time.perf_counter() - started, 1e-6))))
    benchmark.group = f"{name} {batch}x{size}x{size}"
    benchmark.extra_info.update(network=name, batch=batch, merged=merged, compiled=COMPILE)
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=2)
