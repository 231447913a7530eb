"""Sums on the device that are read once on request, so that no step waits for the host."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastokd.ranks import sum_over_ranks

MAX_STACKED = 2**24
"""Logits that are copied into one tensor, so that few kernels count all correct answers."""


class MetricSums:
    """Named sums over samples and the number of samples, in one tensor that never moves."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # the last is the number of samples

    def prepare(self, names: Sequence[str], device: torch.device) -> None:
        """Allocate the sums in the first call; later ones must have the same names."""
        if self._sums is None:
            self._names = tuple(names)
            self._sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        assert self._names == tuple(names)

    def add(self, values: Sequence[Tensor], count: int, skip: Tensor) -> None:
        """Add sums over ``count`` samples, in the order of the names, unless ``skip`` (0-d bool).

        Args:
            values: tensors [K] of any dtype, which are concatenated.
        """
        assert self._sums is not None
        row = torch.cat([value.to(torch.float64) for value in values])
        row = torch.cat([row, row.new_full((1,), count)])
        self._sums.add_(torch.where(skip, 0.0, row))

    def clear(self) -> None:
        """Set all sums to zero."""
        if self._sums is not None:
            self._sums.zero_()

    def means(self, of_all: bool = False) -> dict[str, float]:
        """The means over the samples so far; empty without samples. Waits for the device.

        With ``of_all`` over the samples of all processes, which must all call it.
        """
        if self._sums is None:
            return {}
        *sums, count = (sum_over_ranks(self._sums.clone()) if of_all else self._sums).tolist()
        if not count:
            return {}
        return {name: value / count for name, value in zip(self._names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {} if self._sums is None else {"names": list(self._names), "values": self._sums}

    def add_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Add the sums of a ``state_dict``."""
        before = self._sums
        self.load_state_dict(state, device)
        if before is not None and self._sums is not None:
            self._sums += before

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue with the sums of a ``state_dict``."""
        if "values" in state:
            self._names, self._sums = tuple(state["names"]), state["values"].to(device, copy=True)


@torch.no_grad()
def correct_counts(rows: Sequence[Tensor], target: Tensor) -> Tensor:
    """The number of correct answers of each row of logits [B, C], int64 [R]. A mixed image has the
    class with the larger share.
    """
    if target.is_floating_point():
        target = target.argmax(1)
    if sum(row.numel() for row in rows) <= MAX_STACKED:
        return (torch.stack(list(rows)).argmax(2) == target).sum(1)
    return torch.stack([(row.argmax(1) == target).sum() for row in rows])
