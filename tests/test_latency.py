"""Latencies: what is timed, on which units, and that the device is waited for."""

import time

import pytest
import torch
from torch import nn

from fastokd.experiments.analysis.latency import measure_latency


class Probe(nn.Module):
    """Calls a function in every forward pass."""

    def __init__(self, call):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.call = call

    def forward(self, x):
        self.call(x)
        return x * self.weight


@pytest.fixture
def tf32_settings():
    """Both settings, read; they are afterwards what they were before."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield lambda: [backend.allow_tf32 for backend in backends]
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def test_latency_is_the_median_of_passes_without_gradients():
    seen = []

    def call(x):
        seen.append((tuple(x.shape), torch.is_grad_enabled()))
        time.sleep(0.3 if len(seen) < 6 else 0.05)  # warm-up and the first two that count are slow

    found = measure_latency(Probe(call), (6, 7), 3, torch.device("cpu"))
    assert 0.05 <= found.seconds < 0.3
    assert set(seen) == {((3, 3, 6, 7), False)}
    assert 5 <= found.repeats < len(seen)


@pytest.mark.parametrize("before", [[True, True], [False, True], [False, False]])
def test_latency_of_float32_disables_tf32_and_restores_it(tf32_settings, before):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    seen = []
    measure_latency(Probe(lambda x: seen.append(tf32_settings())), (1, 1), 1, torch.device("cpu"))
    assert seen
    assert all(settings == [False, False] for settings in seen)
    assert tf32_settings() == before

    def fail(x):
        raise torch.OutOfMemoryError if len(seen) == 1 else ValueError

    seen[:] = [None]
    assert measure_latency(Probe(fail), (1, 1), 1, torch.device("cpu")) is None
    assert tf32_settings() == before
    seen.clear()
    with pytest.raises(ValueError):
        measure_latency(Probe(fail), (1, 1), 1, torch.device("cpu"))
    assert tf32_settings() == before


@pytest.mark.gpu
def test_latency_on_a_gpu_waits_for_the_device():
    ends, waited = [], []

    def call(x):
        waited.extend(end.query() for end in ends[-1:])
        torch.cuda._sleep(50_000_000)  # cycles, much longer than launching them takes
        ends.append(torch.cuda.Event())
        ends[-1].record()

    found = measure_latency(Probe(call), (1, 1), 1, torch.device("cuda", 0))
    assert len(waited) == len(ends) - 1 >= found.repeats
    assert all(waited)  # each pass had ended on the device before the next began
