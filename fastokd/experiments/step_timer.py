"""Timing of training steps, each against a baseline."""

import dataclasses
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastokd.data import Dataset
from fastokd.errors import first_line
from fastokd.experiments.timing import median_and_range, sample_seconds
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods.method import MethodBatch
from fastokd.methods.modules import BranchOutput
from fastokd.models import BranchedModel
from fastokd.train.config import TrainConfig
from fastokd.train.data import loader_for
from fastokd.train.memory import is_out_of_memory
from fastokd.train.precision import autocast

WINDOWS = 5
"""Timed windows of a row. Before each of them the first row is timed again, so that changes of the
machine's speed cancel in the ratios.
"""

Clock = Callable[[], float]


class Stepping(Protocol):
    """Training that can be advanced step by step."""

    config: TrainConfig
    model: BranchedModel
    criterion: MethodLoss
    precision: str
    captured: bool
    warm_up: int

    def advance(self, steps: int) -> None:
        """Run this many steps; the device may still be at work afterwards."""

    def loss(self) -> float:
        """The mean loss of the steps since the last call."""

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


class StepTimer:
    """Times training steps against a baseline.

    Args:
        make_baseline: builds the baseline, once.
        dataset: decoded images.
        device: the device of the steps.
        seconds: time for all windows of a row.
        steps: steps of each window, instead of ``seconds``.
        clock: returns a time in seconds.
    """

    def __init__(
        self,
        make_baseline: Callable[[], Stepping],
        dataset: Dataset,
        device: torch.device,
        seconds: float,
        steps: int | None,
        clock: Clock,
    ) -> None:
        self._make_baseline, self._dataset, self._device = make_baseline, dataset, device
        self._seconds, self._steps, self._clock = seconds, steps, clock
        self._baseline: Stepping | None = None

    def measure(self, name: str, kind: str, make: Callable[[], Stepping] | None = None) -> StepRow:
        """A row, of the baseline without ``make``; or the reason why it cannot run, which must not
        end the other rows.
        """
        torch.compiler.reset()  # networks compiled by other rows count against a limit
        try:
            values = self._measure_baseline() if make is None else self._measure(make)
            return StepRow(name, kind, **values)
        except Exception as error:  # compilers' errors have no class in common
            reason = "out of memory" if is_out_of_memory(error) else first_line(error)
            return StepRow(name, kind, reason)
        finally:
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure_baseline(self) -> dict[str, Any]:
        self._baseline, start = self._start(self._make_baseline)
        steps = self._window_steps(self._baseline)
        speeds = [self._speed(self._baseline, steps) for _ in range(WINDOWS)]
        return {**start, **self._values(self._baseline, speeds, speeds)}

    def _measure(self, make: Callable[[], Stepping]) -> dict[str, Any]:
        if self._baseline is None:  # its row is known from an earlier call
            self._baseline = self._make_baseline()
            self._baseline.model.train()
            self._baseline.advance(self._baseline.warm_up)
        running, start = self._start(make)
        steps, baseline_steps = map(self._window_steps, (running, self._baseline))
        speeds, baseline_speeds = [], []
        for _ in range(WINDOWS):
            baseline_speeds.append(self._speed(self._baseline, baseline_steps))
            speeds.append(self._speed(running, steps))
        return {**start, **self._values(running, speeds, baseline_speeds)}

    def _start(self, make: Callable[[], Stepping]) -> tuple[Stepping, dict[str, Any]]:
        """Build a step and warm it up; the values of its first steps."""
        gpu = self._device.type == "cuda"
        before = torch.cuda.memory_allocated(self._device) if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
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
            "peak_bytes": torch.cuda.max_memory_allocated(self._device) - before if gpu else None,
        }

    def _values(
        self, running: Stepping, speeds: Sequence[float], baseline: Sequence[float]
    ) -> dict[str, Any]:
        step_seconds = running.config.batch_size / statistics.median(speeds)
        repeats = (25, 20) if self._steps is None else (3, 1)
        loss = loss_seconds(running, self._dataset, self._device, *repeats)
        ratios = [own / other for own, other in zip(speeds, baseline, strict=True)]
        return {
            "images_per_second": median_and_range(speeds),
            "milliseconds": 1000 * step_seconds,
            "times_first": median_and_range(ratios),
            "loss_share": None if loss is None else loss / step_seconds,
        }

    def _window_steps(self, running: Stepping) -> int:
        if self._steps is not None:
            return self._steps
        started = self.now()
        running.advance(2)
        return max(1, round(self._seconds / WINDOWS / max((self.now() - started) / 2, 1e-9)))

    def _speed(self, running: Stepping, steps: int) -> float:
        """Images per second of a window."""
        started = self.now()
        running.advance(steps)
        return running.config.batch_size * steps / max(self.now() - started, 1e-9)

    def now(self) -> float:
        """The time when the device has done its work so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def loss_seconds(
    running: Stepping, dataset: Dataset, device: torch.device, repeats: int, inner: int
) -> float | None:
    """The time of the loss alone: from a batch's logits to the gradients of all inputs of the loss.
    None if it cannot be captured alone. Captured if the step is; on a GPU timed by events.
    """
    config = running.config
    batch = next(iter(loader_for(config, dataset, dataset.train, True, device)))
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        autocast(running.precision, device),
    ):
        result = running.model(batch.images)
    output = tree_map(_leaf, result._replace(features=()))
    leaves = [
        value for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad
    ]
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
