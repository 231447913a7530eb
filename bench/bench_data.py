"""The throughput of the loaders, and the time a step waits for them.

    FASTOKD_BENCH_SMALL=tiny-imagenet-100 pytest bench/bench_data.py
    --benchmark-columns=min,median,rounds

``FASTOKD_BENCH_SMALL`` is a folder of small images (``train/``, ``val/``; Tiny-ImageNet), without
which those cases are skipped. Large images are composed of them, or drawn, into a temporary
folder; ``FASTOKD_BENCH_LARGE_IMAGES`` names a permanent folder. On a GPU the batches are made
there. Each round is one epoch over the same images in the same windows; ``extra_info`` holds images
per second. Other variables: ``bench/suite.py``.
"""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.images import compose
from bench.loaders import LARGE_MODEL, run_epoch, waiting_share
from bench.suite import DEVICE, SMOKE, rounds
from fastokd.data import Augment, FileSplit, list_files, make_loader, open_dataset
from fastokd.data.images import default_workers
from fastokd.data.loader import get_loader_kind
from fastokd.models import create_model
from fastokd.train.config import TrainConfig
from fastokd.train.runner import StepRunner
from fastokd.train.step import TrainStep

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]'")

SMALL = os.environ.get("FASTOKD_BENCH_SMALL")
LARGE = os.environ.get("FASTOKD_BENCH_LARGE_IMAGES")
COUNT = 16 if SMOKE else int(os.environ.get("FASTOKD_BENCH_IMAGES", "1024"))
BATCH = 8 if SMOKE else 64
CROP = Augment(flip=True, crop_scale=(0.08, 1.0))
THREADS = [1] if SMOKE else sorted({1, 2, default_workers()})
CASES = [("dali", {"threads": n}) for n in THREADS] + [
    ("torchvision", {"workers": n}) for n in (0, *THREADS)
]


@pytest.fixture(scope="session")
def large(tmp_path_factory: Any) -> Path:
    if LARGE and (Path(LARGE) / "train").is_dir():
        return Path(LARGE)
    return compose(
        Path(LARGE) if LARGE else tmp_path_factory.mktemp("images"),
        COUNT,
        None if SMALL is None else Path(SMALL),
    )


def some(split: FileSplit) -> FileSplit:
    """The same ``COUNT`` images for every loader, from all over the split."""
    return split.select(torch.linspace(0, len(split) - 1, min(COUNT, len(split))).long())


def streamed(
    name: str,
    options: dict[str, Any],
    root: Path,
    size: int,
    augment: Augment,
    batch_size: int = BATCH,
) -> Any:
    kind = get_loader_kind(name)
    if reason := kind.missing(DEVICE):
        pytest.skip(reason)
    dataset = list_files(root, image_size=size)
    return kind.make(
        some(dataset.train),
        batch_size,
        True,
        DEVICE,
        0,
        size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        augment=augment,
        options=options,
    )


def measure(benchmark: Any, loader: Any, info: dict[str, Any]) -> None:
    images, _ = run_epoch(loader, DEVICE)
    benchmark.pedantic(functools.partial(run_epoch, loader, DEVICE), **rounds(3))
    if hasattr(loader, "close"):
        loader.close()
    if benchmark.stats is not None:  # --benchmark-disable
        benchmark.extra_info.update(
            info, images=images, images_per_second=images / benchmark.stats.stats.median
        )


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("dataset", ["small-64", "large-224"])
def test_streaming(
    benchmark: Any, large: Path, dataset: str, name: str, options: dict[str, int]
) -> None:
    benchmark.group = dataset
    if dataset == "large-224":
        loader = streamed(name, options, large, 224, CROP)
    else:
        if SMALL is None:
            pytest.skip("set FASTOKD_BENCH_SMALL to a folder of small images")
        loader = streamed(name, options, Path(SMALL), 64, Augment(pad=8, flip=True))
    measure(benchmark, loader, {"loader": name, **options, "dataset": dataset})


def test_resident(benchmark: Any) -> None:
    if SMALL is None:
        pytest.skip("set FASTOKD_BENCH_SMALL to a folder of small images")
    benchmark.group = "small-64"
    loader = make_loader(
        open_dataset(SMALL, image_size=64), "train", BATCH, device=DEVICE, loader="resident"
    )
    measure(benchmark, loader, {"loader": "resident", "dataset": "small-64"})


@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_waiting(benchmark: Any, large: Path, name: str) -> None:
    """The share of an epoch that the AHBF step waits, with the loader's default settings: images
    of 224 pixels on a GPU, of 64 on a CPU.
    """
    on_gpu = DEVICE.type == "cuda"
    config = TrainConfig(
        model=LARGE_MODEL if on_gpu else "resnet8" if SMOKE else "resnet20",
        method="ahbf",
        branches=4,
        aux_blocks=1,
    )
    torch.manual_seed(0)
    model = create_model(config.model, config.method, 10, 4, 1).to(
        DEVICE, memory_format=torch.channels_last
    )
    step = TrainStep(config, model, DEVICE)
    loader = streamed(name, {}, large, 224 if on_gpu else 64, CROP, min(16, BATCH))
    benchmark.group = "waiting"
    found: dict[str, float] = {}
    benchmark.pedantic(lambda: found.update(waiting_share(loader, StepRunner(step))), rounds=1)
    loader.close()
    benchmark.extra_info.update(found, loader=name, model=config.model)
