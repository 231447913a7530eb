"""How steps are run: one after the other, or as replays of a captured CUDA graph with the batch
made inside it.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch

from fastokd.data import Batch, Loader
from fastokd.errors import ConfigError, first_line
from fastokd.train.capture import CapturedStep, CaptureFailed
from fastokd.train.step import TrainStep


class StepRunner:
    """Runs a step over a loader's batches.

    Where the step is captured, a loader that makes its batches by tensor operations alone
    (``gather``) makes them inside the graph; other loaders' batches are copied into tensors that
    the graph reads. There is a graph for each shape of batch. Where nobody asked for a graph and
    the step cannot be captured, ``say`` is told, and steps are run as without.
    """

    def __init__(self, step: TrainStep, say: Callable[[str], object] = lambda text: None) -> None:
        self.step = step
        self.captures = step.levers.cuda_graph
        self._say = say
        self.reason_against_capture = ""
        """Why the step is not captured though it was tried; empty if it is, or nobody tried."""
        self._captured: dict[Hashable, CapturedStep] = {}
        self._static: dict[Hashable, Batch] = {}
        self._place = torch.zeros((), dtype=torch.int64, device=step.device)

    def epoch(
        self, loader: Loader, begin: int = 0, watch: Callable[[Iterable[Any]], Iterator[Any]] = iter
    ) -> Iterator[int]:
        """Train on the batches of a loader's epoch that come after the first ``begin``, which the
        loader has been told of.

        Yields how many batches of the epoch are done, after each. ``watch`` gives the batches
        again, and may take the time that each takes to come.
        """
        if self.captures and hasattr(loader, "gather"):
            yield from self._gathered(loader, begin, watch)
            return
        for done, batch in enumerate(watch(loader), start=begin + 1):
            if self.captures:
                self._run_captured(batch)
            else:
                self.step(batch)
            yield done

    def _run_captured(self, batch: Batch) -> None:
        key = batch.images.shape
        if key not in self._static:
            self._static[key] = Batch(*(torch.empty_like(value) for value in batch))
        static = self._static[key]
        for held, value in zip(static, batch, strict=True):
            held.copy_(value, non_blocking=True)
        self._replay(key, lambda: self.step(static))

    def _gathered(
        self, loader: Any, begin: int, watch: Callable[[Iterable[Any]], Iterator[Any]]
    ) -> Iterator[int]:
        def body() -> None:
            self.step(loader.gather(self._place))
            self._place.add_(1)

        self._place.fill_(begin)
        for done in watch(range(begin + 1, len(loader) + 1)):
            self._replay(("gathered", loader.side), body)
            loader.mark_done(done)
            yield done

    def _replay(self, key: Hashable, body: Callable[[], None]) -> None:
        if not self.captures:
            body()
            return
        if key not in self._captured:
            pool = next(
                (each.pool for each in self._captured.values() if each.pool is not None), None
            )
            self._captured[key] = CapturedStep(body, self.step.device, pool)
        try:
            self._captured[key]()
        except CaptureFailed as error:
            if self.step.config.cuda_graph:
                raise ConfigError(
                    f"cuda_graph=True: the step cannot be captured ({first_line(error)}); leave"
                    " it out"
                ) from error
            self.reason_against_capture, self.captures = first_line(error), False
            self._say(
                f"the step cannot be captured ({self.reason_against_capture}), and is run without a"
                " CUDA graph"
            )
            self.step.levers = dataclasses.replace(self.step.levers, cuda_graph=False)
            self._captured.clear()
            body()
