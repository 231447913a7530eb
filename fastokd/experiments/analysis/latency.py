"""The latency of a network on this machine."""

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from fastokd.experiments.timing import processor
from fastokd.models.layout import to_memory_format
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


Latencies = Mapping[tuple[str, int], Latency | None]
"""By kind of device and batch size; None if the batch does not fit."""


def measure_latencies(network: nn.Module, image_size: tuple[int, int]) -> Latencies:
    """The latencies for all ``BATCH_SIZES``, on the CPU and on the first GPU if there is one."""
    gpus = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    return {
        (device.type, batch_size): measure_latency(network, image_size, batch_size, device)
        for device in (torch.device("cpu"), *gpus)
        for batch_size in BATCH_SIZES
    }


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
    has finished. None if a batch [B, 3, H, W] does not fit into the device's memory. The network,
    in evaluation mode, is moved to the device.
    """

    def run() -> float:
        started = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    try:
        to_memory_format(network.to(device), torch.channels_last)
        images = torch.randn(batch_size, 3, *image_size)
        images = images.to(device, memory_format=torch.channels_last)
        for _ in range(WARM_UP):
            run()
        times: list[float] = []
        while len(times) < LEAST or (len(times) < MOST and sum(times) < SECONDS):
            times.append(run())
    except torch.OutOfMemoryError:
        return None
    return Latency(statistics.median(times), len(times))
