"""The whole step as one CUDA graph, captured once and then replayed with a single launch."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

WARM_UP_STEPS = 11
"""Steps run before the capture, on the capturing stream: cuDNN chooses algorithms, optimizers
create their state, and DistributedDataParallel, which needs the most, rebuilds its buckets (see
PyTorch's notes on CUDA graphs).
"""


class CaptureFailed(RuntimeError):
    """The step is not capturable; no kernels were executed."""


class CapturedStep:
    """A step whose tensors never move. The first calls run it as usual; then it is captured, and
    every further call replays it. Capturing executes nothing, so no step counts twice.

    Args:
        body: the step, without arguments and results.
        pool: the memory pool of other captured steps; only one of them runs at a time.
    """

    def __init__(self, body: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self.pool = pool
        self._body = body
        self._device = device
        self._left = WARM_UP_STEPS
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run one step.

        Raises:
            CaptureFailed: it cannot be captured.
        """
        if self._graph is None and self._left == 0:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        self._left -= 1
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._body()
        current.wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # Loader threads may call CUDA meanwhile, which the default mode treats as an error.
            with torch.cuda.graph(
                graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._body()
        # Compiler errors, of kernels that the warm-up did not need, have no common class.
        except Exception as error:
            torch.cuda.synchronize(self._device)
            # PyTorch 2.11 does not end the allocations of a failed capture, so every later step
            # would leak the tensors that its streams share.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
            raise CaptureFailed(str(error)) from error
        self.pool = pool
        return graph
