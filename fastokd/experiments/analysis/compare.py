"""Comparison of runs: errors over seeds, costs of the students, and costs of training."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastokd.errors import CheckpointError, ConfigError, MissingExtra
from fastokd.experiments.analysis.latency import Latencies, machine, measure_latencies
from fastokd.experiments.analysis.metric_table import metric_cells, metric_tables
from fastokd.experiments.analysis.page import page, remarks_section
from fastokd.experiments.analysis.runs import SAME_RUN, Group, Run, remarks_of
from fastokd.experiments.analysis.tables import (
    BEST_EPOCH_NOTE,
    Table,
    csv_text,
    plain_markdown,
    spread,
)
from fastokd.export import load_student
from fastokd.train.compute import (
    NetworkCosts,
    equal_compute_epochs,
    is_alone,
    network_costs,
    scaled,
    student_alone,
    total_training_flops,
    training_flops,
)
from fastokd.train.config import differences, fields_with_role
from fastokd.train.fields import Role


class PairedTest(NamedTuple):
    """Student's paired t-test of a group's errors against another's: the differences in percentage
    points for each shared seed, the two-sided p-value, and the reason if one of them is missing.
    """

    differences: tuple[float, ...]
    p: float | None
    reason: str = ""


class Reference(NamedTuple):
    """The group that a group's errors are tested against, and the test; both None if there is no
    such group.
    """

    group: Group | None = None
    test: PairedTest | None = None


class Compute(NamedTuple):
    """Training compute of a group.

    Attributes:
        flops: ``training_flops`` of an image.
        total: FLOPs of all planned epochs, 3 times those of the forward passes; None if the number
            of training images is not recorded.
        epochs_alone: ``equal_compute_epochs``.
    """

    flops: float
    total: float | None
    epochs_alone: int


EQUAL_COMPUTE = 0.05
"""The largest relative difference of training compute that counts as equal; also allowed is half an
epoch, since runs have whole epochs.
"""


@dataclass(frozen=True)
class Row:
    """A group in a comparison.

    Attributes:
        group: its runs.
        equal_epochs: the reference with as many epochs: the same network alone (``baseline``), or
            else the first group of the same network, which has no reference.
        equal_compute: the reference with as much training compute: the same network alone with
            another number of epochs. Groups of a network alone have none.
        costs: of its networks; None if the runs have lost the record of their data.
        compute: of its training; None if that is lost, or its teacher cannot be read.
        images_per_second: of training, the median over the epochs of all its runs.
        times_alone: the training time of an image relative to the student alone.
        latencies: of its student; empty if not measured.
    """

    group: Group
    equal_epochs: Reference
    equal_compute: Reference
    costs: NetworkCosts | None
    compute: Compute | None
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
        """Errors, their differences, other metrics, costs of students and of training, and the
        single runs.
        """
        return [
            _error_table(self),
            _difference_table(self),
            *metric_tables([row.group for row in self.rows]),
            _student_table(self),
            _training_table(self),
            _run_table(self),
        ]

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
    computes = [_compute(group, remarks) for group in groups]
    # Groups with the same student share one measurement, so noise does not tell them apart.
    latencies: dict[str, Latencies] = {}
    rows = []
    for group, cost, compute in zip(groups, costs, computes, strict=True):
        name = cost.name if cost else group.label
        if latency and name not in latencies:
            latencies[name] = _latencies(group.runs[0], remarks)
        alone = next(
            (
                other
                for other, each in zip(groups, costs, strict=True)
                if cost and each and each.name == cost.name
                if is_alone(other.config) and _speed_key(other) == _speed_key(group)
            ),
            None,
        )
        speed, speed_alone = _speed(group), _speed(alone) if alone else None
        times_alone = speed_alone / speed if speed_alone and speed else None
        row = Row(
            group,
            _equal_epochs(group, groups),
            _equal_compute(group, compute, groups, computes),
            cost,
            compute,
            speed,
            times_alone,
            latencies.get(name, {}),
        )
        rows.append(row)
    return Comparison(tuple(rows), tuple(remarks), machine() if latency else "")


def _equal_epochs(group: Group, groups: Sequence[Group]) -> Reference:
    same = [other for other in groups if other.network == group.network]
    alone = [other for other in same if is_alone(other.config)] or same[:1]
    equal = [other for other in alone if other.config.epochs == group.config.epochs]
    if not equal:
        run = f"run of {alone[0].label.partition(',')[0]} with {group.config.epochs} epochs"
        return Reference(None, PairedTest((), None, f"there is no {run}"))
    taught = not is_alone(group.config)
    other = (
        min(equal, key=lambda each: len(_setting_differences(group, each))) if taught else equal[0]
    )
    if other is group:
        return Reference()
    if group.progress != other.progress:
        reason = f"{group.progress} epochs are finished, of the reference {other.progress}"
        return Reference(other, PairedTest((), None, reason))
    return Reference(other, _test(group, other))


def _equal_compute(
    group: Group,
    compute: Compute | None,
    groups: Sequence[Group],
    computes: Sequence[Compute | None],
) -> Reference:
    if is_alone(group.config) or compute is None or compute.total is None:
        return Reference()
    tolerance = max(EQUAL_COMPUTE, 0.5 / (compute.epochs_alone - 0.5))
    candidates = []
    for other, each in zip(groups, computes, strict=True):
        if is_alone(other.config) and other.network == group.network and each and each.total:
            distance = abs(each.total / compute.total - 1)
            if distance <= tolerance:
                different = len(_setting_differences(group, other))
                candidates.append((different, distance, other))
    if not candidates:
        return Reference()
    _, _, other = min(candidates, key=lambda candidate: candidate[:2])
    for tested in (group, other):
        if tested.counted[0].epochs < tested.config.epochs:
            reason = f"{tested.progress} epochs of {tested.label} are finished"
            return Reference(other, PairedTest((), None, reason))
    return Reference(other, _test(group, other))


def _setting_differences(group: Group, alone: Group) -> list[str]:
    """The settings, other than the method's and the epochs, that differ, each as "name: value,
    value".
    """
    repeat = {name: getattr(group.config, name) for name in SAME_RUN}
    wanted = scaled(student_alone(group.config), alone.config.epochs)
    return differences(wanted, replace(student_alone(alone.config), **repeat))


def _test(group: Group, other: Group) -> PairedTest:
    return paired_test(last_errors(group.counted), last_errors(other.counted))


def last_errors(runs: Sequence[Run]) -> dict[int, float]:
    """The students' errors in % in the last epoch, by seed."""
    return {run.config.seed: run.error() for run in runs}


def paired_test(errors: Mapping[int, float], others: Mapping[int, float]) -> PairedTest:
    """Test errors by seed over the shared seeds, with ``scipy.stats.ttest_rel``."""
    seeds = [seed for seed in errors if seed in others]
    differences = tuple(errors[seed] - others[seed] for seed in seeds)
    if len(seeds) < 2:
        return PairedTest(differences, None, "needs 2 shared seeds" if seeds else "no shared seed")
    if max(differences) - min(differences) < 1e-9:
        return PairedTest(differences, None, "all differences are equal")
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        return PairedTest(differences, None, "needs scipy: pip install -e '.[plots]'")
    result = ttest_rel([errors[seed] for seed in seeds], [others[seed] for seed in seeds])
    return PairedTest(differences, float(result.pvalue))


def _costs(run: Run) -> NetworkCosts | None:
    if "num_classes" not in run.data or "image_size" not in run.data:
        return None
    return network_costs(run.config, run.data["num_classes"], run.data["image_size"])


def _compute(group: Group, remarks: list[str]) -> Compute | None:
    config, data = group.config, group.runs[0].data
    if "num_classes" not in data or "image_size" not in data:
        return None
    images = (data.get("num_images") or {}).get("train")
    try:
        flops = training_flops(config, data["num_classes"], data["image_size"])
        epochs = equal_compute_epochs(config, data["num_classes"], data["image_size"])
    except (CheckpointError, ConfigError, MissingExtra) as error:
        remarks.append(f"{group.label}: its training compute is not known: {error}")
        return None
    return Compute(flops, total_training_flops(config, flops, images) if images else None, epochs)


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
_MACHINE_FACTS = ("device", "precision", "platform", "cpus", "threads", "world_size")


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
    for row in comparison.rows:
        group = row.group
        finished = group.counted[0].epochs == group.config.epochs
        rows.append(
            {
                "runs": group.label,
                "seeds": str(len(group.counted)),
                "epochs": str(group.config.epochs) if finished else group.progress,
                "student, last epoch": spread(row.errors()),
                "student, best epoch": spread(row.errors(best=True)),
                "ensemble, last epoch": spread(row.errors("ensemble")),
            }
        )
    left_out = [
        f"seed {run.config.seed} of {row.group.label} ({run.epochs} of {run.config.epochs} epochs)"
        for row in comparison.rows
        for run in row.group.left_out
    ]
    notes = [BEST_EPOCH_NOTE]
    if left_out:
        fewer = (
            "Excluded from means, differences and p, with fewer finished epochs than other runs of"
        )
        notes.insert(0, f"{fewer} the row: {'; '.join(left_out)}.")
    return Table.of("Error in %, mean +- sample standard deviation over seeds", rows, notes)


def _difference_table(comparison: Comparison) -> Table:
    rows = []
    names: dict[tuple[str, str], list[str]] = {}  # the groups that are tested against each
    missing: dict[str, list[str]] = {}  # the groups without a value, for a reason
    mixed: list[str] = []
    for row in comparison.rows:
        cells = [row.group.label]
        for kind in ("equal_epochs", "equal_compute"):
            reference: Reference = getattr(row, kind)
            used = any(getattr(other, kind).group is row.group for other in comparison.rows)
            cells += difference_cells(reference.test, used)
            where = kind.replace("_", " ")
            if reference.group is not None:
                names.setdefault((where, reference.group.label), []).append(row.group.label)
                if different := _setting_differences(row.group, reference.group):
                    pair = f"{row.group.label} and {reference.group.label}"
                    mixed.append(f"Other settings of {pair} differ, too: {'; '.join(different)}.")
            if reference.test is not None and reference.test.p is None:
                value = "p" if reference.test.differences else "difference"
                reason = f"No {value} at {where} for {{}}: {reference.test.reason}."
                missing.setdefault(reason, []).append(row.group.label)
        if reason := _missing_reference(row, comparison.rows):
            missing.setdefault(reason, []).append(row.group.label)
        rows.append((*cells, str(row.compute.epochs_alone) if row.compute else "-"))
    notes = [
        "Difference: error minus that of the reference in percentage points, mean over the n seeds"
        " that both have; negative is better. p: two-sided paired t-test of these differences.",
        "Equal compute: against the same network alone with as much training compute, within"
        f" {EQUAL_COMPUTE:.0%} or half an epoch. Epochs alone: the epochs of the same network alone"
        " that cost as much.",
        *(
            f"The reference at {where} of {'; '.join(each)} is {name}."
            for (where, name), each in names.items()
        ),
        *dict.fromkeys(mixed),
        *(reason.format("; ".join(each)) for reason, each in missing.items()),
    ]
    kinds = ("equal epochs", "equal compute")
    head = [name for kind in kinds for name in (f"difference, {kind}", f"p, {kind}")]
    title = "Differences of the students' last errors from the same network alone"
    return Table(title, ("runs", *head, "epochs alone"), tuple(rows), tuple(notes))


def difference_cells(test: PairedTest | None, is_reference: bool) -> tuple[str, str]:
    """The difference and p of a test, as text."""
    if test is None:
        return ("reference", "") if is_reference else ("-", "-")
    difference = f"{spread(test.differences, '+')} (n={len(test.differences)})"
    return difference if test.differences else "-", "-" if test.p is None else f"{test.p:.3g}"


def _missing_reference(row: Row, rows: Sequence[Row]) -> str:
    """The reason why a group has no reference at equal epochs or at equal compute, with {} for its
    name; empty if it has both or needs none.
    """
    network = row.group.network
    if all(other.group is row.group or other.group.network != network for other in rows):
        return f"No difference for {{}}: there are no other runs of {network}."
    if is_alone(row.group.config) or row.equal_compute.group is not None:
        return ""
    if row.compute is None or row.compute.total is None:
        return "No difference at equal compute for {}: the training compute is not known."
    return (
        f"No difference at equal compute for {{}}: there is no run of {network} alone with as much"
        " training compute (about as many epochs as 'epochs alone'); add one with 'fastokd sweep'"
        " or 'fastokd reproduce' and --equal-compute."
    )


def _milliseconds(seconds: float) -> str:
    """Three significant digits without an exponent."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _student_table(comparison: Comparison) -> Table:
    kinds = list(dict.fromkeys(kind for row in comparison.rows for kind in row.latencies))
    rows = []
    for row in comparison.rows:
        name, parameters, flops = "-", "-", "-"
        if costs := row.costs:
            name, parameters = costs.name, f"{costs.student.parameters:,}"
            flops = f"{costs.student.flops / 1e6:,.2f}"
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
            cells[column] = _milliseconds(latency.seconds) if latency else unknown
        rows.append(cells)
    counts = [each.repeats for row in comparison.rows for each in row.latencies.values() if each]
    repeats = sorted({min(counts, default=0), max(counts, default=0)})
    notes = [
        "FLOPs of the forward pass of one image, 2 for a multiply-add.",
        f"Latency: median of {'-'.join(map(str, repeats))} forward passes of the student in"
        f" milliseconds, eager, float32, on {comparison.measured_on}.",
    ]
    return Table.of("Cost of students", rows, notes if kinds else notes[:1])


def _training_table(comparison: Comparison) -> Table:
    totals = [row.compute.total for row in comparison.rows if row.compute and row.compute.total]
    unit, size = next(
        ((name, size) for name, size in _UNITS.items() if max(totals, default=0) >= size),
        ("GFLOPs", 1e9),
    )
    rows = []
    for row in comparison.rows:
        ratio, total = "-", "-"
        if row.costs and row.compute:
            ratio = f"{row.compute.flops / row.costs.student.flops:.2f}"
            total = f"{row.compute.total / size:,.2f}" if row.compute.total else "-"
        rows.append(
            {
                "runs": row.group.label,
                "training FLOPs / student": ratio,
                f"training compute, {unit}": total,
                "training time / alone": _number(row.times_alone, ".2f"),
                "training, images/s": _number(row.images_per_second, ",.0f"),
            }
        )
    notes = [
        "Training FLOPs: forward pass of one image through all trained networks plus a third of a"
        " frozen teacher's, averaged over the epochs. Training compute: 3 times that (forward and"
        " backward), for all images in full batches and all planned epochs.",
        "Training time: time per image, from the median images/s of the epochs, as a multiple of"
        " the same student trained alone; only if such runs are among these, on the same device"
        " with equal numbers of threads and processes and equal settings that affect speed. It"
        " includes other load on the machine.",
    ]
    return Table.of("Cost of training", rows, notes)


_UNITS = {"EFLOPs": 1e18, "PFLOPs": 1e15, "TFLOPs": 1e12}
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
    runs, costs = row.group.counted, row.costs
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
    cells |= metric_cells(row.group)
    for prefix, reference in (("", row.equal_epochs), ("equal_compute_", row.equal_compute)):
        if reference.test is not None:
            differences = reference.test.differences
            cells[f"{prefix}reference"] = reference.group.label if reference.group else ""
            cells[f"{prefix}paired_seeds"] = len(differences)
            cells[f"{prefix}p"] = "" if reference.test.p is None else reference.test.p
            mean = statistics.mean(differences) if differences else ""
            cells[f"{prefix}last_error_difference"] = mean
    if costs is not None:
        cells["student"] = costs.name
        cells["parameters"] = costs.student.parameters
        cells["flops"] = costs.student.flops
    if row.compute is not None:
        cells["training_flops"] = round(row.compute.flops)
        cells["training_compute_flops"] = round(row.compute.total) if row.compute.total else ""
        cells["epochs_alone_at_equal_compute"] = row.compute.epochs_alone
    for (device, size), latency in row.latencies.items():
        cells[f"latency_{device}_batch{size}_seconds"] = latency.seconds if latency else ""
    cells["images_per_second"] = row.images_per_second or ""
    cells["training_time_times_alone"] = row.times_alone or ""
    return cells
