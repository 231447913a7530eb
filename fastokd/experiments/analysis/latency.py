"""The latency of a network on this machine."""

import statistics
import time
from typing import NamedTuple

import torch
from torch import nn

from fastokd.experiments.timing import processor
from fastokd.train.precision import without_tf32

BATCH_SIZES = (1, 128)
WARM_UP = 3
"""Forward passes before the first that is timed."""
LEAST, MOST, SECONDS = 5, 100, 1.0
"""The fewest and the most timed passes; after the fewest, timing stops at this time."""


class Latency(NamedTuple):
    """The median seconds of a forward pass, and the number of timed passes."""

    seconds: float
    repeats: int


def devices() -> list[torch.device]:
    """The CPU, and the first GPU if there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def machine() -> str:
    """This machine in words."""
    gpu = f"; {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{processor()}, threads: {torch.get_num_threads()}{gpu}; torch {torch.__version__}"


@torch.inference_mode()
@without_tf32()
def measure_latency(
    network: nn.Module, image_size: tuple[int, int], batch_size: int, device: torch.device
) -> Latency | None:
    """Time eager forward passes in float32 (without TF32) and channels-last, each until the device
    has finished. None if the batch does not fit into the device's memory.

    Args:
        network: images [B, 3, H, W] to logits, in evaluation mode; it is moved to the device.
        image_size: H and W.
        batch_size: B.
        device: the device.
    """

    def run() -> float:
        started = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    try:
        network.to(device).to(memory_format=torch.channels_last)
        images = torch.randn(batch_size, 3, *image_size).to(
            device, memory_format=torch.channels_last
        )
        for _ in range(WARM_UP):
            run()
        times: list[float] = []
        while len(times) < LEAST or (len(times) < MOST and sum(times) < SECONDS):
            times.append(run())
    except torch.OutOfMemoryError:
        return None
    return Latency(statistics.median(times), len(times))
