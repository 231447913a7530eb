"""Metadata of the fields of a configuration: help, group, bounds, choices and roles.

Checks, the command line, the tables of the documentation and lists of fields are derived from it.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastokd.errors import ConfigError, did_you_mean
from fastokd.limits import Limits

T = TypeVar("T")
GROUPS = ("data", "model", "method", "optimization", "performance", "checkpoints", "logging")
"""The headings of the options, in the order of ``--help``."""


class Role(enum.Flag):
    """Meanings of a field when configurations are compared or changed."""

    NONE = 0
    RESUME = enum.auto()
    """It may change when a run is resumed."""
    REPEAT = enum.auto()
    """It may differ between runs that are averaged."""
    SPEED = enum.auto()
    """The training throughput of a network without branches depends on it."""
    SWITCH = enum.auto()
    """It turns an optimization of the step on or off."""
    TRAINED = enum.auto()
    """It defines the network and its loss."""
    OF_METHOD = enum.auto()
    """It belongs to the method, and returns to its default when another method is chosen."""


EXECUTION = Role.RESUME | Role.REPEAT
"""Roles of fields about the execution of a run, without an influence on its results."""


@dataclass(frozen=True)
class Info(Limits):
    """The metadata of a field; the limits are of the value, or of each value of a tuple.

    Attributes:
        help: for ``--help`` and the documentation.
        group: the heading it is listed under.
        unset: meaning of None, for optional fields.
        role: see ``Role``.
    """

    help: str
    group: str
    unset: str = ""
    role: Role = Role.NONE


@dataclass(frozen=True)
class Group:
    """A heading of the options. Calling it makes a dataclass field with metadata."""

    name: str

    def __call__(self, default: T, help: str, **facts: Any) -> T:
        """A field; ``facts`` are further attributes of ``Info``."""
        metadata = {"info": Info(help, self.name, **facts)}
        value = {"default_factory": dict} if isinstance(default, Mapping) else {"default": default}
        made: Any = dataclasses.field(**value, metadata=metadata)
        return cast(T, made)


def infos(config: Any) -> dict[str, Info]:
    """The metadata of a configuration class or object by field, in the order of the fields."""
    return {item.name: item.metadata["info"] for item in dataclasses.fields(config)}


def check_value(name: str, value: Any, info: Info) -> None:
    """Check a value against the bounds and choices of its field.

    Raises:
        ConfigError: names the field, the value and the allowed values.
    """
    if value is None:
        return
    values = value if isinstance(value, tuple) else (value,)
    if (bounds := info.bounds()) and not all(map(info.allows, values)):
        each = "each value" if isinstance(value, tuple) else "it"
        raise ConfigError(f"{name}={value!r}: {each} must be {bounds}")
    if words := info.words():
        for item in values:
            if item not in words:
                raise ConfigError(f"unknown {name} '{item}'{did_you_mean(item, words)}")
