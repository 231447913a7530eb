"""The resident loader alone: images per second with what it is asked to do to them, and what the
step consumes.

    pytest bench/bench_data_resident.py --benchmark-group-by=group
    --benchmark-columns=min,median,rounds

Variables: ``bench/suite.py``. Each result's ``extra_info`` has ``images_per_second``; that of the
step is what the others are to be compared with. The pixels are random: their values cost nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.suite import DEVICE, DTYPE, SMOKE, rounds, synchronize
from fastokd.data import Augment, ResidentLoader, Split, cache, open_dataset
from fastokd.models import create_model
from fastokd.train.config import TrainConfig
from fastokd.train.step import TrainStep

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

BATCH = 8 if SMOKE else 128
SETS = (
    {"cifar": (32, 16), "tiny-imagenet": (32, 16)}
    if SMOKE
    else {"cifar": (50_000, 32), "tiny-imagenet": (20_000, 64)}
)
FILES = 4 if SMOKE else 500
"""Of each class and split, to open."""
WORK: dict[str, dict[str, Any]] = {
    "evaluate": {"train": False},
    "shuffle": {"augment": Augment()},
    "crop and flip": {"augment": Augment(pad=4, flip=True)},
    "reflect and flip": {"augment": Augment(pad=4, flip=True, padding="reflect")},
    "crop, flip, 3 views": {"augment": Augment(pad=4, flip=True), "views": 3},
    "crop, flip, mixup, CutMix": {
        "augment": Augment(pad=4, flip=True),
        "mixup": 0.2,
        "cutmix": 1.0,
    },
}


def make_loader(name: str, train: bool = True, **settings: Any) -> ResidentLoader:
    """A loader over random pixels of a real set's shape."""
    count, side = SETS[name]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator
    ).permute(0, 3, 1, 2)
    split = Split("train", images, torch.arange(count) % 10)
    return ResidentLoader(
        split,
        BATCH,
        train,
        DEVICE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        num_classes=10,
        dtype=DTYPE,
        **settings,
    )


def take_batches(loader: ResidentLoader, batches: int) -> None:
    """The first batches of an epoch, until they are really there."""
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    synchronize()


def note_speed(benchmark: Any, images: int) -> None:
    """Images per second of the median round, in the result."""
    if benchmark.stats is not None:  # --benchmark-disable
        benchmark.extra_info["images_per_second"] = round(images / benchmark.stats.stats.median)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", SETS)
def test_resident_loader(benchmark: Any, name: str, work: str) -> None:
    benchmark.group = f"{name}, batches of {BATCH}"
    loader = make_loader(name, **WORK[work])
    batches = min(40, len(loader))
    benchmark.pedantic(take_batches, (loader, batches), **rounds(5))
    note_speed(benchmark, batches * BATCH)


def test_a_step_consumes(benchmark: Any) -> None:
    """Training a small student with AHBF on CIFAR-sized images: what the loader must keep up
    with.
    """
    benchmark.group = f"cifar, batches of {BATCH}"
    config = TrainConfig(model="resnet8" if SMOKE else "resnet20", method="ahbf", batch_size=BATCH)
    model = create_model(
        config.model, config.method, 10, config.num_branches(), config.aux_blocks
    ).to(DEVICE, memory_format=torch.channels_last)
    step, loader = (
        TrainStep(config, model, DEVICE),
        make_loader("cifar", augment=Augment(pad=4, flip=True)),
    )
    batch = next(iter(loader))

    def one_step() -> None:
        step(batch)
        synchronize()

    benchmark.pedantic(one_step, **rounds(3))
    note_speed(benchmark, BATCH)


@pytest.mark.parametrize("start", ["first", "second"])
def test_start(benchmark: Any, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening 4,000 JPEG files of 64 x 64: decoded, and found in the cache."""
    benchmark.group = "opening 4,000 files"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for label in range(4):
            folder = tmp_path / "tree" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(FILES):
                Image.fromarray(pixels[i % 40]).resize((64, 64), Image.Resampling.BICUBIC).save(
                    folder / f"{i}.jpg"
                )
    monkeypatch.setattr(cache, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 0.0)
    monkeypatch.setenv("FASTOKD_CACHE", str(tmp_path / "cache") if start == "second" else "off")
    open_dataset(tmp_path / "tree")  # fills the cache
    benchmark.pedantic(open_dataset, (tmp_path / "tree",), **rounds(3))
