"""The gates that say how branches are mixed: forward and backward, eager and compiled.

    pytest bench/bench_gate.py --benchmark-group-by=group --benchmark-columns=min,median,rounds

Maps are those of ResNet-32 on CIFAR: 64 channels of 8 x 8 for every branch, 32 of 16 x 16 behind
the trunk. Every method has its default number of branches. On a GPU the modules run under bfloat16
autocast, as in a step. Variables: ``bench/suite.py``.
"""

from typing import Any

import pytest
import torch
from torch import nn

from bench.suite import DEVICE, SMOKE, compiled, measure, synchronize
from fastokd.methods import get_method
from fastokd.methods.modules import BranchPass, BranchSpec

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

BATCH, CLASSES = (4 if SMOKE else 128), 100
CHANNELS, SIDE = 64, 8
TRUNK_CHANNELS, TRUNK_SIDE = 32, 16


@pytest.mark.parametrize("provider", ["eager", "compiled"])
@pytest.mark.parametrize("method", ["ahbf", "one", "okddip"])
def test_gate(benchmark: Any, method: str, provider: str) -> None:
    torch.manual_seed(0)
    chosen = get_method(method)
    branches = chosen.default_branches
    assert chosen.build_companion is not None
    gate = chosen.build_companion(
        BranchSpec((CHANNELS,) * branches, TRUNK_CHANNELS, CLASSES, [nn.Identity()] * branches)
    )
    gate = gate.to(DEVICE, memory_format=torch.channels_last)
    run = compiled(gate) if provider == "compiled" else gate

    def maps(channels: int, side: int) -> torch.Tensor:
        return (
            torch.randn(BATCH, channels, side, side, device=DEVICE)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
        )

    seen = BranchPass(
        images=torch.zeros(BATCH, 3, 32, 32, device=DEVICE),
        shared=maps(TRUNK_CHANNELS, TRUNK_SIDE),
        features=tuple(maps(CHANNELS, SIDE) for _ in range(branches)),
        logits=(torch.zeros(BATCH, CLASSES, device=DEVICE),) * branches,
        branches=(),
    )
    leaves = (seen.shared, *seen.features, *gate.parameters())

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            scores = run(seen)["scores"]
        torch.stack([row.float().square().mean() for row in scores]).sum().backward()
        synchronize()

    benchmark.group = method
    measure(
        benchmark,
        step,
        provider=provider,
        method=method,
        branches=branches,
        batch=BATCH,
        parameters=sum(parameter.numel() for parameter in gate.parameters()),
    )
