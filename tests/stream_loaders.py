"""Pictures in files, and the loaders that read them, for the tests of both."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd.data import Augment, FileSplit
from fastokd.data.torchvision_loader import TorchvisionLoader, TorchvisionOptions

CROP = Augment(flip=True, crop_scale=(0.08, 1.0))
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
"""A normalisation that leaves pixels at 0 to 255."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A colourful picture with areas, edges and gradients, as photographs have."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    waves = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.blend(patches, waves, 0.6)


def write_split(root: Path, count: int, name: str = "train", classes: int = 3) -> FileSplit:
    """JPEG files of many sizes and shapes."""
    files = tuple(f"{name}/{i % classes}/{i:03d}.jpg" for i in range(count))
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(40 + 7 * (i % 9), 36 + 11 * (i % 7), seed=i).save(root / file, quality=90)
    return FileSplit(name, root, files, torch.arange(count) % classes)


def dali(*args, options=None, **settings):
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    from fastokd.data.dali import DaliLoader, DaliOptions

    return DaliLoader(
        *args,
        **{**DEFAULTS, **settings},
        options=DaliOptions(threads=1) if options is None else options,
    )


def dali_alone(*args, **settings):
    """DALI as it works with a GPU: it scales the images too."""
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    from fastokd.data.dali import DaliOptions

    return dali(*args, **settings, options=DaliOptions(threads=1, resize="dali"))


def torchvision(*args, options=None, **settings):
    return TorchvisionLoader(
        *args,
        **{**DEFAULTS, **settings},
        options=TorchvisionOptions(workers=0) if options is None else options,
    )


DEFAULTS = {"size": (32, 32), "augment": CROP, **LEVELS}
LOADERS = {"dali": dali, "torchvision": torchvision}
each_loader = functools.partial(pytest.mark.parametrize, "make", LOADERS.values(), ids=LOADERS)()
