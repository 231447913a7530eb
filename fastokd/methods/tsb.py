"""TSB: Temporal-Spatial Boosting of mutual distillation."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.graph import CrossEntropy, External, Graph, Logits, Node, ProbabilityMixture, Term
from fastokd.losses import options
from fastokd.losses.checks import check_target, checked_rows
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods.method import Method, Schedule
from fastokd.ranks import gather_rows, rank_and_size

Placement = Literal["auto", "device", "host"]


class TemporalAccumulator(nn.Module):
    """The predictions of M networks for each of N samples, averaged over the sample's steps.

    ``Z_t = beta Z_{t-1} + (1 - beta) p_t`` with ``Z_0 = 0``; read as ``Z_t / (1 - beta^t)`` (TSB
    eq. 5). t counts each sample's steps, so that order, skipped samples and interruptions do not
    matter. A sample that is in a batch several times makes one step, with its mean prediction.

    The memory is [N, M, C] in float32, on the device or in pinned host memory that the device
    accesses in place. ``to()`` and ``half()`` do not change it.

    Args:
        beta: in [0, 1): the share of the past.
    """

    memory: Tensor | None
    steps: Tensor | None

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("memory", None)
        self.register_buffer("steps", None)
        self.device: torch.device | None = None

    def allocate(
        self,
        num_samples: int,
        num_networks: int,
        num_classes: int,
        device: torch.device,
        placement: Placement,
    ) -> str:
        """Allocate an empty memory; returns a line that states the memory it takes.

        ``placement`` "auto" is the device if a quarter of its free memory is enough, else the host.

        Raises:
            ConfigError: it does not fit; the message states how much it needs.
        """
        shape = (num_samples, num_networks, num_classes)
        needed = 4 * math.prod(shape)
        self.memory = self.steps = None
        if placement == "auto":
            fits = device.type != "cuda" or needed <= _free_memory(device) / 4
            placement = "device" if fits else "host"
        mapped = placement == "host" and device.type == "cuda"
        place = torch.device("cpu") if mapped else device
        free = _free_memory(place)
        samples = f"{num_samples:,} samples and {num_classes:,} classes"
        description = f"{num_networks} networks' predictions of {samples} take {_size(needed)}"
        description += " of float32"
        if needed > free:
            fix = "memory=host, " * (place.type == "cuda") + "fewer networks or fewer images"
            fix = f"{_size(free)} are free on {place}; use {fix}"
            raise ConfigError(f"the temporal accumulator does not fit: {description}, and {fix}")
        with torch.cuda.device(device) if mapped else contextlib.nullcontext():
            self.memory = torch.zeros(shape, device=place, pin_memory=mapped)
        self._rows = _mapped(self.memory, device) if mapped else self.memory
        self.steps = torch.zeros(num_samples, dtype=torch.int32, device=device)
        self.device = self.steps.device  # "cuda" with its index
        self._owner = torch.zeros(num_samples, dtype=torch.int64, device=device)
        location = "in pinned host memory" if mapped else f"on {place}"
        return f"temporal accumulator: {description}, {location}"

    def update(self, index: Tensor, predictions: Tensor, keep: bool = True) -> Tensor:
        """Make one step of each sample of the batch, stored with ``keep``; returns the corrected
        values [B, M, C] in float32.

        With torch.distributed the batches of all processes are one batch, which every process adds
        to its memory, so all must call this together. Without ``keep`` they are independent.

        Args:
            index: int64 [B], positions among the N samples.
            predictions: probabilities [B, M, C].
        """
        assert self.steps is not None
        batch = len(index)
        first = rank_and_size()[0] * batch if keep else 0
        predictions = predictions.to(self._rows.dtype)
        if keep:
            index, predictions = gather_rows(index), gather_rows(predictions)
        # One of a sample's positions in the batch sums the predictions of all of them.
        self._owner.index_copy_(0, index, torch.arange(len(index), device=index.device))
        owner = self._owner.index_select(0, index)

        def total(values: Tensor) -> Tensor:
            return torch.zeros_like(values).index_add_(0, owner, values).index_select(0, owner)

        mean = total(predictions) / total(torch.ones_like(owner)).view(-1, 1, 1)
        values = self._rows.index_select(0, index).mul_(self.beta).add_(mean, alpha=1 - self.beta)
        steps = self.steps.index_select(0, index) + 1
        if keep:
            self._rows.index_copy_(0, index, values)
            self.steps.index_copy_(0, index, steps)
        log_beta = math.log(self.beta) if self.beta else -math.inf
        corrected = values / -torch.expm1(steps * log_beta).view(-1, 1, 1)
        return corrected[first : first + batch]

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if self.memory is not None and self.memory.is_pinned() and self.device is not None:
            torch.cuda.synchronize(self.device)  # the device may still write to the memory
        super()._save_to_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self


class _Pointer:
    """Pinned host memory through the CUDA array interface, at the same address."""

    def __init__(self, pinned: Tensor) -> None:
        self.pinned = pinned
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": tuple(pinned.shape),
            "typestr": "<f4",
            "data": (pinned.data_ptr(), False),
            "strides": None,
        }


def _mapped(pinned: Tensor, device: torch.device) -> Tensor:
    """The same memory as a tensor on the device; a ConfigError where the platform copies it."""
    view = torch.as_tensor(_Pointer(pinned), device=device)
    if view.data_ptr() != pinned.data_ptr():
        reason = f"{device} cannot access pinned host memory in place"
        raise ConfigError(f"memory=host: {reason}; use memory=device")
    return view


def _free_memory(device: torch.device) -> float:
    """Free bytes on a device; infinite where that is unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return math.inf


def _size(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


@options.loss_options
class TSBLoss(MethodLoss):
    """M networks that learn from each other's memories and from their common mean prediction.

    ``L = sum_i [ CE(z^i) + kd_weight * ( lambda_ta sum_{j != i} KL(memory_j || z^i) + lambda_si
    KL(mean || z^i) ) ]``, rows at T. ``memory{j}`` is network j's ``TemporalAccumulator``, with the
    current prediction in it. ``mean`` averages all networks' softened predictions.

    The paper prints the student as first argument (``student_first=True``); the default is the
    usual direction. As printed there is no T^2 (``t2_scaling=False``). Detaching is not stated: the
    teachers are constants here. The first 20 epochs are without KL (``kd_weight=0``), but update
    the memory.

    Call ``prepare`` before the first batch. In training mode every call adds the batch's
    predictions, softened with T, to the memory. The memory is in the state dict.
    """

    num_branches: int = options.num_branches(2, 2, "M networks, at least 2.")
    temperature: float = options.temperature(4.0, "T (tau) of the KL terms and of the memory.")
    lambda_ta: float = options.weight(0.5, "weight of every other network's memory.")
    lambda_si: float = options.weight(0.5, "weight of the mean of all networks' predictions.")
    beta: float = options.number(0.8, "share of the past in a memory.", 0, 1, open_high=True)
    student_first: bool = options.switch(False, "``KL(student || teacher)``, as printed.")
    t2_scaling: bool = options.switch(False, "multiply the KL terms by T^2; the paper does not.")
    memory: Placement = options.choice(
        "auto",
        ("auto", "device", "host"),
        'the place of the memory: "device", "host" (pinned memory), or "auto", the device if a'
        " quarter of its free memory is enough.",
    )

    ensemble_of = "predictions"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.accumulator = TemporalAccumulator(self.beta)

    def build_graph(self) -> Graph:
        branches, share = self.branch_names(), 1.0 / self.num_branches
        memories = [f"memory{j}" for j in range(1, self.num_branches + 1)]
        pairs = itertools.product(zip(branches, memories, strict=True), memories)
        edges = [(other, name, self.lambda_ta) for (name, own), other in pairs if own != other]
        edges += [("mean", name, self.lambda_si) for name in branches]
        direction = "student_first" if self.student_first else "teacher_first"
        kind: dict[str, Any] = {"t2_scaling": self.t2_scaling, "direction": direction}
        mean = ProbabilityMixture("mean", branches, (share,) * len(branches), self.temperature)
        nodes: list[Node] = [*map(Logits, branches), *map(External, memories), mean]
        terms: list[Term] = [*map(CrossEntropy, branches)]
        terms += [self.teach(*edge, **kind) for edge in edges]
        return Graph("tsb", nodes, terms, self.label_smoothing)

    def prepare(self, num_samples: int, num_classes: int, device: torch.device) -> str:
        """Allocate an empty memory, see ``TemporalAccumulator.allocate``."""
        sizes = num_samples, self.num_branches, num_classes
        return self.accumulator.allocate(*sizes, torch.device(device), self.memory)

    def update_state(
        self, branch_logits: Rows, target: Tensor, *, index: Tensor | None = None
    ) -> Mapping[str, Any]:
        """Add a batch to the memory; returns ``memories`` [B, M, C] for ``graph_inputs``."""
        return {"memories": self._remember(branch_logits, target, index, keep=True)}

    def graph_inputs(
        self,
        branch_logits: Rows,
        target: Tensor | None = None,
        *,
        index: Tensor | None = None,
        memories: Tensor | None = None,
    ) -> GraphInputs:
        """The networks' rows and memories; without a target the rows alone.

        Args:
            branch_logits, target: as in ``forward``.
            index: int64 [B], the samples' positions in the training split.
            memories: the result of ``update_state``, computed without changing the memory if None.
        """
        if target is None:
            return GraphInputs([*branch_logits])
        if memories is None:
            memories = self._remember(branch_logits, target, index, keep=False)
        named = {f"memory{j}": row for j, row in enumerate(memories.unbind(1), start=1)}
        return GraphInputs([*branch_logits], externals=named)

    def _remember(
        self, branch_logits: Rows, target: Tensor, index: Tensor | None, keep: bool
    ) -> Tensor:
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        checked = self._check_index(index, rows[0])
        check_target(target, rows[0])  # an invalid batch must not change the memory
        softened = [(row.detach().float() / self.temperature).softmax(1) for row in rows]
        return self.accumulator.update(checked, torch.stack(softened, 1), keep)

    def _check_index(self, index: Tensor | None, row: Tensor) -> Tensor:
        memory, made_for = self.accumulator.memory, self.accumulator.device
        if memory is None:
            fix = "call prepare(num_samples, num_classes, device) before the first batch"
            raise ValueError(f"there is no memory yet: {fix}")
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be a tensor, got {type(index).__name__}")
        if index.dtype != torch.int64 or index.shape != row.shape[:1]:
            fix = f"it must be int64 [{len(row)}], positions in the training split"
            raise ValueError(f"index is {index.dtype} {list(index.shape)}; {fix}")
        if not index.device == row.device == made_for:
            devices = f"index is on {index.device} and the logits are on {row.device}"
            raise ValueError(f"{devices}; prepare() made the memory for {made_for}")
        num_samples, _, num_classes = memory.shape
        if row.shape[1] != num_classes:
            allocated = f"prepare() allocated {num_classes}"
            raise ValueError(f"branch_logits[0] has {row.shape[1]} classes; {allocated}")
        if index.device.type == "cpu" and len(index):
            low, high = (int(value) for value in index.aminmax())
            if low < 0 or high >= num_samples:
                allocated = f"prepare() allocated the samples 0 to {num_samples - 1}"
                raise ValueError(f"index holds {low if low < 0 else high}; {allocated}")
        return index


tsb_graph = TSBLoss.make_graph


def warm_up(epoch: int, length: int) -> float:
    """``kd_weight`` in a 0-based epoch: 0 in the first ``length`` epochs, then 1."""
    return float(epoch >= length)


METHOD = Method(
    name="tsb",
    summary="Temporal-Spatial Boosting: networks learn from the accumulated predictions of the"
    " other networks and from the mean of all predictions",
    loss_class=TSBLoss,
    topologies=("peers",),
    needs_index=True,
    schedule=Schedule((20, 240), warm_up),  # the paper's epochs on CIFAR
)
