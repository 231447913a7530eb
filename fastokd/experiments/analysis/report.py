"""One page about runs: how they compare, what differs in their configurations, how they went, and
what was analysed of them.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastokd.errors import first_line
from fastokd.experiments.analysis.compare import Comparison
from fastokd.experiments.analysis.curves import overview_pictures, training_pictures
from fastokd.experiments.analysis.page import bullets, image, page, remarks_section, section
from fastokd.experiments.analysis.runs import Group, Run, config_differences, title
from fastokd.experiments.analysis.tables import Table


def report_page(groups: Sequence[Group], comparison: Comparison) -> str:
    """The page, which needs no other file and no network.

    Args:
        groups: see ``read_runs``.
        comparison: of these groups, see ``compare``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    records = {group.label: [run.records for run in group.runs] for group in groups}
    pictures = [
        picture
        for draw in (overview_pictures, training_pictures)
        for picture in draw(records, title(groups), ["svg"])
    ]
    parts = [
        remarks_section(comparison.remarks),
        section("Comparison", "".join(table.as_html() for table in comparison.tables())),
        section("Configurations", _configurations(groups)),
        section(
            "Over the epochs",
            _BAND
            + "".join(
                _picture(picture.title, picture.files["svg"], picture.description)
                for picture in pictures
            ),
        ),
        *(analysis_section(run) for group in groups for run in group.runs),
    ]
    return page(f"Runs on {title(groups)}", "".join(parts))


_BAND = (
    "<p>Of several seeds the line is the mean and the band the range. What is dotted only some of"
    " the runs have.</p>\n"
)


def _picture(title: str, content: bytes, description: str) -> str:
    return section(title, image(content, description), level=3)


def _configurations(groups: Sequence[Group]) -> str:
    differing = config_differences(groups)
    if not differing:
        return "<p>The configurations are the same but for the seed.</p>\n"
    return Table(
        "What differs between the configurations",
        ("field", *(group.label for group in groups)),
        tuple((name, *values) for name, values in differing.items()),
    ).as_html()


MOST_CELLS = 3000
"""The largest table of an analysis that is shown; larger ones are for programs."""


def analysis_section(run: Run) -> str:
    """What ``fastokd analyze`` has left in the run's folder as a part of a page; empty without it,
    a sentence where it is damaged.
    """
    folder = run.path / "analysis"
    if not folder.is_dir():
        return ""
    try:
        found = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
        where = (
            f"{found['images']} {found['split']} images of {found['data']}, {found['checkpoint']}"
            f" checkpoint, {found['epochs']} epochs"
        )
        body = [f"<p>{escape(where)}.</p>\n", bullets(found["notes"]) if found["notes"] else ""]
        for picture in found.get("pictures", ()):
            body.append(
                _picture(
                    picture["title"],
                    (folder / f"{Path(picture['name']).name}.svg").read_bytes(),
                    picture["description"],
                )
            )
        body += _measures(found["measures"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        body = [
            f"<p>The analysis in {escape(str(folder))} is incomplete or damaged"
            f" ({escape(first_line(error))}): run 'fastokd analyze' again.</p>\n"
        ]
    return section(f"Analysis of {run.path}", "".join(body))


def _measures(measures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The numbers of an analysis: those that stand alone in a table, those by row in another, each
    of the others in its own.
    """
    alone = [measure for measure in measures.values() if measure["axes"] == []]
    by_row = [measure for measure in measures.values() if measure["axes"] == ["row"]]
    rows = dict.fromkeys(name for measure in by_row for name in measure["values"])
    parts = [
        Table(
            "Over all branches",
            ("measure", "value"),
            tuple((measure["title"], _number(measure["values"])) for measure in alone),
            _meanings(alone),
        ),
        Table(
            "By row",
            ("row", *(measure["title"] for measure in by_row)),
            tuple(
                (name, *(_number(measure["values"].get(name)) for measure in by_row))
                for name in rows
            ),
            _meanings(by_row),
        ),
    ]
    return [table.as_html() for table in parts if table.rows] + [
        _details(measure) for measure in measures.values() if len(measure["axes"]) > 1
    ]


def _meanings(measures: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{measure['title']}: {measure['description']}" for measure in measures)


def _details(measure: Mapping[str, Any]) -> str:
    """A measure of several axes as a folded table; the last axis goes across, unless it is the
    longer one.
    """
    lines = _flat(measure["values"], len(measure["axes"]) - 1)
    columns = list(dict.fromkeys(name for values in lines.values() for name in values))
    cells = [[_number(values.get(name)) for name in columns] for values in lines.values()]
    names = list(lines)
    if len(columns) > len(names):
        names, columns, cells = columns, names, [list(line) for line in zip(*cells, strict=True)]
    if len(names) * len(columns) > MOST_CELLS:
        return (
            f"<p>{escape(measure['title'])}: {len(names)} x {len(columns)} numbers, which"
            " analysis.json has.</p>\n"
        )
    table = Table(
        f"{measure['title']} ({', '.join(measure['axes'])})",
        ("", *columns),
        tuple((name, *line) for name, line in zip(names, cells, strict=True)),
        (measure["description"],),
    )
    return (
        f"<details>\n<summary>{escape(measure['title'])}</summary>\n{table.as_html()}</details>\n"
    )


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
