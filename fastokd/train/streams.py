"""Branches side by side: each on a CUDA stream of its own between the split and what joins them
again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BranchStreams:
    """Runs branches that do not depend on each other at the same time.

    The backward pass follows by itself: autograd runs each operation on the stream of its forward.
    Inside a captured CUDA graph the streams become parallel paths. The last branch, the deepest of
    a hierarchy, stays on the caller's stream.

    Args:
        device: a CUDA device.
        count: M, the number of branches.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count - 1)]

    def __call__(
        self, branches: Sequence[nn.Module], inputs: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """What ``one_by_one`` gives, see ``fastokd.models.branched``."""
        here = torch.cuda.current_stream(self._device)
        results: list[Any] = [None] * len(branches)
        for place, stream in enumerate(self._streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results[place] = branches[place](inputs[place])
        results[-1] = branches[-1](inputs[-1])
        for place, stream in enumerate(self._streams):
            here.wait_stream(stream)
            # The allocator must not hand memory on while the other stream may still use it.
            inputs[place].record_stream(stream)
            for value in results[place]:
                value.record_stream(here)
        return results
