"""What a forward pass writes into a model besides gradients, and how it is taken back."""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The floating-point buffers of a model, such as the running means and variances of its batch
    norms, so that a step that is left out leaves them as they were. Otherwise one batch whose
    activations overflow would make them NaN for good: the model would go on training and never
    evaluate again.

    It takes a few small operations on the device and no host sync.

    Args:
        module: a model on its device; buffers that are registered later are not seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = [
            buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer.numel()
        ]
        self._kept: Tensor | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the values; before the forward pass."""
        if self._live:
            self._kept = self._together()

    @torch.no_grad()
    def put_back(self, skipped: Tensor) -> None:
        """Where ``skipped`` (0-d, see ``Optimizers.step``) is not 0, have the values that were
        kept.
        """
        if self._kept is None:
            return
        chosen = torch.where(skipped != 0, self._kept, self._together())
        parts = chosen.split([buffer.numel() for buffer in self._live])
        torch._foreach_copy_(
            self._live,
            [part.view(buffer.shape) for part, buffer in zip(parts, self._live, strict=True)],
        )

    def _together(self) -> Tensor:
        return torch.cat([buffer.reshape(-1) for buffer in self._live])
