"""The resident loader: the whole split lies decoded on the device, and batches are made there.

Order and augmentation are a function of (seed, epoch, position in the epoch) alone. Neither the
device, nor the number of processes, nor an interruption changes which images a global batch holds,
or how they are cropped and mixed.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data.augment import Augment, Mixing, crop, mirror, mix, normalize
from fastokd.data.dataset import Split
from fastokd.data.loader import Batch, LoaderBase, LoaderKind, epoch_seed, to_device
from fastokd.errors import ConfigError, DataError


class ResidentLoader(LoaderBase):
    """Keeps a whole split as uint8 on the device, and shuffles, augments and normalises there.

    See ``LoaderBase`` for which images go where. Evaluation is in order and without augmentation,
    views or mixing.

    All that is random in an epoch is drawn when the epoch begins and lies in tensors that never
    move. ``gather`` makes a batch of them by tensor operations alone, without the host: a captured
    CUDA graph may hold it, and replays it with another step, and after ``set_epoch`` with another
    epoch.

    Args:
        split: the images and labels.
        batch_size: images per batch on this rank.
        train: training or evaluation.
        device: where the split is kept and the batches are made.
        seed: of the order and the augmentation.
        mean, std: per channel, as fractions of 255: a pixel p becomes (p / 255 - mean) / std.
        num_classes: needed for mixing, whose targets are class probabilities.
        augment: augmentation while training.
        views: how often each training image is cropped and mirrored anew for its batch.
        mixup, cutmix: alpha of each, see ``Mixing``. All views of a batch are mixed alike.
        dtype: of the images; the arithmetic is float32.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``, of every view.
        rank, world_size: this process among all that share the split.

    Raises:
        ConfigError: a setting out of range.
        DataError: fewer training images than one batch on every rank, or a device too small for the
            split.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        train: bool,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
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
        self.augment = (augment or Augment()) if train else Augment()
        self.mixing = mixing if train else Mixing()
        self.views = views if train else 1
        self._height, self._width = split.images.shape[2:]
        if self.augment.padding == "reflect" and self.augment.pad >= min(self._height, self._width):
            raise ConfigError(
                f"pad={self.augment.pad} by reflection needs larger images than {self._height} x"
                f" {self._width}; use a smaller pad"
            )
        _check_device_memory(split, self.device)
        self._images = split.images.permute(0, 2, 3, 1).contiguous().to(self.device)  # [N, H, W, C]
        self._targets = split.targets.to(self.device)
        self._num_classes = num_classes or 0
        mean64, std64 = (
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(std, dtype=torch.float64),
        )
        self._scale, self._shift = (
            factor.float().repeat(self._height * self._width).to(self.device)
            for factor in (1 / (255 * std64), -mean64 / std64)
        )
        self._resized: int | None = None
        self._drawn: int | None = None  # the epoch that the choices below are of
        if train:
            here, count = self.device, len(split)
            self._steps = torch.arange(len(self), device=here)
            self._places = rank * batch_size + torch.arange(
                batch_size, device=here
            )  # within the global batch
            self._order = torch.zeros(count, dtype=torch.int64, device=here)
            self._offsets = torch.zeros(views, count, 2, dtype=torch.int64, device=here)
            self._mirrored = torch.zeros(views, count, dtype=torch.bool, device=here)
            self._mixes = torch.zeros(len(self), 5, device=here)

    def __iter__(self) -> Iterator[Batch]:
        self._start_iteration()
        return self._train_batches() if self.train else self._eval_batches()

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.train:
            self._draw()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        super().load_state_dict(state)
        if self.train:
            self._draw()

    def set_size(self, size: int | None) -> None:
        """Resize training images to this side, antialiased, after they are augmented; None for
        their own size.

        What was captured before gives the size it was captured with.

        Raises:
            ConfigError: a size out of range.
        """
        if size is not None and not 1 <= size <= min(self._height, self._width):
            raise ConfigError(
                f"image size {size}: the images are {self._height} x {self._width}; use a smaller"
                " size, or open them larger with --image-size"
            )
        self._resized = None if size == self._height == self._width else size

    @property
    def side(self) -> int | None:
        """What ``set_size`` has set: what a captured ``gather`` goes on giving."""
        return self._resized

    def gather(self, step: Tensor) -> Batch:
        """The training batch of a step of this epoch, by tensor operations alone: nothing is read
        on the host.

        Args:
            step: int64 [] or [1] on the loader's device, below ``len(self)``.
        """
        if self._drawn is None:
            self._draw()
        start = step * self._step
        places = start + self._places
        index = self._order.index_select(0, places)
        pixels, target = self._augmented(places, index), self._targets.index_select(0, index)
        if self.mixing:
            # The partner is the image as far from the other end of the global batch, so no rank's
            # part of it depends on the number of ranks.
            partners = start + self._step - 1 - self._places
            others = self._order.index_select(0, partners)
            choice = self._mixes.index_select(0, step.view(1)).view(-1)
            pixels, target = mix(
                pixels,
                self._augmented(partners, others),
                target,
                self._targets.index_select(0, others),
                choice,
                self._num_classes,
            )
        return Batch(self._finish(pixels, self._resized), target, index)

    def mark_done(self, steps: int) -> None:
        """Say that this many batches of the epoch are done, for ``state_dict``, when they came from
        ``gather``.
        """
        self._position = steps * self._step

    def _draw(self) -> None:
        """Draw the epoch's choices, on the CPU, into the tensors that ``gather`` reads."""
        if self._drawn == self.epoch:
            return
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        choices = [(self._order, torch.randperm(self._count, generator=generator))]
        for view in range(self.views):
            offsets, mirrored = self.augment.draw(self._count, generator)
            choices += [(self._offsets[view], offsets), (self._mirrored[view], mirrored)]
        if self.mixing:
            choices.append(
                (
                    self._mixes,
                    self.mixing.draw(len(self), epoch_seed(self.seed, self.epoch, "/mix")),
                )
            )
        for buffer, drawn in choices:
            buffer.copy_(to_device(drawn, self.device))
        self._drawn = self.epoch

    def _augmented(self, places: Tensor, index: Tensor) -> Tensor:
        """The images of the epoch's ``places``, int64 [B], which are ``index``; float32 [K * B, H,
        W, C], normalised.
        """
        images = self._images.index_select(0, index.repeat(self.views))
        if self.augment.pad:
            images = crop(
                images,
                self._offsets.index_select(1, places).flatten(0, 1),
                self.augment.pad,
                self.augment.padding,
            )
        if self.augment.flip:
            images = mirror(images, self._mirrored.index_select(1, places).flatten())
        return normalize(images, self._scale, self._shift)

    def _finish(self, pixels: Tensor, size: int | None) -> Tensor:
        """Normalised pixels [K * B, H, W, C] as [B, C, H, W] or, for more than one view, [K, B, C,
        H, W].
        """
        images = pixels.permute(0, 3, 1, 2)
        if size is not None:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        images = images.to(self.dtype).contiguous(memory_format=self.memory_format)
        return images if self.views == 1 else images.unflatten(0, (self.views, -1))

    def _train_batches(self) -> Iterator[Batch]:
        self._draw()
        while self._position + self._step <= self._count:
            step = self._position // self._step
            self._position += self._step
            yield self.gather(self._steps[step])

    def _eval_batches(self) -> Iterator[Batch]:
        start, stop = self._shard()
        while start + self._position < stop:
            first = start + self._position
            last = min(first + self.batch_size, stop)
            self._position += last - first
            pixels = normalize(self._images[first:last], self._scale, self._shift)
            index = torch.arange(first, last, device=self.device)
            yield Batch(self._finish(pixels, None), self._targets[first:last], index)


def _check_device_memory(split: Split, device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed, free = split.images.nbytes, torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise DataError(
            f"split '{split.name}' takes {needed / 2**30:.3g} GiB on {device}, which has"
            f" {free / 2**30:.3g} GiB free; use a smaller --image-size, fewer images, or --loader"
            " dali or torchvision, which decode while training"
        )


LOADER = LoaderKind(ResidentLoader, decoded=True)
