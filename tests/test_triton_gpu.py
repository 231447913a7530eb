"""The Triton executor on a GPU: parity, no waiting for the device, capture, determinism,
compilation, other devices.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import executor_properties

from fastokd.kernels.triton.tile import choose_splits
from fastokd.losses import AHBFLoss
from fastokd.ops import Inputs
from tests.triton_cases import TRITON, Batch, check, fused, make, run
from tests.triton_graphs import GRAPHS

pytestmark = pytest.mark.gpu


PARTS = 12
"""Compiling takes most of the time, so processes beside each other (``-n``) take a part each."""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_published_graph(part: int) -> None:
    shapes = executor_properties.CATALOG_SHAPES + executor_properties.MORE_SHAPES
    assert (
        executor_properties.check_catalog("triton", "cuda", shapes, part, PARTS) >= 48 // PARTS * 10
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_random_graphs(part: int) -> None:
    assert executor_properties.check_random("triton", 25, "cuda", part) == 25


@pytest.mark.parametrize("height", [15.0, 60.0, 90.0, 1e4])
@pytest.mark.parametrize(
    ("classes", "dtype"), [(1000, torch.bfloat16), (1300, torch.float32), (100003, torch.float32)]
)
def test_a_logit_far_above_the_guess_at_its_rows_maximum(
    classes: int, dtype: torch.dtype, height: float
) -> None:
    inputs = make(GRAPHS["cascade"](), 3, classes, dtype, device="cuda")
    for m, row in enumerate(inputs.logits):
        row[torch.arange(3), torch.tensor([1, 700 + m, classes - 1])] += height * (1 + m / 8)
    inputs.target = torch.tensor([1, 3, classes - 1], device="cuda")
    check(inputs, huge=height > 20)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kind_of_node_and_term(name: str, soft: bool) -> None:
    check(make(GRAPHS[name](), 37, 1000, soft=soft, device="cuda"))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(
    ("batch", "classes"),
    [
        (0, 10),
        (1, 2),
        (17, 10),
        (128, 10),
        (128, 32),
        (128, 100),
        (96, 1000),
        (1024, 1000),
        (1500, 1001),
        (300, 4096),
        (40, 21841),
        (3, 100003),
    ],
)
def test_shapes_and_dtypes(dtype: torch.dtype, batch: int, classes: int) -> None:
    check(make(GRAPHS["cascade"](), batch, classes, dtype, device="cuda"))


@pytest.mark.parametrize(
    "name", ["cascade", "mixed probabilities", "minimum", "cascade, exact eps"]
)
def test_huge_logits(name: str) -> None:
    check(make(GRAPHS[name](), 33, 1000, scale=1e4, device="cuda"), huge=True)


def test_a_common_offset_costs_no_accuracy_in_the_gradient() -> None:
    inputs = make(GRAPHS["cascade"](), 33, 1000, device="cuda")
    inputs.logits = [row + 1000.0 for row in inputs.logits]
    check(inputs)


def test_strided_and_padded_rows() -> None:
    inputs = make(GRAPHS["cascade"](), 64, 1001, torch.bfloat16, device="cuda")
    first, second, third, fourth = inputs.logits
    inputs.logits = [
        torch.nn.functional.pad(first, (0, 7))[:, :1001],
        second.t().contiguous().t(),
        torch.stack([third, third], 2)[:, :, 1],
        torch.nn.functional.pad(fourth, (1, 0))[:, 1:],
    ]
    check(inputs)


def test_frozen_inputs_and_an_expanded_upstream_gradient() -> None:
    inputs = make(GRAPHS["cascade"](), 64, 100, device="cuda")
    inputs.needs = [True, False, True, False, False, True, False]
    inputs.grad_rows = torch.tensor(0.125, device="cuda").expand(64)
    check(inputs)


def test_labels_out_of_range_are_never_a_number() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100, device="cuda")
    inputs.target = torch.tensor([5, 100, -1], device="cuda")
    rows = run(TRITON, inputs)[0]
    assert rows.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("name", GRAPHS)
def test_the_fused_kernel_equals_the_two(name: str) -> None:
    inputs = make(GRAPHS[name](), 48, 1000, device="cuda")
    inputs.grad_rows = torch.full((48,), 1 / 48, device="cuda")
    rows, terms, grads = fused(inputs)
    for mine, theirs in zip([rows, *terms, *grads], run(TRITON, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [10, 100, 1000, 21841])
def test_bits_repeat(classes: int) -> None:
    inputs = make(GRAPHS["cascade"](), 200, classes, torch.bfloat16, device="cuda")
    for one, two in zip(run(TRITON, inputs), run(TRITON, inputs), strict=True):
        assert torch.equal(one, two)


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


def test_nothing_waits_for_the_device() -> None:
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


def test_a_captured_graph_reads_its_inputs_and_the_weights_of_its_terms_anew() -> None:
    replayed(*loss_inputs(128, 1300))


@pytest.mark.parametrize("classes", [40000, 40001])
def test_a_captured_graph_of_split_rows(classes: int) -> None:
    assert choose_splits(4, classes) > 1
    replayed(*loss_inputs(4, classes))


def test_no_kernel_is_compiled_again_for_another_batch_or_weight() -> None:
    from fastokd.kernels.triton.kernels import forward_kernel

    def count() -> int:
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    run(TRITON, make(GRAPHS["cascade"](), 128, 100, device="cuda"))
    before = count()
    for batch in (1, 16, 80, 127):
        run(TRITON, make(GRAPHS["cascade"](), batch, 100, device="cuda", seed=batch))
    assert count() == before


def test_torch_compile_without_a_break() -> None:
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
def test_a_second_device() -> None:
    inputs: Batch = make(GRAPHS["cascade"](), 64, 100, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(inputs)


def test_rows_beyond_two_to_the_31_elements() -> None:
    # 2^31 / 1000 rows of bf16: 4.3 GB in one tensor, which all rows of logits share.
    batch = 2**31 // 1000 + 8
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free device memory")
    inputs = make(GRAPHS["mutual, temperature 1"](), 8, 1000, torch.bfloat16, device="cuda")
    large = torch.zeros(batch, 1000, dtype=torch.bfloat16, device="cuda")
    large[-8:] = inputs.logits[0]
    target = torch.zeros(batch, dtype=torch.int64, device="cuda")
    target[-8:] = inputs.target
    rows, _, _ = TRITON.forward(
        inputs.plan, Inputs([large, large], [], [], target, inputs.term_weights)
    )
    inputs.logits = [inputs.logits[0], inputs.logits[0]]
    torch.testing.assert_close(rows[-8:], TRITON.forward(inputs.plan, inputs.inputs)[0])
