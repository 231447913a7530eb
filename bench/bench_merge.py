"""The branches' first convolutions one by one and merged: forward and backward of the whole
branched network.

    pytest bench/bench_merge.py --benchmark-group-by=group --benchmark-columns=min,median,rounds

On a GPU under bfloat16 autocast; ``FASTOKD_BENCH_COMPILE=1`` compiles both. Other variables:
``bench/suite.py``.
"""

import os
from typing import Any

import pytest
import torch

from bench.suite import DEVICE, SMOKE, compiled, measure, synchronize
from fastokd.models import create_model

pytest.importorskip("pytest_benchmark", reason="pip install 'fastokd[bench]'")

COMPILE = os.environ.get("FASTOKD_BENCH_COMPILE") == "1"
# (network, where, image size, batch on a CPU, batch on a GPU)
CASES = (
    [("resnet8", None, 8, 2, 2)]
    if SMOKE
    else [
        ("resnet32", None, 32, 16, 128),
        ("resnet110", None, 32, 8, 128),
        ("torchvision:resnet18", "layer3", 224, 2, 96),
    ]
)


@pytest.mark.parametrize("merged", [False, True], ids=["one by one", "merged"])
@pytest.mark.parametrize(
    ("name", "at", "size", "on_cpu", "on_gpu"), CASES, ids=lambda value: str(value)
)
def test_first_convs(
    benchmark: Any, name: str, at: str | None, size: int, on_cpu: int, on_gpu: int, merged: bool
) -> None:
    torch.manual_seed(0)
    batch = on_gpu if DEVICE.type == "cuda" else on_cpu
    model = create_model(name, "ahbf", 100, num_branches=4, aux_blocks=2, at=at).to(
        DEVICE, memory_format=torch.channels_last
    )
    model.merged_first_conv = merged
    network = compiled(model) if COMPILE else model
    images = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            result = network(images)
        torch.stack(
            [row.float().square().mean() for row in (*result.logits, *result.scores)]
        ).sum().backward()
        synchronize()

    benchmark.group = f"{name} {batch}x{size}x{size}"
    measure(benchmark, step, network=name, batch=batch, merged=merged, compiled=COMPILE)
