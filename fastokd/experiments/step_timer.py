"""Timing of training steps, each against a baseline."""

import dataclasses
import gc
import itertools
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastokd.data import Dataset, Loader
from fastokd.errors import first_line
from fastokd.experiments.timing import median_and_range, sample_seconds
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods.method import MethodBatch
from fastokd.methods.modules import BranchOutput
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig
from fastokd.train.data import loader_for
from fastokd.train.memory import is_out_of_memory
from fastokd.train.precision import autocast

WINDOWS = 5
"""Timed windows of a row. Before each of them the first row is timed again, so that changes of the
machine's speed cancel in the ratios.
"""

Clock = Callable[[], float]


class TimedStep(ABC):
    """Training that can be advanced step by step; ``warm_up`` steps come before the first window.
    Batches are made on the device; data loaders of research code are not measured.
    """

    captured = False
    warm_up = 3
    precision = "fp32"
    criterion: MethodLoss

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        self.config = config
        self.model = build_model(config, len(dataset.classes), device)
        self.loader = loader_for(config, dataset, dataset.train, True, device)

    def epochs(self) -> Iterator[Loader]:
        """The loader at the start of every epoch, without end."""
        for epoch in itertools.count():
            self.loader.set_epoch(epoch)
            yield self.loader

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Run this many steps; the device may still be at work afterwards."""

    @abstractmethod
    def loss(self) -> float:
        """The mean loss of the steps since the last call."""

    @abstractmethod
    def loss_backward(self, output: BranchOutput, batch: MethodBatch) -> None:
        """The loss and its gradients, as a step computes them from the network's output."""


@dataclasses.dataclass(frozen=True)
class StepRow:
    """A row of the benchmark. Values that were not measured are None, with a ``reason``.

    Attributes:
        name: the difference from the rows before it.
        kind: "first", "lever" (an optimization that the rows after it have too), "alternative" (one
            that they do not have), or "student" (the student alone).
        reason: the reason why it was not measured, or "".
        images_per_second: median, slowest and fastest window.
        milliseconds: of a step, in the median window.
        times_first: speed-up over the first row: the ratio of each window to the window of the
            first row right before it; median, lowest and highest.
        peak_bytes: peak of the GPU memory allocated for it; None on a CPU.
        loss_share: the fraction of a step's time for the loss and its gradients, measured alone on
            the same logits.
        start_seconds: of the first steps, with compilation and capture.
        first_loss: the loss of the first step; all rows start from the same weights and images.
    """

    name: str
    kind: str
    reason: str = ""
    images_per_second: tuple[float, float, float] | None = None
    milliseconds: float | None = None
    times_first: tuple[float, float, float] | None = None
    peak_bytes: int | None = None
    loss_share: float | None = None
    start_seconds: float | None = None
    first_loss: float | None = None


@dataclasses.dataclass
class StepTimer:
    """Times training steps against a baseline, which ``make_baseline`` builds once. The other
    arguments are those of ``StepBenchmark``.
    """

    make_baseline: Callable[[], TimedStep]
    dataset: Dataset
    device: torch.device
    seconds: float
    steps: int | None
    clock: Clock
    _baseline: TimedStep | None = None

    def measure(self, name: str, kind: str, make: Callable[[], TimedStep] | None = None) -> StepRow:
        """A row, of the baseline without ``make``, or the reason why it cannot run."""
        torch.compiler.reset()  # networks compiled by other rows count against a limit
        try:
            return StepRow(name, kind, **self._measure(make))
        except Exception as error:  # compilers' errors have no class in common
            reason = "out of memory" if is_out_of_memory(error) else first_line(error)
            return StepRow(name, kind, reason)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, make: Callable[[], TimedStep] | None) -> dict[str, Any]:
        if self._baseline is None and make is not None:  # its row is known from an earlier call
            self._baseline = self.make_baseline()
            self._baseline.model.train()
            self._baseline.advance(self._baseline.warm_up)
        running, start = self._start(make or self.make_baseline)
        baseline = self._baseline = self._baseline if make and self._baseline else running
        steps = self._window_steps(running)
        baseline_steps = steps if baseline is running else self._window_steps(baseline)
        speeds, baseline_speeds = [], []
        for _ in range(WINDOWS):
            if baseline is not running:
                baseline_speeds.append(self._speed(baseline, baseline_steps))
            speeds.append(self._speed(running, steps))
        ratios = [own / other for own, other in zip(speeds, baseline_speeds or speeds, strict=True)]
        step_seconds = running.config.batch_size / statistics.median(speeds)
        repeats = (25, 20) if self.steps is None else (3, 1)
        loss = loss_seconds(running, self.dataset, self.device, *repeats)
        return {
            **start,
            "images_per_second": median_and_range(speeds),
            "milliseconds": 1000 * step_seconds,
            "times_first": median_and_range(ratios),
            "loss_share": None if loss is None else loss / step_seconds,
        }

    def _start(self, make: Callable[[], TimedStep]) -> tuple[TimedStep, dict[str, Any]]:
        """Build a step and warm it up; the values of its first steps."""
        gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        running = make()
        running.model.train()
        started = self.now()
        running.advance(1)
        first_loss = running.loss()
        running.advance(running.warm_up - 1)
        return running, {
            "first_loss": first_loss,
            "start_seconds": self.now() - started,
            # Read here: the memory of a captured step is not counted when it is replayed, and that
            # of other rows is.
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) - before if gpu else None,
        }

    def _window_steps(self, running: TimedStep) -> int:
        if self.steps is not None:
            return self.steps
        started = self.now()
        running.advance(2)
        return max(1, round(self.seconds / WINDOWS / max((self.now() - started) / 2, 1e-9)))

    def _speed(self, running: TimedStep, steps: int) -> float:
        """Images per second of a window."""
        started = self.now()
        running.advance(steps)
        return running.config.batch_size * steps / max(self.now() - started, 1e-9)

    def now(self) -> float:
        """The time when the device has done its work so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def loss_seconds(
    running: TimedStep, dataset: Dataset, device: torch.device, repeats: int, inner: int
) -> float | None:
    """The time of the loss alone: from a batch's logits to the gradients of all inputs of the loss.
    None if it cannot be captured alone. Captured if the step is; on a GPU timed by events.
    """
    batch = next(iter(loader_for(running.config, dataset, dataset.train, True, device)))
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, autocast(running.precision, device):
        result = running.model(batch.images)
    output = tree_map(_leaf, result._replace(features=()))
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    targets = MethodBatch(batch.target, batch.index)

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        running.loss_backward(output, targets)

    try:
        return statistics.median(sample_seconds(call, device, running.captured, repeats, inner))
    except RuntimeError:
        # It cannot be captured alone, and launched alone it takes longer than in the step.
        return None


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value
