"""Published training configurations, one for every row of the papers' tables, each value with its source.

A recipe leaves ``data`` empty: where the images lie is the user's to say.
"""

import difflib
import importlib

from fastokd.errors import ConfigError
from fastokd.recipes.recipe import DATASETS, Published, Recipe, by_name

__all__ = ["DATASETS", "Published", "Recipe", "get_recipe", "list_recipes", "recipe_groups", "register_recipes"]

_modules = ["fastokd.recipes.cifar", "fastokd.recipes.ahbf_studies", "fastokd.recipes.imagenet", "fastokd.recipes.tsb", "fastokd.recipes.official"]


def register_recipes(module: str) -> None:
    """Add recipes: the module that has them as ``RECIPES``, by name. The first line of its docstring is their heading."""
    _modules.append(module)


def recipe_groups() -> dict[str, dict[str, Recipe]]:
    """All recipes by name, under the headings of their modules."""
    found = map(importlib.import_module, _modules)
    return {(module.__doc__ or module.__name__).strip().splitlines()[0].rstrip("."): dict(module.RECIPES) for module in found}


def list_recipes() -> dict[str, Recipe]:
    """All recipes by name; two modules may not have the same."""
    return by_name(recipe for group in recipe_groups().values() for recipe in group.values())


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; the message suggests the closest name.
    """
    recipes = list_recipes()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)  # and not all the others, which are hundreds
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"unknown recipe '{name}'; {hint}'fastokd recipes' lists all {len(recipes)}")
    return recipes[name]
