"""TSB: Temporal-Spatial Boosting of mutual distillation."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.graph import KL, CrossEntropy, External, Graph, Logits, Node, ProbabilityMixture, Term
from fastokd.losses import options
from fastokd.losses.checks import check_target, checked_rows
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.losses.options import Impl, Reduction, loss_options
from fastokd.methods.method import Method, Schedule
from fastokd.ranks import gather_rows, rank_and_size

Placement = Literal["auto", "device", "host"]


class TemporalAccumulator(nn.Module):
    """The predictions of M networks for each of N samples, averaged over the sample's steps.

    ``Z_t = beta Z_{t-1} + (1 - beta) p_t`` with ``Z_0 = 0``; read as ``Z_t / (1 - beta^t)`` (TSB
    eq. 5; Z itself is never overwritten by the corrected value). t counts the steps of each sample
    separately, so that order, skipped samples and interruptions do not matter. A sample that is in
    a batch several times makes one step, with the mean of its predictions.

    The memory is [N, M, C] in float32, on the device, or in pinned host memory that the device
    reads and writes in place, without waiting for the host. ``to()`` and ``half()`` do not change
    it.

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
        """Allocate an empty memory.

        Args:
            placement: "device", "host", or "auto": the device if the memory takes no more than a
                quarter of the free memory there, else the host.

        Returns:
            A line that states the memory it takes.

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
        description = (
            f"{num_networks} networks' predictions of {num_samples:,} samples and {num_classes:,}"
            f" classes take {_size(needed)} of float32"
        )
        if needed > free:
            fix = "memory=host, " * (place.type == "cuda") + "fewer networks or fewer images"
            raise ConfigError(
                f"the temporal accumulator does not fit: {description}, and {_size(free)} are free"
                f" on {place}; use {fix}"
            )
        with torch.cuda.device(device) if mapped else contextlib.nullcontext():
            self.memory = torch.zeros(shape, device=place, pin_memory=mapped)
        self._rows = _mapped(self.memory, device) if mapped else self.memory
        self.steps = torch.zeros(num_samples, dtype=torch.int32, device=device)
        self.device = self.steps.device  # "cuda" with its index
        self._owner = torch.zeros(num_samples, dtype=torch.int64, device=device)
        location = "in pinned host memory" if mapped else f"on {place}"
        return f"temporal accumulator: {description}, {location}"

    def update(self, index: Tensor, predictions: Tensor, keep: bool = True) -> Tensor:
        """Make one step of each sample of the batch and return its corrected value.

        With torch.distributed the batches of all processes are one batch, which every process adds
        to its memory, so all must call this together. Without ``keep`` they are independent.

        Args:
            index: int64 [B], positions among the N samples.
            predictions: probabilities [B, M, C].
            keep: whether to store the step.

        Returns:
            Probabilities [B, M, C] in float32.
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
        totals = (
            torch.zeros_like(predictions).index_add_(0, owner, predictions).index_select(0, owner)
        )
        counts = (
            torch.zeros_like(owner)
            .index_add_(0, owner, torch.ones_like(owner))
            .index_select(0, owner)
        )
        values = (
            self._rows.index_select(0, index)
            .mul_(self.beta)
            .add_(totals / counts.view(-1, 1, 1), alpha=1 - self.beta)
        )
        steps = self.steps.index_select(0, index) + 1
        if keep:
            self._rows.index_copy_(0, index, values)
            self.steps.index_copy_(0, index, steps)
        corrected = values / -torch.expm1(
            steps * math.log(self.beta) if self.beta else steps * -math.inf
        ).view(-1, 1, 1)
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
    """The same memory as a tensor on the device. It lives as long as either tensor.

    Raises:
        ConfigError: this platform copies instead.
    """
    view = torch.as_tensor(_Pointer(pinned), device=device)
    if view.data_ptr() != pinned.data_ptr():
        raise ConfigError(
            f"memory='host': {device} cannot reach pinned host memory in place here; use"
            " memory=device"
        )
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


@loss_options
class TSBLoss(MethodLoss):
    """M networks that learn from each other's memories and from their common mean prediction.

    ``L = sum_i [ CE(z^i) + kd_weight * ( lambda_ta sum_{j != i} KL(memory_j || z^i) + lambda_si
    KL(mean || z^i) ) ]``, rows at T. ``memory{j}`` is network j's temporal accumulator for each
    sample, corrected (divided by ``1 - beta^t``) and with the current prediction in it. ``mean``
    averages all networks' softened predictions, the network's own included.

    The paper prints the student as first argument (``student_first=True``); the default is the
    usual direction. As printed there is no T^2 (``t2_scaling=False``). Detaching is not stated: the
    teachers are constants here. The first 20 epochs are without KL (``kd_weight=0``), but update
    the memory.

    Call ``prepare`` before the first batch. In training mode every call adds the batch's
    predictions, softened with T, to the memory (``update_state``); in evaluation mode it does not.
    The memory is in the state dict.
    """

    presets: ClassVar[Presets] = {"paper": {}}

    num_branches: int = options.num_branches(2, 2, "M networks, at least 2.")
    temperature: float = options.temperature(
        4.0, "T (the paper's tau), of the KL terms and of the memory."
    )
    lambda_ta: float = options.weight(0.5, "weight of every other network's temporal accumulator.")
    lambda_si: float = options.weight(
        0.5, "weight of the spatial integrator, the mean of all networks' predictions."
    )
    beta: float = options.number(
        0.8, "in [0, 1): the share of the past in the temporal accumulator.", 0, 1, open_high=True
    )
    student_first: bool = options.switch(
        False,
        "``KL(student || teacher)`` as the paper prints it, instead of ``KL(teacher || student)``.",
    )
    t2_scaling: bool = options.switch(False, "multiply the KL terms by T^2; the paper does not.")
    memory: Placement = options.choice(
        "auto",
        ("auto", "device", "host"),
        'the place of the accumulator: "device", "host" (pinned memory), or "auto", which is the'
        " device if it takes no more than a quarter of the free memory there.",
    )
    label_smoothing: float = options.label_smoothing()
    reduction: Reduction = options.reduction()
    impl: Impl = options.impl()

    ensemble_of = "predictions"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.accumulator = TemporalAccumulator(self.beta)

    def teach(self, teacher: str, student: str, weight: float, **options: Any) -> KL:
        direction = "student_first" if self.student_first else "teacher_first"
        return super().teach(
            teacher, student, weight, t2_scaling=self.t2_scaling, direction=direction, **options
        )

    def build_graph(self) -> Graph:
        branches, share = self.branch_names(), 1.0 / self.num_branches
        memories = [f"memory{j}" for j in range(1, self.num_branches + 1)]
        mean = ProbabilityMixture("mean", branches, (share,) * len(branches), self.temperature)
        terms: tuple[Term, ...] = (
            *map(CrossEntropy, branches),
            *(
                self.teach(memory, student, self.lambda_ta)
                for i, student in enumerate(branches)
                for j, memory in enumerate(memories)
                if j != i
            ),
            *(self.teach("mean", student, self.lambda_si) for student in branches),
        )
        nodes: tuple[Node, ...] = (*map(Logits, branches), *map(External, memories), mean)
        return Graph("tsb", nodes, terms, self.label_smoothing)

    def prepare(self, num_samples: int, num_classes: int, device: torch.device) -> str:
        """Allocate the memory of every sample's predictions, see ``TemporalAccumulator.allocate``;
        an earlier memory is lost.
        """
        return self.accumulator.allocate(
            num_samples, self.num_branches, num_classes, torch.device(device), self.memory
        )

    def update_state(
        self, branch_logits: Rows, target: Tensor, *, index: Tensor | None = None
    ) -> Mapping[str, Any]:
        """Add the batch's predictions to the memory; returns the corrected ``memories`` [B, M, C]
        for ``graph_inputs``.
        """
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
            memories: the result of ``update_state``; None to compute what it would return without
                changing the memory.
        """
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        if target is None:
            return GraphInputs(rows)
        if memories is None:
            memories = self._remember(rows, target, index, keep=False)
        named = {f"memory{j}": row for j, row in enumerate(memories.unbind(1), start=1)}
        return GraphInputs(rows, externals=named)

    def _remember(
        self, branch_logits: Rows, target: Tensor, index: Tensor | None, keep: bool
    ) -> Tensor:
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        checked = self._check_index(index, rows[0])
        check_target(target, rows[0])  # an invalid batch must not change the memory
        predictions = torch.stack(
            [(row.detach().float() / self.temperature).softmax(1) for row in rows], 1
        )
        return self.accumulator.update(checked, predictions, keep)

    def _check_index(self, index: Tensor | None, row: Tensor) -> Tensor:
        memory = self.accumulator.memory
        if memory is None:
            raise ValueError(
                "there is no memory yet: call prepare(num_samples, num_classes, device) before the"
                " first batch"
            )
        if (
            not isinstance(index, Tensor)
            or index.dtype != torch.int64
            or index.shape != row.shape[:1]
        ):
            got = (
                f"{index.dtype} {list(index.shape)}"
                if isinstance(index, Tensor)
                else type(index).__name__
            )
            raise ValueError(
                f"index is {got}; it must be int64 [{len(row)}], the samples' positions in the"
                " training split"
            )
        if row.device != self.accumulator.device or index.device != row.device:
            raise ValueError(
                f"index is on {index.device} and the logits are on {row.device}; prepare() made the"
                f" memory for {self.accumulator.device}"
            )
        if row.shape[1] != memory.shape[2]:
            raise ValueError(
                f"branch_logits[0] has {row.shape[1]} classes; prepare() allocated"
                f" {memory.shape[2]}"
            )
        if index.device.type == "cpu" and len(index):
            low, high = (int(value) for value in index.aminmax())
            if low < 0 or high >= len(memory):
                raise ValueError(
                    f"index holds {low if low < 0 else high}; prepare() allocated the samples 0"
                    f" to {len(memory) - 1}"
                )
        return index


tsb_graph = TSBLoss.make_graph


def warm_up(epoch: int, length: int) -> float:
    """The weight of the distillation terms in a 0-based epoch: 0 in the first ``length`` epochs,
    then 1.
    """
    return float(epoch >= length)


METHOD = Method(
    name="tsb",
    summary=(
        "Temporal-Spatial Boosting: networks learn from the others' predictions over time and from"
        " all predictions' mean"
    ),
    loss_class=TSBLoss,
    branch_range=(2, 8),
    default_branches=2,
    topologies=("peers",),
    needs_index=True,
    schedule=Schedule((20, 240), warm_up),  # the paper's epochs on CIFAR
)
