"""Sums on the device, read once when they are wanted, so that no step waits for the host."""

from collections.abc import Mapping

import torch
from torch import Tensor


class MetricSums:
    """Named sums over samples, kept on the device."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self.count = 0

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add sums over ``count`` samples; every call has the same names."""
        row = torch.stack([value.detach().to(torch.float64) for value in values.values()])
        if self._sums is None:
            self._names, self._sums = tuple(values), row
        else:
            assert self._names == tuple(values)
            self._sums = self._sums + row
        self.count += count

    def means(self) -> dict[str, float]:
        """The mean of each over all samples so far. Waits for the device."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self.count).tolist(), strict=True))


@torch.no_grad()
def correct_counts(rows: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    """For each named row of logits [B, C] how many of the B samples it classifies rightly, as 0-d tensors.

    Of a mixed image the class with the larger share is right.
    """
    if target.is_floating_point():
        target = target.argmax(1)
    return {name: (row.argmax(1) == target).sum() for name, row in rows.items()}
