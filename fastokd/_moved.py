"""Old import paths of packages that moved; each works for one more release, with a warning."""

import importlib
import pkgutil
import sys
import warnings


def alias(old: str, new: str) -> None:
    """Make ``old`` and its submodules other names of ``new`` and its submodules.

    The modules are the same objects, so classes imported by either path are identical.
    """
    warnings.warn(
        f"{old} has moved to {new}; the old path will be removed in the next release",
        DeprecationWarning,
        stacklevel=4,
    )
    package = importlib.import_module(new)
    sys.modules[old] = package
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        sys.modules[f"{old}.{module.name}"] = importlib.import_module(f"{new}.{module.name}")
