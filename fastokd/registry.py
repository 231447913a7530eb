"""The registry behind every extension point: a name, and the place its object is imported from."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from fastokd import plugins
from fastokd.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name. A module is imported when its object is first requested. Installed plug-ins
    are loaded when a name is unknown or the names are listed.

    Args:
        kind: the noun for messages, e.g. "method".
        constant: the name of a module's constant that holds the object, for targets without one.
        targets: "package.module" or "package.module:CONSTANT" for each built-in name.
        reserved: further names that users may write, e.g. "auto", for suggestions.
        has_plugins: plug-ins may register names, which messages about unknown names mention.
    """

    def __init__(
        self,
        kind: str,
        constant: str,
        targets: Mapping[str, str],
        reserved: Iterable[str] = (),
        has_plugins: bool = False,
    ) -> None:
        self.kind = kind
        self._constant = constant
        self.targets = dict(targets)
        self._reserved = tuple(reserved)
        self._has_plugins = has_plugins

    def register(self, name: str, target: str) -> None:
        """Add or replace the object of a name, at "package.module" or "package.module:CONSTANT"."""
        self.targets[name] = target
        plugins.note_registration(name, target.partition(":")[0])

    def get(self, name: str) -> T:
        """The object of a name; a ``ConfigError`` suggests the closest one for an unknown name."""
        self.check(name)
        module, _, constant = self.targets[name].partition(":")
        value: T = getattr(importlib.import_module(module), constant or self._constant)
        return value

    def check(self, name: str) -> None:
        """Raise the ``ConfigError`` of ``get`` for an unknown name; its object is not imported."""
        if name not in self:
            hint = did_you_mean(name, [*self.targets, *self._reserved])
            if self._has_plugins and "did you mean" not in hint:
                hint += f"; for a {self.kind} of a plug-in, pass --plugin FILE.py"
            raise ConfigError(f"unknown {self.kind} '{name}'{hint}{plugins.hint()}")

    def __contains__(self, name: object) -> bool:
        if name not in self.targets:
            plugins.load_installed()
        return name in self.targets

    def __iter__(self) -> Iterator[str]:
        plugins.load_installed()
        return iter(self.targets)
