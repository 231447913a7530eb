"""The student alone with as much training compute as a taught one: its rows, and their results."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fastokd.errors import ConfigError
from fastokd.experiments.analysis.compare import difference_cells, last_errors, paired_test
from fastokd.experiments.analysis.runs import config_differences, value_in_words
from fastokd.experiments.analysis.tables import Table, spread
from fastokd.experiments.sweep.plan import Plan, Record, plan_runs
from fastokd.experiments.sweep.results import Measured
from fastokd.train.compute import equal_compute_student, is_alone, student_alone

P = TypeVar("P", bound=Plan)


def add_students_alone(plan: P) -> P:
    """The plan with the rows of the student alone with equal training compute, see ``Plan.alone``.

    The name of a row has its network, its epochs, and the settings in which the students alone of
    the plan differ, so it does not change if a grid gets further values.

    Raises:
        ConfigError: no row teaches.
        ConfigError, DataError, CheckpointError: the data or a teacher cannot be opened.
    """
    students = {name: student_alone(config) for name, config in plan.configs.items()}
    configs = {name: each for name, each in students.items() if is_alone(plan.configs[name])}
    taught = [name for name, jobs in plan.jobs.items() if jobs and name not in configs]
    if not taught:
        raise ConfigError(
            "--equal-compute: every run is of the student alone; omit the option, or add a method"
            " that teaches, such as ahbf"
        )
    fields = config_differences(list(students.values())).keys() - {"model", "epochs"}
    jobs, rows, alone = dict(plan.jobs), dict.fromkeys(plan.rows), {}
    for name in taught:
        dataset = plan.dataset(plan.configs[name])
        size = dataset.image_size
        config = equal_compute_student(plan.configs[name], len(dataset.classes), size)
        row = next((row for row, other in configs.items() if other == config), None)
        if row is None:
            settings = (
                f"{field}-{value_in_words(getattr(students[name], field))}"
                for field in sorted(fields)
            )
            text = "-".join([config.model, "alone", f"{config.epochs}-epochs", *settings])
            row = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)[:150]
            while row in configs:  # schedules of other lengths, stretched to the same one
                row += "-2"
        configs[row], alone[name] = config, row
        seeds = {job.config.seed for job in (*jobs[name], *jobs.get(row, ()))}
        jobs[row] = plan_runs(plan.out, row, plan.configs.get(row, config), sorted(seeds))
        if name in plan.rows:
            rows[row] = None
    return replace(plan, jobs=jobs, rows=tuple(rows), alone=alone)


def equal_compute_table(
    plan: Plan, measured: Mapping[str, Measured], labels: Mapping[str, str]
) -> list[Table]:
    """A table with a line for each taught row and its student alone; none without such rows.
    ``labels`` are of the taught rows, by name.
    """
    rows = []
    for name, row in plan.alone.items():
        taught, alone = measured[name], measured[row]
        test = paired_test(last_errors(taught.runs), last_errors(alone.runs))
        difference, p = difference_cells(test, False)
        rows.append(
            {
                "taught": labels[name],
                "epochs": str(plan.configs[name].epochs),
                "last epoch": spread(taught.errors()) if taught.runs else taught.progress(),
                "epochs alone": str(plan.jobs[row][0].config.epochs),
                "alone, last epoch": spread(alone.errors()) if alone.runs else alone.progress(),
                "difference": difference,
                "p": p,
            }
        )
    if not rows:
        return []
    notes = [
        "Alone: the same network, method baseline, with as much training compute: the epochs are"
        " multiplied by the ratio of the training FLOPs, and the schedule is stretched."
        " Difference: error minus that of the student alone, mean over the n seeds that both have;"
        " negative is better. p: two-sided paired t-test."
    ]
    return [Table.of("Student alone with equal training compute, errors in %", rows, notes)]


def equal_compute_record(plan: Plan, measured: Mapping[str, Measured]) -> Record:
    """The comparison of each taught row with its student alone, as JSON has it."""
    record: dict[str, dict[str, Any]] = {}
    for name, row in plan.alone.items():
        test = paired_test(last_errors(measured[name].runs), last_errors(measured[row].runs))
        record[name] = {
            "alone": row,
            "epochs": plan.jobs[row][0].config.epochs,
            **measured[row].as_json(),
            "differences": list(test.differences),
            "p": test.p,
        }
    return record
