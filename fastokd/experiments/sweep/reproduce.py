"""``fastokd reproduce``: the recipes of a published table, and results next to its numbers."""

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fastokd.errors import ConfigError, did_you_mean, summarize
from fastokd.experiments.analysis.tables import BEST_EPOCH_NOTE, Table, plain_markdown, spread
from fastokd.experiments.recipes import DATASETS, Published, Recipe, list_recipes
from fastokd.experiments.sweep import results
from fastokd.experiments.sweep.equal_compute import equal_compute_record, equal_compute_table
from fastokd.experiments.sweep.grid import Values, fields_of, shared_values
from fastokd.experiments.sweep.plan import Plan, Record, Results, check_seeds, plan_runs
from fastokd.experiments.sweep.results import Measured, group_by_item
from fastokd.train.compute import scaled
from fastokd.train.config import override
from fastokd.train.rules import check_config


class PaperTable(NamedTuple):
    """The numbers of a source (see ``Published.source``) for a dataset, a key of ``DATASETS``, and
    the recipes that they are of, by name.
    """

    source: str
    dataset: str
    recipes: Mapping[str, Recipe]

    def numbers(self, recipe: Recipe) -> list[Published]:
        """Its numbers for a recipe, one for each row such as the student and the ensemble."""
        return [number for number in recipe.published if number.source == self.source]

    @property
    def runs(self) -> int:
        """The number of runs that its numbers are the mean of; 1 if unknown."""
        return max(
            each.runs or 1 for recipe in self.recipes.values() for each in self.numbers(recipe)
        )


def paper_tables() -> dict[str, PaperTable]:
    """All tables by name: "ahbf-table1", or "okddip-slides-cifar10" if a source has several."""
    recipes: dict[tuple[str, str], dict[str, Recipe]] = {}
    for name, recipe in list_recipes().items():
        for number in recipe.published:
            recipes.setdefault((number.source, recipe.dataset), {})[name] = recipe
    sources = [source for source, _ in recipes]
    tables = {}
    for (source, dataset), by_name in recipes.items():
        text = f"{source} {dataset}" if sources.count(source) > 1 else source
        words = re.findall(r"[a-z0-9]+", text.lower().replace("'s", ""))
        name = re.sub(r"(table|figure)-(?=\d)", r"\1", "-".join(words))
        tables[name] = PaperTable(source, dataset, by_name)
    return tables


def get_table(name: str) -> PaperTable:
    """The table of that name, or a ``ConfigError`` that suggests the closest one."""
    tables = paper_tables()
    if name not in tables:
        raise ConfigError(f"unknown table '{name}'{did_you_mean(name, tables)}")
    return tables[name]


def table_of_tables() -> Table:
    """The tables that can be reproduced."""
    head = ("table", "of", "data", "recipes", "runs")
    rows = []
    for name, table in paper_tables().items():
        counts = str(len(table.recipes)), str(table.runs)
        rows.append((name, table.source, DATASETS[table.dataset].title, *counts))
    notes = (
        "See one with: fastokd reproduce TABLE --dry-run",
        "Run it with: fastokd reproduce TABLE --data FOLDER",
    )
    return Table("Published tables", head, tuple(rows), notes)


@dataclass(frozen=True, kw_only=True)
class Reproduction(Plan):
    """A published table and the runs of its recipes. The results have all recipes of the table.

    Attributes:
        name: of the table.
        table: the table.
        epochs: the number that all schedules are scaled to; None for each recipe's own.
        changes: fields that are set for all recipes.
    """

    kind: ClassVar[str] = "reproduce"

    name: str
    table: PaperTable
    epochs: int | None
    changes: Mapping[str, Any]

    @property
    def record(self) -> Record:
        """Without rows and seeds, which may be run in several calls."""
        return {
            "format": "fastokd reproduce 1",
            "table": self.name,
            "epochs": self.epochs,
            "set": json.loads(json.dumps(self.changes)),
        }

    def results(self, failed: Mapping[str, str]) -> "ReproductionResults":
        measured = self.measured(failed)
        return ReproductionResults(measured, tuple(_notes(self, measured)), self.out, self)


def plan_reproduction(
    name: str,
    data: str,
    rows: Sequence[str],
    seeds: int | None,
    epochs: int | None,
    values: Values,
    out: Path | None,
    plugin: tuple[str, ...] = (),
) -> Reproduction:
    """Plan the runs of a table. Arguments are those of ``fastokd reproduce``, where None and empty
    are the defaults; ``values`` has one value for each field, and ``plugin`` loaded plug-ins.

    Raises:
        ConfigError: an unknown table or row, several values of a field, or an invalid
            configuration.
    """
    table = get_table(name)
    seeds = table.runs if seeds is None else seeds
    check_seeds(seeds)
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs={epochs}: must be at least 1")
    for setting, choices in values.items():
        if len(choices) > 1:
            fix = "pass one, or compare several with 'fastokd sweep'"
            raise ConfigError(f"--set {setting} has {len(choices)} values; {fix}")
    if "epochs" in values:
        raise ConfigError("--set epochs does not scale the schedule; use --epochs, which does")
    if unknown := [pattern for pattern in rows if not fnmatch.filter(table.recipes, pattern)]:
        raise ConfigError(
            f"--rows {unknown[0]}: no recipe of {name} matches; its recipes are"
            f" {summarize(list(table.recipes), 4)}; 'fastokd reproduce {name} --dry-run' lists all"
        )
    changes = shared_values(values)
    out = out or Path("reproduce") / name
    chosen, configs, jobs = [], {}, {}
    for key, recipe in table.recipes.items():
        config = recipe.config if epochs is None else scaled(recipe.config, epochs)
        config = replace(override(config, fields_of(changes)), data=data, plugin=plugin)
        check_config(config)
        configs[key] = config
        runs = _existing_seeds(out, key)
        if not rows or any(fnmatch.fnmatchcase(key, pattern) for pattern in rows):
            chosen.append(key)
            runs |= {*range(seeds)}
        jobs[key] = plan_runs(out, key, config, sorted(runs))
    return Reproduction(
        out=out,
        jobs=jobs,
        rows=tuple(chosen),
        seeds=seeds,
        name=name,
        table=table,
        configs=configs,
        epochs=epochs,
        changes=changes,
    )


def _existing_seeds(out: Path, recipe: str) -> set[int]:
    """The seeds of a recipe's runs in a folder."""
    seeds = (path.name[len(recipe) + 5 :] for path in (out / "runs").glob(f"{recipe}-seed*"))
    return {int(seed) for seed in seeds if re.fullmatch(r"\d+", seed)}


@dataclass(frozen=True)
class ReproductionResults(Results):
    """The results of a table's runs. The notes are the differences from the paper in finished and
    planned runs, and the notes of their recipes.
    """

    plan: Reproduction

    def _numbers(self) -> Iterator[tuple[str, Measured, Published]]:
        """Every number of the table, with its recipe and the recipe's runs."""
        for name, recipe in self.plan.table.recipes.items():
            for number in self.plan.table.numbers(recipe):
                yield name, self.measured[name], number

    def tables(self) -> list[Table]:
        """A line for every number of the table, also for those without a run; then the students
        alone with equal training compute.
        """
        rows = []
        for name, measured, number in self._numbers():
            errors = measured.errors(number.row)
            label = "" if number.row == "student" else f", {number.row.replace('_', ' ')}"
            runs = f" ({number.runs})" if number.runs else ""
            rows.append(
                {
                    "recipe": f"{name}{label}",
                    "published": f"{number.number()}{runs}",
                    "here, last epoch": f"{spread(errors)} ({len(errors)})" if errors else "-",
                    "difference": results.difference(errors, number),
                    "here, best epoch": spread(measured.errors(number.row, best=True)),
                    "runs": measured.progress(),
                }
            )
        table = self.plan.table
        title = (
            f"{table.source}, {DATASETS[table.dataset].title}: errors in %, mean +- sample standard"
            " deviation (number of runs)"
        )
        names = {name: name for name in self.plan.alone}
        alone = equal_compute_table(self.plan, self.measured, names)
        return [Table.of(title, rows, self.notes), *alone]

    def as_json(self) -> Record:
        plan = self.plan
        rows = [
            {
                "recipe": name,
                "row": number.row,
                "published": number._asdict(),
                **measured.as_json(number.row),
            }
            for name, measured, number in self._numbers()
        ]
        return {
            "table": plan.name,
            "source": plan.table.source,
            "dataset": plan.table.dataset,
            "epochs": plan.epochs,
            "set": plan.changes,
            "notes": self.notes,
            "rows": rows,
            "equal_compute": equal_compute_record(plan, self.measured),
        }

    def files(self) -> dict[str, str]:
        table, *others = self.tables()
        notes = (f"- {plain_markdown(note)}" for note in self.notes)
        text = "\n".join([table._replace(notes=()).as_markdown(), *notes, ""])
        text = "\n".join([text, *(other.as_markdown() for other in others)])
        return {"reproduce.md": text}


def _notes(plan: Reproduction, measured: Mapping[str, Measured]) -> list[str]:
    recipes = plan.table.recipes
    runs = [run for each in measured.values() for run in each.runs]
    counts = {name: len(plan.table.numbers(recipe)) for name, recipe in recipes.items()}
    done = sum(count for name, count in counts.items() if measured[name].runs)
    rows = [name for name in recipes if name in plan.rows or measured[name].runs]

    def which(names: Sequence[str]) -> str:
        return "" if len(names) == len(rows) else f" ({summarize(names, 4)})"

    different = group_by_item((name, _differences(plan, name, measured[name])) for name in rows)
    remarks = group_by_item((name, recipes[name].notes) for name in rows)
    nothing = "No known differences from the published setting"
    nothing += "." if runs else " in the planned runs; nothing has been run."
    return [
        f"{done} of {sum(counts.values())} published numbers have a finished run.",
        "Difference: the last epoch minus the published number, in percentage points; positive is"
        " a larger error than published. The paper does not state whether its numbers are from the"
        f" last or the best epoch. {BEST_EPOCH_NOTE}",
        *(f"Not as published{which(names)}: {item}." for item, names in different.items()),
        *([] if different else [nothing]),
        "The notes of each recipe ('fastokd recipes NAME') list settings that the paper does not"
        " state. No paper states its precision; on a GPU it is bf16 unless --set precision=fp32.",
        *(f"{note}{which(names)}" for note, names in remarks.items()),
        *results.comparison_remarks(runs),
    ]


def _differences(plan: Reproduction, name: str, measured: Measured) -> list[str]:
    """Known differences of a recipe's runs from the published setup."""
    recipe, count = plan.table.recipes[name], len(measured.runs)
    published = max(number.runs or 1 for number in plan.table.numbers(recipe))
    return [
        *results.setup_differences(recipe.config, plan.configs[name]),
        *results.data_differences(recipe, measured.runs),
        *([f"{count} of {published} runs"] if 0 < count < published else []),
    ]
