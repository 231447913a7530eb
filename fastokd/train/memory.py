"""An estimate of a run's memory before it is allocated, and the largest batch that fits."""

import bisect
import dataclasses
import gc
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd._moved import moved_names
from fastokd.data import Batch, Dataset
from fastokd.errors import ConfigError, OutOfMemory, first_line
from fastokd.models import BranchedModel
from fastokd.ranks import alone
from fastokd.storage import available_memory, format_bytes
from fastokd.train.build import build_model, meta_model
from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset
from fastokd.train.distributed import BatchShare, Ranks, gather_states, share_of_batch
from fastokd.train.precision import autocast, image_dtype
from fastokd.train.step import TrainStep
from fastokd.train.step_options import choose_step_options
from fastokd.train.teacher import Teacher

FILL = 0.85
"""Fraction of the free memory to fill; the rest is for workspaces and fragmentation."""
LARGEST_BATCH = 1024
"""Default limit of ``fit_batch_size``: larger batches need another recipe."""
STEPS_PER_EPOCH = 20
"""Fewest steps per epoch that ``fit_batch_size`` leaves."""

__getattr__ = moved_names(__name__, {"fastokd.storage": ("size=format_bytes",)})


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a process of a run takes on its device."""

    weights: int
    optimizer: int
    """Optimizer state, and the tensor of all gradients if parameters are flat."""
    average: int
    images: int
    """The dataset's, if they are kept on a GPU."""
    batches: int
    """Images of the batches that are on the device at once."""
    passes: int
    """The peak between the start of a forward pass and the end of its backward pass."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(dataclasses.astuple(self))

    @property
    def ahead(self) -> int:
        """The part that is not allocated before the first step."""
        return self.batches + self.passes

    def describe(self, free: int | None = None) -> str:
        """One line, e.g. "memory: about 1.9 GiB: weights 13 MiB, ...; 139 GiB free"."""
        titles = {
            "passes": "activations and gradients",
            "average": "averaged student",
            "images": "dataset",
        }
        parts = [
            f"{titles.get(name, name)} {format_bytes(value)}"
            for name, value in dataclasses.asdict(self).items()
            if value
        ]
        line = f"memory: about {format_bytes(self.total)}: {', '.join(parts)}"
        return line if free is None else f"{line}; {format_bytes(free)} free"


def estimate_memory(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: Teacher | None = None
) -> MemoryEstimate:
    """Estimate a run's memory from shapes alone; nothing is allocated and nothing computed.

    Runs a forward and a backward pass on fake tensors and counts the storages that are alive. Not
    counted are workspaces of cuDNN and cuBLAS, fragmentation, tensors that a ``reference`` loss
    keeps, and a loss's state per image; tensors that a compiled network recomputes count as kept.
    Copies of weights that are cast once count as autocast's, which take as much.
    Raises a ``ConfigError`` if the network's control flow depends on values.
    """
    share = share_of_batch(config, Ranks.current())
    network = teacher.network if teacher else None
    model = meta_model(config, len(dataset.classes), network)
    frozen = [*network.parameters(), *network.buffers()] if network else []
    options = choose_step_options(config, model, device)
    trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    views = (config.views(),) if config.views() > 1 else ()
    images = (*views, share.device_batch, 3, *dataset.image_size)
    image_bytes = torch.Size(images).numel() * image_dtype(options.precision).itemsize
    # A loader that decodes while training is two batches ahead, and a captured step reads a copy.
    batches = 1 if isinstance(dataset, Dataset) else 3 + options.cuda_graph
    # Gradients of earlier parts, or the buckets of DistributedDataParallel, exist before a pass.
    gradients_before = trained if share.accumulate > 1 or share.processes > 1 else 0
    return MemoryEstimate(
        weights=_bytes([*model.parameters(), *model.buffers(), *frozen]),
        optimizer=_moments(config, model, trained) + (trained if options.flat else 0),
        average=_bytes(model.live_student().state_dict().values()) if config.ema else 0,
        images=_resident(dataset) if device.type == "cuda" else 0,
        batches=share.accumulate * image_bytes * batches,
        passes=_passes(model, images, options.precision) + gradients_before,
    )


def _moments(config: TrainConfig, model: BranchedModel, trained: int) -> int:
    """Bytes of the optimizer state: two tensors for each parameter of Adam, one of SGD."""
    groups = model.companion.parameter_groups() if model.companion is not None else []
    adam = [item for group in groups if group.optimizer == "adam" for item in group.parameters]
    with_adam = _bytes(parameter for parameter in adam if parameter.requires_grad)
    moments = (1 if config.momentum else 0) if config.optimizer == "sgd" else 2
    return 2 * with_adam + moments * (trained - with_adam)


def _resident(dataset: AnyDataset) -> int:
    """Bytes of the decoded images on a GPU: not of training images that get a policy, which stay in
    host memory.
    """
    if not isinstance(dataset, Dataset):
        return 0
    trained = 0 if dataset.augment.has_policy else dataset.train.images.nbytes
    return trained + dataset.evaluation.images.nbytes


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _passes(model: BranchedModel, images: tuple[int, ...], precision: str) -> int:
    """Peak bytes of a forward and a backward pass of a meta model, without model and images."""
    cpu = torch.device("cpu")  # autocast knows no meta device
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=cpu)
        batch = torch.empty(images, dtype=torch.float32)
        try:
            with LiveStorages() as live:
                with autocast(precision, cpu):
                    result = model(batch)
                ends = [
                    value
                    for value in tree_leaves((result.logits, result.extras))
                    if isinstance(value, Tensor) and value.requires_grad
                ]
                torch.autograd.backward(ends, [torch.ones_like(value) for value in ends])
        except Exception as error:  # a network's operators may raise anything
            message = f"the memory of a step cannot be estimated ({first_line(error)})"
            raise ConfigError(f"{message}; pass a number as --batch-size") from error
    return live.peak


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of living storages that operations created; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if (key := storage._cdata) not in inputs and key not in self._alive:
                self._alive[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return [tensor.untyped_storage() for tensor in tensors]


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device, if known; a CPU's share of them."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if (available := available_memory()) is None:
        return None
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if Ranks.current().size > 1 else 1
    return available // sharing


def describe_memory(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: Teacher | None = None
) -> list[str]:
    """Lines for the start of a run, when its model exists: the estimate, and a warning if the first
    step will probably not fit.
    """
    try:
        estimate, free = estimate_memory(config, dataset, device, teacher), free_memory(device)
    except ConfigError as error:
        return [f"memory: {first_line(error)}"]
    lines = [estimate.describe(free)]
    if free is not None and estimate.ahead > free:
        share = share_of_batch(config, Ranks.current())
        lines.append(
            f"memory: the first step takes {format_bytes(estimate.ahead)} more, and"
            f" {format_bytes(free)} are free: it will probably not fit; {_advice(share)}"
        )
    return lines


def batch_sizes(largest: int) -> list[int]:
    """8, 12, 16, 24, 32, 48, ... up to ``largest``; at least the first."""
    doublings = range(max(largest, 1).bit_length())
    sizes = sorted(base << count for base in (8, 12) for count in doublings)
    return [size for size in sizes if size <= largest] or [8]


def fit_batch_size(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    teacher: Teacher | None = None,
    largest: int = LARGEST_BATCH,
) -> tuple[int, str]:
    """The largest batch of ``batch_sizes`` per process whose estimate fills at most ``FILL`` of the
    free memory, and one line with the reason.

    On a GPU it also runs a step on random images, with smaller batches as long as that runs out of
    memory. All processes must call it, before the run creates its model, and get the same result.

    Args:
        config: of the run; its ``batch_size`` is ignored.
        largest: limit of the batch over all processes. Another limit leaves ``STEPS_PER_EPOCH``.

    Raises:
        ConfigError: ``device_batch`` is given too, or even the smallest does not fit.
    """
    if config.device_batch is not None:
        given = f"batch_size auto and device_batch={config.device_batch}"
        raise ConfigError(f"{given}: auto finds what a device takes at once; give one of them")
    processes = Ranks.current().size
    limits = {
        f"larger than {largest} only on request, as auto:N": largest,
        f"an epoch keeps {STEPS_PER_EPOCH} steps": len(dataset.train) // STEPS_PER_EPOCH,
    }
    reason, limit = min(limits.items(), key=lambda item: item[1])
    sizes = batch_sizes(limit // processes)
    free = min((each for each in gather_states(free_memory(device) or 0) if each), default=None)

    def needed(each: int) -> int:
        of_size = dataclasses.replace(config, batch_size=each * processes)
        return estimate_memory(of_size, dataset, device, teacher).total

    count = bisect.bisect_left(
        sizes, True, key=lambda each: free is not None and needed(each) > FILL * free
    )
    tried = device.type == "cuda"
    while tried and count:
        of_size = dataclasses.replace(config, batch_size=sizes[count - 1])
        if all(gather_states(one_step_fits(of_size, dataset, device, teacher))):
            break
        count -= 1
    available = format_bytes(free or 0)
    if not count:
        raise ConfigError(
            f"batch_size auto: not even {sizes[0]} images fit into the {available} free on"
            f" {device}; use a smaller --model, fewer --branches or a smaller --image-size"
        )
    chosen = dataclasses.replace(config, batch_size=sizes[count - 1] * processes)
    if count < len(sizes):
        takes = format_bytes(needed(sizes[count]))
        reason = f"{sizes[count]} per process take about {takes}, and {available} are free"
    scaling = f"lr is scaled by --lr-scaling {config.lr_scaling}"
    if config.lr_scaling == "none":
        scaling = "lr is unchanged (--lr-scaling linear or sqrt scales it)"
    how = f"chosen by memory{' and tried with one step' * tried}"
    share = share_of_batch(chosen, Ranks.current())
    return chosen.batch_size, f"{share.describe()}, {how}: {reason}; {scaling}"


def one_step_fits(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: Teacher | None
) -> bool:
    """True if a step of this process alone fits next to the dataset, without compiling it."""
    config = dataclasses.replace(config, compile=False, cuda_graph=False, streams=False)
    try:
        with alone():
            _try_step(config, dataset, device, teacher)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # nothing without a GPU


def _try_step(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: Teacher | None
) -> None:
    reserved = torch.empty(_resident(dataset), dtype=torch.uint8, device=device)
    network, rows = (teacher.network, teacher.rows) if teacher else (None, None)
    model = build_model(config, len(dataset.classes), device, network)
    step = TrainStep(config, model, device, rows)
    step.criterion.prepare(len(dataset.train), len(dataset.classes), device)
    batch, views = config.batch_size, config.views()
    images = torch.randn((views * batch, 3, *dataset.image_size), device=device)
    images = images.to(image_dtype(step.precision))
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if views > 1:
        images = images.unflatten(0, (views, batch))
    index = torch.arange(batch, device=device)
    step(Batch(images, index % len(dataset.classes), index % len(dataset.train)))
    step.number.item()  # waits for the device
    del reserved


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error means that memory ran out, on a GPU or on the host."""
    host = "DefaultCPUAllocator: can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or host in str(error)


def out_of_memory(config: TrainConfig, device: torch.device) -> OutOfMemory:
    """The error for a step that did not fit: its batch, and how to make it fit."""
    share = share_of_batch(config, Ranks.current())
    peak = ""
    if device.type == "cuda":
        peak = f" with a peak of {format_bytes(torch.cuda.max_memory_allocated(device))}"
    problem = f"out of memory on {device}{peak}: {share.describe()} does not fit"
    return OutOfMemory(f"{problem}; {_advice(share)}")


def _advice(share: BatchShare) -> str:
    advice, images = "--batch-size auto finds one that fits", share.device_batch
    part = next((size for size in range(images // 2, 1, -1) if images % size == 0), None)
    if part is None:
        return advice
    return f"{advice}, --device-batch {part} accumulates gradients over smaller parts"
