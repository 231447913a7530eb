"""Images for the step benchmark: random ones, or some of a dataset, decoded once."""

import dataclasses
import itertools

import torch

from fastokd.data import Augment, Dataset, Split, make_loader
from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset

_MIN_BATCHES, _MAX_BATCHES = 8, 64
_BYTES = 2**28
"""The size of the images, if that is between the fewest and the most batches."""
_SMALL = 64
"""The largest side of images that are augmented as CIFAR is, by shifting them."""


def synthetic_images(config: TrainConfig, num_classes: int = 10) -> Dataset:
    """Random images of the configuration's ``image_size``, or 32."""
    side = config.image_size or 32
    count = config.batch_size * _num_batches(config.batch_size * 3 * side**2)
    generator = torch.Generator().manual_seed(config.seed)
    split = Split(
        "train",
        torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        torch.arange(count) % num_classes,
    )
    return Dataset(
        name="random images",
        classes=tuple(map(str, range(num_classes))),
        train=split,
        test=split,
        mean=(0.5, 0.5, 0.5),
        std=(0.29, 0.29, 0.29),
        augment=Augment(pad=4 if side <= _SMALL else 0, flip=True),
        fingerprint="",
    )


def decoded_images(config: TrainConfig, dataset: AnyDataset) -> Dataset:
    """A dataset in memory; of a dataset of files, some images are decoded and cropped once."""
    if isinstance(dataset, Dataset):
        return dataset
    height, width = dataset.image_size
    plain = dataclasses.replace(dataset, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    augment = dataclasses.replace(dataset.augment, pad=0, flip=False)
    pixels = make_loader(plain, "train", config.batch_size, train=True, augment=augment)
    images, targets = [], []
    for batch in itertools.islice(pixels, _num_batches(config.batch_size * 3 * height * width)):
        images.append(batch.images.mul(255).round().byte().clone())
        targets.append(batch.target.clone())
    split = Split("train", torch.cat(images), torch.cat(targets))
    return Dataset(
        name=dataset.name,
        classes=dataset.classes,
        train=split,
        test=split,
        mean=dataset.mean,
        std=dataset.std,
        augment=dataclasses.replace(dataset.augment, crop_scale=None),
        fingerprint="",
    )


def _num_batches(batch_bytes: int) -> int:
    return max(_MIN_BATCHES, min(_MAX_BATCHES, _BYTES // batch_bytes))
