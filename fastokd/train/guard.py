"""Non-finite losses and gradients: detected on the device, read by the host on request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NonFinite:
    """Steps with a non-finite loss or gradient."""

    count: int
    step: int
    """The first of them, counted from the start of the run, from 0."""
    terms: tuple[str, ...]
    """The non-finite terms of its loss; their names contain the branches."""
    parameters: tuple[str, ...]
    """Its parameters with non-finite gradients."""

    def describe(self) -> str:
        """One line with step, terms and branches."""
        if self.terms:
            what = f"non-finite {', '.join(self.terms)}"
        else:
            # An overflow spreads to all parameters before it; the parts say where to look.
            parts = dict.fromkeys(map(_part, self.parameters))
            what = f"non-finite gradient (the loss is finite) in {', '.join(parts)}"
        steps = f" ({self.count} such steps)" if self.count > 1 else ""
        return f"step {self.step + 1}: {what}{steps}"


def _part(parameter: str) -> str:
    module, _, rest = parameter.partition(".")
    return f"branch{int(rest.split('.')[0]) + 1}" if module == "branches" else module


class FiniteGuard:
    """Counts non-finite steps on the device, with the terms and parameters of the first.

    Args:
        parts: the parameters in each part of the gradient, in the order of the norms.
        sticky: after the first such step skip all updates, so that the weights stay as they were
            before it until the host reads the guard.
    """

    def __init__(self, device: torch.device, parts: Sequence[Sequence[str]], sticky: bool) -> None:
        self._parts = tuple(parts)
        self._terms: tuple[str, ...] = ()
        self._sticky = sticky
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_terms = torch.zeros(0, dtype=torch.bool, device=device)
        self._bad_parts = torch.zeros(len(parts), dtype=torch.bool, device=device)

    def withheld(self) -> Tensor:
        """1.0 if updates are skipped because of an earlier step, else 0.0, as a 0-d tensor."""
        if self._sticky:
            return (self._count > 0).float()
        return torch.zeros_like(self._count, dtype=torch.float32)

    def prepare(self, terms: Sequence[str]) -> None:
        """Set the names of the terms, the same in every call."""
        if not self._terms:
            self._terms = tuple(terms)
            self._bad_terms = torch.zeros(len(terms), dtype=torch.bool, device=self._count.device)
        assert self._terms == tuple(terms)

    def note(self, bad: Tensor, step: Tensor, values: Tensor, norms: Tensor) -> None:
        """Record a step.

        Args:
            bad: 0-d bool, whether the step was non-finite.
            step: 0-d int64, its number.
            values: the terms, float [T].
            norms: the norm of every part of the gradient, float [P].
        """
        first = bad & (self._count == 0)
        self._bad_terms.copy_(torch.where(first, ~values.isfinite(), self._bad_terms))
        self._bad_parts.copy_(torch.where(first, ~norms.isfinite(), self._bad_parts))
        self._step.copy_(torch.where(first, step, self._step))
        self._count.add_(bad)

    def read(self) -> NonFinite | None:
        """The non-finite steps since the last ``clear``, if any. Waits for the device."""
        if not (count := int(self._count)):
            return None
        terms = zip(self._terms, self._bad_terms.tolist(), strict=True)
        parts = zip(self._parts, self._bad_parts.tolist(), strict=True)
        return NonFinite(
            count,
            int(self._step),
            tuple(name for name, bad in terms if bad),
            tuple(dict.fromkeys(name for part, bad in parts if bad for name in part)),
        )

    def clear(self) -> None:
        """Forget all steps."""
        self._count.zero_()
