"""A training step of a small network: the student alone, AHBF as published research code has it,
AHBF here, and that with all optimizations.

    pytest bench/bench_step.py --benchmark-columns=min,median,rounds

A short version of ``fastokd bench step``, for comparing two commits. Optimizations that need a GPU
are included only on a GPU. Variables: ``bench/suite.py``.
"""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.suite import DEVICE, SMOKE, measure, synchronize
from fastokd.experiments.research_step import ResearchStep
from fastokd.experiments.step_benchmark import EngineStep, first_row, optimizations
from fastokd.experiments.step_images import synthetic_images
from fastokd.train.config import TrainConfig

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

CONFIG = TrainConfig(
    model="resnet8" if SMOKE else "resnet20",
    method="ahbf",
    branches=3,
    aux_blocks=0 if SMOKE else 1,
    batch_size=8 if SMOKE else 64,
    lr=0.01,
)
CASES = ["ahbf, research style", "student alone", "ahbf", "ahbf, every lever"]


def make_step(case: str) -> ResearchStep | EngineStep:
    """The step of a case."""
    config, images = first_row(CONFIG, DEVICE), synthetic_images(CONFIG)
    if case == "ahbf, research style":
        return ResearchStep(config, images, DEVICE)
    config = replace(config, impl="auto")
    if case == "student alone":
        config = replace(config, method="baseline", branches=1, aux_blocks=0)
    gathers = False
    if case == "ahbf, every lever":
        for row in optimizations(DEVICE):
            if row.carried and (DEVICE.type == "cuda" or not row.needs_gpu):
                config, gathers = replace(config, **row.changes), gathers or row.gathers
    return EngineStep(config, images, DEVICE, gathers)


@pytest.mark.parametrize("case", CASES)
def test_step(benchmark: Any, case: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    with torch.compiler.set_stance("force_eager") if SMOKE else contextlib.nullcontext():
        running = make_step(case)
        running.model.train()
        running.advance(running.warm_up)

        def step() -> None:
            running.advance(1)
            synchronize()

        median = measure(
            benchmark,
            step,
            case=case,
            model=CONFIG.model,
            branches=CONFIG.branches,
            batch=CONFIG.batch_size,
        )
    if median is not None:
        benchmark.extra_info["images_per_second"] = CONFIG.batch_size / median
