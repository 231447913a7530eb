"""How much memory a run takes, known before it takes it; and the largest batch that fits."""

import copy
import dataclasses
import gc
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.data import Batch, Dataset
from fastokd.data.images import available_memory
from fastokd.errors import ConfigError, OutOfMemory, first_line
from fastokd.models import BranchedModel, create_model
from fastokd.ranks import alone
from fastokd.train.build import build_model, model_layout
from fastokd.train.config import TrainConfig
from fastokd.train.data import AnyDataset
from fastokd.train.distributed import BatchShare, Ranks, gather_states, share_of_batch
from fastokd.train.precision import autocast, choose_precision, image_dtype
from fastokd.train.step import TrainStep
from fastokd.train.step_options import StepOptions, choose_step_options
from fastokd.train.teacher import Teacher

FILL = 0.85
"""The fraction of the free memory that ``fit_batch_size`` fills: the rest is for workspaces of
libraries and for fragments.
"""
LARGEST_BATCH = 1024
"""What ``fit_batch_size`` does not exceed unless asked: larger batches need another recipe."""
STEPS_PER_EPOCH = 20
"""The fewest steps that ``fit_batch_size`` leaves in an epoch."""
_MOMENTS = {"sgd": 1, "adamw": 2, "adam": 2}
"""Tensors of a parameter's size that each optimizer remembers."""
_IN_FLIGHT = 3
"""Batches that a loader which decodes while training has on the device: the one in use, and two
that come.
"""


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """What a process of a run takes on its device, in bytes.

    Attributes:
        weights: parameters and buffers of the networks and the method's modules.
        optimizer: what the optimizers remember, and the tensor of all gradients where parameters
            are flat.
        average: the moving average of the student.
        images: of the dataset, where they lie on a GPU. On a CPU they are there already.
        batches: the images that are on the device at once as batches.
        passes: the most that is held at once between the start of a forward pass and the end of its
            backward pass: activations, then gradients.
    """

    weights: int
    optimizer: int
    average: int
    images: int
    batches: int
    passes: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @property
    def ahead(self) -> int:
        """What is not there yet when everything is made and the first step has not begun."""
        return self.batches + self.passes

    def describe(self, free: int | None = None) -> str:
        """One line, e.g. "memory: about 1.9 GiB: weights 13 MiB, ...; 139 GiB free"; ``free`` is in
        bytes.
        """
        titles = {
            "passes": "activations and gradients",
            "average": "averaged student",
            "images": "dataset",
        }
        parts = [
            f"{titles.get(name, name)} {size(value)}"
            for name, value in dataclasses.asdict(self).items()
            if value
        ]
        return f"memory: about {size(self.total)}: {', '.join(parts)}" + (
            "" if free is None else f"; {size(free)} free"
        )


def size(num_bytes: float) -> str:
    """Bytes for people: "13 MiB", "1.9 GiB"."""
    unit, name = (
        (2**30, "GiB")
        if num_bytes >= 2**30
        else (2**20, "MiB")
        if num_bytes >= 2**20
        else (2**10, "KiB")
    )
    value = num_bytes / unit
    return (
        f"{value:.0f} {name}"
        if (value >= 10 and name != "GiB") or value >= 100
        else f"{value:.1f} {name}"
    )


def estimate_memory(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: nn.Module | None = None
) -> MemoryEstimate:
    """What a run takes on its device, from shapes alone: nothing is allocated and nothing computed.

    A forward and a backward pass are run on fake tensors, and the storages that live are counted.
    What a compiled network recomputes instead of keeping is counted as kept. Not counted are
    workspaces of cuDNN and cuBLAS, the allocator's fragments, what a plain (``impl="reference"``)
    loss keeps, and what a method remembers of every image.

    Args:
        config: its ``batch_size`` is that of all processes.
        dataset: with the run's image size and classes.
        device: where the run computes.
        teacher: the frozen teacher network of methods that have one.

    Raises:
        ConfigError: the network looks at values while it runs, so shapes do not say what it takes.
    """
    share = share_of_batch(config, Ranks.current())
    with torch.device("meta"):
        model = create_model(
            config.model,
            num_classes=len(dataset.classes),
            teacher=None if teacher is None else copy.deepcopy(teacher).to("meta"),
            **model_layout(config),
        )
    options = choose_step_options(config, model, device)
    trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    height, width = dataset.image_size
    images = (
        *([config.views()] if config.views() > 1 else []),
        share.device_batch,
        3,
        height,
        width,
    )
    # Gradients of the parts before, or the buckets in which processes exchange them, are there from
    # the start of a pass.
    gradients_before = trained if share.accumulate > 1 or share.processes > 1 else 0
    return MemoryEstimate(
        weights=_bytes([*model.parameters(), *model.buffers()]),
        optimizer=_optimizer_state(config, model) + (trained if options.flat else 0),
        average=_bytes(model.live_student().state_dict().values()) if config.ema else 0,
        images=_resident(dataset) if device.type == "cuda" else 0,
        batches=share.accumulate
        * torch.Size(images).numel()
        * image_dtype(options.precision).itemsize
        * _batches_at_once(dataset, options),
        passes=_passes(model, images, options.precision) + gradients_before,
    )


def _optimizer_state(config: TrainConfig, model: BranchedModel) -> int:
    groups = model.companion.parameter_groups() if model.companion is not None else []
    adam = _bytes(
        parameter
        for group in groups
        if group.optimizer == "adam"
        for parameter in group.parameters
        if parameter.requires_grad
    )
    rest = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad) - adam
    return adam * _MOMENTS["adam"] + rest * (
        _MOMENTS[config.optimizer] if config.optimizer != "sgd" or config.momentum else 0
    )


def _batches_at_once(dataset: AnyDataset, options: StepOptions) -> int:
    if isinstance(dataset, Dataset):
        return 1
    return _IN_FLIGHT + options.cuda_graph  # a captured step reads a copy that never moves


def _resident(dataset: AnyDataset) -> int:
    """Bytes of the training and evaluation images where a loader keeps them on the device."""
    if not isinstance(dataset, Dataset):
        return 0
    return dataset.train.images.nbytes + dataset.evaluation.images.nbytes


def _bytes(tensors: Any) -> int:
    """Of tensors, each storage once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _passes(model: BranchedModel, images: tuple[int, ...], precision: str) -> int:
    """The most that a forward and a backward pass of a meta model hold at once, beside the model
    and the images.
    """
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
        except Exception as error:  # whatever a network's own operators raise
            raise ConfigError(
                f"the memory that a step takes cannot be estimated ({first_line(error)}); give"
                " --batch-size a number"
            ) from error
    return live.peak


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still alive.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {
            value.untyped_storage()._cdata
            for value in tree_leaves((args, kwargs))
            if isinstance(value, Tensor)
        }
        for value in tree_leaves(result):
            if (
                isinstance(value, Tensor)
                and (key := (storage := value.untyped_storage())._cdata) not in before
                and key not in self._alive
            ):
                self._alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None where unknown. Processes on one CPU
    share its memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = available_memory()
    return (
        None
        if available is None
        else available
        // int(os.environ.get("LOCAL_WORLD_SIZE", "1") if Ranks.current().size > 1 else 1)
    )


def describe_memory(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: nn.Module | None = None
) -> list[str]:
    """The lines about memory for the start of a run, when its model, optimizer and loaders are
    made: the second warns.
    """
    try:
        estimate, free = estimate_memory(config, dataset, device, teacher), free_memory(device)
    except ConfigError as error:
        return [f"memory: {first_line(error)}"]
    lines = [estimate.describe(free)]
    if free is not None and estimate.ahead > free:
        lines.append(
            f"memory: the first step takes {size(estimate.ahead)} more, and {size(free)} are free:"
            f" it will probably not fit; {_advice(share_of_batch(config, Ranks.current()))}"
        )
    return lines


def batch_sizes(largest: int) -> list[int]:
    """8, 12, 16, 24, 32, 48, ... up to ``largest``; at least the first."""
    found = [8]
    while (
        following := found[-1] * 3 // 2 if found[-1].bit_count() == 1 else found[-1] * 4 // 3
    ) <= largest:
        found.append(following)
    return found


def fit_batch_size(
    config: TrainConfig,
    dataset: AnyDataset,
    device: torch.device,
    teacher: Teacher | None = None,
    largest: int = LARGEST_BATCH,
) -> tuple[int, str]:
    """The largest batch of ``batch_sizes`` on every process that fills no more than ``FILL`` of the
    free memory by estimate.

    On a GPU one real step on random images is tried, and a smaller batch taken for as long as that
    runs out of memory. All processes must call it, and find the same. To be called before the run
    has made its model.

    Args:
        config: the run's; its ``batch_size`` does not matter.
        dataset: opened as the run opens it.
        device: of this process.
        teacher: of methods that have one.
        largest: images of a batch over all processes that are not exceeded; neither is a fraction
            of ``STEPS_PER_EPOCH`` of the training images.

    Returns:
        The batch size over all processes, and one line that says why.

    Raises:
        ConfigError: ``device_batch`` is given too, or not even the smallest fits.
    """
    if config.device_batch is not None:
        raise ConfigError(
            f"batch_size auto and device_batch={config.device_batch}: auto finds what a device"
            " takes at once; give one of them"
        )
    processes = Ranks.current().size
    limits = {
        f"more than {largest} must be asked for, as auto:N": largest,
        f"an epoch keeps {STEPS_PER_EPOCH} steps": len(dataset.train) // STEPS_PER_EPOCH,
    }
    reason, limit = min(limits.items(), key=lambda item: item[1])
    sizes = batch_sizes(limit // processes)
    free = min((found for found in gather_states(free_memory(device) or 0) if found), default=None)

    def run(each: int) -> TrainConfig:
        return dataclasses.replace(config, batch_size=each * processes)

    def needs(each: int) -> int:
        return estimate_memory(
            run(each), dataset, device, None if teacher is None else teacher.network
        ).total

    count = _how_many(sizes, lambda each: free is None or needs(each) <= FILL * free)
    tried = device.type == "cuda"
    while (
        tried
        and count
        and not all(
            gather_states(
                _one_step_fits(
                    dataclasses.replace(config, batch_size=sizes[count - 1]),
                    dataset,
                    device,
                    teacher,
                )
            )
        )
    ):
        count -= 1
    if not count:
        raise ConfigError(
            f"batch_size auto: not even {sizes[0]} images fit into the {size(free or 0)} that are"
            f" free on {device}; use a smaller --model, fewer --branches or a smaller --image-size"
        )
    chosen = run(sizes[count - 1])
    if count < len(sizes):
        reason = (
            f"{sizes[count]} on a process take about {size(needs(sizes[count]))}, and"
            f" {size(free or 0)} are free"
        )
    scaling = (
        "lr stays as it is (--lr-scaling linear or sqrt makes it follow)"
        if config.lr_scaling == "none"
        else f"lr follows by --lr-scaling {config.lr_scaling}"
    )
    return (
        chosen.batch_size,
        (
            f"{share_of_batch(chosen, Ranks.current()).describe()}, chosen by"
            f" memory{' and tried with one step' * tried}: {reason}; {scaling}"
        ),
    )


def _how_many(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """How many of the ascending sizes fit."""
    low, high = 0, len(sizes)
    if fits(sizes[-1]):
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(sizes[middle - 1]) else (low, middle - 1)
    return low


def _one_step_fits(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: Teacher | None
) -> bool:
    """Whether a step of this process alone, on random images, fits beside the dataset. Not
    compiled, which takes minutes and memory only less.
    """
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
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _try_step(
    config: TrainConfig, dataset: AnyDataset, device: torch.device, teacher: Teacher | None
) -> None:
    taken = torch.empty(_resident(dataset), dtype=torch.uint8, device=device)
    model = build_model(
        config, len(dataset.classes), device, None if teacher is None else teacher.network
    )
    step = TrainStep(config, model, device, None if teacher is None else teacher.rows)
    step.criterion.prepare(len(dataset.train), len(dataset.classes), device)
    batch, views = config.batch_size, config.views()
    images = torch.randn(
        *([views] if views > 1 else []), batch, 3, *dataset.image_size, device=device
    ).to(image_dtype(choose_precision(config, device)))
    if config.channels_last and views == 1:
        images = images.contiguous(memory_format=torch.channels_last)
    places = torch.arange(batch, device=device)
    step(Batch(images, places % len(dataset.classes), places % len(dataset.train)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del taken


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the host."""
    return isinstance(
        error, torch.OutOfMemoryError
    ) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(config: TrainConfig, device: torch.device) -> OutOfMemory:
    """The error of a run whose step did not fit: how much it had, its batch, and what to change."""
    share = share_of_batch(config, Ranks.current())
    had = (
        f" with {size(torch.cuda.max_memory_allocated(device))} taken at the most"
        if device.type == "cuda"
        else ""
    )
    return OutOfMemory(
        f"out of memory on {device}{had}: {share.describe()} does not fit; {_advice(share)}"
    )


def _advice(share: BatchShare) -> str:
    smaller = next(
        (each for each in range(share.device_batch // 2, 1, -1) if share.device_batch % each == 0),
        None,
    )
    parts = ["--batch-size auto finds one that fits"]
    if smaller is not None:
        parts.append(
            f"--device-batch {smaller} adds up the gradients of smaller parts of the same batch"
        )
    return ", ".join(parts)
