"""``fastokd sweep``: a grid over fields of a configuration, several seeds, a table of errors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fastokd.experiments.analysis.runs import SAME_RUN, value_in_words
from fastokd.experiments.analysis.tables import BEST_EPOCH_NOTE, Table, csv_text, spread
from fastokd.experiments.recipes import Recipe
from fastokd.experiments.sweep import grid, results
from fastokd.experiments.sweep.equal_compute import equal_compute_record, equal_compute_table
from fastokd.experiments.sweep.grid import Point, Values, short
from fastokd.experiments.sweep.plan import Plan, Record, Results, check_seeds, plan_runs
from fastokd.train.batches import small_data_defaults
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
        notes = results.comparison_remarks(runs)
        return SweepResults(measured, tuple(notes), self.out, self)


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


def fit_small_data(plan: Sweep) -> tuple[Sweep, str]:
    """The sweep with the defaults of ``fastokd train`` for few images, and a line about it or "".
    Its data are opened.
    """
    dataset = plan.dataset(plan.points[0].config)
    base, line = small_data_defaults(plan.base, len(dataset.train))
    if not line:
        return plan, ""
    fitted = plan_sweep(base, plan.recipe, plan.values, plan.seeds, plan.out)
    return replace(fitted, _opened=plan._opened), line


@dataclass(frozen=True)
class SweepResults(Results):
    """The results of a sweep."""

    sweep: Sweep

    def tables(self) -> list[Table]:
        """A line for each point; before it, for two fields, a table of rows and columns; after it,
        the students alone with equal training compute.
        """
        labels = {
            point.name: grid.describe(point.values) or point.name for point in self.sweep.points
        }
        grids = [self._grid_table()] if len(self.sweep.fields) == 2 else []
        alone = equal_compute_table(self.sweep, self.measured, labels)
        return [*grids, self._point_table(), *alone]

    def _point_table(self) -> Table:
        rows = [
            {
                "point": grid.describe(point.values) or point.name,
                "runs": measured.progress(),
                "last epoch": spread(measured.errors()),
                "best epoch": spread(measured.errors(best=True)),
            }
            for point, measured in self._points()
        ]
        title = "Errors of the student in %, mean +- sample standard deviation over seeds"
        return Table.of(title, rows, [BEST_EPOCH_NOTE, *self.notes])

    def _points(self) -> list[tuple[Point, results.Measured]]:
        return [(point, self.measured[point.name]) for point in self.sweep.points]

    def _grid_table(self) -> Table:
        """The errors by the values of two fields."""
        cells = []
        for _, measured in self._points():
            errors, text = measured.errors(), measured.progress()
            if errors:
                some = "" if len(errors) == len(measured.states) else f" ({text})"
                text = f"{spread(errors)}{some}"
            cells.append(text)
        (row, row_values), (column, column_values) = (
            (short(field), list(map(value_in_words, self.sweep.values[field])))
            for field in self.sweep.fields
        )
        width = len(column_values)
        lines = [cells[start : start + width] for start in range(0, len(cells), width)]
        rows = tuple((label, *line) for label, line in zip(row_values, lines, strict=True))
        several = "epochs" in self.sweep.fields
        when = "last epoch" if several else f"last of {self.sweep.base.epochs} epochs"
        names = [run.data.get("name", "") for each in self.measured.values() for run in each.runs]
        seeds = f"{self.sweep.seeds} seed{'s' * (self.sweep.seeds > 1)}"
        title = ", ".join(filter(None, [*names[:1], seeds, when]))
        head = (f"{row} \\ {column}", *column_values)
        return Table(f"Errors of the student in %, {title}", head, rows)

    def as_json(self) -> Record:
        points = [
            {"name": point.name, "values": point.values, **measured.as_json()}
            for point, measured in self._points()
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
        for point, measured in self._points():
            row: dict[str, Any] = {"point": point.name}
            row |= {field: value_in_words(value) for field, value in point.values.items()}
            for name, value in measured.as_json().items():
                if name != "runs":
                    row[name] = " ".join(map(repr, value)) if isinstance(value, list) else value
            rows.append(row)
        markdown = "\n".join(table.as_markdown() for table in self.tables())
        return {"sweep.md": markdown, "sweep.csv": csv_text(rows)}
