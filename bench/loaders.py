"""Throughput of loaders, and the time a step waits for them; shared by ``bench_data.py`` and
``bench.gpu data``.
"""

import time
from collections.abc import Iterable

import torch

from fastokd.data import Batch, Loader
from fastokd.train.capture import WARM_UP_STEPS
from fastokd.train.runner import StepRunner

LARGE_MODEL = "resnet18_imagenet"
"""The network whose step waits for images of 224 pixels, at which CIFAR networks are too slow."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_epoch(loader: Loader, device: torch.device) -> tuple[int, float]:
    """Images and seconds of one epoch, from the first request to the last image on the device."""
    synchronize(device)
    started, images = time.perf_counter(), 0
    for batch in loader:
        images += batch.target.shape[0]
    synchronize(device)
    return images, time.perf_counter() - started


def images_per_second(loader: Loader, device: torch.device, epochs: int) -> float:
    """The loader alone, of whole epochs after one that warms it up."""
    run_epoch(loader, device)
    found = [run_epoch(loader, device) for _ in range(epochs)]
    return sum(images for images, _ in found) / sum(seconds for _, seconds in found)


def waiting_share(loader: Loader, runner: StepRunner) -> dict[str, float]:
    """The part of an epoch that goes by because the step waits for its data.

    An epoch on the loader's batches is compared with as many steps on one batch that is there
    already, both run as a training run does it. What is left includes whatever the loader takes
    from the step besides: cores, and kernels on the same GPU.
    """
    device = runner.step.device
    kept = next(iter(loader))
    batch = Batch(*(part.clone() for part in kept))

    def seconds(batches: Iterable[Batch]) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in runner.epoch(batches):
            pass
        synchronize(device)
        return time.perf_counter() - started

    seconds([batch] * (WARM_UP_STEPS + 2 if runner.captures else 3))
    seconds(loader)
    alone, together = seconds([batch] * len(loader)), seconds(loader)
    images = len(loader) * loader.batch_size
    return {
        "step_images_per_second": images / alone,
        "epoch_images_per_second": images / together,
        "waiting_share": max(0.0, 1 - alone / together),
    }
