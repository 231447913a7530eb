"""The points of a grid that ``--set FIELD=VALUE,VALUE`` describes, each with its configuration."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_type_hints

import yaml

from fastokd.errors import ConfigError, did_you_mean
from fastokd.experiments.analysis.runs import value_in_words
from fastokd.train import config as configs
from fastokd.train.config import WITH_OPTIONS, TrainConfig, override
from fastokd.train.config_files import config_from_mapping
from fastokd.train.initial import with_absolute_weights
from fastokd.train.rules import check_config
from fastokd.train.teacher import with_absolute_teacher

Values = Mapping[str, Sequence[Any]]
"""The values of each field; an option is named with its field, e.g. "method_options.lambda_ta"."""

_OWN_OPTIONS = {
    "seed": "use --seeds N, for seeds 0 to N-1",
    "device": "use --devices",
    "data": "use --data; runs on other data cannot be compared",
    "plugin": "use --plugin",
}
"""Fields that have separate options on the command line."""


class Point(NamedTuple):
    """One combination of values: a unique name that begins the names of its runs, the values of
    fields that have several in the grid, and the configuration with seed 0.
    """

    name: str
    values: Mapping[str, Any]
    config: TrainConfig


def parse_values(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Fields and their values from texts such as "branches=2,3" or "method_options.lambda_ta=1,2".

    Values are written as in YAML's lists: ``null`` for a default, quotes around a value with a
    comma, brackets around a list. A ``ConfigError`` names an unknown field or an invalid value.
    """
    fields: dict[str, list[Any]] = {}
    for text in texts:
        where = f"--set {text}"
        field, mark, written = text.partition("=")
        if not mark or not field:
            raise ConfigError(f"{where}: must be FIELD=VALUE,VALUE, such as branches=2,3,4")
        _check_field(field, where)
        if field in fields:
            fix = "write all its values in one --set, separated by commas"
            raise ConfigError(f"{where}: {field} is set twice; {fix}")
        try:
            values = yaml.safe_load(f"[{written}]")
        except yaml.YAMLError:
            values = None
        if not isinstance(values, list):
            fix = "put quotes around a value with a comma or a bracket, and brackets around a list"
            raise ConfigError(f"{where}: not a list of values separated by commas; {fix}")
        if not values:
            raise ConfigError(f"{where}: {field} has no value; write at least one after the =")
        fields[field] = choices = [_converted(field, value, where) for value in values]
        for index, value in enumerate(choices):
            if value in choices[:index]:
                double = f"the value {value_in_words(value)} is listed twice"
                raise ConfigError(f"{where}: {double}; remove one")
    return fields


def _check_field(field: str, where: str) -> None:
    name, dot, option = field.partition(".")
    hints = get_type_hints(TrainConfig)
    if name in _OWN_OPTIONS:
        raise ConfigError(f"{where}: {name} cannot be set here; {_OWN_OPTIONS[name]}")
    if name not in hints:
        hint = did_you_mean(name, set(hints) - set(_OWN_OPTIONS))
        fix = f"options of the method are method_options.NAME{hint}"
        raise ConfigError(f"{where}: unknown field '{name}'; {fix}")
    if dot and (not option or name not in WITH_OPTIONS):
        fix = f"only {' and '.join(WITH_OPTIONS)} have options, as in method_options.NAME"
        raise ConfigError(f"{where}: {name} has no option '{option}'; {fix}")
    if not dot and name in WITH_OPTIONS:
        raise ConfigError(f"{where}: set options one by one, as --set {name}.NAME=VALUE,VALUE")


def _converted(field: str, value: Any, where: str) -> Any:
    name, dot, option = field.partition(".")
    if dot:
        value = {option: configs.option_value(value) if isinstance(value, str) else value}
    converted = getattr(config_from_mapping({name: value}, where), name)
    return converted[option] if dot else converted


def grid_points(base: TrainConfig, values: Values) -> list[Point]:
    """Every combination of values on top of a configuration, the last field's values changing
    fastest. A ``ConfigError`` names a combination that is invalid or equal to another one.
    """
    points: list[Point] = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        point = {field: chosen[field] for field, choices in values.items() if len(choices) > 1}
        config = override(base, fields_of(chosen))
        config = with_absolute_weights(with_absolute_teacher(config))
        try:
            check_config(config)
        except ConfigError as error:
            raise ConfigError(f"{describe(point)}: {error}" if point else str(error)) from error
        for other in points:
            if replace(other.config, seed=config.seed) == config:
                same = f"the same configuration as {describe(other.values)}"
                raise ConfigError(f"{describe(point)}: {same}; remove one")
        stem = _name(point) or f"{config.model}-{config.method}".replace(":", "-")
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        used = {other.name for other in points}
        name = next(name for name in names if name not in used)
        points.append(Point(name, point, replace(config, seed=0)))
    return points


def shared_values(values: Values) -> dict[str, Any]:
    """The values that all points share."""
    return {field: choices[0] for field, choices in values.items() if len(choices) == 1}


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
    """The name of a field; of an option without its field."""
    return field.rpartition(".")[2]


def _name(values: Mapping[str, Any]) -> str:
    """A file name made of values."""
    return "-".join(
        re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{short(field)}-{value_in_words(value)}")
        for field, value in values.items()
    )[:150]
