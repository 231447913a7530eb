"""The numbers that papers report for the points of a grid."""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastokd.errors import summarize
from fastokd.experiments.analysis.runs import SAME_RUN, value_in_words
from fastokd.experiments.recipes import Published, Recipe, list_recipes
from fastokd.experiments.sweep.grid import Point, Values, describe, fields_of, shared_values
from fastokd.experiments.sweep.results import group_by_item, setup_differences
from fastokd.methods import get_method
from fastokd.train.config import TrainConfig, fields_with_role, override
from fastokd.train.fields import Role

_TRAINED = fields_with_role(Role.TRAINED)
"""Fields without which a paper's number is not a recipe's."""


def matched_recipes(
    recipe: Recipe | None, values: Values, points: Sequence[Point]
) -> list[Recipe | None]:
    """The published recipe that each point is, or None.

    A point is a recipe if all fields are equal, except those set for all points alike, such as
    ``epochs=30``; these must not change the network or the loss. If recipes differ in such a field
    alone, a point can only be the recipe of the sweep.
    """
    shared = shared_values(values)
    if recipe is None or any(name.partition(".")[0] in _TRAINED for name in shared):
        return [None] * len(points)
    known: dict[tuple[str, ...], list[Recipe]] = {}
    for other in list_recipes().values():
        if other.dataset == recipe.dataset and other.published:
            config = override(other.config, fields_of(shared))
            known.setdefault(_identity(config), []).append(other)
    matches = [known.get(_identity(point.config), []) for point in points]
    return [
        next((each for each in same if len(same) == 1 or each.name == recipe.name), None)
        for same in matches
    ]


def student_numbers(recipes: Sequence[Recipe | None]) -> list[Published | None]:
    """The published errors of recipes' students, all from the table that has most of them."""
    published = [recipe.published if recipe else () for recipe in recipes]
    by_source = [
        {number.source: number for number in numbers if number.row == "student"}
        for numbers in published
    ]
    counts = Counter(source for each in by_source for source in each)
    if not counts:
        return [None] * len(recipes)
    source = counts.most_common(1)[0][0]
    return [each.get(source) for each in by_source]


def point_differences(points: Sequence[Point], recipes: Sequence[Recipe | None]) -> list[str]:
    """Differences of points from their recipes, with the names of the points unless all differ."""
    compared = [
        (describe(point.values) or point.name, point, recipe)
        for point, recipe in zip(points, recipes, strict=True)
        if recipe
    ]
    different = group_by_item(
        (name, setup_differences(_resolved(recipe.config), _resolved(point.config)))
        for name, point, recipe in compared
    )
    return [
        item if len(names) == len(compared) else f"{item} at {summarize(names, 4)}"
        for item, names in different.items()
    ]


def _identity(config: TrainConfig) -> tuple[str, ...]:
    """The computation that a configuration describes, as text."""
    return tuple(
        value_in_words(value)
        for name, value in vars(_resolved(config)).items()
        if name not in SAME_RUN
    )


def _resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with defaults and presets written out."""
    method = get_method(config.method)
    parameters = inspect.signature(method.loss_class).parameters
    defaults: dict[str, Any] = {name: each.default for name, each in parameters.items()}
    options = {**defaults, **config.loss_options(), **config.model_options()}
    del options["impl"]
    return replace(
        config,
        preset="",
        branches=config.num_branches(),
        topology=config.topology or method.topologies[0],
        ramp_epochs=config.ramp_length(),
        method_options=dict(sorted(options.items())),
    )
