"""GPU paths that need no GPU: a failed capture, random states, devices and precisions."""

import contextlib

import pytest
import torch

from fastokd.train.capture import CapturedStep, CaptureFailed
from fastokd.train.config import TrainConfig
from fastokd.train.optimizers import with_index
from fastokd.train.precision import choose_precision
from fastokd.train.randomness import random_state, set_random_state

GPU = torch.device("cuda", 1)


class FakeStream:
    device_index = 1

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA's entry points without a device; yields the calls that end allocations to a pool."""
    ended = []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *call: ended.append(call), raising=False
    )
    return ended


def test_failed_capture_ends_allocations_to_its_pool(fake_cuda):
    calls = []

    def body():
        calls.append(None)
        if len(calls) > 11:  # the warm-up succeeds, the capture does not
            raise RuntimeError("operation not permitted when stream is capturing")

    step = CapturedStep(body, GPU)
    for _ in range(11):
        step()
    with pytest.raises(CaptureFailed, match="not permitted"):
        step()
    assert fake_cuda == [(1, (0, 7))]
    assert step.pool is None


def test_capture_uses_the_pool_of_other_steps(fake_cuda, monkeypatch):
    pools = []
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *_, pool, **__: pools.append(pool) or contextlib.nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": int})())
    first, second = CapturedStep(lambda: None, GPU), CapturedStep(lambda: None, GPU, pool=(0, 3))
    for step in (first, second):
        for _ in range(12):
            step()
    assert pools == [(0, 7), (0, 3)]
    assert (first.pool, second.pool) == ((0, 7), (0, 3))
    assert fake_cuda == []


def test_random_state_of_given_gpu_is_restored(monkeypatch):
    states = {0: torch.tensor([0]), 1: torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: states.update({device.index: state})
    )
    saved = random_state(GPU)
    assert saved["cuda"] == 1
    assert "cuda" not in random_state(torch.device("cpu"))
    states[1] = torch.tensor([5])
    set_random_state(saved, GPU)
    assert states == {0: 0, 1: 1}


def test_random_state_of_the_cpu_is_restored():
    saved = random_state(torch.device("cpu"))
    first = torch.rand(3)
    set_random_state(saved, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


def test_cuda_without_index_is_the_current_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_index(torch.device("cuda")) == torch.device("cuda", 1)
    assert with_index(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert with_index(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
    ids=str,
)
def test_auto_precision_follows_the_gpu(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(TrainConfig(), GPU) == precision


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"amx_tile": True, "amx_bf16": True}, "bf16"),
        ({"neon": True}, "fp32"),
    ],
    ids=["avx512", "avx512-bf16", "amx", "arm"],
)
def test_auto_precision_follows_the_cpu(monkeypatch, capabilities, precision):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision(TrainConfig(), torch.device("cpu")) == precision
    assert choose_precision(TrainConfig(precision="fp32"), torch.device("cpu")) == "fp32"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert choose_precision(TrainConfig(), torch.device("cpu")) == "fp32"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision(TrainConfig(), torch.device("cpu")) == "fp32"
