"""Loaders: batches that already lie on the device, in the layout the step wants.

A loader's order and augmentation are a function of (seed, epoch, position in the epoch) alone. Neither the device,
nor the number of processes, nor an interruption changes which images a global batch holds or how they are cropped.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastokd.data.augment import Augment, crop, mirror, normalize
from fastokd.data.dataset import Dataset, Split
from fastokd.errors import ConfigError, DataError


class Batch(NamedTuple):
    """B images [B, C, H, W] in a floating dtype, their labels int64 [B], and their positions in the split int64 [B]."""

    images: Tensor
    target: Tensor
    index: Tensor


class Loader(Protocol):
    """What the engine asks of any loader."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, or what is left of it right after ``load_state_dict``."""

    def __len__(self) -> int:
        """The number of batches of a whole epoch, on this rank."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""

    def state_dict(self) -> dict[str, int]:
        """The epoch and how much of it has been handed out."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where the loader that gave ``state`` stood."""


class ResidentLoader:
    """Keeps a whole split as uint8 on the device, and shuffles, augments and normalises there.

    Training: every epoch is shuffled and augmented anew, and the rest that does not fill a batch on every rank is
    dropped, so that all batches have one shape. Evaluation: in order, without augmentation, every image exactly once
    over all ranks; the last batch may be smaller, and a rank may have no batch at all.

    Rank r of W takes the r-th part of each training batch of W * batch_size images, and the r-th contiguous part of
    an evaluation split.

    Args:
        split: the images and labels.
        batch_size: images per batch on this rank.
        train: training or evaluation.
        device: where the split is kept and the batches are made.
        seed: of the order and the augmentation.
        mean, std: per channel, as fractions of 255: a pixel p becomes (p / 255 - mean) / std.
        augment: augmentation while training.
        dtype: of the images; the arithmetic is float32.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``.
        rank, world_size: this process among all that share the split.

    Raises:
        ConfigError: a setting out of range.
        DataError: fewer training images than one batch on every rank, or a device too small for the split.
    """

    def __init__(self, split: Split, batch_size: int, train: bool, device: torch.device | str = "cpu", seed: int = 0, *,
                 mean: Sequence[float], std: Sequence[float], augment: Augment | None = None,
                 dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.channels_last,
                 rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; use 1 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} of world_size={world_size}; ranks are 0 to world_size - 1")
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}; images are normalised, so it is a floating dtype")
        if memory_format not in (torch.channels_last, torch.contiguous_format):
            raise ConfigError(f"memory_format={memory_format}; use torch.channels_last or torch.contiguous_format")
        if train and len(split) < batch_size * world_size:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            fix = f"--batch-size {len(split) // world_size} or less" if len(split) >= world_size else "fewer ranks"
            raise DataError(
                f"split '{split.name}' has {len(split)} images, fewer than one batch of {batch_size}{ranks}; use {fix}"
            )
        self.batch_size = batch_size
        self.train = train
        self.device = torch.device(device)
        self.seed = seed
        self.augment = (augment or Augment()) if train else Augment()
        self.dtype = dtype
        self.memory_format = memory_format
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._size = len(split)
        self._position = 0  # images handed out this epoch: over all ranks in training, on this rank in evaluation
        self._resumed = False
        _check_device_memory(split, self.device)
        self._images = split.images.permute(0, 2, 3, 1).contiguous().to(self.device)  # [N, H, W, C]
        self._targets = split.targets.to(self.device)
        mean64, std64 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        num_pixels = self._images.shape[1] * self._images.shape[2]
        self._scale, self._shift = (
            factor.float().repeat(num_pixels).to(self.device) for factor in (1 / (255 * std64), -mean64 / std64)
        )

    def __len__(self) -> int:
        if self.train:
            return self._size // (self.batch_size * self.world_size)
        start, stop = self._shard()
        return -(-(stop - start) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._position = 0
        self._resumed = False
        return self._train_batches() if self.train else self._eval_batches()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. Naming the epoch just loaded keeps the place in it."""
        if epoch < 0:
            raise ConfigError(f"epoch={epoch} is negative")
        if epoch != self.epoch:
            self.epoch, self._position, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: what it has handed out counts as done. Plain integers."""
        return {"epoch": self.epoch, "position": self._position, "seed": self.seed, "size": self._size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue exactly where the loader that gave ``state`` stood: the next iteration gives the rest of its epoch.

        A training state may be continued with another number of ranks if the global batch divides the place in the
        epoch, as it does when the global batch stays the same.

        Raises:
            ConfigError: the state is of other data or another seed, or falls between two batches.
        """
        for key, here in (("seed", self.seed), ("size", self._size)):
            if state[key] != here:
                raise ConfigError(f"the loader's state is of {key} {state[key]}, and this loader has {key} {here}; resume with the same data and seed")
        step = self.batch_size * (self.world_size if self.train else 1)
        position = state["position"]
        whole = self._size // step * step if self.train else self._shard()[1] - self._shard()[0]
        if not 0 <= position <= whole or (position % step and position != whole):
            raise ConfigError(
                f"the loader's state is {position} images into the epoch, which is no whole number of batches of {step}; resume with the same global batch size"
            )
        self.epoch, self._position, self._resumed = state["epoch"], position, True

    def _shard(self) -> tuple[int, int]:
        return self._size * self.rank // self.world_size, self._size * (self.rank + 1) // self.world_size

    def _train_batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(self._size, generator=generator)
        offsets, mirrored = self.augment.draw(self._size, generator)
        order, offsets, mirrored = (to_device(choice, self.device) for choice in (order, offsets, mirrored))
        step = self.batch_size * self.world_size
        while self._position + step <= self._size:
            start = self._position + self.rank * self.batch_size
            part = slice(start, start + self.batch_size)
            self._position += step
            index = order[part]
            images = self._images.index_select(0, index)
            if self.augment.pad:
                images = crop(images, offsets[part], self.augment.pad)
            if self.augment.flip:
                images = mirror(images, mirrored[part])
            yield self._batch(images, index)

    def _eval_batches(self) -> Iterator[Batch]:
        start, stop = self._shard()
        while start + self._position < stop:
            first = start + self._position
            last = min(first + self.batch_size, stop)
            self._position += last - first
            yield self._batch(self._images[first:last], torch.arange(first, last, device=self.device))

    def _batch(self, images: Tensor, index: Tensor) -> Batch:
        pixels = normalize(images, self._scale, self._shift, self.dtype).permute(0, 3, 1, 2)
        return Batch(pixels.contiguous(memory_format=self.memory_format), self._targets.index_select(0, index), index)


def make_loader(dataset: Dataset, split: str, batch_size: int, *, device: torch.device | str = "cpu", seed: int = 0,
                train: bool | None = None, augment: Augment | None = None, **settings: Any) -> ResidentLoader:
    """The loader of a dataset's split "train", "val" or "test", with the dataset's normalisation and augmentation.

    Args:
        train: by default true for "train" alone; false to evaluate on the training images.
        augment: overrides the dataset's policy.
        settings: the other keywords of ``ResidentLoader``.
    """
    return ResidentLoader(
        dataset.split(split), batch_size, split == "train" if train is None else train, device, seed, mean=dataset.mean,
        std=dataset.std, augment=dataset.augment if augment is None else augment, **settings,
    )


def epoch_seed(seed: int, epoch: int) -> int:
    """One number for the pair, so that seed 1 in epoch 0 shares nothing with seed 0 in epoch 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()) >> 1


def to_device(choices: Tensor, device: torch.device) -> Tensor:
    """Drawn on the CPU, so that every device sees the same; copied without making the host wait."""
    if device.type == "cuda":
        choices = choices.pin_memory()
    return choices.to(device, non_blocking=True)


def _check_device_memory(split: Split, device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed, free = split.images.nbytes, torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise DataError(
            f"split '{split.name}' takes {needed / 2**30:.3g} GiB on {device}, which has {free / 2**30:.3g} GiB free; "
            f"use a smaller --image-size or fewer images"
        )
