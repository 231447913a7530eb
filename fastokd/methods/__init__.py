"""The methods, one file each. A file is imported when its method is requested."""

from fastokd.methods.method import Method
from fastokd.registry import Registry

_methods: Registry[Method] = Registry(
    "method",
    "METHOD",
    {
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
    },
)


def register_method(name: str, module: str) -> None:
    """Add a method: the module that holds its constant ``METHOD``."""
    _methods.register(name, module)


def list_methods() -> list[str]:
    """The names of all methods."""
    return sorted(_methods)


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: the name is unknown; the message suggests the closest one.
    """
    return _methods.get(name)


__all__ = ["Method", "get_method", "list_methods", "register_method"]
