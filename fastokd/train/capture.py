"""The whole step as one CUDA graph: recorded once, then replayed without the host launching
anything.
"""

from collections.abc import Callable
from typing import Any

import torch

WARM_UP_STEPS = 11
"""Steps run before the capture, on the stream that captures: cuDNN chooses its algorithms,
optimizers make their state, and DistributedDataParallel, which needs most of them, has rebuilt its
buckets (PyTorch's notes on CUDA graphs).
"""


class CaptureFailed(RuntimeError):
    """The step does something that a CUDA graph cannot hold. Nothing of it was run."""


class CapturedStep:
    """A step that reads and writes tensors that never move. The first calls run it, which are real
    steps; then it is captured, and every further call replays it. Capturing runs nothing, so no
    step is counted twice.

    Args:
        body: the step, without arguments and results.
        device: a CUDA device.
        pool: the memory pool of other captured steps, of which only one is replayed at a time.
    """

    def __init__(self, body: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self.pool = pool
        self._body = body
        self._device = device
        self._left = WARM_UP_STEPS
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """One step.

        Raises:
            CaptureFailed: it cannot be captured.
        """
        if self._graph is None and self._left == 0:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        self._left -= 1
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._body()
        here.wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of the loader may call CUDA meanwhile, which the default mode would take for a
            # mistake of ours.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._body()
        # Compilers' errors, of kernels that the warm-up did not need, have no class in common
        except Exception as error:
            torch.cuda.synchronize(self._device)
            raise CaptureFailed(str(error)) from error
        self.pool = graph.pool()
        return graph
