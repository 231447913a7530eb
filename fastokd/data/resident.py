"""The resident loader: the whole decoded split is on the device, and batches are made there.

Order and augmentation depend only on (seed, epoch, position in the epoch). The images of a global
batch, their crops and their mixing are independent of the device, the number of processes and
interruptions.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data import loader, random_crop
from fastokd.data.augment import Augment, crop, erase, flip, jitter, mix, normalize
from fastokd.data.dataset import Split
from fastokd.data.loader import Batch, LoaderBase, LoaderKind, LoaderSettings
from fastokd.data.policies import POLICIES, apply_policy
from fastokd.errors import ConfigError, DataError


class ResidentLoader(LoaderBase):
    """Keep a whole split as uint8 on the device, and shuffle, augment and normalize there.

    See ``LoaderBase`` for the images of each batch. All random choices of an epoch are drawn when
    it begins, into tensors that never move. ``gather`` makes a batch of them with tensor operations
    alone, so a captured CUDA graph may contain it, and replays it for other steps and epochs. A
    policy is the exception: the split then stays in host memory, where one thread applies the
    policy to one image after another.

    Args:
        split, batch_size, train, device, seed: see ``LoaderBase``; the split is kept on the device.
        settings: the fields of ``LoaderSettings``.

    Raises:
        ConfigError, DataError: as ``LoaderBase``, or for a device too small for the split.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        train: bool,
        device: torch.device | str = "cpu",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(split, batch_size, train, device, seed, LoaderSettings(**settings))
        self.augment = (self.settings.augment or Augment()) if train else Augment()
        self._height, self._width = split.images.shape[2:]
        loader.check_padding(self.augment, self._height, self._width)
        self._home = torch.device("cpu") if self.augment.has_policy else self.device
        _check_device_memory(split, self._home)
        self._images = split.images.permute(0, 2, 3, 1).contiguous().to(self._home)  # [N, H, W, C]
        self._targets = split.targets.to(self._home)
        self._scale, self._shift = self._normalization(self._height, self._width)
        self._resized: int | None = None
        self._drawn: int | None = None  # the epoch of the choices below
        self._make_batch = self._batch
        if train:
            device, count, views = self._home, len(split), self.views
            self._steps = torch.arange(len(self), device=device)
            # Positions of this rank's images within the global batch
            self._positions = self.rank * batch_size + torch.arange(batch_size, device=device)
            self._order = torch.zeros(count, dtype=torch.int64, device=device)
            self._offsets = torch.zeros(views, count, 2, dtype=torch.int64, device=device)
            self._flipped = torch.zeros(views, count, dtype=torch.bool, device=device)
            self._mixes = torch.zeros(len(self), 5, device=device)
            jittered, erased = bool(self.augment.color_jitter), bool(self.augment.erasing)
            self._jitters = torch.zeros(views, count * jittered, 3, 2, device=device)
            self._boxes = torch.zeros(views, count * erased, 4, dtype=torch.int64, device=device)
            self._seeds = torch.zeros(
                views, count * self.augment.has_policy, dtype=torch.int64, device=device
            )

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
        """Resize training images to this side, antialiased, after augmentation; None restores their
        size. CUDA graphs captured before keep the size at capture.

        Raises:
            ConfigError: a size out of range.
        """
        if size is not None and not 1 <= size <= min(self._height, self._width):
            images = f"the images are {self._height} x {self._width}"
            fix = "use a smaller size, or open them larger with --image-size"
            raise ConfigError(f"image size {size}: {images}; {fix}")
        self._resized = None if size == self._height == self._width else size

    @property
    def side(self) -> int | None:
        """The side set by ``set_size``; a captured ``gather`` keeps it."""
        return self._resized

    @property
    def capturable(self) -> bool:
        """True if ``gather`` consists of operations on the device, as without a policy."""
        return not self.augment.has_policy

    def gather(self, step: Tensor) -> Batch:
        """The training batch of a step of this epoch, by tensor operations alone, without the host.

        Args:
            step: int64 [] or [1] on the loader's device (with a policy: on the CPU), below
                ``len(self)``.
        """
        if self._drawn is None:
            self._draw()
        return self._make_batch(step)

    def compile(self) -> None:
        """Make batches in ``gather`` by few kernels, with ``torch.compile``; once is enough."""
        if self.capturable and self._make_batch == self._batch:
            self._make_batch = torch.compile(self._batch)

    def _batch(self, step: Tensor) -> Batch:
        start = step * self._step
        positions = start + self._positions
        index = self._order.index_select(0, positions)
        pixels = self._augmented(positions, index)
        target = self._moved(self._targets.index_select(0, index))
        if self.mixing:
            # Partners are counted from the other end of the global batch, so that pairs do not
            # depend on the number of ranks.
            partners = start + self._step - 1 - self._positions
            others = self._order.index_select(0, partners)
            choice = self._mixes.index_select(0, step.view(1)).view(-1)
            pixels, target = mix(
                pixels,
                self._augmented(partners, others),
                target,
                self._moved(self._targets.index_select(0, others)),
                self._moved(choice),
                self._num_classes,
            )
        return Batch(self._finish(pixels, self._resized), target, self._moved(index))

    def _moved(self, values: Tensor) -> Tensor:
        """Values of the split's device on the device of the batches."""
        return loader.to_device(values, self.device) if self.augment.has_policy else values

    def mark_done(self, steps: int) -> None:
        """Set the position for ``state_dict`` after this many batches came from ``gather``."""
        self._position = steps * self._step

    def _draw(self) -> None:
        """Draw the epoch's random choices on the CPU into the tensors that ``gather`` reads."""
        if self._drawn == self.epoch:
            return
        generator = torch.Generator().manual_seed(loader.epoch_seed(self.seed, self.epoch))
        choices = [(self._order, torch.randperm(self._count, generator=generator))]
        for view in range(self.views):
            offsets, flipped = self.augment.draw(self._count, generator)
            choices += [(self._offsets[view], offsets), (self._flipped[view], flipped)]
            choices += self._draw_more(view)
        if self.mixing:
            seed = loader.epoch_seed(self.seed, self.epoch, "/mix")
            choices.append((self._mixes, self.mixing.draw(len(self), seed)))
        for buffer, drawn in choices:
            buffer.copy_(loader.to_device(drawn, self._home))
        self._drawn = self.epoch

    def _draw_more(self, view: int) -> list[tuple[Tensor, Tensor]]:
        """The buffers of a view for policy, jitter and erasing, and the choices drawn for them."""

        def numbers(purpose: str) -> Any:
            return random_crop.uniforms(self.seed, self.epoch, 0, self._count, view, purpose)

        augment, size = self.augment, (self._height, self._width)
        choices: list[tuple[Tensor, Any]] = []
        if augment.has_policy:
            choices.append((self._seeds[view], random_crop.policy_seeds(numbers("policy"))))
        if augment.color_jitter:
            drawn = random_crop.jitters(numbers("jitter"), augment.color_jitter)
            choices.append((self._jitters[view], drawn))
        if augment.erasing:
            boxes = random_crop.erasures(numbers("erase"), augment.erasing, size)
            choices.append((self._boxes[view], boxes))
        return [(buffer, torch.from_numpy(drawn)) for buffer, drawn in choices]

    def _augmented(self, positions: Tensor, index: Tensor) -> Tensor:
        """The images ``index`` at these positions of the epoch, both int64 [B]: normalized float32
        [K * B, H, W, C].
        """
        images = self._images.index_select(0, index.repeat(self.views))
        if self.augment.pad:
            offsets = self._offsets.index_select(1, positions).flatten(0, 1)
            images = crop(images, offsets, self.augment.pad, self.augment.padding)
        if self.augment.flip:
            images = flip(images, self._flipped.index_select(1, positions).flatten())
        if self.augment.has_policy:
            seeds = self._seeds.index_select(1, positions).flatten().tolist()
            images = apply_policy(images, self.augment.policy, self.augment.policy_options, seeds)
            images = self._moved(images)
        if self.augment.color_jitter:
            choices = self._jitters.index_select(1, positions).flatten(0, 1)
            images = jitter(images, self._moved(choices))
        pixels = normalize(images, self._scale, self._shift)
        if self.augment.erasing:
            boxes = self._boxes.index_select(1, positions).flatten(0, 1)
            pixels = erase(pixels, self._moved(boxes))
        return pixels

    def _finish(self, pixels: Tensor, size: int | None) -> Tensor:
        """Normalized pixels [K * B, H, W, C] as [B, C, H, W] or, for more than one view, [K, B, C,
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
        sizes = f"{needed / 2**30:.3g} GiB on {device}, which has {free / 2**30:.3g} GiB free"
        fix = "use a smaller --image-size, fewer images, or --loader dali or torchvision"
        raise DataError(f"split '{split.name}' takes {sizes}; {fix}")


LOADER = LoaderKind(ResidentLoader, decoded=True, policies=tuple(POLICIES))
