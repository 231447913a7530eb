"""One table, for a terminal, Markdown, HTML and CSV."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import rich.table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

BEST_EPOCH_NOTE = (
    "The best epoch is selected on the evaluation images, and is optimistic if these are the test"
    " images."
)


class Table(NamedTuple):
    """A table of text: its title, the names of its columns, its rows, and notes on how to read it.
    The first column names the rows; the others are aligned as numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, title: str, rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()
    ) -> "Table":
        """A table of at least one row, each with the cells by their columns."""
        cells = tuple(tuple(row.values()) for row in rows)
        return cls(title, tuple(rows[0]), cells, tuple(notes))

    def as_text(self) -> str:
        """For a terminal. Nothing is cut off; only the columns' names are wrapped."""
        table = rich.table.Table(box=None, pad_edge=False)
        for index, name in enumerate(self.head):
            widths = (len(word) for word in name.split() or [""])
            width = max(len(name) // 2, *widths, *(cell_len(row[index]) for row in self.rows))
            justify: Any = "right" if index else "left"
            table.add_column(Text(name), justify=justify, vertical="bottom", width=width)
        for row in self.rows:
            table.add_row(*map(Text, row))
        output = io.StringIO()
        Console(file=output, color_system=None, width=10_000).print(table)
        lines = [line.rstrip() for line in output.getvalue().splitlines()]
        return "\n".join([self.title, "", *lines, *(["", *self.notes] if self.notes else [])])

    def as_markdown(self) -> str:
        """A Markdown table under a heading."""
        notes = [line for note in self.notes for line in (plain_markdown(note), "")]
        heading = f"## {plain_markdown(self.title)}"
        return "\n".join([heading, "", *markdown_table([self.head, *self.rows]), *notes])

    def as_html(self) -> str:
        """An HTML table with a caption."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.head)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>\n"
            for row in self.rows
        )
        notes = "".join(f"<p>{escape(note)}</p>\n" for note in self.notes)
        return (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(self.title)}">\n'
            f"<table>\n<caption>{escape(self.title)}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n{notes}"
        )


def markdown_table(rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table and an empty line; the first row is its head."""
    head, *rest = rows
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rest)
    ]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with the columns of all of them; a value that a row lacks is empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plain_markdown(text: str) -> str:
    """Text with Markdown's markup characters escaped; names of runs may contain any."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in text)


def spread(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """Mean and sample standard deviation as text; a single value has no deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.{digits}f}"
