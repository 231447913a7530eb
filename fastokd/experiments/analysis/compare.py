"""Runs beside each other: errors over seeds, what the students cost, and what it cost to train
them.
"""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastokd.errors import CheckpointError
from fastokd.experiments.analysis.latency import (
    BATCH_SIZES,
    Latency,
    devices,
    machine,
    measure_latency,
)
from fastokd.experiments.analysis.page import page, remarks_section
from fastokd.experiments.analysis.runs import Group, Record, Run, remarks_of
from fastokd.experiments.analysis.tables import Table, plain_markdown, spread
from fastokd.export import load_student
from fastokd.models import create_model
from fastokd.models.summary import Cost, count_parameters, forward_flops
from fastokd.train.build import model_layout
from fastokd.train.config import fields_with_role
from fastokd.train.fields import Role

Latencies = Mapping[tuple[str, int], Latency | None]
"""For each kind of device and batch size; None where the batch does not fit."""


@dataclass(frozen=True)
class PairedTest:
    """Student's paired t-test of a group's errors against another's.

    Attributes:
        differences: this group's error less the other's in percentage points, for each seed that
            both have.
        p: the two-sided p-value, or None.
        reason: why there is no p-value, or no difference.
    """

    differences: tuple[float, ...]
    p: float | None
    reason: str = ""


@dataclass(frozen=True)
class NetworkCosts:
    """What networks cost, in parameters and in FLOPs of one image forward.

    Attributes:
        name: the student's network.
        student: the student alone.
        training: all that is trained; a frozen teacher is not in it.
    """

    name: str
    student: Cost
    training: Cost


@dataclass(frozen=True)
class Row:
    """What a comparison says of a group.

    Attributes:
        group: its runs.
        reference: what its errors are tested against: the first group of the same network alone
            (``baseline``), or else the first group of the same network; None where it is this group
            itself.
        test: of its last errors against those of the reference; None without one.
        costs: of its networks; None where the runs have lost what data they are for.
        images_per_second: of training, the median over the epochs of all its runs; None where none
            is recorded.
        times_alone: how many times as long an image takes in training as with the student alone;
            None where no run says it.
        latencies: of its student; empty where they were not measured.
    """

    group: Group
    reference: Group | None
    test: PairedTest | None
    costs: NetworkCosts | None
    images_per_second: float | None
    times_alone: float | None
    latencies: Latencies

    def last(self, row: str | None = None) -> list[float]:
        """Errors in % in the last epoch, one for each run that is counted: the student's, or those
        of another row, if all have it.
        """
        return _errors([(run, run.last) for run in self.group.counted], row)

    def best(self) -> list[float]:
        """Errors in % of the student in its best epoch, one for each run that is counted."""
        return _errors([(run, run.best) for run in self.group.counted])


@dataclass(frozen=True)
class Comparison:
    """Groups of runs beside each other.

    Attributes:
        rows: one for each group.
        remarks: what is not as in finished and whole runs, and what could not be measured.
        measured_on: the machine of the latencies; empty where they were not measured.
    """

    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    measured_on: str

    def tables(self) -> list[Table]:
        """Errors, costs, and the single runs."""
        return [_error_table(self), _cost_table(self), _run_table(self)]

    def as_text(self) -> str:
        """For a terminal."""
        return "\n\n".join([*(table.as_text() for table in self.tables()), *self.remarks]) + "\n"

    def as_markdown(self) -> str:
        """Markdown, with a heading for each table."""
        return (
            "\n".join(
                [
                    *(table.as_markdown() for table in self.tables()),
                    *(f"- {plain_markdown(remark)}" for remark in self.remarks),
                ]
            )
            + "\n"
        )

    def as_html(self) -> str:
        """A page that needs no other file."""
        return page(
            "Comparison of runs",
            remarks_section(self.remarks) + "".join(table.as_html() for table in self.tables()),
        )

    def as_csv(self) -> str:
        """A line for each group, with numbers that are not rounded; in ``seeds`` and in errors by
        seed, spaces separate the seeds.
        """
        rows = [_csv_row(row) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(
            text,
            list(dict.fromkeys(name for row in rows for name in row)),
            restval="",
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def compare(groups: Sequence[Group], latency: bool = True) -> Comparison:
    """Compare groups of runs, at least one, see ``read_runs``.

    Args:
        groups: the groups.
        latency: measure the students' latencies on this machine.

    Raises:
        ConfigError, MissingExtra: a network cannot be built here.
    """
    said = remarks_of(groups)
    costs = [_costs(group.runs[0]) for group in groups]
    measured: dict[
        str, Latencies
    ] = {}  # groups with the same student share one measurement, so noise does not tell them apart
    rows = []
    for group, own in zip(groups, costs, strict=True):
        name = own.name if own else group.label
        if latency and name not in measured:
            measured[name] = _latencies(group.runs[0], said)
        alone = [
            other
            for other, others in zip(groups, costs, strict=True)
            if own and others and others.name == own.name and _goes_as(other) == _goes_as(group)
        ]
        reference = _reference(group, groups)
        rows.append(
            Row(
                group,
                reference,
                None if reference is None else paired_test(group, reference),
                own,
                _speed(group),
                _times_alone(group, alone),
                measured.get(name, {}),
            )
        )
    return Comparison(tuple(rows), tuple(said), machine() if latency else "")


def paired_test(group: Group, other: Group) -> PairedTest:
    """Test the students' last errors over the seeds that both groups have, with scipy
    (``scipy.stats.ttest_rel``).

    Only runs after as many of as many planned epochs are tested: the learning rate has come equally
    far down.
    """
    if group.progress != other.progress:
        return PairedTest(
            (), None, f"{group.progress} epochs are finished, of the reference {other.progress}"
        )
    errors = [
        {run.config.seed: _errors([(run, run.last)])[0] for run in each.counted}
        for each in (group, other)
    ]
    seeds = [seed for seed in errors[0] if seed in errors[1]]
    mine, theirs = ([column[seed] for seed in seeds] for column in errors)
    differences = tuple(one - two for one, two in zip(mine, theirs, strict=True))
    if len(seeds) < 2:
        return PairedTest(differences, None, "needs 2 shared seeds" if seeds else "no shared seed")
    if max(differences) - min(differences) < 1e-9:
        return PairedTest(differences, None, "all differences are equal")
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        return PairedTest(differences, None, "needs scipy: pip install 'fastokd[plots]'")
    return PairedTest(differences, float(ttest_rel(mine, theirs).pvalue))


def _reference(group: Group, groups: Sequence[Group]) -> Group | None:
    alike = [other for other in groups if other.network == group.network]
    found = next((other for other in alike if other.config.method == "baseline"), alike[0])
    return None if found is group else found


def _errors(records: Sequence[tuple[Run, Record]], row: str | None = None) -> list[float]:
    """Errors in %; none where only some of the records have that row."""
    accuracies = [record["eval"].get(row or run.student) for run, record in records]
    return [] if None in accuracies else [100 * (1 - value) for value in accuracies]


def _costs(run: Run) -> NetworkCosts | None:
    if "num_classes" not in run.data or "image_size" not in run.data:
        return None
    with torch.device("meta"):
        model = create_model(
            run.config.model, num_classes=run.data["num_classes"], **model_layout(run.config)
        )
    size = (3, *run.data["image_size"])
    student, training = (
        Cost(count_parameters(network), forward_flops(network, size))
        for network in (model.student(), model)
    )
    return NetworkCosts(model.name, student, training)


def _latencies(run: Run, said: list[str]) -> Latencies:
    try:
        student, record = load_student(run.path)
    except CheckpointError as error:
        said.append(f"{run.path}: no latency of its student: {error}")
        return {}
    size = tuple(record["preprocessing"]["image_size"])
    return {
        (device.type, batch_size): measure_latency(student, size, batch_size, device)
        for device in devices()
        for batch_size in BATCH_SIZES
    }


def _speed(group: Group) -> float | None:
    found = [
        record["images_per_second"]
        for run in group.runs
        for record in run.records
        if record.get("images_per_second")
    ]
    return statistics.median(found) if found else None


_SPEED_FIELDS = fields_with_role(Role.SPEED)
"""Fields that the throughput of a student alone depends on. Options that run several branches at
once, such as ``streams``, are not among them.
"""
_MACHINE_FACTS = ("device", "platform", "cpus", "threads", "world_size")


def _goes_as(group: Group) -> set[str]:
    """What images per second depend on beside the method: the machines, and how the runs used
    them.
    """
    return {
        repr(
            [
                *(getattr(run.config, name) for name in _SPEED_FIELDS),
                *map(run.environment.get, _MACHINE_FACTS),
            ]
        )
        for run in group.runs
    }


def _times_alone(group: Group, comparable: Sequence[Group]) -> float | None:
    alone = next((other for other in comparable if other.config.method == "baseline"), None)
    speeds = (_speed(alone), _speed(group)) if alone else (None, None)
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


# --- the tables
# --------------------------------------------------------------------------------------------------


def _error_table(found: Comparison) -> Table:
    rows = []
    references: dict[str, list[str]] = {}  # of which groups
    untested: dict[
        tuple[str, str], list[str]
    ] = {}  # for what there is not and why, of which groups
    for row in found.rows:
        group, test = row.group, row.test
        difference, p = "-", "-"
        if row.reference is not None:
            references.setdefault(row.reference.label, []).append(group.label)
        if test is None and any(other.reference is group for other in found.rows):
            difference, p = "reference", ""
        elif test is None:
            untested.setdefault(
                ("difference", f"there are no other runs of {group.network}"), []
            ).append(group.label)
        else:
            if test.differences:
                difference = f"{spread(test.differences, '+')} (n={len(test.differences)})"
            if test.p is not None:
                p = f"{test.p:.3g}"
            else:
                untested.setdefault(
                    ("p" if test.differences else "difference", test.reason), []
                ).append(group.label)
        rows.append(
            (
                group.label,
                str(len(group.counted)),
                _epochs(group),
                spread(row.last()),
                spread(row.best()),
                spread(row.last("ensemble")),
                difference,
                p,
            )
        )
    left_out = [
        f"seed {run.config.seed} of {row.group.label} ({run.epochs} of {run.config.epochs} epochs)"
        for row in found.rows
        for run in row.group.left_out
    ]
    return Table(
        "Error in %, mean +- sample standard deviation over seeds",
        (
            "runs",
            "seeds",
            "epochs",
            "student, last epoch",
            "student, best epoch",
            "ensemble, last epoch",
            "difference, last epoch",
            "p",
        ),
        tuple(rows),
        (
            *(
                [
                    "Not in means, differences and p, having fewer finished epochs than others of"
                    f" the row: {'; '.join(left_out)}."
                ]
                if left_out
                else []
            ),
            (
                "The best epoch is chosen on the images it is measured on, and so it is optimistic"
                " if these are the test images; the last is not chosen."
            ),
            (
                "Difference: percentage points, less is better, seed by seed against the reference,"
                " over the n seeds that both have. p: two-sided paired t-test of these differences."
            ),
            *(
                f"The reference of {'; '.join(labels)} is {reference}."
                for reference, labels in references.items()
            ),
            *(
                f"No {what} for {'; '.join(labels)}: {reason}."
                for (what, reason), labels in untested.items()
            ),
        ),
    )


def _epochs(group: Group) -> str:
    return (
        str(group.config.epochs)
        if group.counted[0].epochs == group.config.epochs
        else group.progress
    )


def _cost_table(found: Comparison) -> Table:
    kinds = list(dict.fromkeys(kind for row in found.rows for kind in row.latencies))
    rows = []
    for row in found.rows:
        costs = (
            ["-"] * 3
            if row.costs is None
            else [
                f"{row.costs.student.parameters:,}",
                f"{row.costs.student.flops / 1e6:,.2f}",
                f"{row.costs.training.flops / row.costs.student.flops:.2f}",
            ]
        )
        rows.append(
            (
                row.group.label,
                row.costs.name if row.costs else "-",
                *costs[:2],
                *(_milliseconds(row.latencies, kind) for kind in kinds),
                costs[2],
                "-" if row.times_alone is None else f"{row.times_alone:.2f}",
                "-" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
            )
        )
    latency = (
        [
            f"Latency: median of {_repeats(found.rows)} forward passes of the student in"
            f" milliseconds, eager, float32, on {found.measured_on}."
        ]
        if kinds
        else []
    )
    return Table(
        "What students and training cost",
        (
            "runs",
            "student",
            "parameters",
            "MFLOPs",
            *(f"{_DEVICES[device]}, batch {size}, ms" for device, size in kinds),
            "training FLOPs / student",
            "training time / alone",
            "training, images/s",
        ),
        tuple(rows),
        (
            (
                "FLOPs of one image forward, 2 for a multiply-add; training FLOPs are those of all"
                " that is trained, a frozen teacher not among them."
            ),
            *latency,
            (
                "Training time: of an image, by the median images/s of the epochs, as a multiple of"
                " the same student trained alone; only where such runs are among these, on the same"
                " device with as many threads and processes, configured alike in what speed depends"
                " on. What else the machine did meanwhile is in it."
            ),
        ),
    )


_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def _milliseconds(latencies: Latencies, kind: tuple[str, int]) -> str:
    if kind not in latencies:
        return "-"
    found = latencies[kind]
    return "no memory" if found is None else f"{1000 * found.seconds:.3g}"


def _repeats(rows: Sequence[Row]) -> str:
    counts = [found.repeats for row in rows for found in row.latencies.values() if found]
    return "-".join(map(str, dict.fromkeys((min(counts, default=0), max(counts, default=0)))))


def _run_table(found: Comparison) -> Table:
    rows = []
    for row in found.rows:
        for run in row.group.runs:
            last, best = (
                100 * (1 - record["eval"][run.student]) for record in (run.last, run.best)
            )
            ensemble = _errors([(run, run.last)], "ensemble")
            known = run.environment.get
            rows.append(
                (
                    str(run.path),
                    row.group.label,
                    str(run.config.seed),
                    f"{run.epochs} of {run.config.epochs}",
                    f"{last:.2f}",
                    f"{best:.2f} (epoch {run.best['epoch'] + 1})",
                    f"{ensemble[0]:.2f}" if ensemble else "-",
                    f"{run.seconds:,.1f}",
                    str(known("device", "-")),
                    str(known("torch", "-")),
                    str(known("commit") or known("fastokd", "-")),
                )
            )
    return Table(
        "Single runs, errors in %",
        (
            "run",
            "runs",
            "seed",
            "epochs",
            "student, last epoch",
            "student, best epoch",
            "ensemble, last epoch",
            "seconds of training",
            "device",
            "torch",
            "commit",
        ),
        tuple(rows),
    )


def _csv_row(row: Row) -> dict[str, Any]:
    runs, test, costs = row.group.counted, row.test, row.costs
    cells: dict[str, Any] = {
        "runs": row.group.label,
        "num_seeds": len(runs),
        "seeds": " ".join(str(run.config.seed) for run in runs),
        "epochs": row.group.config.epochs,
        "finished_epochs": runs[0].epochs,
        "left_out_seeds": " ".join(str(run.config.seed) for run in row.group.left_out),
    }
    for name, values in (
        ("last_error", row.last()),
        ("best_error", row.best()),
        ("ensemble_last_error", row.last("ensemble")),
    ):
        cells |= {
            f"{name}_mean": statistics.mean(values) if values else "",
            f"{name}_std": statistics.stdev(values) if len(values) > 1 else "",
            f"{name}_by_seed": " ".join(map(repr, values)),
        }
    if test is not None and row.reference is not None:
        cells |= {
            "reference": row.reference.label,
            "paired_seeds": len(test.differences),
            "p": "" if test.p is None else test.p,
            "last_error_difference": statistics.mean(test.differences) if test.differences else "",
        }
    if costs is not None:
        cells |= {
            "student": costs.name,
            "parameters": costs.student.parameters,
            "flops": costs.student.flops,
            "training_flops": costs.training.flops,
        }
    cells |= {
        f"latency_{device}_batch{size}_seconds": found.seconds if found else ""
        for (device, size), found in row.latencies.items()
    }
    return cells | {
        "images_per_second": row.images_per_second or "",
        "training_time_times_alone": row.times_alone or "",
    }
