"""The options of losses and of a method's modules: default, limits and meaning in one declaration.

A loss is a class under ``loss_options`` whose attributes are options; they become the arguments of
its constructor. Checks, help texts and the tables of the documentation read the declarations.
"""

import dataclasses
import inspect
import numbers
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, dataclass_transform

from torch import Tensor

from fastokd.errors import did_you_mean
from fastokd.graph import DIVERGENCES
from fastokd.limits import Limits

Reduction = Literal["mean", "sum", "none"]
Impl = Literal["auto", "reference", "triton", "cpu"]
POSITIONAL = ("label_smoothing", "reduction", "impl")
DIVERGENCE = ("divergence", "divergence_alpha", "divergence_beta", "standardize")
KEYWORDS = (*POSITIONAL, "ignore_index", "class_weight", "class_dim", *DIVERGENCE)
"""Options of every loss, the last arguments of its constructor; the first of them may be passed by
position."""
OptionValue = float | int | bool | str
T = TypeVar("T")

COMMON = ("num_branches", "reduction", "impl", "ignore_index", "class_weight", "class_dim")
"""Arguments of every loss that are not method options: the command line sets them by other means,
or cannot, because its labels are classes."""


@dataclass(frozen=True)
class Option(Limits):
    """One option.

    Attributes:
        default: its value where nothing else is requested.
        help: its meaning, in one sentence.
        kind: the values it takes; "any" is checked by the code that uses it.
    """

    default: Any
    help: str
    kind: Literal["number", "integer", "switch", "choice", "any"] = "any"

    def check(self, name: str, value: object) -> None:
        """Raise a TypeError for a value of another type, a ValueError for one out of its limits."""
        if self.kind == "switch" and not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}; it must be True or False")
        if self.kind == "choice" and value not in self.words():
            raise ValueError(f"{name}={value!r}{did_you_mean(str(value), self.words())}")
        if self.kind not in ("number", "integer"):
            return
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if self.kind == "number" and not is_number:
            raise TypeError(f"{name}={value!r}; it must be a number")
        whole = self.kind == "number" or isinstance(value, int)
        if not (is_number and whole and self.allows(float(cast(float, value)))):
            raise ValueError(f"{name}={value!r}; it must be {self._expected()}")

    def _expected(self) -> str:
        """The allowed numbers, as in "temperature=0; it must be a positive number"."""
        if self.ge is not None and self.ge == self.le:
            return f"{self.ge:g}"
        noun = "a number" if self.kind == "number" else "an integer"
        return f"{noun} of {self.bounds()}" if self.bounds().startswith("at") else self.bounds()


# The functions return Any so that a type checker takes the annotation of the attribute.


def number(
    default: float,
    help: str,
    low: float = 0,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """A number in [low, high]; ``open_low`` and ``open_high`` exclude a bound."""
    ge, gt = (None, low) if open_low else (low, None)
    le, lt = (None, high) if open_high else (high, None)
    return Option(default, help, "number", ge=ge, gt=gt, le=le, lt=lt)


def weight(default: float, help: str) -> Any:
    """The weight of a term: a number of at least 0."""
    return number(default, help)


def integer(default: int, help: str, low: int = 0, high: int | None = None) -> Any:
    """An integer of at least ``low`` and at most ``high``."""
    return Option(default, help, "integer", ge=low, le=high)


def num_branches(default: int, low: int, help: str, high: int | None = None) -> Any:
    """The number of branches M."""
    return integer(default, help, low, high)


def switch(default: bool, help: str) -> Any:
    """True or False."""
    return Option(default, help, "switch")


def choice(default: str, choices: Iterable[str], help: str) -> Any:
    """One of several words."""
    return Option(default, help, "choice", choices=tuple(choices))


def temperature(default: float = 3.0, help: str = "T of the KL terms.") -> Any:
    return number(default, help, open_low=True)


def teacher_eps() -> Any:
    help = "added to the teacher's probabilities, not renormalized."
    return number(0.0, help, 0, 1, open_high=True)


def label_smoothing() -> Any:
    return number(0.0, "in [0, 1), for every cross-entropy.", 0, 1, open_high=True)


def reduction(
    help: str = 'the loss of the batch: "mean", "sum", or "none" for each sample.',
) -> Any:
    return Option("mean", help)


def impl() -> Any:
    return Option("auto", 'the executor: "auto", "reference", "triton" or "cpu".')


def ignore_index() -> Any:
    help = "label of rows that contribute nothing; the mean is over the other rows. None: no label."
    return Option(-100, help)


def class_weight() -> Any:
    help = "factors [C] of the classes in every cross-entropy, as in cross_entropy. None: 1."
    return Option(None, help)


def class_dim() -> Any:
    return Option(1, "dimension of the classes in dense logits, with more than two: 1 or -1.")


def divergence() -> Any:
    help = "in place of KL in every term, with its weight and, except for mse and l1, its T."
    return choice("kl", DIVERGENCES, help)


def divergence_parameter(name: str, of: str) -> Any:
    return Option(None, f"{name} of {of}; None for its default.")


def standardize() -> Any:
    return switch(False, "standardize both rows of logits of every KL term (Sun et al., 2024).")


def keyword(*, default: Any, kw_only: Literal[True]) -> Any:
    """One of ``KEYWORDS``, in a form that type checkers know as keyword-only."""
    return default


@dataclass_transform(eq_default=False, field_specifiers=(keyword,))
def loss_options(cls: type[T]) -> type[T]:
    """Make a loss's options the arguments of its constructor, in their order.

    The class becomes a dataclass; its docstring gets a section that describes the options.
    """
    for name, option in list(vars(cls).items()):
        if isinstance(option, Option):
            facts: Any = {"default": option.default, "metadata": {"option": option}}
            setattr(cls, name, dataclasses.field(**facts, kw_only=name in KEYWORDS))
    has_constructor = "__init__" in vars(cls)
    made = dataclass(eq=False, repr=False)(cls)
    if "class_weight" in vars(made):
        del made.class_weight  # type: ignore[attr-defined]  # would hide the buffer
    if has_constructor:
        return made
    _accept_positions(made)
    wrap = textwrap.TextWrapper(100, initial_indent=" " * 8, subsequent_indent=" " * 12).fill
    lines = [wrap(f"{name}: {option.help}") for name, option in options_of(made).items()]
    made.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "    Args:", *lines, ""])
    return made


def _accept_positions(loss: Any) -> None:
    """Let the constructor take ``POSITIONAL`` as its last positional arguments too."""
    construct = loss.__init__
    this, *parameters = inspect.signature(construct).parameters.values()
    parameters = [
        each
        if each.name in KEYWORDS and each.name not in POSITIONAL
        else each.replace(kind=each.POSITIONAL_OR_KEYWORD)
        for each in parameters
    ]
    signature = inspect.Signature(parameters)

    def __init__(self: Any, *values: Any, **options: Any) -> None:
        arguments = signature.bind(*values, **options).arguments
        if isinstance(weight := arguments.get("class_weight"), Tensor):
            arguments["class_weight"] = weight.detach()  # modules reject parameters at this point
        construct(self, **arguments)

    loss.__init__ = __init__
    loss.__init__.__signature__ = inspect.Signature([this, *parameters])


def options_of(cls: type) -> dict[str, Option]:
    """The options of a class under ``loss_options``, by name and in the constructor's order."""
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name in KEYWORDS)
    return {field.name: field.metadata["option"] for field in fields}
