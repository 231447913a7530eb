"""The methods, one file each. A file is imported when its method is asked for."""

import importlib

from fastokd.errors import ConfigError, did_you_mean
from fastokd.methods.method import Method

_modules = {
    "baseline": "fastokd.methods.baseline",
    "independent": "fastokd.methods.independent",
    "kd": "fastokd.methods.kd",
    "dml": "fastokd.methods.dml",
    "cl_ilr": "fastokd.methods.cl_ilr",
    "one": "fastokd.methods.one",
    "okddip": "fastokd.methods.okddip",
    "kdcl": "fastokd.methods.kdcl",
    "ffm": "fastokd.methods.ffm",
    "tsb": "fastokd.methods.tsb",
    "ahbf": "fastokd.methods.ahbf",
    "ffsd": "fastokd.methods.ffsd",
    "afid": "fastokd.methods.afid",
}


def register_method(name: str, module: str) -> None:
    """Add a method: the module that holds its constant ``METHOD``."""
    _modules[name] = module


def list_methods() -> list[str]:
    """The names of all methods."""
    return sorted(_modules)


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    if name not in _modules:
        raise ConfigError(f"unknown method '{name}'{did_you_mean(name, _modules)}")
    return importlib.import_module(_modules[name]).METHOD


__all__ = ["Method", "get_method", "list_methods", "register_method"]
