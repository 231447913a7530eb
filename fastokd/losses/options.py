"""The options of losses and of a method's modules: default, bounds and meaning in one declaration.

A loss is a class under ``loss_options`` whose attributes are options; they become the arguments of
its constructor. Checks, help texts and the tables of the documentation read the declarations.
"""

import dataclasses
import math
import numbers
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, dataclass_transform

from fastokd.errors import did_you_mean

Reduction = Literal["mean", "sum", "none"]
Impl = Literal["auto", "reference", "triton", "cpu"]
OptionValue = float | int | bool | str
T = TypeVar("T")

COMMON = ("num_branches", "reduction", "impl")
"""Arguments of every loss, which the command line sets by other means than method options."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: its value where nothing else is requested.
        help: its meaning, in one sentence.
        kind: the values it takes; "any" is checked by the code that uses it.
        low, high: the bounds of a number or integer.
        open_low, open_high: whether a bound itself is excluded.
        choices: the words that a "choice" takes.
    """

    default: Any
    help: str
    kind: Literal["number", "integer", "switch", "choice", "any"] = "any"
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()

    @property
    def bounds(self) -> str:
        """The bounds in words, as in "temperature=0; it must be a positive number"."""
        noun = "a number" if self.kind == "number" else "an integer"
        if self.low == self.high:
            return f"{self.low}"
        if self.high == math.inf:
            positive = self.low == 0 and self.open_low
            return f"a positive {noun[2:]}" if positive else f"{noun} of at least {self.low}"
        left, right = "("[not self.open_low :] or "[", ")"[not self.open_high :] or "]"
        return f"in {left}{self.low}, {self.high}{right}"

    def check(self, name: str, value: object) -> None:
        """Check a value of the option.

        Raises:
            TypeError: its type is wrong.
            ValueError: it is out of bounds, or not one of the choices.
        """
        if self.kind == "switch" and not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}; it must be True or False")
        if self.kind == "choice" and value not in self.choices:
            raise ValueError(f"{name}={value!r}{did_you_mean(str(value), self.choices)}")
        if self.kind not in ("number", "integer"):
            return
        if self.kind == "integer":
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r}; it must be {self.bounds}")
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}; it must be a number")
        size = float(value)
        above = self.low < size if self.open_low else self.low <= size
        below = size < self.high if self.open_high else size <= self.high
        if not (math.isfinite(size) and above and below):
            raise ValueError(f"{name}={value}; it must be {self.bounds}")


# The functions return Any so that a type checker takes the annotation of the attribute.


def number(
    default: float,
    help: str,
    low: float = 0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """A number in [low, high]; ``open_low`` and ``open_high`` exclude a bound."""
    return Option(default, help, "number", low, high, open_low, open_high)


def weight(default: float, help: str) -> Any:
    """The weight of a term: a number of at least 0."""
    return number(default, help)


def integer(default: int, help: str, low: int = 0) -> Any:
    """An integer of at least ``low``."""
    return Option(default, help, "integer", low)


def switch(default: bool, help: str) -> Any:
    """True or False."""
    return Option(default, help, "switch")


def choice(default: str, choices: Iterable[str], help: str) -> Any:
    """One of several words."""
    return Option(default, help, "choice", choices=tuple(choices))


def text(default: str, help: str) -> Any:
    """Any text; the code that uses it checks it."""
    return Option(default, help)


def num_branches(default: int, low: int, help: str, high: float = math.inf) -> Any:
    """The number of branches M."""
    return Option(default, help, "integer", low, high)


def temperature(default: float = 3.0, help: str = "T of the KL terms.") -> Any:
    return number(default, help, open_low=True)


def detach_teacher(default: bool, help: str) -> Any:
    return switch(default, help)


def teacher_eps() -> Any:
    return number(
        0.0, "added to the teacher's probabilities, not renormalized.", 0, 1, open_high=True
    )


def label_smoothing() -> Any:
    return number(0.0, "in [0, 1), for every cross-entropy.", 0, 1, open_high=True)


def reduction(
    help: str = 'the loss of the batch: "mean", "sum", or "none" for each sample.',
) -> Any:
    return Option("mean", help)


def impl() -> Any:
    return Option("auto", 'the executor: "auto", "reference", "triton" or "cpu".')


@dataclass_transform(eq_default=False)
def loss_options(cls: type[T]) -> type[T]:
    """Make a loss's options the arguments of its constructor, in their order.

    The class becomes a dataclass; its docstring gets a section that describes the options.
    """
    declared = {name: value for name, value in vars(cls).items() if isinstance(value, Option)}
    for name, option in declared.items():
        field = dataclasses.field(default=option.default, metadata={"option": option})
        setattr(cls, name, field)
    lines = [
        textwrap.fill(
            f"{name}: {option.help}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for name, option in declared.items()
    ]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "    Args:", *lines, ""])
    return dataclass(eq=False, repr=False)(cls)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a class under ``loss_options``, by name; empty for other classes."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}
