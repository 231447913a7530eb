"""Types of command-line options, and output shared by the commands."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.constructors import PrimitiveConstructorSpec

from fastokd.train.config import OptionValue, option_value
from fastokd.train.progress import Counter


class BadValue(Exception):
    """A value that an option does not take. Not a ``ValueError``: the parser would catch it."""


def parse_int(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise BadValue(f"'{text}' is not a whole number") from None


def parse_float(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise BadValue(f"'{text}' is not a number") from None


def parse_bool(text: str) -> bool:
    """True or False."""
    if text.lower() not in ("true", "false"):
        raise BadValue(f"'{text}' is not True or False")
    return text.lower() == "true"


def parse_pairs(items: list[str]) -> dict[str, OptionValue]:
    """``NAME=VALUE`` pairs; values that look like numbers and booleans become such."""
    options = {}
    for item in items:
        name, mark, text = item.partition("=")
        if not mark or not name:
            raise BadValue(f"'{item}' is not of the form NAME=VALUE")
        options[name] = option_value(text)
    return options


def spec(
    parse: Callable[[list[str]], Any], metavar: str, nargs: Any = 1
) -> PrimitiveConstructorSpec[Any]:
    """The parser of an option with any default value."""
    return PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)] if nargs == 1 else [*map(str, value)],
    )


def one(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """The parser of an option with one value."""
    return spec(lambda texts: parse(texts[0]), metavar)


def choice(*words: str) -> PrimitiveConstructorSpec[Any]:
    """The parser of an option that takes one of some words."""

    def parse(text: str) -> str:
        if text not in words:
            raise BadValue(f"invalid choice '{text}' (choices: {', '.join(words)})")
        return text

    return one(parse, "{" + ",".join(words) + "}")


_QUIET = tyro.conf.arg(help_behavior_hint="")  # no "(default: None)"
Text = Annotated[str | None, one(str, "TEXT"), _QUIET]
Whole = Annotated[int | None, one(parse_int, "N"), _QUIET]
Int = Annotated[int, one(parse_int, "N")]
Float = Annotated[float, one(parse_float, "X")]
File = Annotated[Path | None, one(Path, "PATH"), _QUIET]
Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    spec(lambda texts: tuple(map(Path, texts)), "RUN [RUN ...]", "*"),
    _QUIET,
]
Options = Annotated[dict[str, OptionValue], spec(parse_pairs, "[NAME=VALUE ...]", "*"), _QUIET]
Settings = tyro.conf.UseAppendAction[
    Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint="(may be repeated)"),
    ]
]
Which = Annotated[str, choice("last", "best")]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """The console for tables and lines; long lines are not wrapped."""
    return _Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line without interpreting markup."""
    console().print(text, markup=False)


def print_table(table: Table) -> None:
    """Print a table in the width of the terminal."""
    _Console(highlight=False).print(table)


def make_table(left: str, *right: str) -> Table:
    """A plain table with one left-aligned column, and further columns aligned to the right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(left)
    for name in right:
        table.add_column(name, justify="right")
    return table


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr: a bar on a terminal, otherwise lines from time to time."""
    counter = Counter(title)
    try:
        yield counter
    finally:
        counter.close()
