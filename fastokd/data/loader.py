"""The one loader contract, the loaders that keep it, and the choice among them."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.dataset import Dataset, Split
from fastokd.data.files import FileDataset, FileSplit
from fastokd.errors import ConfigError, DataError
from fastokd.registry import Registry


class Batch(NamedTuple):
    """B images [B, C, H, W] in a floating dtype, their targets, and their positions in the split
    int64 [B].

    With K > 1 views of each image, the images are [K, B, C, H, W]. Targets are labels int64 [B], or
    class probabilities float32 [B, classes] where images are mixed; ``index`` is then that of the
    first image of each pair.
    """

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

    def set_size(self, size: int | None) -> None:
        """Give square images of this side from the next iteration on; None for the dataset's own
        size.
        """

    def state_dict(self) -> dict[str, int]:
        """The epoch and how much of it has been handed out."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where the loader that gave ``state`` stood."""


class LoaderBase:
    """What all loaders have in common: the settings, the shards of the ranks, and the place in the
    epoch.

    Training drops the rest that does not fill a batch on every rank, so that all batches have one
    shape. Evaluation goes through every image exactly once over all ranks; the last batch may be
    smaller, and a rank may have no batch at all. Rank r of W takes the r-th part of each training
    batch of W * batch_size images, and the r-th contiguous part of an evaluation split.

    Args:
        split_name, count: the split and the number of its images.
        batch_size: images per batch on this rank.
        train: training or evaluation.
        device: where the batches are made.
        seed: of the order and the augmentation.
        dtype: of the images; the arithmetic is float32.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``.
        rank, world_size: this process among all that share the split.

    Raises:
        ConfigError: a setting out of range.
        DataError: fewer training images than one batch on every rank.
    """

    def __init__(
        self,
        split_name: str,
        count: int,
        batch_size: int,
        train: bool,
        device: torch.device | str,
        seed: int,
        *,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; use 1 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank={rank} of world_size={world_size}; ranks are 0 to world_size - 1"
            )
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}; images are normalised, so it is a floating dtype")
        if memory_format not in (torch.channels_last, torch.contiguous_format):
            raise ConfigError(
                f"memory_format={memory_format}; use torch.channels_last or torch.contiguous_format"
            )
        if train and count < batch_size * world_size:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            fix = (
                f"--batch-size {count // world_size} or less"
                if count >= world_size
                else "fewer ranks"
            )
            raise DataError(
                f"split '{split_name}' has {count} images, fewer than one batch of"
                f" {batch_size}{ranks}; use {fix}"
            )
        self.batch_size = batch_size
        self.train = train
        self.device = torch.device(device)
        self.seed = seed
        self.dtype = dtype
        self.memory_format = memory_format
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._count = count
        # Images handed out this epoch: over all ranks in training, on this rank in evaluation
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        if self.train:
            return self._count // self._step
        start, stop = self._shard()
        return -(-(stop - start) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. Naming the epoch just loaded keeps the place in
        it.
        """
        if epoch < 0:
            raise ConfigError(f"epoch={epoch} is negative")
        if epoch != self.epoch:
            self.epoch, self._position, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: what it has handed out counts as done. Plain integers."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "seed": self.seed,
            "size": self._count,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue exactly where the loader that gave ``state`` stood: the next iteration gives the
        rest of its epoch.

        A training state may be continued with another number of ranks if the global batch divides
        the place in the epoch, as it does when the global batch stays the same.

        Raises:
            ConfigError: the state is of other data or another seed, or falls between two batches.
        """
        for key, here in (("seed", self.seed), ("size", self._count)):
            if state[key] != here:
                raise ConfigError(
                    f"the loader's state is of {key} {state[key]}, and this loader has {key}"
                    f" {here}; resume with the same data and seed"
                )
        position = state["position"]
        whole = (
            self._count // self._step * self._step
            if self.train
            else self._shard()[1] - self._shard()[0]
        )
        if not 0 <= position <= whole or (position % self._step and position != whole):
            raise ConfigError(
                f"the loader's state is {position} images into the epoch, which is no whole number"
                f" of batches of {self._step}; resume with the same global batch size"
            )
        self.epoch, self._position, self._resumed = state["epoch"], position, True

    @property
    def _step(self) -> int:
        """How far a batch moves the place in the epoch."""
        return self.batch_size * (self.world_size if self.train else 1)

    def _shard(self) -> tuple[int, int]:
        return (
            self._count * self.rank // self.world_size,
            self._count * (self.rank + 1) // self.world_size,
        )

    def _start_iteration(self) -> None:
        """Begin the epoch, unless its rest was just asked for by ``load_state_dict``."""
        if not self._resumed:
            self._position = 0
        self._resumed = False


def epoch_seed(seed: int, epoch: int, purpose: str = "") -> int:
    """One number for the pair, so that seed 1 in epoch 0 shares nothing with seed 0 in epoch 1."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}{purpose}".encode(), digest_size=8).digest())
        >> 1
    )


def to_device(choices: Tensor, device: torch.device) -> Tensor:
    """Drawn on the CPU, so that every device sees the same; copied without making the host wait."""
    if device.type == "cuda":
        choices = choices.pin_memory()
    return choices.to(device, non_blocking=True)


def _runs_anywhere(device: torch.device) -> None:
    return None


def _suits_all(split: FileSplit) -> None:
    return None


@dataclass(frozen=True)
class LoaderKind:
    """A kind of loader.

    Args:
        make: called as ``make(split, batch_size, train, device, seed, **settings)``. The settings
            are those of ``ResidentLoader``, and for a loader of files ``size`` (height, width) and
            ``bad_images`` ("fail" or "replace"). It raises ``ConfigError`` for one it cannot do,
            with the reason.
        decoded: whether it takes splits of decoded images (of a ``Dataset``) or of files (of a
            ``FileDataset``).
        missing: why it cannot run on a device, with what mends it; None if it can.
        unsuitable: why it cannot decode a split of files, as far as their names tell, with what
            mends it; None if it can.
    """

    make: Callable[..., Loader]
    decoded: bool
    missing: Callable[[torch.device], str | None] = _runs_anywhere
    unsuitable: Callable[[FileSplit], str | None] = _suits_all

    def reason_against(self, device: torch.device, splits: Iterable[FileSplit]) -> str | None:
        """Why it cannot give these files on this device, with what mends it; None if it can."""
        return self.missing(device) or next(filter(None, map(self.unsuitable, splits)), None)


_loaders: Registry[LoaderKind] = Registry(
    "loader",
    "LOADER",
    {
        "resident": "fastokd.data.resident",
        "dali": "fastokd.data.dali",
        "torchvision": "fastokd.data.torchvision_loader",
    },
    reserved=["auto"],
)


def register_loader(name: str, module: str) -> None:
    """Add a loader: the module has a constant ``LOADER``, a ``LoaderKind``, and is imported when it
    is needed.
    """
    _loaders.register(name, module)


def list_loaders() -> list[str]:
    """The names of all loaders."""
    return sorted(_loaders)


def get_loader_kind(name: str) -> LoaderKind:
    """The loader of that name.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    return _loaders.get(name)


def make_loader(
    dataset: Dataset | FileDataset,
    split: str | Split | FileSplit,
    batch_size: int,
    *,
    loader: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    train: bool | None = None,
    augment: Augment | None = None,
    **settings: Any,
) -> Loader:
    """The loader of one of a dataset's splits, with the dataset's normalisation and augmentation.

    Args:
        split: one of the dataset's splits, or its name: "train", "val" or "test".
        loader: the kind; by default "resident" for decoded images, and for files the best that can
            decode them here.
        train: by default true for the training split alone; false to evaluate on its images.
        augment: overrides the dataset's policy.
        settings: the other keywords of the loader.

    Raises:
        ConfigError: no such split or loader, a loader that does not go with this dataset, or a
            setting out of range.
        DataError: see the loader.
    """
    device = torch.device(device)
    decoded = isinstance(dataset, Dataset)
    name = loader or (
        "resident" if isinstance(dataset, Dataset) else best_file_loader(device, dataset.splits)
    )
    kind = get_loader_kind(name)
    if kind.decoded != decoded:
        fix = "open_dataset" if kind.decoded else "list_files"
        raise ConfigError(
            f"loader '{name}' takes {'decoded images' if kind.decoded else 'image files'}; open"
            f" {dataset.name} with {fix}"
        )
    if reason := kind.missing(device):
        raise ConfigError(f"loader '{name}' cannot run here: {reason}")
    if not kind.decoded:
        settings.setdefault("size", dataset.image_size)
    chosen = dataset.split(split) if isinstance(split, str) else split
    return kind.make(
        chosen,
        batch_size,
        chosen is dataset.train if train is None else train,
        device,
        seed,
        mean=dataset.mean,
        std=dataset.std,
        num_classes=dataset.num_classes,
        augment=dataset.augment if augment is None else augment,
        **settings,
    )


def file_loaders() -> Iterator[str]:
    """The names of the loaders that decode files while training, best first; each is imported when
    it is its turn.
    """
    return (name for name in _loaders if not get_loader_kind(name).decoded)


def best_file_loader(device: torch.device, splits: Collection[FileSplit]) -> str:
    """The first loader of files, in the order of the table, that can decode these on this device.

    Raises:
        ConfigError: none can; the message says why.
    """
    reasons = []
    for name in file_loaders():
        reason = get_loader_kind(name).reason_against(device, splits)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise ConfigError(
        "no loader can decode image files while training"
        f" ({'; '.join(reasons) or 'none is there'}); use --loader resident"
    )
