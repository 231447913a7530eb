"""The base class of loaders that read and decode image files while the network trains.

``fastokd.data.dali`` and ``fastokd.data.torchvision_loader`` decode. Order, crop windows, flips,
the position in the epoch, corrupt images, normalization and mixing are decided here for both.
"""

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastokd.data import loader, random_crop
from fastokd.data.augment import Augment, crop, erase, flip, jitter, mix, normalize
from fastokd.data.decoding import central_part
from fastokd.data.files import MAX_REPLACED, FileSplit, check_bad_images
from fastokd.data.loader import Batch, LoaderBase, LoaderSettings
from fastokd.data.policies import PolicyDraws, apply_policy
from fastokd.errors import ConfigError, DataError, did_you_mean, escape, summarize

Options = TypeVar("Options")


@dataclass(frozen=True)
class Framing:
    """The mapping of a decoded image to one of ``size``.

    Args:
        size: height and width of the result.
        augment: a random resized crop if it has a ``crop_scale`` and ``train``.
        train: otherwise the image is scaled until it covers ``cover_size``, and its center is
            cropped.
    """

    size: tuple[int, int]
    augment: Augment
    train: bool

    @property
    def random(self) -> bool:
        """True if crop windows are drawn."""
        return self.train and self.augment.crop_scale is not None

    @property
    def cover_size(self) -> tuple[int, int]:
        """The size to cover before the center crop: ``size`` while training, else
        ``Augment.evaluation_side`` of it.
        """
        if self.train:
            return self.size
        height, width = (self.augment.evaluation_side(side) for side in self.size)
        return height, width


class Request(NamedTuple):
    """One batch to decode: indices in the split int64 [B], the candidates [B, 22] for crop windows
    of random resized crops, and the choices for crop, flip and policy if there is a policy, which
    the decoder then applies.
    """

    framing: Framing
    indices: NDArray[np.int64]
    candidates: NDArray[np.float64] | None
    draws: PolicyDraws | None = None


class Decoded(NamedTuple):
    """Images uint8 [B, H, W, 3] on any device, and their actual indices in the split, int64 [B]."""

    pixels: Tensor
    indices: NDArray[np.int64]


def scaled(image: Tensor, framing: Framing) -> Tensor:
    """An image uint8 [3, H, W], or its crop window, scaled to ``framing.size``: uint8 [height,
    width, 3].
    """
    from torchvision.transforms.v2 import functional as v2

    if framing.random:
        return v2.resize(image, list(framing.size), antialias=True).permute(1, 2, 0)
    left, top, right, bottom = central_part(image.shape[2], image.shape[1])
    image = image[:, top:bottom, left:right]
    height, width = image.shape[1:]
    rows, columns = random_crop.cover(height, width, framing.cover_size)
    image = v2.resize(image, [rows, columns], antialias=True)
    top = random_crop.central(rows, framing.size[0])
    left = random_crop.central(columns, framing.size[1])
    return v2.crop(image, top, left, *framing.size).permute(1, 2, 0)


def with_policy(images: Tensor, augment: Augment, draws: PolicyDraws) -> Tensor:
    """Crop, flip and apply the policy to images uint8 [B, H, W, 3] on the CPU."""
    if augment.pad:
        images = crop(images, draws.offsets, augment.pad, augment.padding)
    if augment.flip:
        images = flip(images, draws.flipped)
    seeds = random_crop.policy_seeds(draws.numbers).tolist()
    return apply_policy(images, augment.policy, augment.policy_options, seeds)


@dataclass(frozen=True, kw_only=True)
class StreamSettings(LoaderSettings):
    """Settings of loaders that decode files, in addition to ``LoaderSettings``. The partner of a
    mixed image is on the same rank, so that no image is decoded twice. Evaluation uses only
    ``evaluation_side`` of the augmentation policy.

    Args:
        size: height and width of the images in a batch.
        bad_images: the policy for training images that cannot be decoded: "fail" stops with the
            name; "replace" uses the next image of the class that can be decoded, counts it in
            ``replaced``, and stops above 1 %. Evaluation always stops, because its accuracy is over
            all images.
    """

    size: tuple[int, int]
    bad_images: str = "fail"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bad_images(self.bad_images)


class StreamLoader(LoaderBase, ABC):
    """Read, decode and augment the images of a split while the step computes.

    See ``LoaderBase`` for the images of each batch. A batch's images and crop windows depend only
    on (seed, epoch, position in the epoch), independent of workers, threads, ranks and
    interruptions. The position is therefore the whole state, and a resumed epoch continues with the
    remaining images, identical pixel for pixel. A new iteration ends the previous one.

    Args:
        split, batch_size, train, device, seed: see ``LoaderBase``.
        settings: the fields of ``StreamSettings``.

    Attributes:
        replaced: for each corrupt image that this process has met, by its index, the reason.

    Raises:
        ConfigError, DataError: as ``LoaderBase``.
    """

    def __init__(
        self,
        split: FileSplit,
        batch_size: int,
        train: bool,
        device: torch.device | str = "cpu",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        stream = StreamSettings(**settings)
        super().__init__(split, batch_size, train, device, seed, stream)
        self.split = split
        self.augment = stream.augment or Augment()
        self.bad_images = stream.bad_images
        self.replaced: dict[int, str] = {}
        self._targets = split.targets.to(self.device)
        self._running: Generator[Batch, None, None] | None = None
        self._base_size = stream.size
        self._frame(stream.size)

    @abstractmethod
    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        """The requested batches, in order, read ahead. Closing the generator stops the reading."""

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
        """Return square training images of this side from the next iteration on; None restores the
        loader's size. The current size changes nothing.

        Raises:
            ConfigError: a size out of range, an evaluation loader, or a ``write_into`` buffer of
                another size.
        """
        if size is not None and size < 1:
            raise ConfigError(f"image size {size}; use 1 or more")
        if not self.train:
            raise ConfigError("only training images change their size; evaluation keeps its own")
        wanted = self._base_size if size is None else (size, size)
        if wanted == self.framing.size:
            return
        if self._out is not None:
            new, old = (" x ".join(map(str, size)) for size in (wanted, self.framing.size))
            problem = f"image size {new}: the buffer of write_into is for {old}"
            raise ConfigError(f"{problem}; call write_into(None) first, then pass a new buffer")
        self._stop()
        self._frame(wanted)

    def write_into(self, out: Tensor | None) -> None:
        """Write every training batch into this buffer, for a step that reads its input from a fixed
        address; None ends that.

        Args:
            out: [batch_size, 3, H, W], or [views, batch_size, 3, H, W], in the loader's dtype and
                memory format, on its device.

        Raises:
            ConfigError: a buffer of another shape, dtype, device or layout.
        """
        views = [self.views] if self.views > 1 else []
        shape = [*views, self.batch_size, 3, *self.framing.size]
        if out is not None and (
            list(out.shape) != shape
            or out.dtype != self.dtype
            or out.device.type != self.device.type
            or not out.flatten(0, -4).is_contiguous(memory_format=self.memory_format)
        ):
            given = f"{out.dtype} {list(out.shape)} on {out.device}"
            wanted = f"{self.dtype} {shape} on {self.device}, dense in {self.memory_format}"
            raise ConfigError(f"the buffer is {given}; it must be {wanted}")
        self._out = None if out is None else out.flatten(0, -4)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._stop()
        super().load_state_dict(state)

    def close(self) -> None:
        """Stop reading ahead and release threads and processes; a later iteration starts them."""
        self._stop()

    def _frame(self, size: tuple[int, int]) -> None:
        loader.check_padding(self.augment, *size)
        self.framing = Framing(size, self.augment, self.train)
        self._scale, self._shift = self._normalization(*size)
        self._out = None

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _ranges(self) -> list[tuple[int, int]]:
        """Start and stop, in the order of the epoch, of the remaining batches of this rank."""
        if self.train:
            first = self._position + self.rank * self.batch_size
            last = self._count - self._step + self.rank * self.batch_size
            starts = range(first, last + 1, self._step)
            return [(start, start + self.batch_size) for start in starts]
        start, stop = self._shard()
        starts = range(start + self._position, stop, self.batch_size)
        return [(first, min(first + self.batch_size, stop)) for first in starts]

    def _numbers(
        self, epoch: int, start: int, stop: int, purpose: str = "augment"
    ) -> NDArray[np.float64]:
        """The random numbers of a batch's images, view after view: [K * B, NUMBERS]."""
        count = stop - start
        parts = [
            random_crop.uniforms(self.seed, epoch, start, count, view, purpose)
            for view in range(self.views)
        ]
        return np.concatenate(parts)

    def _draws(self, epoch: int, start: int, stop: int) -> PolicyDraws | None:
        """The choices of a batch for a policy; None without one."""
        if not (self.train and self.augment.has_policy):
            return None
        numbers = self._numbers(epoch, start, stop)
        offsets = torch.from_numpy(random_crop.offsets(numbers, self.augment.pad))
        flipped = torch.from_numpy(random_crop.flipped(numbers) & self.augment.flip)
        return PolicyDraws(offsets, flipped, self._numbers(epoch, start, stop, "policy"))

    def _batches(self) -> Generator[Batch, None, None]:
        epoch, framing, ranges = self.epoch, self.framing, self._ranges()
        order, mixes = np.arange(self._count), None
        if self.train:
            generator = torch.Generator().manual_seed(loader.epoch_seed(self.seed, epoch))
            order = torch.randperm(self._count, generator=generator).numpy()
        if self.mixing:
            mixes = self.mixing.draw(len(self), loader.epoch_seed(self.seed, epoch, "/mix"))

        def requests() -> Iterator[Request]:
            policy = framing.augment
            for start, stop in ranges:
                candidates = None
                if framing.random and policy.crop_scale is not None:
                    numbers = self._numbers(epoch, start, stop)
                    candidates = random_crop.candidates(
                        numbers, policy.crop_scale, policy.crop_ratio
                    )
                indices = np.tile(order[start:stop], self.views)
                yield Request(framing, indices, candidates, self._draws(epoch, start, stop))

        with contextlib.closing(self._decode(requests())) as decoded:
            for (start, stop), (pixels, indices) in zip(ranges, decoded, strict=True):
                where = (epoch, start, stop) if self.train else None
                choice = None if mixes is None else mixes[self._position // self._step]
                self._position += self._step if self.train else stop - start
                yield self._batch(pixels, indices, where, choice)

    def _batch(
        self,
        pixels: Tensor,
        indices: NDArray[np.int64],
        where: tuple[int, int, int] | None,
        choice: Tensor | None,
    ) -> Batch:
        images, boxes = pixels.to(self.device, non_blocking=True), None
        if where is not None:
            images = self._augmented(images, where)
            if self.augment.erasing:
                numbers = self._numbers(*where, "erase")
                drawn = random_crop.erasures(numbers, self.augment.erasing, self.framing.size)
                boxes = loader.to_device(torch.from_numpy(drawn), self.device)
        count = len(indices) // self.views
        index = loader.to_device(torch.from_numpy(indices), self.device)[:count]
        target = self._targets.index_select(0, index)
        out = self._out if self.train else None
        if out is None:
            out = torch.empty(
                (len(indices), 3, *images.shape[1:3]),
                dtype=self.dtype,
                device=self.device,
                memory_format=self.memory_format,
            )
        pixels = out.permute(0, 2, 3, 1)
        if choice is not None:
            clean = normalize(images, self._scale, self._shift)
            clean = clean if boxes is None else erase(clean, boxes)
            clean = clean.unflatten(0, (self.views, -1))
            choice = loader.to_device(choice, self.device)
            mixed, target = mix(
                clean, clean.flip(1), target, target.flip(0), choice, self._num_classes
            )
            pixels.copy_(mixed.flatten(0, 1))
        # On a GPU, one kernel reads the bytes and writes the step's input.
        elif self.memory_format == torch.channels_last:
            torch.addcmul(self._shift, images.flatten(1), self._scale, out=pixels.flatten(1))
        else:
            torch.addcmul(self._shift[:3], images, self._scale[:3], out=pixels)
        if choice is None and boxes is not None:
            pixels.copy_(erase(pixels, boxes))
        return Batch(out if self.views == 1 else out.unflatten(0, (self.views, -1)), target, index)

    def _augmented(self, images: Tensor, where: tuple[int, int, int]) -> Tensor:
        """Decoded images uint8 [K * B, H, W, 3] of (epoch, start, stop) with random crops, flips
        and jitter. With a policy, the decoder has already cropped and flipped them.
        """
        is_done = self.augment.has_policy or not (self.augment.pad or self.augment.flip)
        numbers = None if is_done else self._numbers(*where)
        if numbers is not None and self.augment.pad:
            corners = torch.from_numpy(random_crop.offsets(numbers, self.augment.pad))
            corners = loader.to_device(corners, self.device)
            images = crop(images, corners, self.augment.pad, self.augment.padding)
        if numbers is not None and self.augment.flip:
            flipped = torch.from_numpy(random_crop.flipped(numbers))
            images = flip(images, loader.to_device(flipped, self.device))
        if self.augment.color_jitter:
            numbers = self._numbers(*where, "jitter")
            choices = torch.from_numpy(random_crop.jitters(numbers, self.augment.color_jitter))
            images = jitter(images, loader.to_device(choices, self.device))
        return images

    def _note_corrupt(self, corrupt: Mapping[int, str]) -> None:
        """Count corrupt images, or stop because of them.

        Args:
            corrupt: the reason for each, by its index in the split.

        Raises:
            DataError: they must not be replaced, or there are too many.
        """
        names = [f"{escape(self.split.files[i])} ({reason})" for i, reason in corrupt.items()]
        where, checked = self.split.where, "what 'fastokd data check' finds"
        if not self.train or self.bad_images == "fail":
            choice = ", or train with --bad-images replace" if self.train else ""
            fix = f"replace or delete {checked}{choice}"
            raise DataError(f"{where}: cannot decode {summarize(names)}; {fix}")
        self.replaced.update(corrupt)
        limit = math.ceil(MAX_REPLACED * len(self.split))
        if len(self.replaced) > limit:
            found = f"{len(self.replaced)} corrupt images, the last {names[-1]}"
            raise DataError(f"{where}: {found}; at most {limit} are replaced: fix {checked}")


def check_options(options: object, **rules: tuple[float, float] | Collection[str]) -> None:
    """Raise ``ConfigError`` for an option outside its range (lower and upper bound, with
    ``math.inf`` for none) or its choices. None is allowed.
    """
    for name, rule in rules.items():
        value = getattr(options, name)
        if isinstance(value, str):
            choices = cast("Collection[str]", rule)
            if value not in choices:
                raise ConfigError(f"unknown {name} '{value}'{did_you_mean(value, choices)}")
        elif value is not None:
            low, high = cast("tuple[float, float]", rule)
            if not low <= value <= high:
                words = f"{low} or more" if high == math.inf else f"in [{low}, {high}]"
                raise ConfigError(f"{name}={value}: it must be {words}")


def read_options(kind: type[Options], given: "Options | Mapping[str, Any] | None") -> Options:
    """A loader's options from a mapping, as in a configuration.

    Raises:
        ConfigError: an unknown option, a value of another type or out of range.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    values = cast("Mapping[str, Any]", given)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"unknown loader option '{name}'{did_you_mean(name, fields)}")
        default = fields[name].default
        expected = int if default is None else type(default)
        allowed = (int, float) if expected is float else expected
        if isinstance(value, bool) != (expected is bool) or not isinstance(value, allowed):
            kind_name = f"{'an' if expected is int else 'a'} {expected.__name__}"
            raise ConfigError(f"loader option {name}={value!r}: it must be {kind_name}")
    return kind(**values)
