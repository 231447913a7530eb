"""Top-5 accuracy, likelihood and calibration of the students of compared runs."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from fastokd.experiments.analysis.runs import Group
from fastokd.experiments.analysis.tables import Table, spread
from fastokd.metrics import ECE_BINS, METRICS


def metric_tables(groups: Sequence[Group]) -> list[Table]:
    """The table of the metrics that any of the groups has; empty if none has."""
    shown = [key for key in METRICS if any(_values(group, key) for group in groups)]
    rows = []
    for group in groups:
        cells = {"runs": group.label, "seeds": str(len(group.counted))}
        for key in shown:
            cells[METRICS[key].heading] = _spread(_values(group, key), METRICS[key].digits)
        rows.append(cells)
    note = (
        "NLL: negative log-likelihood of the label in nats. ECE: expected calibration error, over"
        f" {ECE_BINS} bins of the confidence. Both at temperature 1."
    )
    title = "Top-5 accuracy, likelihood and calibration of the students, last epoch"
    if "top5" not in shown:  # of at most five classes
        title = "Likelihood and calibration of the students, last epoch"
    return [Table.of(title, rows, [note])] if shown else []


def metric_cells(group: Group) -> dict[str, Any]:
    """The columns of the CSV, in the units of the table."""
    cells: dict[str, Any] = {}
    for key in METRICS:
        if values := _values(group, key):
            cells[f"last_{key}_mean"] = statistics.mean(values)
            deviation = len(values) > 1 and all(map(math.isfinite, values))
            cells[f"last_{key}_std"] = statistics.stdev(values) if deviation else ""
            cells[f"last_{key}_by_seed"] = " ".join(map(repr, values))
    return cells


def _values(group: Group, key: str) -> list[float]:
    """The metric of each counted run; empty if only some of them have recorded it."""
    values = [run.metric(key) for run in group.counted]
    known = [METRICS[key].scale * value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _spread(values: Sequence[float], digits: int) -> str:
    finite = all(map(math.isfinite, values))  # statistics.stdev raises an error otherwise
    return spread(values, digits=digits) if finite else "non-finite"
