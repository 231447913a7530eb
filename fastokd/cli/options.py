"""Types of command-line options, and output shared by the commands."""

import contextlib
import dataclasses
import inspect
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from rich.console import Console
from rich.table import Table
from tyro.constructors import PrimitiveConstructorSpec

from fastokd.train.config import OptionValue, TrainConfig, option_value
from fastokd.train.fields import infos
from fastokd.train.progress import Counter, OutputConsole

T = TypeVar("T")
Which = Literal["last", "best"]
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]
Settings = tyro.conf.UseAppendAction[
    Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint="(may be repeated)"),
    ]
]


def plugin_words(arguments: Sequence[str]) -> list[str]:
    """The values of ``--plugin`` among the arguments of any command, before they are parsed."""
    texts = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, mark, text = word.partition("=")
        if name == "--plugin" and (mark or not following.startswith("-")):
            texts.append(text if mark else following)
    return texts


class BadValue(Exception):
    """A value that an option does not take. Not a ``ValueError``: the parser would catch it."""


KINDS: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    bool: (
        lambda text: {"true": True, "false": False}[text.lower()],
        "{True,False}",
        "True or False",
    ),
    int: (int, "N", "a whole number"),
    float: (float, "X", "a number"),
    str: (str, "TEXT", ""),
    Path: (Path, "PATH", ""),
}
"""For each type of a value its parser, its placeholder in ``--help`` and its name in an error."""

SHARED = {
    "data": "Dataset, as for 'fastokd train --data'",
    "which": "Checkpoint of the last or the best epoch",
    "split": "train, val or test (default: the split that the run is evaluated on)",
    "workers": "Number of processes (default: one per CPU core)",
    "latency": "Measure the latencies of the students on this machine",
    "devices": "cpu, or GPUs as cuda:0,cuda:1; auto: all GPUs, or the CPU",
    "per_device": "Number of simultaneous runs on each device; auto chooses",
    "dry_run": "Print the runs and the results so far; train nothing",
}
"""The help of options that several commands have."""


PLUGINS: Any = tyro.conf.UseAppendAction[
    Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="FILE.py|MODULE",
            help=infos(TrainConfig)["plugin"].help,
            help_behavior_hint="(may be repeated)",
        ),
    ]
]
"""The type of ``--plugin``. Its values are loaded before the arguments are parsed."""


def parse(name: str, kind: Any, text: str) -> Any:
    """The value of an option from its text."""
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            choices = ", ".join(get_args(kind))
            raise BadValue(f"{name}: invalid choice '{text}' (choices: {choices})")
        return text
    function, _, noun = KINDS[kind]
    try:
        return function(text)
    except (KeyError, ValueError):
        raise BadValue(f"{name}: '{text}' is not {noun}") from None


def parse_pairs(name: str, texts: list[str]) -> dict[str, OptionValue]:
    """``NAME=VALUE`` pairs; values that look like numbers and booleans become such."""
    options = {}
    for text in texts:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise BadValue(f"{name}: '{text}' is not of the form NAME=VALUE")
        options[key] = option_value(value)
    return options


def spec(
    function: Callable[[list[str]], Any], metavar: str, nargs: Any = 1
) -> PrimitiveConstructorSpec[Any]:
    """The parser of an option with any default value."""
    return PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=function,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)] if nargs == 1 else [*map(str, value)],
    )


def option_spec(field: str, hint: Any, words: Sequence[str] = ()) -> PrimitiveConstructorSpec[Any]:
    """The parser of an option for a type hint: a scalar, which may be optional, a tuple or pairs.

    Args:
        field: the option, e.g. "batch_size".
        hint: the type of its value.
        words: possible values, for ``--help``.
    """
    name = f"--{field.replace('_', '-')}"
    optional = isinstance(hint, types.UnionType)
    kind = get_args(hint)[0] if optional else hint
    if get_origin(kind) in (dict, Mapping):
        return spec(lambda texts: parse_pairs(name, texts), "[NAME=VALUE ...]", "*")
    if get_origin(kind) is tuple:
        each = get_args(kind)[0]
        metavar = f"[{KINDS[each][1]} ...]"
        return spec(lambda texts: tuple(parse(name, each, text) for text in texts), metavar, "*")
    words = get_args(kind) if get_origin(kind) is Literal else words
    metavar = "{" + ",".join(words) + "}" if words else KINDS[kind][1]

    def value(texts: list[str]) -> Any:
        return None if optional and texts[0] == "None" else parse(name, kind, texts[0])

    return spec(value, metavar)


def with_options(target: T) -> T:
    """Give a command's function or a class of options types for tyro, with errors in one line.

    Options that are not in the docstring are described in ``SHARED``, or like the configuration's
    field.
    """
    if not inspect.isclass(target):  # of a class, tyro joins the lines of a description
        target.__doc__ = re.sub(
            r"(?<=\S)\n {8,}(?=\S)", " ", inspect.cleandoc(target.__doc__ or "")
        )
    hints: Any = get_type_hints(target, include_extras=True)
    one_of: Any = Literal
    for name, hint in hints.items():
        base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if marks and isinstance(marks[0], tuple):  # words that are known when the program runs
            base, marks = one_of[marks[0]], marks[1:]
        if name == "return" or hint is Settings or hint is PLUGINS:
            continue
        described = f" {name}: " in (target.__doc__ or "")
        if base is bool:
            if not described and name in SHARED:
                hints[name] = Annotated[bool, tyro.conf.arg(help=SHARED[name])]
            continue
        text = shown = None
        if isinstance(base, types.UnionType) or get_origin(base) in (dict, tuple):
            shown = ""  # no "(default: None)"
        if not described:
            info = infos(TrainConfig).get(name)
            text = SHARED.get(name) or (info.help if info else None)
            if info and info.unset and name not in SHARED:
                shown = f"(default: {info.unset})"
        argument = tyro.conf.arg(help=text, help_behavior_hint=shown)
        parse = option_spec(name, base)
        if "Positional" in repr(marks):  # named like the argument; tyro adds brackets
            several = " ..." if get_origin(base) is tuple else ""
            parse = dataclasses.replace(parse, metavar=f"{name.upper()}{several}")
        hints[name] = Annotated[(base, *marks, parse, argument)]
    target.__annotations__ = hints
    return target


PIPED_WIDTH = 240
"""The width of tables in a pipe or file, where rich assumes 80 columns and would break names."""


def console(soft_wrap: bool = True) -> Console:
    """The console for tables and lines; with ``soft_wrap`` long lines are not wrapped."""
    made = OutputConsole(highlight=False, soft_wrap=soft_wrap)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_WIDTH
    return made


def say(text: str) -> None:
    """Print a line without interpreting markup."""
    console().print(text, markup=False)


def print_table(table: Table, wrap: bool = True) -> None:
    """Print a table in the width of the terminal, or ``PIPED_WIDTH``; without ``wrap`` in its own.

    Lines in a pipe or file do not end with blanks, which a narrow terminal would wrap.
    """
    made = console(soft_wrap=not wrap)
    if made.is_terminal:
        made.print(table)
        return
    with made.capture() as captured:
        made.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def make_table(left: str, *right: str) -> Table:
    """A plain table with one left-aligned column, and further columns aligned to the right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(left)
    for name in right:
        table.add_column(name, justify="right")
    return table


def progress_bar(title: str) -> AbstractContextManager[Counter]:
    """Progress on stderr: a bar on a terminal, otherwise lines from time to time."""
    return contextlib.closing(Counter(title))
