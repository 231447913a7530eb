"""One table, for a terminal, Markdown and HTML."""

import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import rich.table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        head: the columns' names; the first column names the rows.
        rows: cells, as many as ``head`` has; all but those of the first column are numbers, or
            words that stand for one.
        notes: sentences on how to read it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """For a terminal. Nothing is cut off however narrow it is; only the columns' names are
        wrapped, to a few lines.
        """
        table = rich.table.Table(box=None, pad_edge=False)
        for index, name in enumerate(self.head):
            width = max(
                len(name) // 2,
                *(len(word) for word in name.split() or [""]),
                *(cell_len(row[index]) for row in self.rows),
            )
            table.add_column(
                Text(name), justify="right" if index else "left", vertical="bottom", width=width
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        console = Console(file=io.StringIO(), color_system=None, width=10_000)
        console.print(table)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        return "\n".join([self.title, "", *lines, *(["", *self.notes] if self.notes else [])])

    def as_markdown(self) -> str:
        """A Markdown table under a heading."""
        notes = [line for note in self.notes for line in (plain_markdown(note), "")]
        return "\n".join(
            [
                f"## {plain_markdown(self.title)}",
                "",
                *markdown_table([self.head, *self.rows]),
                *notes,
            ]
        )

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
    """The lines of a Markdown table and the empty line after it; the first row is its head."""
    head, *rest = rows
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rest)
    ]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def plain_markdown(text: str) -> str:
    """Text without what Markdown reads as markup; names of runs may hold anything."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in text)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation as text; a single value has no deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.2f}"
