"""What loaders have in common that read and decode image files while the network trains.

They differ in who decodes: ``fastokd.data.dali`` or ``fastokd.data.torchvision_loader``. Order, windows, mirroring,
shards, the place in the epoch, bad pictures and normalisation are decided here, once for both.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastokd.data import random_crop
from fastokd.data.augment import Augment, crop, mirror
from fastokd.data.files import MAX_REPLACED, FileSplit
from fastokd.data.images import first_of, show
from fastokd.data.loader import Batch, epoch_seed, to_device
from fastokd.errors import ConfigError, DataError, did_you_mean

BAD_IMAGES = ("fail", "replace")


class Request(NamedTuple):
    """One batch to decode: images of the split int64 [B], and the windows' candidates [B, 22] of random resized crops."""

    index: NDArray[np.int64]
    candidates: NDArray[np.float64] | None


class Decoded(NamedTuple):
    """Pictures uint8 [B, H, W, 3], on any device, and the images of the split they really are, int64 [B]."""

    pixels: Tensor
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Framing:
    """How a decoded picture becomes one of ``size``.

    Args:
        size: height and width of the result.
        augment: a random resized crop if it has a ``crop_scale`` and ``train``.
        train: else the picture is scaled until it covers ``cover_size``, and its centre is cut.
    """

    size: tuple[int, int]
    augment: Augment
    train: bool

    @property
    def random(self) -> bool:
        """Whether windows are drawn."""
        return self.train and self.augment.crop_scale is not None

    @property
    def cover_size(self) -> tuple[int, int]:
        """What is covered before the centre is cut: ``size`` itself while training, ``Augment.evaluation_side`` of it else."""
        if self.train:
            return self.size
        height, width = (self.augment.evaluation_side(side) for side in self.size)
        return height, width


class StreamLoader(ABC):
    """Reads, decodes and augments the images of a split while the step computes.

    Training: every epoch is shuffled and augmented anew, and the rest that does not fill a batch on every rank is
    dropped, so that all batches have one shape. Evaluation: in order, every image exactly once over all ranks; the last
    batch may be smaller, and a rank may have no batch at all. Rank r of W takes the r-th part of each training batch of
    W * batch_size images, and the r-th contiguous part of an evaluation split.

    Which images a batch holds, and which window of each, depends on (seed, epoch, place in the epoch) alone: not on the
    number of workers, threads or ranks, nor on an interruption. The state is therefore the place in the epoch, and a
    resumed epoch continues with the images that were left, the same pixel for pixel.

    A new iteration ends the one before it.

    Args:
        split: the encoded images and their labels.
        batch_size: images per batch on this rank.
        train: training or evaluation.
        device: where the batches are made.
        seed: of the order and the augmentation.
        size: height and width of the images in a batch.
        mean, std: per channel, as fractions of 255: a pixel p becomes (p / 255 - mean) / std.
        augment: the policy while training; evaluation takes from it alone how much is cut off (``evaluation_side``).
        dtype: of the images; the arithmetic is float32.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``.
        rank, world_size: this process among all that share the split.
        bad_images: what a picture that cannot be decoded does to training: "fail" stops with its name; "replace" trains on
            the next image of the split that can be decoded, which ``replaced`` counts, and stops beyond one in a hundred.
            Evaluation always stops, because its accuracy is over all images.
        out: a buffer [batch_size, 3, height, width] of ``dtype`` on ``device`` that every training batch is written to, for a
            step that reads its input from one address.

    Attributes:
        replaced: bad pictures met so far by this process, by their place in the split, and why.

    Raises:
        ConfigError: a setting out of range.
        DataError: fewer training images than one batch on every rank.
    """

    def __init__(self, split: FileSplit, batch_size: int, train: bool, device: torch.device | str = "cpu", seed: int = 0, *,
                 size: tuple[int, int], mean: Sequence[float], std: Sequence[float], augment: Augment | None = None,
                 dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.channels_last,
                 rank: int = 0, world_size: int = 1, bad_images: Literal["fail", "replace"] = "fail",
                 out: Tensor | None = None) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; use 1 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} of world_size={world_size}; ranks are 0 to world_size - 1")
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}; images are normalised, so it is a floating dtype")
        if memory_format not in (torch.channels_last, torch.contiguous_format):
            raise ConfigError(f"memory_format={memory_format}; use torch.channels_last or torch.contiguous_format")
        if bad_images not in BAD_IMAGES:
            raise ConfigError(f"unknown bad_images '{bad_images}'{did_you_mean(bad_images, BAD_IMAGES)}")
        if train and len(split) < batch_size * world_size:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            fix = f"--batch-size {len(split) // world_size} or less" if len(split) >= world_size else "fewer ranks"
            raise DataError(f"split '{split.name}' has {len(split)} images, fewer than one batch of {batch_size}{ranks}; use {fix}")
        self.split = split
        self.batch_size = batch_size
        self.train = train
        self.device = torch.device(device)
        self.seed = seed
        self.augment = augment or Augment()
        self.framing = Framing(size, self.augment, train)
        self.dtype = dtype
        self.memory_format = memory_format
        self.rank = rank
        self.world_size = world_size
        self.bad_images = bad_images
        self.epoch = 0
        self.replaced: dict[int, str] = {}
        self._position = 0  # images handed out this epoch: over all ranks in training, on this rank in evaluation
        self._resumed = False
        self._running: Generator[Batch, None, None] | None = None
        mean64, std64 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale, self._shift = (
            factor.float().repeat(size[0] * size[1]).to(self.device) for factor in (1 / (255 * std64), -mean64 / std64))
        self._targets = split.targets.to(self.device)
        self._out = out
        shape = (batch_size, 3, *size)
        if out is not None and (out.shape != shape or out.dtype != dtype or not out.is_contiguous(memory_format=memory_format)):
            raise ConfigError(f"out is {out.dtype} {list(out.shape)}; it must be {dtype} {list(shape)}, dense in {memory_format}")

    @abstractmethod
    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        """The batches asked for, in order, read ahead of their use. Closing it stops the reading."""

    def close(self) -> None:
        """Stop reading ahead and give back threads and processes; the loader can be iterated again."""
        self._stop()

    def __len__(self) -> int:
        if self.train:
            return len(self.split) // (self.batch_size * self.world_size)
        start, stop = self._shard()
        return -(-(stop - start) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self._stop()
        if not self._resumed:
            self._position = 0
        self._resumed = False
        self._running = self._batches()
        return self._running

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. Naming the epoch just loaded keeps the place in it."""
        if epoch < 0:
            raise ConfigError(f"epoch={epoch} is negative")
        if epoch != self.epoch:
            self._stop()
            self.epoch, self._position, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: what it has handed out counts as done. Plain integers."""
        return {"epoch": self.epoch, "position": self._position, "seed": self.seed, "size": len(self.split)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue exactly where the loader that gave ``state`` stood: the next iteration gives the rest of its epoch.

        A training state may be continued with another number of ranks if the global batch divides the place in the
        epoch, as it does when the global batch stays the same.

        Raises:
            ConfigError: the state is of other data or another seed, or falls between two batches.
        """
        for key, here in (("seed", self.seed), ("size", len(self.split))):
            if state[key] != here:
                raise ConfigError(f"the loader's state is of {key} {state[key]}, and this loader has {key} {here}; resume with the same data and seed")
        step = self.batch_size * (self.world_size if self.train else 1)
        position = state["position"]
        whole = len(self.split) // step * step if self.train else self._shard()[1] - self._shard()[0]
        if not 0 <= position <= whole or (position % step and position != whole):
            raise ConfigError(
                f"the loader's state is {position} images into the epoch, which is no whole number of batches of {step}; resume with the same global batch size")
        self._stop()
        self.epoch, self._position, self._resumed = state["epoch"], position, True

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _shard(self) -> tuple[int, int]:
        size = len(self.split)
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    def _places(self) -> list[tuple[int, int]]:
        """Where in the order of the epoch the remaining batches of this rank begin and end."""
        if self.train:
            step = self.batch_size * self.world_size
            starts = range(self._position, len(self.split) - step + 1, step)
            return [(start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size) for start in starts]
        start, stop = self._shard()
        return [(first, min(first + self.batch_size, stop)) for first in range(start + self._position, stop, self.batch_size)]

    def _batches(self) -> Generator[Batch, None, None]:
        order: NDArray[np.int64] | None = None
        if self.train:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
            order = torch.randperm(len(self.split), generator=generator).numpy()
        epoch, places = self.epoch, self._places()

        def requests() -> Iterator[Request]:
            for start, stop in places:
                if order is None:
                    yield Request(np.arange(start, stop), None)
                    continue
                candidates = None
                if self.augment.crop_scale is not None:
                    numbers = random_crop.uniforms(self.seed, epoch, start, stop - start)
                    candidates = random_crop.candidates(numbers, self.augment.crop_scale, self.augment.crop_ratio)
                yield Request(order[start:stop], candidates)

        with contextlib.closing(self._decode(requests())) as decoded:
            for (start, stop), (pixels, index) in zip(places, decoded, strict=True):
                numbers = random_crop.uniforms(self.seed, epoch, start, stop - start) if self.train else None
                self._position += (stop - start) * (self.world_size if self.train else 1)
                yield self._batch(pixels, index, numbers)

    def _batch(self, pixels: Tensor, index: NDArray[np.int64], numbers: NDArray[np.float64] | None) -> Batch:
        images = pixels.to(self.device, non_blocking=True)
        if numbers is not None and self.augment.pad:
            corners = torch.from_numpy(random_crop.offsets(numbers, self.augment.pad))
            images = crop(images, to_device(corners, self.device), self.augment.pad)
        if numbers is not None and self.augment.flip:
            images = mirror(images, to_device(torch.from_numpy(random_crop.mirrored(numbers)), self.device))
        where = to_device(torch.from_numpy(index), self.device)
        return Batch(self._normalize(images), self._targets.index_select(0, where), where)

    def _normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to normalised [B, 3, H, W]; on a GPU one kernel reads the bytes and writes the step's input."""
        count, height, width, _ = images.shape
        out = self._out if self.train else None
        if out is None:
            out = torch.empty((count, 3, height, width), dtype=self.dtype, device=self.device, memory_format=self.memory_format)
        target = out.permute(0, 2, 3, 1)
        if self.memory_format == torch.channels_last:
            # Factors repeated for every pixel: broadcasting over an inner dimension of three is slow.
            torch.addcmul(self._shift, images.view(count, -1), self._scale, out=target.view(count, -1))
        else:
            torch.addcmul(self._shift[:3], images, self._scale[:3], out=target)
        return out

    def _note_bad(self, found: Mapping[int, str]) -> None:
        """Count bad pictures, or stop because of them.

        Args:
            found: why they cannot be decoded, by their place in the split.

        Raises:
            DataError: they are not to be replaced, or there are too many of them.
        """
        names = [f"{show(self.split.files[i])} ({reason})" for i, reason in found.items()]
        where = f"split '{self.split.name}' of {show(self.split.root)}"
        if not self.train or self.bad_images == "fail":
            choice = " or train with --bad-images replace" if self.train else ""
            raise DataError(f"{where}: cannot decode {first_of(names)}; replace or delete it (fastokd data check finds all such files){choice}")
        self.replaced.update(found)
        limit = max(1, int(MAX_REPLACED * len(self.split)))
        if len(self.replaced) > limit:
            raise DataError(
                f"{where}: {len(self.replaced)} bad pictures, the last {first_of(names, 1)}; no more than {limit} are replaced: "
                f"mend the data (fastokd data check lists them)")
