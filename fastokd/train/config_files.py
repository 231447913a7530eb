"""Configurations from YAML files and other plain values."""

import contextlib
import dataclasses
import inspect
import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from fastokd import plugins
from fastokd.errors import ConfigError, did_you_mean, first_line
from fastokd.train.config import RETIRED, TrainConfig


class _Loader(yaml.SafeLoader):
    """YAML with the floats of version 1.2, such as 1e-1, and without doubled keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                problem = f"the key '{key}' occurs twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def config_from_mapping(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A configuration from plain values, e.g. of a YAML file; missing fields have their defaults.

    Raises:
        ConfigError: an unknown field (with the closest name) or a value of the wrong type.
    """
    hints = get_type_hints(TrainConfig)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of fields, got {type(values).__name__}")
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name in RETIRED:
            if value != RETIRED[name].off:
                warnings.warn(f"{where}: {name}={value}: {RETIRED[name].reason}", stacklevel=2)
            continue
        if name not in hints:
            raise ConfigError(f"{where}: unknown field '{name}'{did_you_mean(str(name), hints)}")
        try:
            converted[name] = _convert(value, hints[name])
        except (TypeError, ValueError):
            problem = f"{name}={value!r} has the wrong type"
            expected = inspect.formatannotation(hints[name])
            raise ConfigError(f"{where}: {problem}; expected {expected}") from None
    return TrainConfig(**converted)


def _convert(value: Any, hint: Any) -> Any:
    """A value in the type of its field; a ``TypeError`` or ``ValueError`` if it has another type.
    Integers are allowed as floats, and YAML's 5e-4, a string, as the number it means.
    """
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind, parts = get_origin(kinds[0]) or kinds[0], get_args(kinds[0])
    if kind is Mapping and isinstance(value, Mapping):
        return {_convert(key, parts[0]): _convert(item, parts[1]) for key, item in value.items()}
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, parts[0]) for item in value)
    if kind is float and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kinds) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def read_config(path: Path) -> TrainConfig:
    """A configuration from a YAML file; raises as ``load_config``."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    return load_config(text, str(path))


def load_config(text: str, where: str) -> TrainConfig:
    """A configuration from YAML text.

    Raises:
        ConfigError: the text is not YAML, or a field is wrong.
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{where} is not valid YAML: {line}{problem}") from error
    return config_from_mapping(values or {}, where)


def load_plugins(config: TrainConfig, user: str = "") -> TrainConfig:
    """Import the plug-ins of a configuration, see ``fastokd.plugins.load_plugins``.

    Returns:
        The configuration with the plug-ins that were imported, which may be at other paths.
    """
    return dataclasses.replace(config, plugin=plugins.load_plugins(config.plugin, user))


def completed(config: TrainConfig) -> TrainConfig:
    """The configuration with the split point that is the default of ``at``, and the plug-ins that
    its names come from, for other processes and versions.
    """
    from fastokd.models import split_point

    if config.at is None:
        at = split_point(config.model, config.method, config.num_branches(), config.topology)
        if at is None and (config.freeze_epochs or config.trunk_lr != 1):
            with contextlib.suppress(ConfigError):  # networks that cannot be split have no trunk
                at = split_point(config.model, "ahbf", 2)  # the same trunk as with branches
        config = dataclasses.replace(config, at=at)
    names = (*config.model_names(), config.method, config.data.partition(":")[0], config.loader)
    found = plugins.origins((*names, config.impl))
    return dataclasses.replace(config, plugin=tuple(dict.fromkeys([*config.plugin, *found])))


def load_run_plugins(config: TrainConfig, folder: Path) -> TrainConfig:
    """``load_plugins`` for the configuration of a run, which another person may have written.

    Raises:
        ConfigError: a plug-in's file or folder is in the run's folder, or its path is not absolute.
    """
    for text in config.plugin:
        written = text if text.endswith(".py") else plugins.Plugin.parse(text).folder
        path = Path(written)
        inside = path.resolve().is_relative_to(folder.resolve())
        if written and (inside or not path.is_absolute()):
            raise ConfigError(
                f"plug-in {text} of {folder}: code that came with a run is not loaded; if you trust"
                " it, copy it elsewhere and pass --plugin with its path"
            )
    return load_plugins(config, str(folder))
