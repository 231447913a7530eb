"""Complete training configurations as functions, one per published row, each value with its source.

A recipe leaves ``data`` empty: where the images lie is the user's to say.
"""

import importlib
import inspect
from collections.abc import Callable

from fastokd.errors import ConfigError, did_you_mean
from fastokd.train.config import TrainConfig

_modules = {
    "cifar10-resnet20-baseline": "fastokd.recipes.cifar",
    "cifar10-resnet32-ahbf": "fastokd.recipes.cifar",
    "cifar100-resnet32-ahbf": "fastokd.recipes.cifar",
    **dict.fromkeys(("cifar100-resnet32-okddip", "cifar100-resnet32-okddip-peers", "cifar100-resnet32-dml", "cifar100-resnet32-cl-ilr",
                     "cifar100-resnet32-one-attached", "cifar100-resnet32-independent"), "fastokd.recipes.okddip"),
    "cifar100-resnet32-one": "fastokd.recipes.one",
    "cifar100-resnet32-ffsd": "fastokd.recipes.ffsd",
    "cifar100-wrn16-2-afid": "fastokd.recipes.afid",
    **dict.fromkeys(("cifar10-resnet32-tsb", "cifar100-resnet32-tsb", "cifar100-resnet32-wrn16-4-tsb", "cifar100-resnet32-kdcl",
                     "cifar100-resnet32-wrn16-2-kdcl"), "fastokd.recipes.tsb"),
    **dict.fromkeys(("cifar10-resnet32-ffm", "cifar100-resnet32-ffm", "cifar100-resnet110-ffm"), "fastokd.recipes.ffm"),
}


def register_recipe(name: str, module: str) -> None:
    """Add a recipe: the module that holds a function of that name, with underscores for the hyphens."""
    _modules[name] = module


def list_recipes() -> dict[str, str]:
    """Every recipe's name and the first line of its docstring."""
    return {name: (_function(name).__doc__ or "").strip().splitlines()[0] for name in sorted(_modules)}


def get_recipe(name: str) -> TrainConfig:
    """The configuration of that name.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    return _function(name)()


def describe_recipe(name: str) -> str:
    """The whole docstring of a recipe: what it is and where its values come from."""
    return inspect.getdoc(_function(name)) or ""


def _function(name: str) -> Callable[[], TrainConfig]:
    if name not in _modules:
        raise ConfigError(f"unknown recipe '{name}'{did_you_mean(name, _modules)}")
    return getattr(importlib.import_module(_modules[name]), name.replace("-", "_"))
