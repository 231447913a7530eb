"""The methods, one file each. A file is imported when its method is requested."""

from fastokd.methods.method import Method
from fastokd.registry import Registry

_NAMES = "baseline independent kd dml cl_ilr one okddip kdcl ffm tsb ahbf ffsd afid"
_methods: Registry[Method] = Registry(
    "method",
    "METHOD",
    {name: f"fastokd.methods.{name}" for name in _NAMES.split()},
    has_plugins=True,
)


def register_method(name: str, module: str) -> None:
    """Add a method: the module that holds its constant ``METHOD``."""
    _methods.register(name, module)


def list_methods() -> list[str]:
    """The names of all methods."""
    return sorted(_methods)


def get_method(name: str) -> Method:
    """The method of that name; a ``ConfigError`` suggests the closest one for an unknown name."""
    return _methods.get(name)


__all__ = ["Method", "get_method", "list_methods", "register_method"]
