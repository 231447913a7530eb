"""Parsers made from the signatures and docstrings of commands, and output shared by commands."""

import argparse
import contextlib
import difflib
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastokd.errors import EXIT_OK, ConfigError
from fastokd.train.config import RETIRED, TrainConfig, option_value
from fastokd.train.fields import infos
from fastokd.train.progress import Counter

T = TypeVar("T")
POSITIONAL = "positional"
Positional = Annotated[T, POSITIONAL]
Which = Literal["last", "best"]
Runs = Positional[tuple[Path, ...]]
Settings = Annotated[tuple[str, ...], "FIELD=VALUE"]

KINDS: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "", "True or False"),
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
    "device": "Device: auto, cpu, cuda or cuda:N",
    "workers": "Number of processes (default: one per CPU core)",
    "latency": "Measure the latencies of the students on this machine",
    "devices": "cpu, or GPUs as cuda:0,cuda:1; auto: all GPUs, or the CPU",
    "per_device": "Number of simultaneous runs on each device; auto chooses",
    "dry_run": "Print the runs and the results so far; train nothing",
}
"""The help of options that several commands have."""


class Parser(argparse.ArgumentParser):
    """The parser of a command: a function with annotations and a docstring with "Args:".

    Its keyword arguments become options, described in the docstring or in ``SHARED``.
    """

    def __init__(self, name: str, function: Callable[..., int | None]) -> None:
        description, _, arguments = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
        super().__init__(
            prog=name,
            description=description,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.function = function
        self.add_argument("-h", "--help", action="store_true", help="show this message")
        helps = SHARED | dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                continue
            default, required = parameter.default, parameter.default is parameter.empty
            help = " ".join(helps[name].split())
            add_option(self, name, hints[name], help, None if required else default, required)
        positional = [each for each in self._actions if not each.option_strings]
        names = [f"[{each.metavar}]" if each.nargs else str(each.metavar) for each in positional]
        self.usage = " ".join([self.prog, "[OPTIONS]", *names])

    def run(self, arguments: Sequence[str]) -> int:
        """Print the help, or call the function with the options that are given; returns the exit
        code.

        Raises:
            ConfigError: an option is unknown, missing or of the wrong type.
        """
        words = with_hyphens(arguments)
        if {"-h", "--help"} & set(words):
            print(self.format_help(), end="")
            return EXIT_OK
        options, unknown = self.parse_known_args(words)
        if unknown:
            self.error(describe_unknown(unknown[0], self.names()))
        return self.function(**vars(options)) or EXIT_OK

    def names(self) -> list[str]:
        """The options, e.g. "--batch-size"."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Raise a ``ConfigError`` for a message of ``argparse``."""
        for theirs, ours in (
            (r"^argument ", ""),
            (r"^the following arguments are required", "missing argument"),
            (r"expected one argument$", "its value is missing"),
        ):
            message = re.sub(theirs, ours, message)
        end = "" if message.endswith("?") else ";"
        raise ConfigError(f"{message}{end} '{self.prog} --help' lists the options")


def add_option(
    section: Any,
    name: str,
    hint: Any,
    help: str,
    default: Any = None,
    required: bool = False,
    **settings: Any,
) -> None:
    """Add an option to a parser or a group of its arguments.

    Args:
        hint: the type of its value: a scalar, which may be optional, a tuple or a dictionary. It
            may be annotated with ``POSITIONAL``, a tuple of the words that the option takes, or a
            placeholder for one value of an option that may be repeated.
        default: shown in the help, if there is one.
        settings: further arguments of ``add_argument``.
    """
    kind, mark = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    optional = isinstance(kind, types.UnionType)
    kind = get_args(kind)[0] if optional else kind
    origin, parts = get_origin(kind), get_args(kind)
    values: dict[str, Any]
    if kind is bool and "metavar" not in settings:
        values = {"action": argparse.BooleanOptionalAction}
    elif origin in (dict, Mapping):
        values = {"nargs": "*", "action": _Collect, "const": dict, "type": parse_pair}
        values["metavar"] = "NAME=VALUE"
    elif origin is tuple:
        values = {"nargs": "*", "action": _Collect, "const": tuple, "type": _parser(parts[0])}
        values["metavar"] = KINDS[parts[0]][1]
    else:
        words = parts if origin is Literal else mark if isinstance(mark, tuple) else ()
        kind = str if words else kind
        values = {"type": _parser(kind, words, optional)}
        values["metavar"] = "{" + ",".join(words) + "}" if words else KINDS[kind][1]
    if mark == POSITIONAL:
        flag, values["metavar"] = name, name.upper().replace("_", "-")
        if not required and "nargs" not in values:
            values["nargs"] = "?"
    else:
        if isinstance(mark, str):
            values |= {"metavar": mark, "nargs": 1}
        flag = f"--{name.replace('_', '-')}"
        values |= {"dest": name, "required": required}
    shown = default
    if isinstance(default, Mapping):
        shown = " ".join(f"{key}={value}" for key, value in default.items())
    elif isinstance(default, tuple):
        shown = " ".join(map(str, default))
    if shown not in ("", None) and values.get("action") is not argparse.BooleanOptionalAction:
        help += f" (default: {shown})"
    section.add_argument(flag, help=help.replace("%", "%%"), **{**values, **settings})


def add_field(section: Any, name: str, base: TrainConfig | None = None, **settings: Any) -> None:
    """Add an option for a field of the configuration; the help shows its value in ``base``."""
    info, default = infos(TrainConfig)[name], getattr(base or TrainConfig(), name)
    shown = info.unset if default is None else default
    add_option(section, name, get_type_hints(TrainConfig)[name], info.help, shown, **settings)


class _Collect(argparse.Action):
    """Add the values of an option to those before it, in a collection of the type ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        collect: Any = self.const
        before = getattr(namespace, self.dest, collect())
        before = before.items() if isinstance(before, dict) else before
        setattr(namespace, self.dest, collect([*before, *values]))


def _parser(kind: Any, words: Sequence[str] = (), optional: bool = False) -> Callable[[str], Any]:
    """The parser of a value."""
    function, _, noun = KINDS[kind]

    def parse(text: str) -> Any:
        if optional and text == "None":
            return None
        if words and text not in words:
            choices = ", ".join(words)
            raise argparse.ArgumentTypeError(f"invalid choice '{text}' (choices: {choices})")
        try:
            return function(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"'{text}' is not {noun}") from None

    return parse


def parse_pair(text: str) -> tuple[str, Any]:
    """A pair; a value that looks like a number or a boolean becomes one."""
    name, mark, value = text.partition("=")
    if not (mark and name):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE")
    return name, option_value(value)


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """The arguments with - for _ in the names of options."""
    return [re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), word) for word in arguments]


def describe_unknown(word: str, names: Sequence[str]) -> str:
    """The message about an argument that a command does not have."""
    if not word.startswith("-"):
        return f"unknown argument '{word}'"
    option = word.partition("=")[0]
    if retired := RETIRED.get(option.lstrip("-").replace("-", "_")):
        return f"option '{option}': {retired.reason}"
    close = difflib.get_close_matches(option, names, n=1)
    return f"unknown option '{option}'" + (f"; did you mean '{close[0]}'?" if close else "")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def say(text: str) -> None:
    """Print a line; the terminal wraps a long one."""
    _Console(highlight=False, soft_wrap=True).print(text, markup=False)


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    texts: Collection[int] = (),
    wide: bool = False,
) -> None:
    """Print a table without lines; without headings if all are empty.

    Args:
        texts: the columns after the first that are text, aligned to the left, not numbers.
        wide: let the terminal wrap long lines, instead of wrapping within columns.
    """
    table = Table(box=None, pad_edge=False, show_header=any(headings))
    for index, heading in enumerate(headings):
        is_text = index == 0 or index in texts
        table.add_column(
            heading,
            justify="left" if is_text else "right",
            no_wrap=wide or index not in texts,
            vertical="bottom" if "\n" in "".join(headings) else "top",
        )
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console = _Console(highlight=False, soft_wrap=wide)
    if wide:
        console.width = max(console.width, 120)
    console.print(table)


def row_title(name: str, student: str) -> str:
    """The title of a row of logits, marked if it is the student."""
    return f"{name} (student)" if name == student else name


def progress_bar(title: str) -> AbstractContextManager[Counter]:
    """Progress on stderr: a bar on a terminal, otherwise lines from time to time."""
    return contextlib.closing(Counter(title))
