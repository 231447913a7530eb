"""What ``--set FIELD=VALUE,VALUE`` means: the points of a grid, each with its configuration."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import yaml

from fastokd.errors import ConfigError, did_you_mean
from fastokd.experiments.analysis.runs import value_in_words
from fastokd.train.config import (
    TrainConfig,
    check_config,
    config_from_mapping,
    option_value,
    override,
)
from fastokd.train.teacher import with_absolute_teacher

Values = Mapping[str, Sequence[Any]]
"""For each field its values; an option is named with its field, e.g. "method_options.lambda_ta"."""

_ELSEWHERE = {
    "seed": "--seeds N, for seeds 0 to N-1",
    "device": "--devices",
    "data": "--data; runs on other data do not compare",
}
"""Fields that are not set by name, and how they are given."""

_WITH_OPTIONS = ("method_options", "loader_options")
"""Fields whose options are set one by one."""


@dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
        name: from its values, different from those of other points; the names of its runs begin so.
        values: of the fields that have several in the grid.
        config: with seed 0.
    """

    name: str
    values: Mapping[str, Any]
    config: TrainConfig


def parse_values(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Fields and their values from texts such as "branches=2,3" or "method_options.lambda_ta=1,2".

    Values are written as in YAML's lists: ``null`` for a default, quotes around what holds a comma,
    brackets around a list.

    Raises:
        ConfigError: an unknown field, or values that it cannot have.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        field, mark, written = text.partition("=")
        if not mark or not field:
            raise ConfigError(
                f"--set {text}: it is not of the form FIELD=VALUE,VALUE, such as branches=2,3,4"
            )
        _check_field(field, text)
        if field in found:
            raise ConfigError(
                f"--set {text}: {field} is set already; write all its values in one --set,"
                " separated by commas"
            )
        try:
            values = yaml.safe_load(f"[{written}]")
        except yaml.YAMLError:
            values = None
        if not isinstance(values, list):
            raise ConfigError(
                f"--set {text}: these are no values separated by commas; put quotes around a value"
                " that holds a comma or a bracket, and brackets around a list"
            )
        if not values:
            raise ConfigError(f"--set {text}: {field} has no value; write at least one after the =")
        found[field] = [_converted(field, value, f"--set {text}") for value in values]
        for place, value in enumerate(found[field]):
            if value in found[field][:place]:
                raise ConfigError(
                    f"--set {text}: the value {value_in_words(value)} is there twice; leave one out"
                )
    return found


def _check_field(field: str, text: str) -> None:
    name, dot, option = field.partition(".")
    hints = get_type_hints(TrainConfig)
    if name in _ELSEWHERE:
        raise ConfigError(f"--set {text}: {name} is given by {_ELSEWHERE[name]}")
    if name not in hints:
        raise ConfigError(
            f"--set {text}: unknown field '{name}'; an option of the method is"
            f" method_options.NAME{did_you_mean(name, set(hints) - set(_ELSEWHERE))}"
        )
    if dot and (not option or name not in _WITH_OPTIONS):
        raise ConfigError(
            f"--set {text}: {name} has no option '{option}'; only {' and '.join(_WITH_OPTIONS)}"
            " have some, as method_options.NAME"
        )
    if not dot and name in _WITH_OPTIONS:
        raise ConfigError(
            f"--set {text}: options are set one by one, as --set {name}.NAME=VALUE,VALUE"
        )


def _converted(field: str, value: Any, where: str) -> Any:
    name, dot, option = field.partition(".")
    if dot:
        value = {option: option_value(value) if isinstance(value, str) else value}
    converted = getattr(config_from_mapping({name: value}, where), name)
    return converted[option] if dot else converted


def grid_points(base: TrainConfig, values: Values) -> list[Point]:
    """Every combination of values on top of a configuration, the last field's values changing
    fastest.

    Raises:
        ConfigError: a combination that makes no sense, or is the same configuration as another; the
            message begins with it.
    """
    swept = [field for field, choices in values.items() if len(choices) > 1]
    points: list[Point] = []
    names: set[str] = set()
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        point = {field: chosen[field] for field in swept}
        config = with_absolute_teacher(override(base, fields_of(chosen)))
        try:
            check_config(config)
        except ConfigError as error:
            raise ConfigError(f"{describe(point)}: {error}" if point else str(error)) from error
        alike = next(
            (other for other in points if replace(other.config, seed=config.seed) == config), None
        )
        if alike:
            raise ConfigError(
                f"{describe(point)}: this is the same configuration as {describe(alike.values)};"
                " leave one out"
            )
        stem = _name(point) or f"{config.model}-{config.method}".replace(":", "-")
        name = next(
            name
            for number in itertools.count(1)
            if (name := stem if number == 1 else f"{stem}-{number}") not in names
        )
        names.add(name)
        points.append(Point(name, point, replace(config, seed=0)))
    return points


def fields_of(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of fields and options, as fields of the configuration."""
    fields: dict[str, Any] = {}
    for field, value in chosen.items():
        name, dot, option = field.partition(".")
        fields[name] = {**fields.get(name, {}), option: value} if dot else value
    return fields


def describe(values: Mapping[str, Any]) -> str:
    """Values with the names of their fields, e.g. "branches=2, lambda_ta=1"."""
    return ", ".join(f"{short(field)}={value_in_words(value)}" for field, value in values.items())


def short(field: str) -> str:
    """The name of a field, of an option without its field."""
    return field.rpartition(".")[2]


def _name(values: Mapping[str, Any]) -> str:
    """A file's name from values."""
    return "-".join(
        re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{short(field)}-{value_in_words(value)}")
        for field, value in values.items()
    )[:150]
