"""Every divergence from a frozen teacher: the fused executors against the reference, eager and
compiled.

    pytest bench/bench_terms.py --benchmark-group-by=group --benchmark-columns=min,median,rounds
"""

import functools
from typing import Any

import pytest
import torch

from bench.bench_loss import PROVIDERS, make_loss, make_step, random_logits
from bench.suite import DEVICE, DTYPE, SMOKE, measure
from fastokd.graph import DIVERGENCES, CrossEntropy, Graph, Logits, with_divergence
from fastokd.losses import GraphLoss

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

SIZES = ((4, 10),) if SMOKE else ((128, 100), (96, 1000))
STUDENT = Graph("student", (Logits("student"),), (CrossEntropy("student"),))
CASES = [(name, False) for name in DIVERGENCES] + [("kl", True), ("dkd", True)]
"""Divergences, and whether the rows are standardized."""


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("divergence", "standardize"), CASES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_term(
    benchmark: Any, size: tuple[int, int], divergence: str, standardize: bool, provider: str
) -> None:
    """Forward and backward of a student's cross-entropy and one term from a frozen teacher."""
    batch, classes = size
    graph = STUDENT.with_teacher("student", temperature=4.0)
    graph = with_divergence(graph, divergence, standardize=standardize)
    torch.manual_seed(0)
    (student,) = random_logits(batch, classes, 1, True)
    (teacher,) = random_logits(batch, classes, 1, False)
    target = torch.randint(classes, (batch,), device=DEVICE)
    loss = make_loss(provider, functools.partial(GraphLoss, graph))
    name = f"standardized {divergence}" if standardize else divergence
    benchmark.group = f"{batch}x{classes} {name}"
    step = make_step(lambda: loss([student], target, teacher=teacher), [student], True)
    measure(
        benchmark,
        step,
        provider=provider,
        divergence=name,
        batch=batch,
        classes=classes,
        dtype=str(DTYPE),
    )
