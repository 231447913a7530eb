"""Commands that train many runs."""

import sys
from pathlib import Path
from typing import Any

import tyro

from fastokd.cli.options import PLUGINS, Settings, say
from fastokd.cli.train import start_from
from fastokd.data import absolute_spec
from fastokd.errors import EXIT_OK
from fastokd.experiments.demo import run_demo
from fastokd.experiments.recipes import get_recipe
from fastokd.experiments.sweep.equal_compute import add_students_alone
from fastokd.experiments.sweep.grid import parse_values
from fastokd.experiments.sweep.plan import Plan
from fastokd.experiments.sweep.queue import parse_devices, parse_per_device
from fastokd.experiments.sweep.reproduce import plan_reproduction, table_of_tables
from fastokd.experiments.sweep.sweep import fit_small_data, plan_sweep
from fastokd.plugins import load_plugins
from fastokd.train.batches import BATCH_FIELDS
from fastokd.train.config import override


def demo(
    out: Path = Path("demo-out"), seeds: int = 10, epochs: int = 20, branches: int = 4
) -> None:
    """Train a small student alone and with AHBF on a few embedded digits, compare both, and export
    the student.

    Args:
        out: Folder for the runs, the plots and the exported student; an earlier demo is replaced
        seeds: Number of seeds of each method, at least 3
        epochs: Epochs of every run
        branches: Branches of the AHBF runs, 3 to 8
    """
    run_demo(out, seeds, epochs, branches)


def sweep(
    recipe: str | None = None,
    config: Path | None = None,
    data: str | None = None,
    set: Settings = (),
    seeds: int = 1,
    out: Path | None = None,
    devices: str = "auto",
    per_device: str = "auto",
    equal_compute: bool = False,
    dry_run: bool = False,
    plugin: PLUGINS = (),
) -> int:
    """Run a grid over fields of the configuration with several seeds, and compare the errors of the
    students. Repeat the command to resume.

    Failed runs are reported and the others continue; the exit code is that of the first failed run.

    Args:
        recipe: Start from this published configuration (see 'fastokd recipes')
        config: Start from this YAML file, e.g. the config.yaml of a run
        set: Field of the configuration, or method_options.NAME, with one value, or several for the
            grid: branches=2,3,4. Values are written as in YAML: null for the default, brackets
            around a list, quotes around a comma
        seeds: Number of runs of each point, with seeds from 0
        out: Folder (default: sweeps/RECIPE, or sweeps/MODEL-METHOD). A larger grid may use the
            folder of a smaller one
        equal_compute: For each point, also train the student alone with the same training compute
            (more epochs, schedule stretched), and compare
    """
    base = start_from(recipe, config)
    changes: dict[str, Any] = {} if data is None else {"data": absolute_spec(data)}
    changes["plugin"] = (*base.plugin, *load_plugins(plugin))
    base = override(base, changes)
    values = parse_values(set)
    plan = plan_sweep(base, get_recipe(recipe) if recipe else None, values, seeds, out)
    if plan.base.data and not (BATCH_FIELDS & values.keys() or recipe or config):
        plan, line = fit_small_data(plan)
        if line:
            say(line)
    if equal_compute:
        plan = add_students_alone(plan)
    return _run(plan, dry_run, devices, per_device)


def reproduce(
    table: tyro.conf.Positional[str | None] = None,
    data: str | None = None,
    rows: tuple[str, ...] = (),
    seeds: int | None = None,
    epochs: int | None = None,
    set: Settings = (),
    out: Path | None = None,
    devices: str = "auto",
    per_device: str = "auto",
    equal_compute: bool = False,
    dry_run: bool = False,
    plugin: PLUGINS = (),
) -> int:
    """Run the recipes of a published table, and compare the results with those of the paper. Repeat
    the command to resume.

    Args:
        table: Table, e.g. ahbf-table1; without it the tables are listed
        rows: Only recipes with such names, e.g. '*-resnet32-*' (default: all)
        seeds: Number of runs of each recipe, with seeds from 0 (default: as in the paper)
        epochs: Scale all schedules to this number of epochs (default: as in the recipes)
        set: Another value for a field of every recipe, as for 'fastokd sweep --set': precision=fp32
        out: Folder (default: reproduce/TABLE)
        equal_compute: For each recipe, also train the student alone with the same training compute
            (more epochs, schedule stretched), and compare
    """
    if table is None:
        print(table_of_tables().as_text())
        return EXIT_OK
    where = "" if data is None else absolute_spec(data)
    plan = plan_reproduction(
        table, where, rows, seeds, epochs, parse_values(set), out, load_plugins(plugin)
    )
    if equal_compute:
        plan = add_students_alone(plan)
    return _run(plan, dry_run, devices, per_device)


def _run(plan: Plan, dry_run: bool, devices: str, per_device: str) -> int:
    """Run a plan, or only print it, and print the results."""
    if dry_run:
        plan.check()
        states = [(job.name, job.state()) for job in plan.queue]
        for name, state in states:
            say(f"{name}: {state}")
        finished = sum(state == "finished" for _, state in states)
        say(f"{len(states)} runs in {plan.out}, {finished} finished\n")
        print(plan.results({}).as_text())
        return EXIT_OK
    outcome = plan.run(parse_devices(devices), parse_per_device(per_device), say)
    print(f"\n{plan.results(outcome.failed).as_text()}\n")
    say(f"runs, tables and numbers: {plan.out}")
    if outcome.failed:
        failed = ", ".join(outcome.failed)
        print(
            f"fastokd: {len(outcome.failed)} of {len(plan.queue)} runs failed: {failed}; the same"
            " command tries them again",
            file=sys.stderr,
        )
    if outcome.signal:
        print(f"fastokd: stopped by {outcome.signal}; the same command resumes", file=sys.stderr)
    return outcome.exit_code
