"""Sums on the device that are read once on request, so that no step waits for the host."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastokd.ranks import sum_over_ranks


class MetricSums:
    """Named sums over samples and the number of samples, in one tensor that never moves."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # the last is the number of samples

    def add(self, values: Mapping[str, Tensor], count: int, skip: Tensor | None = None) -> None:
        """Add sums over ``count`` samples, of equal names in every call, unless ``skip`` (0-d)."""
        row = torch.stack([value.detach().to(torch.float64) for value in values.values()])
        row = torch.cat([row, row.new_full((1,), count)])
        if self._sums is None:
            self._names, self._sums = tuple(values), torch.zeros_like(row)
        assert self._names == tuple(values)
        self._sums.add_(row if skip is None else torch.where(skip, 0.0, row))

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
def correct_counts(rows: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    """For each row of logits [B, C] the number of correct answers, 0-d. A mixed image has the class
    with the larger share.
    """
    if target.is_floating_point():
        target = target.argmax(1)
    return {name: (row.argmax(1) == target).sum() for name, row in rows.items()}
