"""The result of a comparison in sentences."""

import statistics

from fastokd.experiments.analysis.compare import Comparison, Row
from fastokd.train.compute import is_alone

EVIDENCE = 0.05
"""The largest p-value that counts as evidence of a difference."""


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each group with a reference of equal epochs: the difference of the errors in
    percentage points, negative if the group is better, and the evidence for it.
    """
    rows = [row for row in comparison.rows if row.equal_epochs.test is not None]
    return [_verdict(row, _names(comparison)) for row in rows]


def _names(comparison: Comparison) -> dict[str, str]:
    """The short name of each group by its label: the method, where that identifies it."""
    groups = [row.group for row in comparison.rows]
    methods = [group.config.method for group in groups]
    names = {}
    for group in groups:
        unique = methods.count(group.config.method) == 1
        names[group.label] = group.config.method if unique else group.label
    return names


def _verdict(row: Row, names: dict[str, str]) -> str:
    group, test = row.equal_epochs
    name = names[row.group.label]
    if group is None or test is None or not test.differences:
        reason = test.reason if test else ""
        return f"{name}: not compared, because {reason}"
    differences = test.differences
    mean, count = statistics.mean(differences), len(differences)
    spread = f" +- {statistics.stdev(differences):.2f}" if count > 1 else ""
    seeds = f"{count} seed{'s' * (count > 1)}"
    start = f"{name} vs {names[group.label]}: {mean:+.2f}{spread} points of error over {seeds}"
    if test.p is None:
        if count == 1:
            return f"{start}: one seed cannot show a difference; train at least three"
        return f"{start}: no test ({test.reason})"
    better = "better" if mean < 0 else "worse"
    result = f"{name} is {better}" if test.p <= EVIDENCE else "no evidence of a difference"
    return f"{start}, p {test.p:.2g}: {result}"


def headline(comparison: Comparison) -> list[str]:
    """The verdicts, or the reason for their absence."""
    if found := verdicts(comparison):
        return found
    if len(comparison.rows) > 1 and not any(is_alone(row.group.config) for row in comparison.rows):
        return ["no verdict: none of the runs is of the student alone (--method baseline)"]
    return []
