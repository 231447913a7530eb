"""Running the steps of an epoch: one by one, or as replays of a captured CUDA graph."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fastokd.data import Batch, Loader
from fastokd.errors import ConfigError, first_line
from fastokd.train.capture import CapturedStep, CaptureFailed
from fastokd.train.step import TrainStep


class StepRunner:
    """Runs a step over a loader's batches.

    If the step is captured, a loader whose batches are made by tensor operations alone (it has
    ``gather``, and ``capturable`` is not false) makes them inside the graph; batches of other
    loaders are copied into tensors that the graph reads. There is one graph for each shape of
    batch. If a step cannot be captured and the configuration does not require it, ``report`` gets a
    message and steps run without a graph.
    """

    def __init__(
        self, step: TrainStep, report: Callable[[str], object] = lambda text: None
    ) -> None:
        self.step = step
        self.captures = step.options.cuda_graph
        self.reason_against_capture = ""
        """The reason why capturing failed, or empty."""
        self._report = report
        self._captured: dict[Hashable, CapturedStep] = {}
        self._static: dict[Hashable, Batch] = {}
        self._position = torch.zeros((), dtype=torch.int64, device=step.device)

    def epoch(
        self, loader: Loader, begin: int = 0, watch: Callable[[Iterable[Any]], Iterator[Any]] = iter
    ) -> Iterator[int]:
        """Train on the batches of an epoch after the first ``begin``, which the loader skips.

        Args:
            watch: passes batches on, and may measure the time that each takes.

        Yields:
            The number of batches done, after each.
        """
        on_gpu = self.step.device.type == "cuda"
        if self.step.options.compile and on_gpu and hasattr(loader, "compile"):
            loader.compile()
        if self.captures and hasattr(loader, "gather") and getattr(loader, "capturable", True):
            gathering: Any = loader
            self._position.fill_(begin)
            for done in watch(range(begin + 1, len(loader) + 1)):
                self._run(("gather", gathering.side), partial(self._gather_and_step, gathering))
                gathering.mark_done(done)
                yield done
            return
        for done, batch in enumerate(watch(loader), start=begin + 1):
            static = self._static_copy(batch) if self.captures else batch
            self._run(batch.images.shape, partial(self.step, static))
            yield done

    def _gather_and_step(self, loader: Any) -> None:
        self.step(loader.gather(self._position))
        self._position.add_(1)

    def _static_copy(self, batch: Batch) -> Batch:
        """The batch in tensors that never move."""
        key = batch.images.shape
        if key not in self._static:
            self._static[key] = Batch(*(torch.empty_like(value) for value in batch))
        for static, value in zip(self._static[key], batch, strict=True):
            static.copy_(value, non_blocking=True)
        return self._static[key]

    def _run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Run a step, or replay the graph captured for a shape of batch and the frozen parts."""
        if not self.captures:
            body()
            return
        key = (key, self.step.frozen)
        if key not in self._captured:
            pools = (step.pool for step in self._captured.values() if step.pool is not None)
            self._captured[key] = CapturedStep(body, self.step.device, next(pools, None))
        try:
            self._captured[key]()
        except CaptureFailed as error:
            self._stop_capturing(error)
            body()

    def _stop_capturing(self, error: CaptureFailed) -> None:
        reason = first_line(error)
        if self.step.config.cuda_graph:
            raise ConfigError(
                f"cuda_graph=True: the step cannot be captured ({reason}); omit it"
            ) from error
        self.reason_against_capture, self.captures = reason, False
        self._report(f"the step cannot be captured ({reason}); running without a CUDA graph")
        self.step.options = dataclasses.replace(self.step.options, cuda_graph=False)
        self._captured.clear()
