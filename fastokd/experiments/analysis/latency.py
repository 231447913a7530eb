"""How long a network takes for a batch on this machine."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from fastokd.experiments.step_benchmark import processor
from fastokd.train.precision import without_tf32

BATCH_SIZES = (1, 128)
WARM_UP = 3
"""Forward passes before the first that is timed."""
LEAST, MOST = 5, 100
"""Forward passes that are timed."""
SECONDS = 1.0
"""How long passes are timed beyond the first few, at most."""


@dataclass(frozen=True)
class Latency:
    """The median of forward passes.

    Attributes:
        seconds: of one pass.
        repeats: passes that were timed.
    """

    seconds: float
    repeats: int


def devices() -> list[torch.device]:
    """Where latencies are measured: on the CPU, and on the first GPU if there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def machine() -> str:
    """What latencies are measured on, in words."""
    gpu = f"; {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{processor()}, threads: {torch.get_num_threads()}{gpu}; torch {torch.__version__}"


@torch.inference_mode()
@without_tf32()
def measure_latency(
    network: nn.Module, image_size: tuple[int, int], batch_size: int, device: torch.device
) -> Latency | None:
    """Time forward passes as PyTorch runs them eagerly, in float32 (without TF32) and
    channels-last, until the device is done with each.

    Args:
        network: images [B, 3, H, W] to logits, in evaluation mode; it is moved to the device.
        image_size: H and W.
        batch_size: B.
        device: where.

    Returns:
        None where the batch does not fit into the device's memory.
    """

    def run() -> float:
        started = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    try:
        network.to(device, memory_format=torch.channels_last)
        images = torch.randn(batch_size, 3, *image_size).to(
            device, memory_format=torch.channels_last
        )
        for _ in range(WARM_UP):
            run()
        found: list[float] = []
        while len(found) < LEAST or (len(found) < MOST and sum(found) < SECONDS):
            found.append(run())
    except torch.OutOfMemoryError:
        return None
    return Latency(statistics.median(found), len(found))
