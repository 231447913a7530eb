"""One page about runs: their comparison, configurations, curves and analyses."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastokd.errors import first_line
from fastokd.experiments.analysis.compare import Comparison
from fastokd.experiments.analysis.curves import overview_figures, training_figures
from fastokd.experiments.analysis.page import bullets, image, page, remarks_section, section
from fastokd.experiments.analysis.runs import Group, Run, config_differences, curve_records, title
from fastokd.experiments.analysis.tables import Table
from fastokd.experiments.analysis.verdict import headline
from fastokd.train.compute import is_alone
from fastokd.train.config import fields_with_role
from fastokd.train.fields import Role


def report_page(groups: Sequence[Group], comparison: Comparison) -> str:
    """The page, which needs no other file and no network; ``comparison`` is of these groups."""
    records = {group.label: curve_records(group) for group in groups}
    drawings = (overview_figures, training_figures)
    figures = (each for draw in drawings for each in draw(records, title(groups), ["svg"]))
    curves = "".join(_figure(each.title, each.files["svg"], each.description) for each in figures)
    parts = [
        "".join(f"<p><strong>{escape(line)}.</strong></p>\n" for line in headline(comparison)),
        remarks_section(comparison.remarks),
        section("Comparison", "".join(table.as_html() for table in comparison.tables())),
        section("Configurations", _configurations(groups)),
        section(
            "Over the epochs",
            "<p>For several seeds, the line is the mean and the band is the range. In epochs that"
            f" only some of the runs have finished, each run has a dotted line.</p>\n{curves}",
        ),
        *(analysis_section(run) for group in groups for run in group.runs),
    ]
    return page(f"Runs on {title(groups)}", "".join(parts))


def _figure(title: str, content: bytes, description: str) -> str:
    return section(title, image(content, description), level=3)


def _configurations(groups: Sequence[Group]) -> str:
    differing = {}
    for name, values in config_differences([group.config for group in groups]).items():
        cells = [_cell(group, name, value) for group, value in zip(groups, values, strict=True)]
        if len(set(cells)) > 1:
            differing[name] = cells
    if not differing:
        return "<p>The configurations are the same but for the seed.</p>\n"
    head = ("field", *(group.label for group in groups))
    rows = tuple((name, *values) for name, values in differing.items())
    return Table("Differences of the configurations", head, rows).as_html()


_OF_BRANCHES = {*fields_with_role(Role.TRAINED | Role.OF_METHOD)} - {"model", "method"}
"""Fields that a student trained alone does not use."""


def _cell(group: Group, field: str, value: str) -> str:
    unused = field in _OF_BRANCHES and is_alone(group.config)
    return "-" if unused and field != "method_options" else value


MOST_CELLS = 3000
"""The most cells of an analysis table that is shown."""


def analysis_section(run: Run) -> str:
    """The section on the run's ``fastokd analyze``: empty without one, a sentence if damaged."""
    folder = run.path / "analysis"
    if not folder.is_dir():
        return ""
    try:
        found = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
        subject = (
            f"{found['images']} {found['split']} images of {found['data']}, {found['checkpoint']}"
            f" checkpoint, {found['epochs']} epochs"
        )
        body = [f"<p>{escape(subject)}.</p>\n", bullets(found["notes"]) if found["notes"] else ""]
        for each in found.get("pictures", ()):
            content = (folder / f"{Path(each['name']).name}.svg").read_bytes()
            body.append(_figure(each["title"], content, each["description"]))
        body += _measures(found["measures"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        body = [
            f"<p>The analysis in {escape(str(folder))} is incomplete or damaged"
            f" ({escape(first_line(error))}): run 'fastokd analyze' again.</p>\n"
        ]
    return section(f"Analysis of {run.path}", "".join(body))


def _measures(measures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tables of an analysis: of single numbers, of numbers by row, and one for each other."""
    alone = [measure for measure in measures.values() if measure["axes"] == []]
    by_row = [measure for measure in measures.values() if measure["axes"] == ["row"]]
    names = dict.fromkeys(name for measure in by_row for name in measure["values"])
    values = [(measure["title"], _number(measure["values"])) for measure in alone]
    rows = [(name, *(_number(each["values"].get(name)) for each in by_row)) for name in names]
    head = ("row", *(measure["title"] for measure in by_row))
    tables = [
        Table("Over all branches", ("measure", "value"), tuple(values), _meanings(alone)),
        Table("By row", head, tuple(rows), _meanings(by_row)),
    ]
    details = [_details(measure) for measure in measures.values() if len(measure["axes"]) > 1]
    return [table.as_html() for table in tables if table.rows] + details


def _meanings(measures: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{measure['title']}: {measure['description']}" for measure in measures)


def _details(measure: Mapping[str, Any]) -> str:
    """A measure of several axes as a folded table, the shorter of its last axis across."""
    lines = _flat(measure["values"], len(measure["axes"]) - 1)
    columns = list(dict.fromkeys(name for values in lines.values() for name in values))
    cells = [[_number(values.get(name)) for name in columns] for values in lines.values()]
    names = list(lines)
    if len(columns) > len(names):
        names, columns, cells = columns, names, [list(line) for line in zip(*cells, strict=True)]
    title = measure["title"]
    if len(names) * len(columns) > MOST_CELLS:
        size = f"{len(names)} x {len(columns)} numbers"
        return f"<p>{escape(title)}: {size}, which analysis.json has.</p>\n"
    rows = tuple((name, *line) for name, line in zip(names, cells, strict=True))
    caption = f"{title} ({', '.join(measure['axes'])})"
    table = Table(caption, ("", *columns), rows, (measure["description"],)).as_html()
    return f"<details>\n<summary>{escape(title)}</summary>\n{table}</details>\n"


def _flat(values: Mapping[str, Any], depth: int) -> dict[str, Mapping[str, Any]]:
    """Nested values with the names of the first ``depth`` axes joined to one."""
    if depth == 1:
        return dict(values)
    return {
        f"{name}, {more}": inner
        for name, value in values.items()
        for more, inner in _flat(value, depth - 1).items()
    }


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
