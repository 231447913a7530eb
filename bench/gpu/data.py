"""The loaders on a GPU: images per second of each, DALI by the share of the JPEG engine and by
decoder, and how long an AHBF step waits.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.kernels import NUM_BRANCHES
from bench.gpu.part import Context, Part, Row
from bench.gpu.results import Results
from bench.images import compose
from bench.loaders import LARGE_MODEL, images_per_second, waiting_share
from fastokd.data import Augment, Dataset, FileDataset, Split, list_files, make_loader
from fastokd.data.dali import default_threads
from fastokd.data.loader import get_loader_kind
from fastokd.models import create_model
from fastokd.train.config import TrainConfig
from fastokd.train.randomness import be_deterministic
from fastokd.train.runner import StepRunner
from fastokd.train.step import TrainStep

HARDWARE_SHARES = (0.0, 0.15, 0.3, 0.5, 0.65, 0.8, 1.0)
"""Of the JPEG files, for the GPU's JPEG engine."""


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _resident(context: Context, augment: Augment) -> dict[str, Any]:
    """Random pixels in CIFAR's shape: their values cost nothing."""
    count, side, batch = (256, 8, 32) if context.dry else (50_000, 32, 128)
    generator = torch.Generator().manual_seed(0)
    split = Split(
        "train",
        torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        torch.arange(count) % 10,
    )
    dataset = Dataset(
        name="random images",
        classes=tuple(map(str, range(10))),
        train=split,
        test=split,
        mean=(0.5, 0.5, 0.5),
        std=(0.29, 0.29, 0.29),
        augment=augment,
        fingerprint="",
    )
    loader = make_loader(
        dataset, "train", batch, device=context.device, dtype=_dtype(context.device)
    )
    return {
        "loader": "resident",
        "batch": batch,
        "size": side,
        "images_per_second": images_per_second(loader, context.device, 1 if context.dry else 3),
    }


class _Images:
    """The large images, listed on first use."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.size, self.batch, self.count = (48, 4, 16) if context.dry else (224, 256, 2048)
        self._dataset: FileDataset | None = None

    def dataset(self) -> FileDataset:
        if self._dataset is None:
            folder = self.context.images or compose(
                self.context.runs / f"images-{self.count}", self.count
            )
            self._dataset = list_files(
                folder, image_size=self.size, augment=Augment(flip=True, crop_scale=(0.08, 1.0))
            )
        return self._dataset

    def loader(self, name: str, batch: int, options: dict[str, Any]) -> Any:
        return make_loader(
            self.dataset(),
            "train",
            batch,
            loader=name,
            device=self.context.device,
            dtype=_dtype(self.context.device),
            options=options,
        )

    def measure(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        about = {"loader": name, **options, "batch": self.batch, "size": self.size}
        if reason := get_loader_kind(name).missing(self.context.device):
            return {**about, "skipped": reason}
        if name == "dali":
            about["threads"] = default_threads(self.context.device.type == "cuda")
        loader = self.loader(name, self.batch, options)
        try:
            return {
                **about,
                "images_per_second": images_per_second(
                    loader, self.context.device, 1 if self.context.dry else 2
                ),
            }
        finally:
            loader.close()

    def waiting(self, results: Results) -> dict[str, Any]:
        """The waiting time of a step with the fastest loader that decodes."""
        decoding = [
            row
            for row in results.rows
            if row.get("loader") in ("dali", "torchvision") and "images_per_second" in row
        ]
        if not decoding:
            return {"skipped": "no loader that decodes could be measured"}
        best = max(decoding, key=lambda row: row["images_per_second"])
        dry, device = self.context.dry, self.context.device
        config = TrainConfig(
            model="resnet8" if dry else LARGE_MODEL,
            method="ahbf",
            branches=2 if dry else NUM_BRANCHES,
            aux_blocks=0,
        )
        torch.manual_seed(0)
        be_deterministic(False)  # as in a run: convolutions by the fastest algorithms
        model = create_model(
            config.model,
            config.method,
            len(self.dataset().classes),
            config.branches,
            config.aux_blocks,
        ).to(device, memory_format=torch.channels_last)
        step = TrainStep(config, model, device)
        options = {
            name: best[name] for name in ("workers", "decoder", "hw_decoder_load") if name in best
        }
        loader = self.loader(best["loader"], 4 if dry else 96, options)
        try:
            return {
                "model": config.model,
                "method": config.method,
                "branches": config.branches,
                "batch": loader.batch_size,
                "fed_by": best["row"],
                **waiting_share(loader, StepRunner(step)),
            }
        finally:
            loader.close()


def _rows(context: Context, results: Results) -> Iterator[Row]:
    for name, augment in (("shuffle", Augment()), ("crop and flip", Augment(pad=4, flip=True))):
        yield Row(f"resident, {name}", 0.0, lambda augment=augment: _resident(context, augment))
    images = _Images(context)
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("torchvision", "torchvision", {"workers": 0 if context.dry else os.cpu_count()}),
        ("dali, decoder cpu", "dali", {"decoder": "cpu"}),
    ]
    if context.device.type == "cuda":
        cases += [
            (
                f"dali, decoder mixed, {share:.0%} by the JPEG engine",
                "dali",
                {"decoder": "mixed", "hw_decoder_load": share},
            )
            for share in HARDWARE_SHARES
        ]
    for title, name, options in cases:
        yield Row(
            title,
            context.needs(0.5),
            lambda name=name, options=options: images.measure(name, options),
        )
    yield Row("waiting", context.needs(2.0), lambda: images.waiting(results))


def _line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return row["skipped"]
    return (
        f"{row['images_per_second']:,.0f} images/s"
        if "images_per_second" in row
        else f"{row['waiting_share']:.1%} of an epoch"
    )


PART = Part("data", 0.2, _rows, _line, sources=("bench/loaders.py", "bench/images.py"))
