"""Comparison of runs: errors over seeds, costs of the students, and costs of training."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastokd.errors import CheckpointError
from fastokd.experiments.analysis.latency import Latencies, machine, measure_latencies
from fastokd.experiments.analysis.page import page, remarks_section
from fastokd.experiments.analysis.runs import Group, Run, remarks_of
from fastokd.experiments.analysis.tables import (
    BEST_EPOCH_NOTE,
    Table,
    csv_text,
    plain_markdown,
    spread,
)
from fastokd.export import load_student
from fastokd.models.summary import Cost, count_parameters, forward_flops
from fastokd.train.build import meta_model, training_flops_per_image
from fastokd.train.config import fields_with_role
from fastokd.train.fields import Role


class PairedTest(NamedTuple):
    """Student's paired t-test of a group's errors against another's: the differences in percentage
    points for each shared seed, the two-sided p-value, or the reason why one of both is missing.
    """

    differences: tuple[float, ...]
    p: float | None
    reason: str = ""


class NetworkCosts(NamedTuple):
    """Parameters and FLOPs of one image forward: of the student alone, and of all trained networks,
    without a frozen teacher. ``name`` is the student's network.
    """

    name: str
    student: Cost
    training: Cost


@dataclass(frozen=True)
class Row:
    """A group in a comparison.

    Attributes:
        group: its runs.
        reference: the group that its errors are tested against: the first group of the same network
            alone (``baseline``), or else the first group of the same network; None for that group.
        test: of its last errors against those of the reference.
        costs: of its networks; None if the runs have lost the record of their data.
        images_per_second: of training, the median over the epochs of all its runs.
        times_alone: the training time of an image relative to the student alone.
        latencies: of its student; empty if not measured.
    """

    group: Group
    reference: Group | None
    test: PairedTest | None
    costs: NetworkCosts | None
    images_per_second: float | None
    times_alone: float | None
    latencies: Latencies

    def errors(self, row: str = "student", best: bool = False) -> list[float]:
        """``Run.error`` of each counted run; empty if only some of them have that row."""
        return _errors(self.group.counted, row, best)


def _errors(runs: Sequence[Run], row: str, best: bool = False) -> list[float]:
    try:
        return [run.error(row, best) for run in runs]
    except KeyError:
        return []


@dataclass(frozen=True)
class Comparison:
    """Compared groups of runs, with remarks on irregular runs and failed measurements.

    ``measured_on`` is the machine of the latencies, or "".
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
        remarks = (f"- {plain_markdown(remark)}" for remark in self.remarks)
        return "\n".join([*(table.as_markdown() for table in self.tables()), *remarks, ""])

    def as_html(self) -> str:
        """A page that needs no other file."""
        tables = "".join(table.as_html() for table in self.tables())
        return page("Comparison of runs", remarks_section(self.remarks) + tables)

    def as_csv(self) -> str:
        """A line for each group, numbers not rounded; spaces separate seeds and their errors."""
        return csv_text([_csv_row(row) for row in self.rows])


def compare(groups: Sequence[Group], latency: bool = True) -> Comparison:
    """Compare groups of runs, at least one, see ``read_runs``; ``latency`` measures the latencies
    of their students on this machine.
    """
    remarks = remarks_of(groups)
    costs = [_costs(group.runs[0]) for group in groups]
    # Groups with the same student share one measurement, so noise does not tell them apart.
    latencies: dict[str, Latencies] = {}
    rows = []
    for group, cost in zip(groups, costs, strict=True):
        name = cost.name if cost else group.label
        if latency and name not in latencies:
            latencies[name] = _latencies(group.runs[0], remarks)
        alone = next(
            (
                other
                for other, each in zip(groups, costs, strict=True)
                if cost and each and each.name == cost.name
                if other.config.method == "baseline" and _speed_key(other) == _speed_key(group)
            ),
            None,
        )
        speed, speed_alone = _speed(group), _speed(alone) if alone else None
        times_alone = speed_alone / speed if speed_alone and speed else None
        same = [other for other in groups if other.network == group.network]
        first = next((other for other in same if other.config.method == "baseline"), same[0])
        reference = None if first is group else first
        test = paired_test(group, reference) if reference else None
        measured = latencies.get(name, {})
        rows.append(Row(group, reference, test, cost, speed, times_alone, measured))
    return Comparison(tuple(rows), tuple(remarks), machine() if latency else "")


def paired_test(group: Group, other: Group) -> PairedTest:
    """Test the students' last errors over the shared seeds, with ``scipy.stats.ttest_rel``.

    Only runs with the same finished and planned epochs are tested: their learning rates have
    decayed equally.
    """
    if group.progress != other.progress:
        reason = f"{group.progress} epochs are finished, of the reference {other.progress}"
        return PairedTest((), None, reason)
    errors = {run.config.seed: run.error() for run in group.counted}
    others = {run.config.seed: run.error() for run in other.counted}
    seeds = [seed for seed in errors if seed in others]
    differences = tuple(errors[seed] - others[seed] for seed in seeds)
    if len(seeds) < 2:
        return PairedTest(differences, None, "needs 2 shared seeds" if seeds else "no shared seed")
    if max(differences) - min(differences) < 1e-9:
        return PairedTest(differences, None, "all differences are equal")
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        return PairedTest(differences, None, "needs scipy: pip install 'fastokd[plots]'")
    result = ttest_rel([errors[seed] for seed in seeds], [others[seed] for seed in seeds])
    return PairedTest(differences, float(result.pvalue))


def _costs(run: Run) -> NetworkCosts | None:
    if "num_classes" not in run.data or "image_size" not in run.data:
        return None
    num_classes, size = run.data["num_classes"], run.data["image_size"]
    model = meta_model(run.config, num_classes)
    student = model.student()
    training = training_flops_per_image(run.config, num_classes, size)
    return NetworkCosts(
        model.name,
        Cost(count_parameters(student), forward_flops(student, (3, *size))),
        Cost(count_parameters(model), round(training)),
    )


def _latencies(run: Run, remarks: list[str]) -> Latencies:
    try:
        student, record = load_student(run.path)
    except CheckpointError as error:
        remarks.append(f"{run.path}: no latency of its student: {error}")
        return {}
    return measure_latencies(student, tuple(record["preprocessing"]["image_size"]))


def _speed(group: Group) -> float | None:
    """The median over the epochs; with late teaching, those of both phases, by their epochs."""
    start = group.config.teach_epoch()
    phases: list[list[float]] = [[], []]
    for run in group.runs:
        for record in run.records:
            if speed := record.get("images_per_second"):
                phases[record["epoch"] >= start].append(speed)
    medians = [(len(speeds), statistics.median(speeds)) for speeds in phases if speeds]
    if len(medians) < 2:
        return medians[0][1] if medians else None
    return sum(count for count, _ in medians) / sum(count / speed for count, speed in medians)


_SPEED_FIELDS = fields_with_role(Role.SPEED)
"""Fields that the throughput of a student alone depends on; ``streams`` is not one of them."""
_MACHINE_FACTS = ("device", "platform", "cpus", "threads", "world_size")


def _speed_key(group: Group) -> set[str]:
    """The machines, and the settings of the runs, that images per second depend on."""
    keys = set()
    for run in group.runs:
        fields = [getattr(run.config, name) for name in _SPEED_FIELDS]
        keys.add(repr([*fields, *map(run.environment.get, _MACHINE_FACTS)]))
    return keys


# --- the tables


def _error_table(comparison: Comparison) -> Table:
    rows = []
    references: dict[str, list[str]] = {}  # the groups that are tested against each
    missing: dict[tuple[str, str], list[str]] = {}  # the groups without a value, for a reason
    for row in comparison.rows:
        group, test = row.group, row.test
        difference, p, reason = "-", "-", None
        if row.reference is not None:
            references.setdefault(row.reference.label, []).append(group.label)
        if test is not None:
            if test.differences:
                difference = f"{spread(test.differences, '+')} (n={len(test.differences)})"
            if test.p is not None:
                p = f"{test.p:.3g}"
            else:
                reason = ("p" if test.differences else "difference", test.reason)
        elif any(other.reference is group for other in comparison.rows):
            difference, p = "reference", ""
        else:
            reason = ("difference", f"there are no other runs of {group.network}")
        if reason:
            missing.setdefault(reason, []).append(group.label)
        finished = group.counted[0].epochs == group.config.epochs
        rows.append(
            {
                "runs": group.label,
                "seeds": str(len(group.counted)),
                "epochs": str(group.config.epochs) if finished else group.progress,
                "student, last epoch": spread(row.errors()),
                "student, best epoch": spread(row.errors(best=True)),
                "ensemble, last epoch": spread(row.errors("ensemble")),
                "difference, last epoch": difference,
                "p": p,
            }
        )
    left_out = [
        f"seed {run.config.seed} of {row.group.label} ({run.epochs} of {run.config.epochs} epochs)"
        for row in comparison.rows
        for run in row.group.left_out
    ]
    notes = [
        BEST_EPOCH_NOTE,
        "Difference: error minus that of the reference in percentage points, mean over the n seeds"
        " that both have; negative is better. p: two-sided paired t-test of these differences.",
        *(f"The reference of {'; '.join(each)} is {name}." for name, each in references.items()),
        *(f"No {what} for {'; '.join(each)}: {why}." for (what, why), each in missing.items()),
    ]
    if left_out:
        fewer = (
            "Excluded from means, differences and p, with fewer finished epochs than other runs of"
        )
        notes.insert(0, f"{fewer} the row: {'; '.join(left_out)}.")
    return Table.of("Error in %, mean +- sample standard deviation over seeds", rows, notes)


def _cost_table(comparison: Comparison) -> Table:
    kinds = list(dict.fromkeys(kind for row in comparison.rows for kind in row.latencies))
    rows = []
    for row in comparison.rows:
        name, parameters, flops, training = "-", "-", "-", "-"
        if costs := row.costs:
            name, parameters = costs.name, f"{costs.student.parameters:,}"
            flops = f"{costs.student.flops / 1e6:,.2f}"
            training = f"{costs.training.flops / costs.student.flops:.2f}"
        cells = {
            "runs": row.group.label,
            "student": name,
            "parameters": parameters,
            "MFLOPs": flops,
        }
        for device, size in kinds:
            column = f"{_DEVICES[device]}, batch {size}, ms"
            latency = row.latencies.get((device, size))
            unknown = "no memory" if (device, size) in row.latencies else "-"
            cells[column] = f"{1000 * latency.seconds:.3g}" if latency else unknown
        cells["training FLOPs / student"] = training
        cells["training time / alone"] = _number(row.times_alone, ".2f")
        cells["training, images/s"] = _number(row.images_per_second, ",.0f")
        rows.append(cells)
    counts = [each.repeats for row in comparison.rows for each in row.latencies.values() if each]
    repeats = sorted({min(counts, default=0), max(counts, default=0)})
    notes = [
        "FLOPs of the forward pass of one image, 2 for a multiply-add; training FLOPs are those of"
        " all trained networks, without a frozen teacher, as the mean over the planned epochs.",
        f"Latency: median of {'-'.join(map(str, repeats))} forward passes of the student in"
        f" milliseconds, eager, float32, on {comparison.measured_on}.",
        "Training time: time per image, from the median images/s of the epochs, as a multiple of"
        " the same student trained alone; only if such runs are among these, on the same device"
        " with equal numbers of threads and processes and equal settings that affect speed. It"
        " includes other load on the machine.",
    ]
    if not kinds:
        del notes[1]
    return Table.of("Cost of students and training", rows, notes)


_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _run_table(comparison: Comparison) -> Table:
    runs = [(row.group.label, run) for row in comparison.rows for run in row.group.runs]
    rows = [
        {
            "run": str(run.path),
            "runs": label,
            "seed": str(run.config.seed),
            "epochs": f"{run.epochs} of {run.config.epochs}",
            "student, last epoch": f"{run.error():.2f}",
            "student, best epoch": f"{run.error(best=True):.2f} (epoch {run.best['epoch'] + 1})",
            "ensemble, last epoch": spread(_errors([run], "ensemble")),
            "seconds of training": f"{run.seconds:,.1f}",
            "device": str(run.environment.get("device", "-")),
            "torch": str(run.environment.get("torch", "-")),
            "commit": str(run.environment.get("commit") or run.environment.get("fastokd", "-")),
        }
        for label, run in runs
    ]
    return Table.of("Single runs, errors in %", rows)


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
    errors = {
        "last": row.errors(),
        "best": row.errors(best=True),
        "ensemble_last": row.errors("ensemble"),
    }
    for name, values in errors.items():
        cells[f"{name}_error_mean"] = statistics.mean(values) if values else ""
        cells[f"{name}_error_std"] = statistics.stdev(values) if len(values) > 1 else ""
        cells[f"{name}_error_by_seed"] = " ".join(map(repr, values))
    if test is not None and row.reference is not None:
        differences = test.differences
        cells["reference"] = row.reference.label
        cells["paired_seeds"] = len(differences)
        cells["p"] = "" if test.p is None else test.p
        cells["last_error_difference"] = statistics.mean(differences) if differences else ""
    if costs is not None:
        cells["student"] = costs.name
        cells["parameters"] = costs.student.parameters
        cells["flops"] = costs.student.flops
        cells["training_flops"] = costs.training.flops
    for (device, size), latency in row.latencies.items():
        cells[f"latency_{device}_batch{size}_seconds"] = latency.seconds if latency else ""
    cells["images_per_second"] = row.images_per_second or ""
    cells["training_time_times_alone"] = row.times_alone or ""
    return cells
