"""Running branches concurrently, each on its own CUDA stream."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BranchStreams:
    """Runs independent branches concurrently.

    The backward pass follows: autograd runs each operation on the stream of its forward. In a
    captured CUDA graph the streams become parallel paths. The last branch, the deepest of a
    hierarchy, stays on the caller's stream.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count - 1)]

    def __call__(
        self, branches: Sequence[nn.Module], inputs: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The results of ``one_by_one``, see ``fastokd.models.branched``."""
        current = torch.cuda.current_stream(self._device)
        results: list[Any] = [None] * len(branches)
        for index, stream in enumerate(self._streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results[index] = branches[index](inputs[index])
        results[-1] = branches[-1](inputs[-1])
        for index, stream in enumerate(self._streams):
            current.wait_stream(stream)
            # The allocator must not reuse memory while the other stream may still use it.
            inputs[index].record_stream(stream)
            for value in results[index]:
                value.record_stream(current)
        return results
