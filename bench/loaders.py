"""How fast loaders are, and how long a step waits for them; shared by ``bench_data.py`` and ``gpu.py``."""

import time
from collections.abc import Callable
from typing import Any

import torch

from fastokd.data import Batch, Loader

LARGE_MODEL = "resnet18_imagenet"
"""Whose step waits for pictures of 224 pixels; the CIFAR networks are slower there than what anybody trains."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_epoch(loader: Loader, device: torch.device, step: Callable[[Batch], Any] = lambda batch: None) -> tuple[int, float]:
    """Images and seconds of one epoch, from the first request to the last image on the device."""
    synchronize(device)
    started, images = time.perf_counter(), 0
    for batch in loader:
        step(batch)
        images += batch.target.shape[0]
    synchronize(device)
    return images, time.perf_counter() - started


def images_per_second(loader: Loader, device: torch.device, epochs: int) -> float:
    """The loader alone, of whole epochs after one that warms it up."""
    run_epoch(loader, device)
    found = [run_epoch(loader, device) for _ in range(epochs)]
    return sum(images for images, _ in found) / sum(seconds for _, seconds in found)


def waiting_share(loader: Loader, device: torch.device, step: Callable[[Batch], Any]) -> dict[str, float]:
    """The part of an epoch that goes by because the step waits for its data.

    An epoch on the loader's batches is compared with as many steps on one batch that is there already. What is
    left includes whatever the loader takes from the step besides: cores, and kernels on the same GPU.
    """
    kept = next(iter(loader))
    batch = Batch(*(part.clone() for part in kept))
    for _ in range(3):
        step(batch)
    run_epoch(loader, device, step)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(len(loader)):
        step(batch)
    synchronize(device)
    alone = time.perf_counter() - started
    images, together = run_epoch(loader, device, step)
    return {
        "step_images_per_second": images / alone, "epoch_images_per_second": images / together, "waiting_share": max(0.0, 1 - alone / together),
    }
