"""Published training configurations, one for every row of the papers' tables, each value with its
source.

A recipe leaves ``data`` empty: where the images lie is the user's to say.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import NamedTuple

from fastokd import plugins
from fastokd.errors import ConfigError
from fastokd.experiments.recipes.recipe import DATASETS, Published, Recipe, by_name

__all__ = [
    "DATASETS",
    "Group",
    "Published",
    "Recipe",
    "get_recipe",
    "list_recipes",
    "recipe_groups",
    "register_recipes",
]

_modules = [
    "fastokd.experiments.recipes.cifar",
    "fastokd.experiments.recipes.ahbf_studies",
    "fastokd.experiments.recipes.imagenet",
    "fastokd.experiments.recipes.modern",
    "fastokd.experiments.recipes.finetune",
    "fastokd.experiments.recipes.tsb",
    "fastokd.experiments.recipes.official",
]


def register_recipes(module: str) -> None:
    """Add the recipes of a module, which has them as ``RECIPES``, by name. The first paragraph of
    its docstring is their heading.
    """
    _modules.append(module)


class Group(NamedTuple):
    """The recipes of one module, and its docstring: the first paragraph and the rest."""

    heading: str
    about: str
    recipes: Mapping[str, Recipe]


def recipe_groups() -> list[Group]:
    """All recipes, module by module."""
    plugins.load_installed()
    groups = []
    for module in map(importlib.import_module, _modules):
        heading, _, about = (inspect.getdoc(module) or module.__name__).partition("\n\n")
        heading = " ".join(heading.split()).rstrip(".")
        groups.append(Group(heading, about.strip(), module.RECIPES))
    return groups


def list_recipes() -> dict[str, Recipe]:
    """All recipes by name; two modules may not have the same."""
    return by_name(recipe for group in recipe_groups() for recipe in group.recipes.values())


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; a ``ConfigError`` suggests the closest one."""
    recipes = list_recipes()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)  # listing all would be too long
        hint = f"did you mean '{close[0]}'? " if close else ""
        fix = f"{hint}'fastokd recipes' lists all {len(recipes)}"
        raise ConfigError(f"unknown recipe '{name}'; {fix}")
    return recipes[name]
