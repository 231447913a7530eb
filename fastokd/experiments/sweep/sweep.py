"""``fastokd sweep``: a grid over fields of a configuration, several seeds of each point, and the
table of their errors.
"""

import csv
import inspect
import io
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
import yaml

from fastokd.errors import ConfigError, MissingExtra, summarize
from fastokd.experiments.analysis.compare import spread
from fastokd.experiments.analysis.heat_map import Panel, draw_heat_map
from fastokd.experiments.analysis.runs import SAME_RUN, value_in_words
from fastokd.experiments.analysis.tables import Table
from fastokd.experiments.recipes import DATASETS, Published, Recipe, list_recipes
from fastokd.experiments.sweep.folder import RUNS, Record, check_folder, run_in_folder
from fastokd.experiments.sweep.grid import Point, Values, describe, fields_of, grid_points, short
from fastokd.experiments.sweep.images import Datasets
from fastokd.experiments.sweep.queue import Job, Outcome, Queue
from fastokd.experiments.sweep.results import (
    Measured,
    comparison_remarks,
    data_differences,
    difference,
    measure,
    setup_differences,
)
from fastokd.methods import get_method
from fastokd.storage import write_json, write_text
from fastokd.train.config import TrainConfig, override

T = TypeVar("T")

_WHAT_IS_TRAINED = (
    "model",
    "at",
    "method",
    "preset",
    "branches",
    "topology",
    "aux_blocks",
    "compression",
    "method_options",
)
"""Fields that make a paper's number another one's where they are not the recipe's."""


@dataclass(frozen=True)
class Sweep:
    """A grid and its runs.

    Attributes:
        base: what all points share.
        recipe: what ``base`` began as; None for one without.
        values: of every field that is set, see ``parse_values``.
        points: see ``grid_points``.
        jobs: for each point its runs, one for each seed.
        out: the folder.
        datasets: of the runs.
    """

    base: TrainConfig
    recipe: Recipe | None
    values: Values
    points: tuple[Point, ...]
    jobs: tuple[tuple[Job, ...], ...]
    out: Path
    datasets: Datasets = field(default_factory=Datasets)

    @property
    def fields(self) -> list[str]:
        """The fields with several values."""
        return [field for field, choices in self.values.items() if len(choices) > 1]

    @property
    def queue(self) -> list[Job]:
        """The runs in the order in which they begin: all points with the first seed, then with the
        next.
        """
        return [job for of_a_seed in zip(*self.jobs, strict=True) for job in of_a_seed]

    def check(self) -> None:
        """Check that the folder, if it is there, is of this grid or of a smaller one, and of the
        same images.

        Raises:
            ConfigError: it is not; the message has the difference.
            DataError: the data cannot be trained on.
        """
        check_folder(self.out, "sweep", _record(self), _differences, self.queue, self.datasets)


def plan_sweep(
    base: TrainConfig, recipe: Recipe | None, values: Values, seeds: int, out: Path | None
) -> Sweep:
    """The runs of a grid.

    Raises:
        ConfigError: there are no seeds, or a combination of values makes no sense.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: it must be at least 1, for seeds 0 to N-1")
    points = grid_points(base, values)
    base = override(
        base,
        fields_of({field: choices[0] for field, choices in values.items() if len(choices) == 1}),
    )
    out = out or Path("sweeps") / (
        recipe.name if recipe else f"{base.model.replace(':', '-')}-{base.method}"
    )
    jobs = tuple(
        tuple(
            Job(out / RUNS / f"{point.name}-seed{seed}", replace(point.config, seed=seed))
            for seed in range(seeds)
        )
        for point in points
    )
    return Sweep(base, recipe, values, tuple(points), jobs, out)


def run_sweep(
    sweep: Sweep,
    devices: Sequence[torch.device],
    per_device: int | None,
    say: Callable[[str], None],
) -> Outcome:
    """Train what is not trained yet, write the results after every run, and draw them, see
    ``Results``.

    Args:
        sweep: the grid.
        devices, per_device, say: see ``Queue``.

    Raises:
        ConfigError: the folder is of another grid, holds another run, or another queue runs in it.
        DataError: the data cannot be trained on.
        StorageError: the disk refused.
    """
    queue = Queue(sweep.queue, sweep.out, devices, per_device, say, sweep.datasets)
    outcome = run_in_folder(
        queue,
        sweep.out,
        "sweep",
        _record(sweep),
        sweep.queue,
        sweep.datasets,
        sweep.check,
        lambda failed: Results.of(sweep, failed).write(),
    )
    try:
        Results.of(sweep, outcome.failed).draw()
    except MissingExtra as error:
        say(f"no heat map: {error}")
    return outcome


def _record(sweep: Sweep) -> Record:
    base = {
        name: value
        for name, value in yaml.safe_load(sweep.base.to_yaml()).items()
        if name not in SAME_RUN
    }
    record = {
        "format": "fastokd sweep 1",
        "base": base,
        "values": {field: sweep.values[field] for field in sweep.fields},
        "seeds": len(sweep.jobs[0]),
    }
    return json.loads(json.dumps(record))


def _differences(there: Record, here: Record) -> list[str]:
    """What a grid has that another has not; more values of a field that has several, and more
    seeds, are no difference.
    """
    fields = {name.partition(".")[0] for name in (*there["values"], *here["values"])}
    if list(there["values"]) != list(here["values"]):
        found = [
            f"{name}: {there['base'].get(name)!r}, {value!r}"
            for name, value in here["base"].items()
            if name not in fields and there["base"].get(name) != value
        ]
        return [
            *found,
            (
                f"the fields with several values: {' '.join(there['values']) or 'none'},"
                f" {' '.join(here['values']) or 'none'}; runs are named by these, so they stay as"
                " they are in a folder, and only they can get more values"
            ),
        ]
    found = [
        f"{name}: {there['base'].get(name)!r}, {value!r}"
        for name, value in here["base"].items()
        if there["base"].get(name) != value
    ]
    found += [
        f"{field}: {there['values'][field]}, {values}"
        for field, values in here["values"].items()
        if any(value not in values for value in there["values"][field])
    ]
    return [
        *found,
        *([f"seeds: {there['seeds']}, {here['seeds']}"] if here["seeds"] < there["seeds"] else []),
    ]


# --- the published numbers
# --------------------------------------------------------------------------------------------


def matched_recipes(sweep: Sweep) -> list[Recipe | None]:
    """For each point the recipe that it is, if a paper has numbers for that.

    A point is a recipe's if it has its fields, but for those that are set for all points alike,
    such as ``epochs=30``; what makes another network or another loss must not be among these. Where
    recipes differ in such a field alone, a point is of that which the sweep began with, or of none.
    """
    shared = {field: choices[0] for field, choices in sweep.values.items() if len(choices) == 1}
    if sweep.recipe is None or any(name.partition(".")[0] in _WHAT_IS_TRAINED for name in shared):
        return [None] * len(sweep.points)
    known: dict[tuple[str, ...], list[Recipe]] = {}
    for recipe in list_recipes().values():
        if recipe.dataset == sweep.recipe.dataset and recipe.published:
            known.setdefault(_identity(override(recipe.config, fields_of(shared))), []).append(
                recipe
            )
    return [
        next(
            (recipe for recipe in found if len(found) == 1 or recipe.name == sweep.recipe.name),
            None,
        )
        for found in (known.get(_identity(point.config), []) for point in sweep.points)
    ]


def published_numbers(sweep: Sweep) -> list[Published | None]:
    """For each point what a paper reports of the student of its recipe, all from the same table:
    the one that has most of the points.
    """
    found = matched_recipes(sweep)
    numbers = [
        (
            {number.source: number for number in recipe.published if number.row == "student"}
            if recipe
            else {}
        )
        for recipe in found
    ]
    counts = Counter(source for each in numbers for source in each)
    if not counts:
        return [None] * len(sweep.points)
    source = counts.most_common(1)[0][0]
    return [each.get(source) for each in numbers]


def _identity(config: TrainConfig) -> tuple[str, ...]:
    """What a configuration computes, in words."""
    return tuple(
        value_in_words(value)
        for name, value in vars(_resolved(config)).items()
        if name not in SAME_RUN
    )


def _resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with defaults and presets written out."""
    method = get_method(config.method)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(method.loss_class).parameters.items()
    }
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


def _not_as_published(sweep: Sweep, published: Sequence[Published | None]) -> list[str]:
    """In what points that stand beside a paper are not their recipes, and which, unless all of
    them.
    """
    points = [
        (point, recipe)
        for point, recipe, number in zip(
            sweep.points, matched_recipes(sweep), published, strict=True
        )
        if recipe and number
    ]
    different: dict[str, list[str]] = {}
    for point, recipe in points:
        for item in setup_differences(_resolved(recipe.config), _resolved(point.config)):
            different.setdefault(item, []).append(describe(point.values) or point.name)
    return [
        item if len(names) == len(points) else f"{item} at {summarize(names, 4)}"
        for item, names in different.items()
    ]


# --- the results
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What the runs of a sweep measured so far.

    Attributes:
        sweep: the grid.
        measured: of each point.
        published: of each point, see ``published_numbers``; all None where the runs are on data of
            other classes.
        notes: how to read it, and what differs from the paper.
    """

    sweep: Sweep
    measured: tuple[Measured, ...]
    published: tuple[Published | None, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, sweep: Sweep, failed: Mapping[str, str]) -> "Results":
        """Read what is there.

        Args:
            sweep: the grid.
            failed: the runs that failed just now, by name, each with its error.
        """
        measured = tuple(measure(jobs, failed) for jobs in sweep.jobs)
        runs = [run for each in measured for run in each.runs]
        published, notes = tuple(published_numbers(sweep)), []
        recipe = sweep.recipe
        if recipe and any(published):
            classes = DATASETS[recipe.dataset].num_classes
            if any(run.data.get("num_classes", classes) != classes for run in runs):
                published = (None,) * len(published)
            else:
                number = next(number for number in published if number)
                fewer = (
                    [f"{len(sweep.jobs[0])} of {number.runs} runs"]
                    if len(sweep.jobs[0]) < (number.runs or 1)
                    else []
                )
                different = [
                    *_not_as_published(sweep, published),
                    *data_differences(recipe, runs),
                    *fewer,
                ]
                notes.append(
                    f"Published: {number.source}, which does not say whether of the last or the"
                    " best epoch. What is not as published:"
                    f" {'; '.join(different) or 'nothing that is known'}."
                )
        notes += comparison_remarks(runs) if runs else []
        return cls(sweep, measured, published, tuple(notes))

    def tables(self) -> list[Table]:
        """A line for each point; for two fields also a table with the values of the one as rows and
        of the other as columns.
        """
        paper = any(self.published)
        rows = []
        for point, measured, number in zip(
            self.sweep.points, self.measured, self.published, strict=True
        ):
            errors = measured.errors()
            beside = (
                [number.number() if number else "-", difference(errors, number)] if paper else []
            )
            rows.append(
                (
                    describe(point.values) or point.name,
                    measured.progress(),
                    spread(errors),
                    spread(measured.errors(best=True)),
                    *beside,
                )
            )
        points = Table(
            "Errors of the student in %, mean +- sample standard deviation over seeds",
            (
                "point",
                "runs",
                "last epoch",
                "best epoch",
                *(["published", "difference, last epoch"] if paper else []),
            ),
            tuple(rows),
            (
                (
                    "The best epoch is chosen on the images it is measured on, and so it is"
                    " optimistic if these are the test images; the last is not chosen."
                ),
                *self.notes,
            ),
        )
        if len(self.sweep.fields) != 2:
            return [points]
        (row, rows_of), (column, columns_of) = self._labels()
        return [
            *(
                Table(
                    f"Errors of the student in %, {panel.title}",
                    (f"{row} \\ {column}", *columns_of),
                    tuple(
                        (label, *texts) for label, texts in zip(rows_of, panel.texts, strict=True)
                    ),
                )
                for panel in self._panels()
            ),
            points,
        ]

    def _labels(self) -> list[tuple[str, list[str]]]:
        """The fields with several values, and their values in words."""
        return [
            (short(field), [value_in_words(value) for value in self.sweep.values[field]])
            for field in self.sweep.fields
        ]

    def _panels(self) -> list[Panel]:
        """For two fields: our errors by rows and columns, and the published ones if there are
        any.
        """
        values, texts = [], []
        for measured in self.measured:
            errors = measured.errors()
            values.append(statistics.mean(errors) if errors else None)
            some = "" if len(errors) == len(measured.states) else f" ({measured.progress()})"
            texts.append(f"{spread(errors)}{some}" if errors else measured.progress())
        when = (
            "last epoch"
            if "epochs" in self.sweep.fields
            else f"last of {self.sweep.base.epochs} epochs"
        )
        data = next(
            (run.data.get("name", "") for measured in self.measured for run in measured.runs), ""
        )
        seeds = len(self.sweep.jobs[0])
        panels = [
            Panel(
                ", ".join(filter(None, ["here", data, f"{seeds} seed{'s' * (seeds > 1)}", when])),
                self._by_rows(values),
                self._by_rows(texts),
            )
        ]
        if any(self.published):
            source = next(number.source for number in self.published if number)
            panels.append(
                Panel(
                    f"published, {source}",
                    self._by_rows([number and number.error for number in self.published]),
                    self._by_rows(
                        [number.number() if number else "-" for number in self.published]
                    ),
                )
            )
        return panels

    def _by_rows(self, points: Sequence[T]) -> list[Sequence[T]]:
        """What belongs to the points, by the values of the first field."""
        width = len(self.sweep.values[self.sweep.fields[1]])
        return [points[start : start + width] for start in range(0, len(points), width)]

    def as_text(self) -> str:
        """For a terminal."""
        return "\n\n".join(table.as_text() for table in self.tables())

    def write(self) -> None:
        """Write ``sweep.md``, ``sweep.csv`` and ``results.json``."""
        out, sweep = self.sweep.out, self.sweep
        write_text(out / "sweep.md", "\n".join(table.as_markdown() for table in self.tables()))
        write_text(out / "sweep.csv", self._csv())
        write_json(
            out / "results.json",
            {
                "recipe": sweep.recipe.name if sweep.recipe else None,
                "values": sweep.values,
                "notes": self.notes,
                "points": [
                    {
                        "name": point.name,
                        "values": point.values,
                        **measured.as_json(),
                        "published": number._asdict() if number else None,
                    }
                    for point, measured, number in zip(
                        sweep.points, self.measured, self.published, strict=True
                    )
                ],
            },
        )

    def draw(self) -> None:
        """Draw ``heat-map.png`` and ``heat-map.svg``, if there are two fields.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        if len(self.sweep.fields) == 2:
            shared = [
                getattr(self.sweep.base, name)
                for name in ("model", "method")
                if name not in self.sweep.fields
            ]
            ours, *papers = self._panels()
            papers = [
                panel._replace(title=f"{panel.title}, the paper's setup, see sweep.md")
                for panel in papers
            ]
            draw_heat_map(
                [ours, *papers],
                *self._labels(),
                ", ".join([*shared, "student"]),
                self.sweep.out / "heat-map",
            )

    def _csv(self) -> str:
        """A line for each point, numbers not rounded; spaces separate seeds."""
        text = io.StringIO()
        rows = []
        for point, measured, number in zip(
            self.sweep.points, self.measured, self.published, strict=True
        ):
            found = measured.as_json()
            joined = {
                name: " ".join(map(repr, value))
                for name, value in found.items()
                if isinstance(value, list)
            }
            del found["runs"]
            paper = (
                {
                    "published": number.error,
                    "published_std": number.std,
                    "published_source": number.source,
                }
                if number
                else {}
            )
            rows.append(
                {
                    "point": point.name,
                    **{field: value_in_words(value) for field, value in point.values.items()},
                    **found,
                    **joined,
                    **paper,
                }
            )
        writer = csv.DictWriter(
            text,
            list(dict.fromkeys(name for row in rows for name in row)),
            restval="",
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
