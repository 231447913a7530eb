"""The losses: the fused executors against the reference, eager and compiled.

    pytest bench/bench_loss.py --benchmark-group-by=group --benchmark-columns=min,median,rounds

``test_loss`` is AHBF (paper preset, four branches) at seven sizes, ``test_method`` the graph of
every method at one. ``FASTOKD_BENCH_LARGE=1`` adds the sizes beyond 4 million logits;
``bench/suite.py`` has the other variables. The ``extra_info`` of ``test_loss`` holds the least
number of bytes that the logits and their gradients need, and the share of the time that moving
these takes at the measured bandwidth of a copy.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.suite import DEVICE, DTYPE, SIZES, SMOKE, compiled, measure, synchronize
from fastokd.losses import AHBFLoss, GraphLoss
from fastokd.methods import get_method, list_methods
from fastokd.ops.executors import executor_states

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

BRANCHES = 4
LARGE = 4_000_000
METHOD_SIZE = (4, 10) if SMOKE else (128, 100)
EXECUTOR = {"cpu": "cpu", "cuda": "triton"}[DEVICE.type]
PROVIDERS = ["eager", "compiled", "fused"]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 256 MB: the roofline of a loss that touches
    each logit once.
    """
    source = torch.ones(32 * 2**20, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / best


def make_loss(provider: str, build: Callable[..., torch.nn.Module]) -> Callable[..., torch.Tensor]:
    """The loss of ``build(impl=...)`` as one of ``PROVIDERS`` runs it."""
    if provider == "fused":
        reason = executor_states().get(EXECUTOR, "this fastokd does not have it")
        if reason:
            pytest.skip(f"impl='{EXECUTOR}' cannot run: {reason}")
        return build(impl=EXECUTOR).to(DEVICE)
    loss = build(impl="reference").to(DEVICE)
    return compiled(loss) if provider == "compiled" else loss


def random_logits(batch: int, classes: int, rows: int, backward: bool) -> list[torch.Tensor]:
    return [
        torch.randn(batch, classes, device=DEVICE).mul(3).to(DTYPE).requires_grad_(backward)
        for _ in range(rows)
    ]


def random_weights(batch: int, width: int, backward: bool) -> torch.Tensor:
    return torch.rand(batch, width, device=DEVICE).softmax(1).requires_grad_(backward)


def make_step(
    call: Callable[[], torch.Tensor], leaves: list[torch.Tensor], backward: bool
) -> Callable[[], None]:
    """The timed call: the loss and, with ``backward``, the gradients of the leaves."""

    def step() -> None:
        if backward:
            for leaf in leaves:
                leaf.grad = None
            call().backward()
        else:
            with torch.no_grad():
                call()
        synchronize()

    return step


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    "size", [(4, 10)] if SMOKE else SIZES, ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_loss(benchmark: Any, size: tuple[int, int], mode: str, provider: str) -> None:
    batch, classes = size
    if batch * classes * BRANCHES > LARGE * 1.5 and os.environ.get("FASTOKD_BENCH_LARGE") != "1":
        pytest.skip("large: set FASTOKD_BENCH_LARGE=1")
    backward = mode == "forward+backward"
    torch.manual_seed(0)
    logits = random_logits(batch, classes, BRANCHES, backward)
    scores = [random_weights(batch, 2, backward) for _ in range(BRANCHES - 1)]
    target = torch.randint(classes, (batch,), device=DEVICE)
    loss = make_loss(provider, functools.partial(AHBFLoss.preset, "paper", BRANCHES))
    benchmark.group = f"{batch}x{classes} {mode}"
    # Forward reads the logits; backward reads them again and writes as much.
    moved = BRANCHES * batch * classes * DTYPE.itemsize * (3 if backward else 1)
    step = make_step(
        lambda: loss(logits, target, scores=scores, kd_weight=0.5), [*logits, *scores], backward
    )
    median = measure(
        benchmark,
        step,
        provider=provider,
        mode=mode,
        batch=batch,
        classes=classes,
        case=SIZES.get(size, "smoke"),
        dtype=str(DTYPE),
        bytes=moved,
    )
    if median is not None:
        benchmark.extra_info.update(
            bytes_per_second=moved / median, roofline_share=moved / copy_bandwidth() / median
        )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("method", list_methods())
def test_method(benchmark: Any, method: str, provider: str) -> None:
    """Forward and backward of a method's graph, paper preset, without the
    method's other computations.
    """
    batch, classes = METHOD_SIZE
    chosen = get_method(method)
    graph = chosen.loss_class.preset("paper", chosen.default_branches).graph
    torch.manual_seed(0)
    rows = [name for name in graph.logits if name != graph.teacher]
    logits = random_logits(batch, classes, len(rows), True)
    frozen = {"teacher": random_logits(batch, classes, 1, False)[0]} if graph.teacher else {}
    weights = {
        name: random_weights(batch, width, True) for name, width in graph.weight_sources.items()
    }
    externals = {name: random_weights(batch, classes, False) for name in graph.externals}
    target = torch.randint(classes, (batch,), device=DEVICE)
    loss = make_loss(provider, functools.partial(GraphLoss, graph))
    benchmark.group = f"{batch}x{classes} {method}"
    step = make_step(
        lambda: loss(logits, target, weights=weights, externals=externals, kd_weight=0.5, **frozen),
        [*logits, *weights.values()],
        True,
    )
    measure(
        benchmark,
        step,
        provider=provider,
        method=method,
        branches=chosen.default_branches,
        nodes=len(graph.nodes),
        terms=len(graph.terms),
        batch=batch,
        classes=classes,
        dtype=str(DTYPE),
    )
