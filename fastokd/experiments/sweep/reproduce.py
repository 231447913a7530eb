"""``fastokd reproduce``: the recipes of a published table, and what their runs measured beside what
the paper reports.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastokd.errors import ConfigError, did_you_mean, summarize
from fastokd.experiments.analysis.compare import spread
from fastokd.experiments.analysis.tables import Table, plain_markdown
from fastokd.experiments.recipes import DATASETS, Published, Recipe, list_recipes
from fastokd.experiments.sweep.folder import RUNS, Record, check_folder, run_in_folder
from fastokd.experiments.sweep.grid import Values, fields_of
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
from fastokd.storage import write_json, write_text
from fastokd.train.config import TrainConfig, check_config, override


class PaperTable(NamedTuple):
    """The numbers that a source reports for one dataset.

    Attributes:
        source: as ``Published.source`` has it.
        dataset: a key of ``DATASETS``.
        recipes: those that it has numbers for, by name.
    """

    source: str
    dataset: str
    recipes: Mapping[str, Recipe]

    def numbers(self, recipe: Recipe) -> list[Published]:
        """Its numbers for a recipe: one for each row that it reports, such as the student and the
        ensemble.
        """
        return [number for number in recipe.published if number.source == self.source]

    @property
    def runs(self) -> int:
        """How many runs its numbers are the mean of; 1 where it does not say."""
        return max(
            number.runs or 1 for recipe in self.recipes.values() for number in self.numbers(recipe)
        )


def paper_tables() -> dict[str, PaperTable]:
    """All tables by name: the source's, with the dataset where it has several, e.g. "ahbf-table1"
    and "okddip-slides-cifar10".
    """
    found: dict[tuple[str, str], dict[str, Recipe]] = {}
    for name, recipe in list_recipes().items():
        for number in recipe.published:
            found.setdefault((number.source, recipe.dataset), {})[name] = recipe
    sources = [source for source, _ in found]
    return {
        _name(source, dataset if sources.count(source) > 1 else ""): PaperTable(
            source, dataset, recipes
        )
        for (source, dataset), recipes in found.items()
    }


def _name(source: str, dataset: str) -> str:
    words = re.findall(r"[a-z0-9]+", f"{source} {dataset}".lower().replace("'s", ""))
    return re.sub(r"(table|figure)-(?=\d)", r"\1", "-".join(words))


def get_table(name: str) -> PaperTable:
    """The table of that name.

    Raises:
        ConfigError: there is none.
    """
    tables = paper_tables()
    if name not in tables:
        raise ConfigError(f"unknown table '{name}'{did_you_mean(name, tables)}")
    return tables[name]


def table_of_tables() -> Table:
    """What there is."""
    rows = [
        (
            name,
            found.source,
            DATASETS[found.dataset].title,
            str(len(found.recipes)),
            str(found.runs),
        )
        for name, found in paper_tables().items()
    ]
    return Table(
        "Published tables",
        ("table", "of", "data", "recipes", "runs"),
        tuple(rows),
        (
            "See one with: fastokd reproduce TABLE --dry-run",
            "Run it with: fastokd reproduce TABLE --data FOLDER",
        ),
    )


@dataclass(frozen=True)
class Reproduction:
    """A table whose recipes are run.

    Attributes:
        name: of the table.
        table: the table.
        rows: the recipes to run now, by name; the others of the table are shown as they are.
        seeds: runs of each of these rows, with seeds from 0.
        configs: of all recipes of the table, by name, with seed 0.
        jobs: for each recipe of the table its runs: those to run now, and those that are there from
            before.
        epochs: the number that all are scaled to; None for each recipe's own.
        changes: fields that are set for all recipes.
        out: the folder.
        datasets: of the runs.
    """

    name: str
    table: PaperTable
    rows: tuple[str, ...]
    seeds: int
    configs: Mapping[str, TrainConfig]
    jobs: Mapping[str, tuple[Job, ...]]
    epochs: int | None
    changes: Mapping[str, Any]
    out: Path
    datasets: Datasets = field(default_factory=Datasets)

    @property
    def queue(self) -> list[Job]:
        """The runs in the order in which they begin: all rows with the first seed, then with the
        next.
        """
        return [
            job
            for seed in range(self.seeds)
            for name in self.rows
            for job in self.jobs[name]
            if job.config.seed == seed
        ]

    @property
    def record(self) -> Record:
        """What the folder is of; rows and seeds may come in several calls."""
        return {
            "format": "fastokd reproduce 1",
            "table": self.name,
            "epochs": self.epochs,
            "set": json.loads(json.dumps(self.changes)),
        }

    def check(self) -> None:
        """Check that the folder, if it is there, is of this table in these settings, and every run
        in it too; and of the same images.

        Raises:
            ConfigError: it is not; the message has the difference.
            DataError: the data cannot be trained on.
        """
        check_folder(
            self.out,
            "reproduce",
            self.record,
            _record_differences,
            [job for jobs in self.jobs.values() for job in jobs],
            self.datasets,
        )


def _record_differences(there: Record, here: Record) -> list[str]:
    return [
        f"{name}: {there[name]!r}, {value!r}"
        for name, value in here.items()
        if there[name] != value
    ]


def plan_reproduction(
    name: str,
    data: str,
    rows: Sequence[str],
    seeds: int | None,
    epochs: int | None,
    values: Values,
    out: Path | None,
) -> Reproduction:
    """The runs of a table.

    Args:
        name: of the table.
        data: the dataset.
        rows: patterns of recipes' names, such as "*-ahbf"; empty for all.
        seeds: runs of each recipe, with seeds from 0; None for as many as the table has.
        epochs: scale all schedules to this number; None for the recipes' own.
        values: fields that are set for all recipes, one value each.
        out: the folder; None for ``reproduce/NAME``.

    Raises:
        ConfigError: no such table or rows, several values of a field, or a configuration that makes
            no sense.
    """
    table = get_table(name)
    seeds = table.runs if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: it must be at least 1, for seeds 0 to N-1")
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs={epochs}: it must be at least 1")
    for setting, choices in values.items():
        if len(choices) > 1:
            raise ConfigError(
                f"--set {setting} has {len(choices)} values; a table is reproduced with one: give"
                " one, or compare several with 'fastokd sweep'"
            )
        if setting == "epochs":
            raise ConfigError(
                "--set epochs is --epochs here, which scales what is counted in epochs with them"
            )
    changes = {setting: choices[0] for setting, choices in values.items()}
    chosen = [
        recipe
        for recipe in table.recipes
        if not rows or any(fnmatch.fnmatchcase(recipe, pattern) for pattern in rows)
    ]
    if unknown := [pattern for pattern in rows if not fnmatch.filter(table.recipes, pattern)]:
        raise ConfigError(
            f"--rows {unknown[0]}: no recipe of {name} is named so; its recipes are"
            f" {summarize(list(table.recipes), 4)}; 'fastokd reproduce {name} --dry-run' lists all"
        )
    configs = {}
    for recipe, found in table.recipes.items():
        config = found.config if epochs is None else scaled(found.config, epochs)
        configs[recipe] = replace(override(config, fields_of(changes)), data=data)
        check_config(configs[recipe])
    out = out or Path("reproduce") / name
    jobs = {
        recipe: tuple(
            Job(out / RUNS / f"{recipe}-seed{seed}", replace(config, seed=seed))
            for seed in sorted(
                {*_seeds_there(out, recipe), *range(seeds if recipe in chosen else 0)}
            )
        )
        for recipe, config in configs.items()
    }
    return Reproduction(name, table, tuple(chosen), seeds, configs, jobs, epochs, changes, out)


def _seeds_there(out: Path, recipe: str) -> set[int]:
    """The seeds of a recipe's runs in a folder."""
    names = (
        re.fullmatch(rf"{re.escape(recipe)}-seed(\d+)", path.name)
        for path in (out / RUNS).glob(f"{recipe}-seed*")
    )
    return {int(found[1]) for found in names if found}


def scaled(config: TrainConfig, epochs: int) -> TrainConfig:
    """The configuration with another number of epochs, and what else is counted in epochs in
    proportion.
    """
    factor = epochs / config.epochs
    ramp = None if config.ramp_epochs is None else round(config.ramp_epochs * factor)
    warmup = None if config.warmup_epochs is None else config.warmup_epochs * factor
    return replace(config, epochs=epochs, ramp_epochs=ramp, warmup_epochs=warmup)


def run_reproduction(
    plan: Reproduction,
    devices: Sequence[torch.device],
    per_device: int | None,
    say: Callable[[str], None],
) -> Outcome:
    """Train what is not trained yet, and write ``reproduce.md`` and ``results.json``.

    Args:
        plan: the table.
        devices, per_device, say: see ``Queue``.

    Raises:
        ConfigError: the folder is of something else, holds another run, or another queue runs in
            it.
        DataError: the data cannot be trained on.
        StorageError: the disk refused.
    """
    queue = Queue(plan.queue, plan.out, devices, per_device, say, plan.datasets)
    return run_in_folder(
        queue,
        plan.out,
        "reproduce",
        plan.record,
        plan.queue,
        plan.datasets,
        plan.check,
        lambda failed: ReproductionResults.of(plan, failed).write(),
    )


@dataclass(frozen=True)
class ReproductionResults:
    """What the runs of a table measured so far.

    Attributes:
        plan: the table.
        measured: of every recipe, by name.
        notes: what differs from the paper in the runs that are finished and in those planned, and
            what their recipes say.
    """

    plan: Reproduction
    measured: Mapping[str, Measured]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, plan: Reproduction, failed: Mapping[str, str]) -> "ReproductionResults":
        """Read what is there.

        Args:
            plan: the table.
            failed: the runs that failed just now, by name, each with its error.
        """
        measured = {name: measure(jobs, failed) for name, jobs in plan.jobs.items()}
        return cls(plan, measured, tuple(_notes(plan, measured)))

    def table(self) -> Table:
        """A line for every number of the table, also for those that have not been run."""
        rows = []
        for name, recipe in self.plan.table.recipes.items():
            measured = self.measured[name]
            for number in self.plan.table.numbers(recipe):
                errors = measured.errors(number.row)
                rows.append(
                    (
                        (
                            name
                            if number.row == "student"
                            else f"{name}, {number.row.replace('_', ' ')}"
                        ),
                        f"{number.number()}{f' ({number.runs})' if number.runs else ''}",
                        f"{spread(errors)} ({len(errors)})" if errors else "-",
                        difference(errors, number),
                        spread(measured.errors(number.row, best=True)),
                        measured.progress(),
                    )
                )
        return Table(
            f"{self.plan.table.source}, {DATASETS[self.plan.table.dataset].title}: errors in %,"
            " mean +- sample standard deviation (number of runs)",
            ("recipe", "published", "here, last epoch", "difference", "here, best epoch", "runs"),
            tuple(rows),
            self.notes,
        )

    def as_text(self) -> str:
        """For a terminal."""
        return self.table().as_text()

    def as_markdown(self) -> str:
        """A table, and the notes as a list."""
        table = self.table()
        return (
            "\n".join(
                [
                    replace(table, notes=()).as_markdown(),
                    *(f"- {plain_markdown(note)}" for note in table.notes),
                ]
            )
            + "\n"
        )

    def write(self) -> None:
        """Write ``reproduce.md`` and ``results.json``."""
        plan = self.plan
        write_text(plan.out / "reproduce.md", self.as_markdown())
        write_json(
            plan.out / "results.json",
            {
                "table": plan.name,
                "source": plan.table.source,
                "dataset": plan.table.dataset,
                "epochs": plan.epochs,
                "set": plan.changes,
                "notes": self.notes,
                "rows": [
                    {
                        "recipe": name,
                        "row": number.row,
                        "published": number._asdict(),
                        **self.measured[name].as_json(number.row),
                    }
                    for name, recipe in plan.table.recipes.items()
                    for number in plan.table.numbers(recipe)
                ],
            },
        )


def _notes(plan: Reproduction, measured: Mapping[str, Measured]) -> list[str]:
    runs = [run for each in measured.values() for run in each.runs]
    numbers = sum(len(plan.table.numbers(recipe)) for recipe in plan.table.recipes.values())
    done = sum(
        len(plan.table.numbers(plan.table.recipes[name]))
        for name, each in measured.items()
        if each.runs
    )
    notes = [
        (
            f"{done} of {numbers} numbers have a finished run here; the others say nothing about"
            " the paper."
        ),
        (
            "Difference: of the last epoch from what is published, in percentage points; above 0 is"
            " worse here. The paper does not say whether its numbers are of the last epoch or of"
            " the best, and the best is chosen on the images that it is measured on."
        ),
    ]
    rows = [name for name in plan.table.recipes if name in plan.rows or measured[name].runs]
    different: dict[str, list[str]] = {}
    for name in rows:
        recipe, each = plan.table.recipes[name], measured[name]
        published = max(number.runs or 1 for number in plan.table.numbers(recipe))
        fewer = [f"{len(each.runs)} of {published} runs"] if 0 < len(each.runs) < published else []
        for item in [
            *setup_differences(recipe.config, plan.configs[name]),
            *data_differences(recipe, each.runs),
            *fewer,
        ]:
            different.setdefault(item, []).append(name)
    notes += [
        f"Not as published{_which(names, rows)}: {item}." for item, names in different.items()
    ]
    if not different:
        notes.append(
            "Nothing is known to differ from what is published"
            + ("." if runs else " in what is planned; nothing has been run.")
        )
    notes.append(
        "What the paper leaves open is as each recipe says ('fastokd recipes NAME'); none says its"
        " precision, which is bf16 on a GPU here unless --set precision=fp32."
    )
    said: dict[str, list[str]] = {}
    for name in rows:
        for note in plan.table.recipes[name].notes:
            said.setdefault(note, []).append(name)
    notes += [f"{note}{_which(names, rows)}" for note, names in said.items()]
    return notes + (comparison_remarks(runs) if runs else [])


def _which(names: Sequence[str], rows: Sequence[str]) -> str:
    return "" if len(names) == len(rows) else f" ({summarize(names, 4)})"
