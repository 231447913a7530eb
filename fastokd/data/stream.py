"""What loaders have in common that read and decode image files while the network trains.

They differ in who decodes: ``fastokd.data.dali`` or ``fastokd.data.torchvision_loader``. Order,
windows, mirroring, the place in the epoch, bad pictures, normalisation and mixing are decided here,
once for both.
"""

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastokd.data import random_crop
from fastokd.data.augment import Augment, Mixing, crop, mirror, mix, normalize
from fastokd.data.files import BAD_IMAGES, MAX_REPLACED, FileSplit
from fastokd.data.loader import Batch, LoaderBase, epoch_seed, to_device
from fastokd.errors import ConfigError, DataError, did_you_mean, escape, summarize

Options = TypeVar("Options")


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
        """What is covered before the centre is cut: ``size`` itself while training,
        ``Augment.evaluation_side`` of it else.
        """
        if self.train:
            return self.size
        height, width = (self.augment.evaluation_side(side) for side in self.size)
        return height, width


class Request(NamedTuple):
    """One batch to decode: images of the split int64 [B], and the windows' candidates [B, 22] of
    random resized crops.
    """

    framing: Framing
    index: NDArray[np.int64]
    candidates: NDArray[np.float64] | None


class Decoded(NamedTuple):
    """Pictures uint8 [B, H, W, 3], on any device, and the images of the split they really are,
    int64 [B].
    """

    pixels: Tensor
    index: NDArray[np.int64]


def scaled(picture: Tensor, framing: Framing) -> Tensor:
    """A picture uint8 [3, H, W], or the window that was drawn of it, brought to ``framing.size``:
    uint8 [height, width, 3].
    """
    from torchvision.transforms.v2 import functional as v2

    if framing.random:
        return v2.resize(picture, list(framing.size), antialias=True).permute(1, 2, 0)
    rows, columns = random_crop.cover(*picture.shape[1:], framing.cover_size)
    picture = v2.resize(picture, [rows, columns], antialias=True)
    return v2.crop(
        picture,
        random_crop.central(rows, framing.size[0]),
        random_crop.central(columns, framing.size[1]),
        *framing.size,
    ).permute(1, 2, 0)


class StreamLoader(LoaderBase, ABC):
    """Reads, decodes and augments the images of a split while the step computes.

    See ``LoaderBase`` for which images go where. Evaluation is in order and without augmentation,
    views or mixing.

    Which images a batch holds, and which window of each, depends on (seed, epoch, place in the
    epoch) alone: not on the number of workers, threads or ranks, nor on an interruption. The state
    is therefore the place in the epoch, and a resumed epoch continues with the images that were
    left, the same pixel for pixel.

    A new iteration ends the one before it.

    Args:
        split: the encoded images and their labels.
        batch_size: images per batch on this rank.
        train: training or evaluation.
        device: where the batches are made.
        seed: of the order and the augmentation.
        size: height and width of the images in a batch.
        mean, std: per channel, as fractions of 255: a pixel p becomes (p / 255 - mean) / std.
        num_classes: needed for mixing, whose targets are class probabilities.
        augment: the policy while training; evaluation takes from it alone how much is cut off
            (``evaluation_side``).
        views: how often each training image is cropped and mirrored anew for its batch.
        mixup, cutmix: alpha of each, see ``Mixing``. All views of a batch are mixed alike; the
            partner of an image is of the same rank, so that no picture is decoded twice.
        dtype: of the images; the arithmetic is float32.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``, of every view.
        rank, world_size: this process among all that share the split.
        bad_images: what a picture that cannot be decoded does to training: "fail" stops with its
            name; "replace" trains on the next image of its class that can be decoded, which
            ``replaced`` counts, and stops beyond one in a hundred. Evaluation always stops, because
            its accuracy is over all images.

    Attributes:
        replaced: bad pictures met so far by this process, by their place in the split, and why.

    Raises:
        ConfigError: a setting out of range.
        DataError: fewer training images than one batch on every rank.
    """

    def __init__(
        self,
        split: FileSplit,
        batch_size: int,
        train: bool,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int | None = None,
        augment: Augment | None = None,
        views: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        rank: int = 0,
        world_size: int = 1,
        bad_images: Literal["fail", "replace"] = "fail",
    ) -> None:
        super().__init__(
            split.name,
            len(split),
            batch_size,
            train,
            device,
            seed,
            dtype=dtype,
            memory_format=memory_format,
            rank=rank,
            world_size=world_size,
        )
        mixing = Mixing(mixup, cutmix)
        if views < 1:
            raise ConfigError(f"views={views}; use 1 or more")
        if mixing and num_classes is None:
            raise ConfigError(
                "mixup and cutmix need num_classes: their targets are class probabilities"
            )
        if bad_images not in BAD_IMAGES:
            raise ConfigError(
                f"unknown bad_images '{bad_images}'{did_you_mean(bad_images, BAD_IMAGES)}"
            )
        self.split = split
        self.augment = augment or Augment()
        self.mixing = mixing if train else Mixing()
        self.views = views if train else 1
        self.bad_images = bad_images
        self.replaced: dict[int, str] = {}
        self._num_classes = num_classes or 0
        self._targets = split.targets.to(self.device)
        self._running: Generator[Batch, None, None] | None = None
        mean64, std64 = (
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(std, dtype=torch.float64),
        )
        self._per_channel = 1 / (255 * std64), -mean64 / std64
        self._own_size = size
        self._frame(size)

    @abstractmethod
    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        """The batches asked for, in order, read ahead of their use. Closing it stops the
        reading.
        """

    def __iter__(self) -> Iterator[Batch]:
        self._stop()
        self._start_iteration()
        self._running = self._batches()
        return self._running

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._stop()
        super().set_epoch(epoch)

    def set_size(self, size: int | None) -> None:
        """Give square training images of this side from the next iteration on; None for the
        loader's own size.

        Saying the size that they have already changes nothing.

        Raises:
            ConfigError: a size out of range, an evaluation loader, or a buffer of another size that
                batches are written into.
        """
        if size is not None and size < 1:
            raise ConfigError(f"image size {size}; use 1 or more")
        if not self.train:
            raise ConfigError("only training images change their size; evaluation keeps its own")
        wanted = self._own_size if size is None else (size, size)
        if wanted == self.framing.size:
            return
        if self._out is not None:
            raise ConfigError(
                f"image size {wanted[0]} x {wanted[1]}: the buffer of write_into is for"
                f" {self.framing.size[0]} x {self.framing.size[1]}; call write_into(None) first,"
                " and give a buffer of the new size afterwards"
            )
        self._stop()
        self._frame(wanted)

    def write_into(self, out: Tensor | None) -> None:
        """Write every training batch into this buffer, for a step that reads its input from one
        address; None ends that.

        Args:
            out: [batch_size, 3, H, W], or [views, batch_size, 3, H, W], in the loader's dtype and
                memory format, on its device.

        Raises:
            ConfigError: a buffer of another shape, dtype, device or layout.
        """
        if out is not None:
            height, width = self.framing.size
            shape = (*([self.views] if self.views > 1 else []), self.batch_size, 3, height, width)
            dense = (
                out.flatten(0, -4).is_contiguous(memory_format=self.memory_format)
                if out.ndim > 3
                else False
            )
            if (
                out.shape != shape
                or out.dtype != self.dtype
                or out.device.type != self.device.type
                or not dense
            ):
                raise ConfigError(
                    f"the buffer is {out.dtype} {list(out.shape)} on {out.device}; it must be"
                    f" {self.dtype} {list(shape)} on {self.device}, dense in {self.memory_format}"
                )
        self._out = None if out is None else out.flatten(0, -4)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._stop()
        super().load_state_dict(state)

    def close(self) -> None:
        """Stop reading ahead and give back threads and processes; the loader can be iterated
        again.
        """
        self._stop()

    def _frame(self, size: tuple[int, int]) -> None:
        if self.augment.padding == "reflect" and self.augment.pad >= min(size):
            raise ConfigError(
                f"pad={self.augment.pad} by reflection needs larger images than {size[0]} x"
                f" {size[1]}; use a smaller pad"
            )
        self.framing = Framing(size, self.augment, self.train)
        self._scale, self._shift = (
            factor.float().repeat(size[0] * size[1]).to(self.device) for factor in self._per_channel
        )
        self._out: Tensor | None = None

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _places(self) -> list[tuple[int, int]]:
        """Where in the order of the epoch the remaining batches of this rank begin and end."""
        if self.train:
            starts = range(
                self._position + self.rank * self.batch_size,
                self._count - self._step + self.rank * self.batch_size + 1,
                self._step,
            )
            return [(start, start + self.batch_size) for start in starts]
        start, stop = self._shard()
        return [
            (first, min(first + self.batch_size, stop))
            for first in range(start + self._position, stop, self.batch_size)
        ]

    def _numbers(self, epoch: int, start: int, stop: int) -> NDArray[np.float64]:
        """What is random about the pictures of a batch, view after view: [K * B, NUMBERS]."""
        return np.concatenate(
            [
                random_crop.uniforms(self.seed, epoch, start, stop - start, view)
                for view in range(self.views)
            ]
        )

    def _batches(self) -> Generator[Batch, None, None]:
        epoch, framing, places = self.epoch, self.framing, self._places()
        order = np.arange(self._count)
        if self.train:
            order = torch.randperm(
                self._count, generator=torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            ).numpy()
        mixes = (
            self.mixing.draw(len(self), epoch_seed(self.seed, epoch, "/mix"))
            if self.mixing
            else None
        )

        def requests() -> Iterator[Request]:
            for start, stop in places:
                candidates = None
                if framing.random and framing.augment.crop_scale is not None:
                    candidates = random_crop.candidates(
                        self._numbers(epoch, start, stop),
                        framing.augment.crop_scale,
                        framing.augment.crop_ratio,
                    )
                yield Request(framing, np.tile(order[start:stop], self.views), candidates)

        with contextlib.closing(self._decode(requests())) as decoded:
            for (start, stop), (pixels, index) in zip(places, decoded, strict=True):
                numbers = self._numbers(epoch, start, stop) if self.train else None
                choice = None if mixes is None else mixes[self._position // self._step]
                self._position += self._step if self.train else stop - start
                yield self._batch(pixels, index, numbers, choice)

    def _batch(
        self,
        pixels: Tensor,
        index: NDArray[np.int64],
        numbers: NDArray[np.float64] | None,
        choice: Tensor | None,
    ) -> Batch:
        images = pixels.to(self.device, non_blocking=True)
        if numbers is not None and self.augment.pad:
            corners = torch.from_numpy(random_crop.offsets(numbers, self.augment.pad))
            images = crop(
                images, to_device(corners, self.device), self.augment.pad, self.augment.padding
            )
        if numbers is not None and self.augment.flip:
            images = mirror(
                images, to_device(torch.from_numpy(random_crop.mirrored(numbers)), self.device)
            )
        where = to_device(torch.from_numpy(index), self.device)[: len(index) // self.views]
        target = self._targets.index_select(0, where)
        out = self._out if self.train else None
        if out is None:
            out = torch.empty(
                (len(index), 3, *images.shape[1:3]),
                dtype=self.dtype,
                device=self.device,
                memory_format=self.memory_format,
            )
        if choice is None:
            self._normalize(images, out)
        else:
            clean = normalize(images, self._scale, self._shift).unflatten(0, (self.views, -1))
            mixed, target = mix(
                clean,
                clean.flip(1),
                target,
                target.flip(0),
                to_device(choice, self.device),
                self._num_classes,
            )
            out.copy_(mixed.flatten(0, 1).permute(0, 3, 1, 2))
        return Batch(out if self.views == 1 else out.unflatten(0, (self.views, -1)), target, where)

    def _normalize(self, images: Tensor, out: Tensor) -> None:
        """uint8 [B, H, W, 3] to normalised [B, 3, H, W]; on a GPU one kernel reads the bytes and
        writes the step's input.
        """
        target = out.permute(0, 2, 3, 1)
        if self.memory_format == torch.channels_last:
            # Factors repeated for every pixel: broadcasting over an inner dimension of three is
            # slow.
            torch.addcmul(self._shift, images.flatten(1), self._scale, out=target.flatten(1))
        else:
            torch.addcmul(self._shift[:3], images, self._scale[:3], out=target)

    def _note_bad(self, found: Mapping[int, str]) -> None:
        """Count bad pictures, or stop because of them.

        Args:
            found: why they cannot be decoded, by their place in the split.

        Raises:
            DataError: they are not to be replaced, or there are too many of them.
        """
        names = [f"{escape(self.split.files[i])} ({reason})" for i, reason in found.items()]
        where = f"split '{self.split.name}' of {escape(self.split.root)}"
        if not self.train or self.bad_images == "fail":
            choice = ", or train with --bad-images replace" if self.train else ""
            raise DataError(
                f"{where}: cannot decode {summarize(names)}; replace or delete what 'fastokd data"
                f" check' finds{choice}"
            )
        self.replaced.update(found)
        limit = math.ceil(MAX_REPLACED * len(self.split))
        if len(self.replaced) > limit:
            raise DataError(
                f"{where}: {len(self.replaced)} bad pictures, the last {summarize(names[-1:])}; no"
                f" more than {limit} are replaced: mend what 'fastokd data check' finds"
            )


def stand_in(split: FileSplit, index: int, bad: Container[int]) -> int:
    """The next image of the same class that is not bad, from the last one on to the first.

    Raises:
        DataError: all are bad.
    """
    same = (split.targets == split.targets[index]).nonzero().flatten().tolist()
    place = same.index(index)
    for other in same[place + 1 :] + same[:place]:
        if other not in bad:
            return other
    raise DataError(
        f"split '{split.name}' of {escape(split.root)}: none of the {len(same)} images of the class"
        f" of {escape(split.files[index])} can be decoded; mend what 'fastokd data check' finds"
    )


def read_options(kind: type[Options], given: "Options | Mapping[str, Any] | None") -> Options:
    """A loader's options from a mapping, as a configuration has them.

    Raises:
        ConfigError: an unknown option, a value of another type or out of range.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    assert isinstance(given, Mapping)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in fields:
            raise ConfigError(f"unknown loader option '{name}'{did_you_mean(name, fields)}")
        default = fields[name].default
        expected = int if default is None else type(default)
        if isinstance(value, bool) != (expected is bool) or not isinstance(
            value, (int, float) if expected is float else expected
        ):
            raise ConfigError(
                f"loader option {name}={value!r}: it must be {'a' if expected is not int else 'an'}"
                f" {expected.__name__}"
            )
    return kind(**given)
