"""Running statistics that a skipped step must not change."""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The floating-point buffers of a model on its device, such as batch-norm statistics, which a
    skipped step restores. Otherwise one batch whose activations overflow would make them NaN for
    good.

    Takes a few small operations on the device and no host synchronization.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = [
            buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer.numel()
        ]
        self._kept: Tensor | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the values, before the forward pass."""
        if self._live:
            self._kept = self._concatenated()

    @torch.no_grad()
    def put_back(self, skipped: Tensor) -> None:
        """Restore the copied values if ``skipped`` (0-d, see ``Optimizers.step``) is nonzero."""
        if self._kept is None:
            return
        chosen = torch.where(skipped != 0, self._kept, self._concatenated())
        parts = chosen.split([buffer.numel() for buffer in self._live])
        views = [part.view(live.shape) for part, live in zip(parts, self._live, strict=True)]
        torch._foreach_copy_(self._live, views)

    def _concatenated(self) -> Tensor:
        return torch.cat([buffer.reshape(-1) for buffer in self._live])
