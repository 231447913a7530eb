"""The loader interface, the base class of the loaders, and the choice among them."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastokd.data.augment import Augment, Mixing
from fastokd.data.dataset import AnySplit, Dataset, Split
from fastokd.data.files import FileDataset, FileSplit
from fastokd.data.policies import NO_POLICY
from fastokd.errors import ConfigError, DataError
from fastokd.registry import Registry


class Batch(NamedTuple):
    """B images [B, C, H, W] in a floating dtype, their targets, and their positions in the split
    int64 [B].

    With K > 1 views of each image, the images are [K, B, C, H, W]. Targets are labels int64 [B], or
    class probabilities float32 [B, classes] if images are mixed; ``index`` is then that of the
    first image of each pair.
    """

    images: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # a public name, which hides tuple.index


class Loader(Protocol):
    """The interface of all loaders."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, or its remaining batches right after ``load_state_dict``."""

    def __len__(self) -> int:
        """The number of batches of a whole epoch, on this rank."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""

    def set_size(self, size: int | None) -> None:
        """Return square images of this side from now on; None restores the dataset's size."""

    def state_dict(self) -> dict[str, int]:
        """The epoch and the position in it."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of the loader that returned ``state``."""


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of every loader.

    Args:
        mean, std: per channel, as fractions of 255: a pixel p becomes (p / 255 - mean) / std.
        num_classes: required for mixing, whose targets are class probabilities.
        augment: augmentation while training.
        views: number of independently augmented views of each training image.
        mixup, cutmix: alpha of each, see ``Mixing``. All views of a batch are mixed alike.
        dtype: of the images; the arithmetic is float32.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``, of every view.
        rank, world_size: this process among all that share the split.

    Raises:
        ConfigError: a setting out of range.
    """

    mean: Sequence[float]
    std: Sequence[float]
    num_classes: int | None = None
    augment: Augment | None = None
    views: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ConfigError(f"views={self.views}; use 1 or more")
        if Mixing(self.mixup, self.cutmix) and self.num_classes is None:
            raise ConfigError("mixup and cutmix need num_classes, for their targets")
        if not 0 <= self.rank < self.world_size:
            given = f"rank={self.rank} of world_size={self.world_size}"
            raise ConfigError(f"{given}; ranks are 0 to world_size - 1")
        if not self.dtype.is_floating_point:
            raise ConfigError(f"dtype={self.dtype}: must be a floating dtype")
        formats = (torch.channels_last, torch.contiguous_format)
        if self.memory_format not in formats:
            choices = " or ".join(map(str, formats))
            raise ConfigError(f"memory_format={self.memory_format}; use {choices}")


class LoaderBase:
    """The parts that all loaders share: settings, the ranks' parts, and the position in the epoch.

    Training drops the remainder that does not fill a batch on every rank, so that all batches have
    one shape. Evaluation covers every image exactly once over all ranks; the last batch may be
    smaller, and a rank may have no batch at all. Rank r of W takes the r-th part of each training
    batch of W * batch_size images, and the r-th contiguous part of an evaluation split. Evaluation
    is in order, without augmentation, views or mixing.

    Args:
        split: the split.
        batch_size: images per batch on this rank.
        train: training or evaluation.
        device: the device of the batches.
        seed: of the order and the augmentation.
        settings: see ``LoaderSettings``.

    Raises:
        ConfigError: ``batch_size`` out of range.
        DataError: fewer training images than one batch on every rank.
    """

    def __init__(
        self,
        split: AnySplit,
        batch_size: int,
        train: bool,
        device: torch.device | str,
        seed: int,
        settings: LoaderSettings,
    ) -> None:
        count, world_size = len(split), settings.world_size
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; use 1 or more")
        if train and count < batch_size * world_size:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            largest = count // world_size
            fix = f"use --batch-size {largest} or less" if largest else "use fewer ranks"
            few = f"{count} images, fewer than one batch of {batch_size}{ranks}"
            raise DataError(f"split '{split.name}' has {few}; {fix}")
        self.batch_size = batch_size
        self.train = train
        self.device = torch.device(device)
        self.seed = seed
        self.settings = settings
        self.dtype = settings.dtype
        self.memory_format = settings.memory_format
        self.rank = settings.rank
        self.world_size = world_size
        self.mixing = Mixing(settings.mixup, settings.cutmix) if train else Mixing()
        self.views = settings.views if train else 1
        self.epoch = 0
        self._count = count
        self._num_classes = settings.num_classes or 0
        # Images returned this epoch: over all ranks in training, on this rank in evaluation
        self._position = 0
        self._resumed = False

    def _normalization(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """``scale`` and ``shift`` of ``normalize`` for images of this size."""
        mean, std = (
            torch.tensor(values, dtype=torch.float64)
            for values in (self.settings.mean, self.settings.std)
        )
        scale, shift = (
            factor.float().repeat(height * width).to(self.device)
            for factor in (1 / (255 * std), -mean / std)
        )
        return scale, shift

    def __len__(self) -> int:
        if self.train:
            return self._count // self._step
        start, stop = self._shard()
        return -(-(stop - start) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration. The epoch just loaded keeps its position."""
        if epoch < 0:
            raise ConfigError(f"epoch={epoch} is negative")
        if epoch != self.epoch:
            self.epoch, self._position, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """The position after the last returned batch, as plain integers."""
        state = {"epoch": self.epoch, "position": self._position}
        return {**state, "seed": self.seed, "size": self._count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue exactly at the position of the loader that returned ``state``.

        A training state may be resumed with another number of ranks if the global batch divides the
        position, as it does if the global batch stays the same.

        Raises:
            ConfigError: the state belongs to other data or another seed, or to a position between
                two batches.
        """
        for key, value in (("seed", self.seed), ("size", self._count)):
            if state[key] != value:
                different = f"{key} {state[key]}, and this loader has {key} {value}"
                fix = "resume with the same data and seed"
                raise ConfigError(f"the loader's state has {different}; {fix}")
        position = state["position"]
        start, stop = self._shard()
        whole = self._count // self._step * self._step if self.train else stop - start
        if not 0 <= position <= whole or (position % self._step and position != whole):
            between = f"{position} images into the epoch, between batches of {self._step}"
            fix = "resume with the same global batch size"
            raise ConfigError(f"the loader's state is {between}; {fix}")
        self.epoch, self._position, self._resumed = state["epoch"], position, True

    @property
    def _step(self) -> int:
        """The number of images by which a batch advances the position."""
        return self.batch_size * (self.world_size if self.train else 1)

    def _shard(self) -> tuple[int, int]:
        return (
            self._count * self.rank // self.world_size,
            self._count * (self.rank + 1) // self.world_size,
        )

    def _start_iteration(self) -> None:
        """Begin the epoch, unless ``load_state_dict`` has just set a position in it."""
        if not self._resumed:
            self._position = 0
        self._resumed = False


def check_padding(augment: Augment, height: int, width: int) -> None:
    """Raise ``ConfigError`` if images of this size are too small to be padded by reflection."""
    if augment.padding == "reflect" and augment.pad >= min(height, width):
        size = f"{height} x {width}"
        raise ConfigError(f"pad={augment.pad}: too large to reflect {size}; use a smaller pad")


def epoch_seed(seed: int, epoch: int, purpose: str = "") -> int:
    """One number for the pair, so that seed 1 in epoch 0 is independent of seed 0 in epoch 1."""
    digest = hashlib.blake2b(f"{seed}/{epoch}{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def to_device(choices: Tensor, device: torch.device) -> Tensor:
    """Copy random choices, drawn on the CPU for reproducibility, without blocking the host."""
    if device.type == "cuda":
        choices = choices.pin_memory()
    return choices.to(device, non_blocking=True)


@dataclass(frozen=True)
class LoaderKind:
    """A kind of loader.

    Args:
        make: called as ``make(split, batch_size, train, device, seed, **settings)``. The settings
            are the fields of ``LoaderSettings``, and for a loader of files also ``size`` (height,
            width) and ``bad_images`` ("fail" or "replace"). It raises ``ConfigError`` with the
            reason for settings it does not support.
        decoded: takes splits of decoded images (of a ``Dataset``) rather than of files (of a
            ``FileDataset``).
        missing: the reason why it cannot run on a device, with the fix; None if it can.
        unsuitable: the reason why it cannot decode a split of files, by their names, with the fix;
            None if it can.
        policies: the augmentation policies that it applies, see ``fastokd.data.policies``.
    """

    make: Callable[..., Loader]
    decoded: bool
    missing: Callable[[torch.device], str | None] = lambda device: None
    unsuitable: Callable[[FileSplit], str | None] = lambda split: None
    policies: Collection[str] = (NO_POLICY,)

    def reason_against(
        self, device: torch.device, splits: Iterable[FileSplit], policy: str = NO_POLICY
    ) -> str | None:
        """The reason why it cannot load these files with a policy on this device, with the fix, or
        None.
        """
        reasons = (self.lacks(policy), self.missing(device), *map(self.unsuitable, splits))
        return next(filter(None, reasons), None)

    def lacks(self, policy: str) -> str | None:
        """The reason why it cannot apply an augmentation policy, with the fix, or None."""
        if policy in self.policies:
            return None
        return f"it does not support auto_augment={policy}; use --loader torchvision"


_loaders: Registry[LoaderKind] = Registry(
    "loader",
    "LOADER",
    {
        "resident": "fastokd.data.resident",
        "dali": "fastokd.data.dali",
        "torchvision": "fastokd.data.torchvision_loader",
    },
    reserved=["auto"],
    has_plugins=True,
)


def register_loader(name: str, module: str) -> None:
    """Add a loader: the module has a constant ``LOADER``, a ``LoaderKind``, and is imported when it
    is first requested.
    """
    _loaders.register(name, module)


def list_loaders() -> list[str]:
    """The names of all loaders."""
    return sorted(_loaders)


def get_loader_kind(name: str) -> LoaderKind:
    """The loader of that name; a ``ConfigError`` suggests the closest one."""
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
    """The loader of one of a dataset's splits, with the dataset's normalization and augmentation.

    Args:
        split: one of the dataset's splits, or its name: "train", "val" or "test".
        loader: the kind; default: "resident" for decoded images, and for files the first of
            ``file_loaders`` that can decode them.
        train: default: true for the training split; false evaluates on its images.
        augment: overrides the dataset's policy.
        settings: further keywords of the loader, see ``LoaderSettings``.

    Raises:
        ConfigError: an unknown split or loader, a loader that does not fit this dataset, or a
            setting out of range.
        DataError: see the loader.
    """
    device = torch.device(device)
    decoded = isinstance(dataset, Dataset)
    augment = dataset.augment if augment is None else augment
    if loader is None and not isinstance(dataset, Dataset):
        loader = best_file_loader(device, dataset.splits, augment.policy)
    loader = loader or "resident"
    kind = get_loader_kind(loader)
    if kind.decoded != decoded:
        fix = f"image files; open {dataset.name} with list_files"
        if kind.decoded:
            fix = f"decoded images; open {dataset.name} with open_dataset"
        raise ConfigError(f"loader '{loader}' takes {fix}")
    if reason := kind.lacks(augment.policy) or kind.missing(device):
        raise ConfigError(f"loader '{loader}' cannot run here: {reason}")
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
        augment=augment,
        **settings,
    )


def file_loaders() -> Iterator[str]:
    """The loaders that decode files while training, in order of preference, imported in turn."""
    return (name for name in _loaders if not get_loader_kind(name).decoded)


def best_file_loader(
    device: torch.device, splits: Collection[FileSplit], policy: str = NO_POLICY
) -> str:
    """The first of ``file_loaders`` that can decode these splits with a policy on this device.

    Raises:
        ConfigError: no loader can; the message has the reasons.
    """
    reasons = []
    for name in file_loaders():
        reason = get_loader_kind(name).reason_against(device, splits, policy)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) or "none is registered"
    raise ConfigError(f"no loader can decode files while training ({why}); use --loader resident")
