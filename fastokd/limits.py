"""Limits of a value: bounds of a number, or a list of words.

Options of losses and methods and fields of configurations are built on them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a value; without any, every value is allowed.

    Attributes:
        ge, gt, le, lt: bounds of a number: at least, above, at most, below.
        choices: the allowed words, or a function that returns them.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()

    def words(self) -> Sequence[str]:
        """The allowed words; empty where any value is allowed."""
        return self.choices() if callable(self.choices) else self.choices

    def bounds(self) -> str:
        """The bounds in words, e.g. "in [0, 1)"; empty without any."""
        low = self.ge if self.ge is not None else self.gt
        high = self.le if self.le is not None else self.lt
        if low is None:
            return ""
        if high is None:
            if self.ge is not None:
                return f"at least {low:g}"
            return "a positive number" if low == 0 else f"above {low:g}"
        left = "[" if self.ge is not None else "("
        right = "]" if self.le is not None else ")"
        return f"in {left}{low:.10g}, {high:.10g}{right}"

    def allows(self, value: float) -> bool:
        """True if a number is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
