"""What was not finite: found on the device in every step, read by the host when it asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NonFinite:
    """What a guard saw.

    Attributes:
        count: steps whose loss or gradient was not finite.
        step: the first of them, counted from the start of the run, from 0.
        terms: the terms of the loss that were not finite in it; they name their branches.
        parameters: parameters whose gradients were not finite in it.
    """

    count: int
    step: int
    terms: tuple[str, ...]
    parameters: tuple[str, ...]

    def describe(self) -> str:
        """One line that names step, terms and branches."""
        return f"step {self.step + 1}: {self._what()}" + (
            f" ({self.count} such steps)" if self.count > 1 else ""
        )

    def _what(self) -> str:
        if self.terms:
            return f"non-finite {', '.join(self.terms)}"
        # A gradient that overflows takes everything before it along; the parts say where to look.
        parts = dict.fromkeys(map(_part, self.parameters))
        return f"non-finite gradient (the loss is finite) in {', '.join(parts)}"


def _part(parameter: str) -> str:
    room, _, rest = parameter.partition(".")
    return f"branch{int(rest.split('.')[0]) + 1}" if room == "branches" else room


class FiniteGuard:
    """Remembers, on the device, how many steps were not finite, and what was not in the first of
    them.

    Args:
        device: of the step.
        parts: the parameters in each part of the gradient, in the order of the norms.
        sticky: after the first such step the guard goes on saying that updates must be left out, so
            that the weights stay as they were before it until the host has seen it.
    """

    def __init__(self, device: torch.device, parts: Sequence[Sequence[str]], sticky: bool) -> None:
        self._parts = tuple(parts)
        self._terms: tuple[str, ...] = ()
        self._sticky = sticky
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_terms: Tensor | None = None
        self._bad_parts = torch.zeros(len(parts), dtype=torch.bool, device=device)

    def withheld(self) -> Tensor:
        """1.0 where updates are to be left out because of an earlier step, as a 0-d tensor."""
        return (
            (self._count > 0).float()
            if self._sticky
            else torch.zeros_like(self._count, dtype=torch.float32)
        )

    def note(self, bad: Tensor, step: Tensor, terms: dict[str, Tensor], norms: Tensor) -> None:
        """After a step.

        Args:
            bad: 0-d bool, whether the step was not finite.
            step: 0-d int64, its number.
            terms: 0-d values by name; the same names in every call.
            norms: the norm of every part of the gradient, float [P].
        """
        values = torch.stack([value.detach().to(torch.float32) for value in terms.values()])
        if self._bad_terms is None:
            self._terms, self._bad_terms = (
                tuple(terms),
                torch.zeros(len(terms), dtype=torch.bool, device=values.device),
            )
        first = bad & (self._count == 0)
        self._bad_terms.copy_(torch.where(first, ~values.isfinite(), self._bad_terms))
        self._bad_parts.copy_(torch.where(first, ~norms.isfinite(), self._bad_parts))
        self._step.copy_(torch.where(first, step, self._step))
        self._count.add_(bad)

    def read(self) -> NonFinite | None:
        """What was seen since the last ``clear``; None if all was finite. Waits for the device."""
        if not (count := int(self._count)):
            return None
        assert self._bad_terms is not None
        terms, parts = (
            [name for name, bad in zip(names, flags.tolist(), strict=True) if bad]
            for names, flags in ((self._terms, self._bad_terms), (self._parts, self._bad_parts))
        )
        return NonFinite(
            count,
            int(self._step),
            tuple(terms),
            tuple(dict.fromkeys(name for part in parts for name in part)),
        )

    def clear(self) -> None:
        """Forget what was seen."""
        self._count.zero_()
