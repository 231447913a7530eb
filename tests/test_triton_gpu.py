"""The Triton executor on a GPU: the contract of all executors, no waiting for the device, capture,
compilation, other devices.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import executor_properties
import masked_rows  # noqa: F401  # registers its checks
import worked_values  # noqa: F401  # registers its checks
from executor_contract import CHECKS, Subject, names

from fastokd.kernels.triton.tile import choose_splits
from fastokd.losses import AHBFLoss
from fastokd.ops import evaluate

pytestmark = pytest.mark.gpu
TRITON = Subject("triton", "cuda")
PARTS = 12
"""Compiling takes most of the time, so processes beside each other (``-n``) take a part each."""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_published_graph_matches_reference(part: int) -> None:
    shapes = executor_properties.CATALOG_SHAPES + executor_properties.MORE_SHAPES
    assert (
        executor_properties.check_catalog("triton", "cuda", shapes, part, PARTS) >= 48 // PARTS * 10
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_random_graphs_match_reference(part: int) -> None:
    assert executor_properties.check_random("triton", 25, "cuda", part) == 25


@pytest.mark.parametrize("name", names("triton"))
def test_executor_on_gpu_keeps_contract(name: str) -> None:
    CHECKS[name]("triton", "cuda")


def loss_inputs(
    batch: int, classes: int, device: str = "cuda"
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(batch, classes, generator=random).to(device).requires_grad_() for _ in range(4)
    ]
    scores = [
        torch.randn(batch, 2, generator=random).softmax(1).to(device).requires_grad_()
        for _ in range(3)
    ]
    return logits, scores, torch.randint(classes, (batch,), generator=random).to(device)


def test_loss_does_not_synchronize() -> None:
    logits, scores, target = loss_inputs(128, 100)
    criterion = AHBFLoss(impl="triton").cuda()
    weight = torch.tensor(0.5, device="cuda")
    criterion(logits, target, scores=scores, kd_weight=weight).backward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = criterion(logits, target, scores=scores, kd_weight=weight, return_terms=True)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(logits: list[torch.Tensor], scores: list[torch.Tensor], target: torch.Tensor) -> None:
    """Captures a step in a CUDA graph; replays must give the bits of the same step outside it, for
    other weights of the terms and, replayed last, for other logits and labels in the same places.
    """
    criterion = AHBFLoss(impl="triton").cuda()
    weight = torch.tensor(1.0, device="cuda")

    def step() -> torch.Tensor:
        for tensor in (*logits, *scores):
            tensor.grad = None
        loss = criterion(logits, target, scores=scores, kd_weight=weight)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured_grads = [tensor.grad for tensor in (*logits, *scores)]
    for value in (0.0, 0.25, 1.5, None):
        if value is None:
            with torch.no_grad():
                for tensor in logits:
                    tensor.copy_(tensor.flip(1) * 100)  # far from a guess at a row's maximum
                target.copy_(target.flip(0))
        else:
            weight.fill_(value)
        graph.replay()
        found, found_grads = captured.clone(), [grad.clone() for grad in captured_grads]
        assert found.isfinite()
        assert torch.equal(found, step().detach())
        for mine, tensor in zip(found_grads, (*logits, *scores), strict=True):
            assert torch.equal(mine, tensor.grad)


def test_captured_graph_reads_inputs_and_term_weights_again() -> None:
    replayed(*loss_inputs(128, 1300))


@pytest.mark.parametrize("classes", [40000, 40001])
def test_captured_graph_of_split_rows_replays(classes: int) -> None:
    assert choose_splits(4, classes) > 1
    replayed(*loss_inputs(4, classes))


def test_kernels_are_not_recompiled_for_batch_or_weight() -> None:
    from fastokd.kernels.triton.kernels import forward_kernel

    def count() -> int:
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    TRITON.run(TRITON.make("cascade", (128, 100)))
    before = count()
    for batch in (1, 16, 80, 127):
        TRITON.run(TRITON.make("cascade", (batch, 100), seed=batch))
    assert count() == before


def test_torch_compile_has_no_graph_break() -> None:
    logits, scores, target = loss_inputs(64, 100)
    criterion = AHBFLoss(impl="triton").cuda()
    compiled = torch.compile(
        lambda *tensors: criterion(tensors[:4], target, scores=tensors[4:]), fullgraph=True
    )
    expected = criterion(logits, target, scores=scores)
    expected_grads = torch.autograd.grad(expected, [*logits, *scores])
    found = compiled(*logits, *scores)
    found_grads = torch.autograd.grad(found, [*logits, *scores])
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device_matches_reference() -> None:
    assert torch.cuda.current_device() == 0
    second = Subject("triton", "cuda:1")
    second.compare(second.make("cascade", (64, 100)))


def test_rows_beyond_2_31_elements_match_reference() -> None:
    # 2^31 / 1000 rows of bf16: 4.3 GB in one tensor, which all rows of logits share.
    batch = 2**31 // 1000 + 8
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free device memory")
    inputs = TRITON.make("mutual, temperature 1", (8, 1000), dtype=torch.bfloat16)
    row, target = inputs.logits[0].detach(), inputs.target
    large = torch.zeros(batch, 1000, dtype=torch.bfloat16, device="cuda")
    large[-8:] = row
    all_targets = torch.zeros(batch, dtype=torch.int64, device="cuda")
    all_targets[-8:] = target

    def rows(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        arguments = ([logits, logits], [], [], target, inputs.term_weights)
        return evaluate(inputs.plan, *arguments, impl="triton")[0]

    torch.testing.assert_close(rows(large, all_targets)[-8:], rows(row, target))
