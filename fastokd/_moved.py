"""Former names and import paths; each works for one more release, with a warning."""

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a name is used by its former spelling."""
    warnings.warn(
        f"{old} is now {new}; the old name will be removed in the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """The method ``new`` of a class under its former name."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)(*arguments, **options)

    return call


def renamed_property(old: str, new: str) -> Any:
    """The property ``new`` of a class under its former name."""

    def get(self: Any) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)

    return property(get)


def alias(old: str, new: str) -> None:
    """Make ``old`` and its submodules other names of the modules of ``new``."""
    warn_renamed(old, new, stacklevel=4)
    package = importlib.import_module(new)
    sys.modules[old] = package
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        sys.modules[f"{old}.{module.name}"] = importlib.import_module(f"{new}.{module.name}")


def moved_names(old: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of the module ``old``, from the names that each new module has of it;
    "old=new" for a renamed one.
    """
    targets = {
        name.partition("=")[0]: (module, name.rpartition("=")[2])
        for module, group in names.items()
        for name in group
    }

    def get(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"module '{old}' has no attribute '{name}'")
        module, current = targets[name]
        warn_renamed(f"{old}.{name}", f"{module}.{current}")
        return getattr(importlib.import_module(module), current)

    return get
