"""TSB: Temporal-Spatial Boosting of mutual distillation."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.graph import KL, CrossEntropy, External, Graph, Logits, ProbabilityMixture
from fastokd.methods.base import (
    Impl,
    Reduction,
    branch_names,
    check_choice,
    check_options,
    check_target,
    checked_rows,
    mean_prediction,
)
from fastokd.methods.method import GraphInputs, Method, MethodLoss, Presets
from fastokd.ranks import gather_rows, rank_and_size

Where = Literal["auto", "device", "host"]


def tsb_graph(
    num_branches: int = 2,
    temperature: float = 4.0,
    lambda_ta: float = 0.5,
    lambda_si: float = 0.5,
    student_first: bool = False,
    t2_scaling: bool = False,
    label_smoothing: float = 0.0,
) -> Graph:
    """M networks that learn from each other's memories and from their common mean prediction.

    ``L = sum_i [ CE(z^i) + kd_weight * ( lambda_ta sum_{j != i} KL(memory_j || z^i) + lambda_si
    KL(mean || z^i) ) ]``, rows at T. ``memory{j}`` is network j's temporal accumulator for each
    sample, given from outside: corrected (divided by ``1 - beta^t``), with the current prediction
    already in it. ``mean`` averages all networks' softened predictions, the own one included.

    The paper prints the student as first argument (``student_first=True``); the default is the
    usual direction. As printed there is no T^2 (``t2_scaling=False``). Detaching is not stated: the
    teachers are constants here. The first 20 epochs are without KL (``kd_weight=0``), but are
    remembered.
    """
    branches = branch_names("tsb_graph", num_branches, 2)

    def teach(teacher: str, student: str, weight: float) -> KL:
        direction = "student_first" if student_first else "teacher_first"
        return KL(
            teacher, student, weight, temperature, t2_scaling, detach=True, direction=direction
        )

    memories = [f"memory{j}" for j in range(1, num_branches + 1)]
    mean = ProbabilityMixture("mean", branches, (1.0 / num_branches,) * num_branches, temperature)
    terms = (
        *map(CrossEntropy, branches),
        *(
            teach(memory, student, lambda_ta)
            for i, student in enumerate(branches)
            for j, memory in enumerate(memories)
            if j != i
        ),
        *(teach("mean", student, lambda_si) for student in branches),
    )
    return Graph(
        "tsb", (*map(Logits, branches), *map(External, memories), mean), terms, label_smoothing
    )


class TemporalAccumulator(nn.Module):
    """What M networks predicted for each of N samples, averaged over the steps in which it was
    seen.

    ``Z_t = beta Z_{t-1} + (1 - beta) p_t`` with ``Z_0 = 0``; read as ``Z_t / (1 - beta^t)`` (TSB
    eq. 5; Z itself is never overwritten by the corrected value). t counts the steps of each sample
    by itself, so that order, samples left out of an epoch and interruptions do not matter. A sample
    that is in a batch several times makes one step, with the mean of its predictions.

    The memory is [N, M, C] in float32, on the device, or in pinned host memory that the device
    reads and writes in place: nothing waits for the host. It stays where ``allocate`` put it;
    ``to()`` and ``half()`` leave it alone.

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
        where: Where,
    ) -> str:
        """Forget everything and make room; returns what it takes, in words.

        ``where="auto"`` is the device if the memory takes no more than a quarter of what is free
        there, else the host.

        Raises:
            ConfigError: it does not fit; the message says how much it needs.
        """
        shape = (num_samples, num_networks, num_classes)
        needed = 4 * math.prod(shape)
        self.memory = self.steps = None
        if where == "auto":
            where = (
                "host" if device.type == "cuda" and needed > _free_memory(device) / 4 else "device"
            )
        mapped = where == "host" and device.type == "cuda"
        place = torch.device("cpu") if mapped else device
        free = _free_memory(place)
        what = (
            f"{num_networks} networks' predictions of {num_samples:,} samples and {num_classes:,}"
            f" classes take {_size(needed)} of float32"
        )
        if needed > free:
            fix = (
                "memory=host, fewer networks or fewer images"
                if place.type == "cuda"
                else "fewer networks or fewer images"
            )
            raise ConfigError(
                f"the temporal accumulator does not fit: {what}, and {_size(free)} are free on"
                f" {place}; use {fix}"
            )
        self.device = device
        with torch.cuda.device(device) if mapped else contextlib.nullcontext():
            self.memory = torch.zeros(shape, device=place, pin_memory=mapped)
        self._rows = _mapped(self.memory, device) if mapped else self.memory
        self.steps = torch.zeros(num_samples, dtype=torch.int32, device=device)
        self._owner = torch.zeros(num_samples, dtype=torch.int64, device=device)
        return (
            f"temporal accumulator: {what}, {'in pinned host memory' if mapped else f'on {place}'}"
        )

    def update(self, index: Tensor, predictions: Tensor, keep: bool = True) -> Tensor:
        """Make one step of each sample of the batch and read it, corrected, with this prediction in
        it.

        With torch.distributed the batches of all processes are one batch, which each of them
        remembers: all must call this at once. Without ``keep`` each process is on its own.

        Args:
            index: int64 [B], positions among the N samples.
            predictions: probabilities [B, M, C].
            keep: false leaves the memory as it was.

        Returns:
            Probabilities [B, M, C] in float32.
        """
        assert self.memory is not None
        batch = len(index)
        first = rank_and_size()[0] * batch if keep else 0
        predictions = predictions.to(self._rows.dtype)
        if keep:
            index, predictions = gather_rows(index), gather_rows(predictions)
        # Any one of a sample's places in the batch gathers what all of them predict.
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
            torch.cuda.synchronize(
                self.device
            )  # the device may still write to what the host is about to read
        super()._save_to_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TemporalAccumulator":
        return self


class _Pointer:
    """Pinned host memory as the CUDA array interface shows it: the device reaches it under the same
    address.
    """

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
    """The same memory as a tensor on the device. It lives as long as either of the two.

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
    """Bytes that are free on a device; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return math.inf


def _size(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


class TSBLoss(MethodLoss):
    """The TSB loss, see ``tsb_graph`` for the formula: each network learns from the others'
    memories and from the mean.

    Call ``prepare`` before the first batch. In training mode every call remembers the batch's
    predictions, softened with T; in evaluation mode nothing is remembered. What is remembered is in
    the state dict.

    Args:
        num_branches: M networks, at least 2.
        temperature: T (the paper's tau), of the KL terms and of what is remembered.
        lambda_ta: weight of every other network's temporal accumulator.
        lambda_si: weight of the spatial integrator, the mean of all networks' predictions.
        beta: in [0, 1): the share of the past in the temporal accumulator.
        student_first: ``KL(student || teacher)`` as the paper prints it, instead of ``KL(teacher ||
            student)``.
        t2_scaling: multiply the KL terms by T^2; the paper does not.
        memory: where the accumulator lies: "device", "host" (pinned memory), or "auto", which is
            the device if it takes no more than a quarter of what is free there.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {"paper": {}}

    def __init__(
        self,
        num_branches: int = 2,
        temperature: float = 4.0,
        lambda_ta: float = 0.5,
        lambda_si: float = 0.5,
        beta: float = 0.8,
        student_first: bool = False,
        t2_scaling: bool = False,
        memory: Where = "auto",
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(
            temperature=temperature,
            lambda_ta=lambda_ta,
            lambda_si=lambda_si,
            label_smoothing=label_smoothing,
        )
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1:
            raise ValueError(
                f"beta={beta!r}; it must be in [0, 1): the share of the past in the temporal"
                " accumulator"
            )
        for name, value in (("student_first", student_first), ("t2_scaling", t2_scaling)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}; it must be True or False")
        check_choice("memory", memory, ("auto", "device", "host"))
        graph = tsb_graph(
            num_branches,
            temperature,
            lambda_ta,
            lambda_si,
            student_first,
            t2_scaling,
            label_smoothing,
        )
        super().__init__(graph, num_branches, reduction, impl)
        self.temperature = temperature
        self.where = memory
        self.accumulator = TemporalAccumulator(beta)

    def prepare(self, num_samples: int, num_classes: int, device: torch.device) -> str:
        """Make room for every sample's predictions, see ``TemporalAccumulator.allocate``; forgets
        what there was.
        """
        return self.accumulator.allocate(
            num_samples, self.num_branches, num_classes, torch.device(device), self.where
        )

    def graph_inputs(
        self, branch_logits: Sequence[Tensor] | Tensor, target: Tensor | None, *, index: Tensor
    ) -> GraphInputs:
        """``index``: int64 [B], the samples' positions in the training split. In training mode this
        remembers the batch.
        """
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        self._check_index(index, rows[0])
        check_target(target, rows[0])  # what the graph rejects must not be remembered
        predictions = torch.stack(
            [(row.detach().float() / self.temperature).softmax(1) for row in rows], 1
        )
        memories = self.accumulator.update(index, predictions, self.training).unbind(1)
        return GraphInputs(
            rows, externals={f"memory{j}": memory for j, memory in enumerate(memories, start=1)}
        )

    def _check_index(self, index: Tensor, row: Tensor) -> None:
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
                f"branch_logits[0] has {row.shape[1]} classes; prepare() made room for"
                f" {memory.shape[2]}"
            )
        if index.device.type == "cpu" and len(index):
            low, high = (int(value) for value in index.aminmax())
            if low < 0 or high >= len(memory):
                raise ValueError(
                    f"index holds {low if low < 0 else high}; prepare() made room for the samples 0"
                    f" to {len(memory) - 1}"
                )

    @torch.no_grad()
    def named_rows(self, branch_logits: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
        """The networks' logits [B, C], and their ``ensemble``: the mean of their predictions."""
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        return {
            **dict(zip(self.graph.logits, rows, strict=True)),
            "ensemble": mean_prediction(rows),
        }


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
    schedule=warm_up,
    # 20 of the paper's 240 epochs on CIFAR.
    ramp_epochs=lambda epochs, preset: round(epochs * 20 / 240),
)
