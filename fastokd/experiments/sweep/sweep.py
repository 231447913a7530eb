"""``fastokd sweep``: a grid over fields of a configuration, several seeds, a table of errors."""

import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import yaml

from fastokd.errors import MissingExtra
from fastokd.experiments.analysis import figures
from fastokd.experiments.analysis.runs import SAME_RUN, Run, value_in_words
from fastokd.experiments.analysis.tables import BEST_EPOCH_NOTE, Table, csv_text, spread
from fastokd.experiments.recipes import DATASETS, Published, Recipe
from fastokd.experiments.sweep import grid, results
from fastokd.experiments.sweep.equal_compute import equal_compute_record, equal_compute_table
from fastokd.experiments.sweep.grid import Point, Values, short
from fastokd.experiments.sweep.plan import Plan, Record, Results, check_seeds, plan_runs
from fastokd.experiments.sweep.published import matched_recipes, point_differences, student_numbers
from fastokd.experiments.sweep.queue import Outcome
from fastokd.train.config import TrainConfig, override


@dataclass(frozen=True, kw_only=True)
class Sweep(Plan):
    """A grid and its runs.

    Attributes:
        base: the settings that all points share.
        recipe: the recipe that ``base`` began as, or None.
        values: of every field that is set, see ``parse_values``.
        points: see ``grid_points``.
    """

    kind: ClassVar[str] = "sweep"

    base: TrainConfig
    recipe: Recipe | None
    values: Values
    points: tuple[Point, ...]

    @property
    def fields(self) -> list[str]:
        """The fields with several values."""
        return [field for field, choices in self.values.items() if len(choices) > 1]

    @property
    def record(self) -> Record:
        fields = yaml.safe_load(self.base.to_yaml()).items()
        record = {
            "format": "fastokd sweep 1",
            "base": {name: value for name, value in fields if name not in SAME_RUN},
            "values": {field: self.values[field] for field in self.fields},
            "seeds": self.seeds,
        }
        return json.loads(json.dumps(record))

    def differences(self, existing: Record) -> list[str]:
        """Differences that prevent reusing the folder; more values and seeds are allowed."""
        record = self.record
        old, new = existing["values"], record["values"]
        renamed = list(old) != list(new)
        swept = {name.partition(".")[0] for name in (*old, *new)} if renamed else set()
        different = [
            f"{name}: {existing['base'].get(name)!r}, {value!r}"
            for name, value in record["base"].items()
            if name not in swept and existing["base"].get(name) != value
        ]
        if renamed:
            return [
                *different,
                f"the fields with several values: {' '.join(old) or 'none'},"
                f" {' '.join(new) or 'none'}; runs are named after these fields, so a folder keeps"
                " them and only they can get more values",
            ]
        different += [
            f"{field}: {old[field]}, {values}"
            for field, values in new.items()
            if any(value not in values for value in old[field])
        ]
        if record["seeds"] < existing["seeds"]:
            different.append(f"seeds: {existing['seeds']}, {record['seeds']}")
        return different

    def results(self, failed: Mapping[str, str]) -> "SweepResults":
        measured = self.measured(failed)
        runs = [run for each in measured.values() for run in each.runs]
        published, notes = _published(self, runs)
        notes += results.comparison_remarks(runs)
        return SweepResults(measured, tuple(notes), self.out, self, tuple(published))

    def run(
        self, devices: Sequence[torch.device], per_device: int, say: Callable[[str], None]
    ) -> Outcome:
        """As ``Plan.run``, and draw the results at the end."""
        outcome = super().run(devices, per_device, say)
        try:
            self.results(outcome.failed).draw()
        except MissingExtra as error:
            say(f"no heat map: {error}")
        return outcome


def plan_sweep(
    base: TrainConfig, recipe: Recipe | None, values: Values, seeds: int, out: Path | None
) -> Sweep:
    """Plan the runs of a grid; a ``ConfigError`` names an invalid combination of values."""
    check_seeds(seeds)
    points = tuple(grid.grid_points(base, values))
    base = override(base, grid.fields_of(grid.shared_values(values)))
    name = recipe.name if recipe else f"{base.model.replace(':', '-')}-{base.method}"
    out = out or Path("sweeps") / name
    jobs = {point.name: plan_runs(out, point.name, point.config, range(seeds)) for point in points}
    return Sweep(
        out=out,
        jobs=jobs,
        configs={point.name: point.config for point in points},
        rows=tuple(jobs),
        seeds=seeds,
        base=base,
        recipe=recipe,
        values=values,
        points=points,
    )


def _published(sweep: Sweep, runs: Sequence[Run]) -> tuple[Sequence[Published | None], list[str]]:
    """The published number of each point's student from one table, or None, and a note on it. All
    are None if the runs are on data with other classes.
    """
    recipes = matched_recipes(sweep.recipe, sweep.values, sweep.points)
    published = student_numbers(recipes)
    number = next(filter(None, published), None)
    if sweep.recipe is None or number is None:
        return published, []
    classes = DATASETS[sweep.recipe.dataset].num_classes
    if any(run.data.get("num_classes", classes) != classes for run in runs):
        return [None] * len(published), []
    pairs = zip(recipes, published, strict=True)
    different = [
        *point_differences(sweep.points, [recipe if each else None for recipe, each in pairs]),
        *results.data_differences(sweep.recipe, runs),
    ]
    if sweep.seeds < (number.runs or 1):
        different.append(f"{sweep.seeds} of {number.runs} runs")
    note = (
        f"Published: {number.source}, which does not say whether of the last or the best epoch. Not"
        f" as published: {'; '.join(different) or 'nothing that is known'}."
    )
    return published, [note]


class _Grid(NamedTuple):
    """Errors of all points by the values of two fields: as a table and as numbers."""

    title: str
    table: Table
    values: list[list[float | None]]


@dataclass(frozen=True)
class SweepResults(Results):
    """The results of a sweep, with the published number of each point's student or None."""

    sweep: Sweep
    published: tuple[Published | None, ...]

    def tables(self) -> list[Table]:
        """A line for each point; before it, for two fields, tables of rows and columns; after it,
        the students alone with equal training compute.
        """
        labels = {
            point.name: grid.describe(point.values) or point.name for point in self.sweep.points
        }
        alone = equal_compute_table(self.sweep, self.measured, labels)
        return [*(each.table for each in self._grids()), self._point_table(), *alone]

    def _point_table(self) -> Table:
        rows = []
        for point, measured, number in self._points():
            errors = measured.errors()
            row = {
                "point": grid.describe(point.values) or point.name,
                "runs": measured.progress(),
                "last epoch": spread(errors),
                "best epoch": spread(measured.errors(best=True)),
            }
            if any(self.published):
                row["published"] = number.number() if number else "-"
                row["difference, last epoch"] = results.difference(errors, number)
            rows.append(row)
        title = "Errors of the student in %, mean +- sample standard deviation over seeds"
        return Table.of(title, rows, [BEST_EPOCH_NOTE, *self.notes])

    def _points(self) -> list[tuple[Point, results.Measured, Published | None]]:
        measured = [self.measured[point.name] for point in self.sweep.points]
        return list(zip(self.sweep.points, measured, self.published, strict=True))

    def _grids(self) -> list[_Grid]:
        """For two fields: our errors, and the published ones if there are any."""
        if len(self.sweep.fields) != 2:
            return []
        cells: list[tuple[float | None, str]] = []
        for _, measured, _ in self._points():
            errors, text = measured.errors(), measured.progress()
            if errors:
                some = "" if len(errors) == len(measured.states) else f" ({text})"
                text = f"{spread(errors)}{some}"
            cells.append((statistics.mean(errors) if errors else None, text))
        several = "epochs" in self.sweep.fields
        when = "last epoch" if several else f"last of {self.sweep.base.epochs} epochs"
        names = [run.data.get("name", "") for each in self.measured.values() for run in each.runs]
        seeds = f"{self.sweep.seeds} seed{'s' * (self.sweep.seeds > 1)}"
        title = ", ".join(filter(None, ["here", *names[:1], seeds, when]))
        grids = [self._grid(title, cells)]
        published = self.published
        if numbers := list(filter(None, published)):
            cells = [(each.error, each.number()) if each else (None, "-") for each in published]
            grids.append(self._grid(f"published, {numbers[0].source}", cells))
        return grids

    def _grid(self, title: str, cells: Sequence[tuple[float | None, str]]) -> _Grid:
        """The values and texts of the points, in lines."""
        (row, row_values), (column, column_values) = (
            (short(field), list(map(value_in_words, self.sweep.values[field])))
            for field in self.sweep.fields
        )
        width = len(column_values)
        lines = [cells[start : start + width] for start in range(0, len(cells), width)]
        rows = tuple(
            (label, *(text for _, text in line))
            for label, line in zip(row_values, lines, strict=True)
        )
        head = (f"{row} \\ {column}", *column_values)
        table = Table(f"Errors of the student in %, {title}", head, rows)
        return _Grid(title, table, [[value for value, _ in line] for line in lines])

    def as_json(self) -> Record:
        points = [
            {
                "name": point.name,
                "values": point.values,
                **measured.as_json(),
                "published": number._asdict() if number else None,
            }
            for point, measured, number in self._points()
        ]
        name = self.sweep.recipe.name if self.sweep.recipe else None
        return {
            "recipe": name,
            "values": self.sweep.values,
            "notes": self.notes,
            "points": points,
            "equal_compute": equal_compute_record(self.sweep, self.measured),
        }

    def files(self) -> dict[str, str]:
        """``sweep.md``, and ``sweep.csv`` with unrounded numbers and spaces between seeds."""
        rows = []
        for point, measured, number in self._points():
            row: dict[str, Any] = {"point": point.name}
            row |= {field: value_in_words(value) for field, value in point.values.items()}
            for name, value in measured.as_json().items():
                if name != "runs":
                    row[name] = " ".join(map(repr, value)) if isinstance(value, list) else value
            if number:
                row |= {"published": number.error, "published_std": number.std}
                row["published_source"] = number.source
            rows.append(row)
        markdown = "\n".join(table.as_markdown() for table in self.tables())
        return {"sweep.md": markdown, "sweep.csv": csv_text(rows)}

    def draw(self) -> None:
        """Draw ``heat-map.png`` and ``heat-map.svg``, if there are two fields: our errors and the
        published ones side by side, each with a separate color scale.
        """
        grids, fields = self._grids(), self.sweep.fields
        if not grids:
            return
        plt = figures.require_matplotlib()
        height, width = len(grids[0].table.rows), len(grids[0].table.head) - 1
        inches = max(3.5, 1.1 * width + 1.5)
        size = (inches * len(grids), max(2.6, 0.6 * height + 1.6))
        figure, panels = figures.panel_grid(plt, len(grids), len(grids), size)
        label = "error, %; own colour scale" if len(grids) > 1 else "error, %"
        for axes, drawn in zip(panels, grids, strict=True):
            texts = [row[1:] for row in drawn.table.rows]
            image = figures.draw_heat_map(axes, drawn.values, texts, "small", cmap="viridis_r")
            axes.set_xticks(range(width), drawn.table.head[1:])
            axes.set_yticks(range(height), [row[0] for row in drawn.table.rows])
            axes.set(xlabel=short(fields[1]), ylabel=short(fields[0]))
            setup = "" if drawn is grids[0] else ", the paper's setup, see sweep.md"
            axes.set_title(textwrap.fill(drawn.title + setup, int(11 * inches)), fontsize="medium")
            if any(value is not None for line in drawn.values for value in line):
                figure.colorbar(image, ax=axes, label=label)
        base = self.sweep.base
        shared = [getattr(base, name) for name in ("model", "method") if name not in fields]
        title = ", ".join([*shared, "student"])
        figure.suptitle(title, fontsize="medium", wrap=True)
        files = figures.encoded(plt, figure, ("png", "svg"))
        figures.FigureFiles("heat-map", title, title, files).write(self.out)
