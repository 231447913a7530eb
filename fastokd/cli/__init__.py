"""The command line: ``fastokd COMMAND``. Commands are listed in ``fastokd.cli.commands``."""

import contextlib
import difflib
import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from fastokd.cli.commands import GROUPS, Command, find_command, option_names, options_of, overview
from fastokd.cli.options import BadValue, plugin_words
from fastokd.errors import (
    EXIT_CODES,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_OK,
    EXIT_PIPE,
    SYNONYMS,
    ConfigError,
    FastOKDError,
)
from fastokd.plugins import load_plugins
from fastokd.train.config import RETIRED
from fastokd.version import __version__

BOOLEAN = "{True,False"
"""The start of the choices of an option that takes True or False."""
DESCRIPTION = f"""Online knowledge distillation: train a small classifier with deeper branches that
teach it, and keep the small one.

Exit codes: {"; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())}."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    is_program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except FastOKDError as error:
        if not error.repeated:
            print(f"fastokd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        if is_program:  # a second Ctrl-C ends the program at once, without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not getattr(error, "repeated", False):
            print(f"fastokd: {error}" if str(error) else "fastokd: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            return EXIT_PIPE
        # Refused outside the files that fastokd writes itself, e.g. a name that is too long.
        name = f": {error.filename}" if error.filename else ""
        print(f"fastokd: {error.strerror or error}{name}"[:500], file=sys.stderr)
        return EXIT_IO


def _is_stdout_closed() -> bool:
    """Check if the reader of standard output is gone, as after ``| head``, and silence it then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # reports errors only
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"fastokd {__version__}")
        return EXIT_OK
    command, depth = find_command(arguments)
    words, arguments = arguments[:depth], arguments[depth:]
    name = " ".join(["fastokd", *words])
    if isinstance(command, Command):
        if command.plugins:
            load_plugins(plugin_words(arguments))  # names in the other arguments may need them
        target, description = command.load(arguments), None
        arguments = _with_truth_values(target, arguments)
    else:
        target, description = overview(command), GROUPS[words[0]] if words else DESCRIPTION
        if arguments and arguments[0] not in ("-h", "--help"):
            raise ConfigError(_unknown(arguments[0], [], name))
        arguments = ["--help"]
    try:
        # Messages of the parser are replaced by one line below.
        with contextlib.redirect_stderr(io.StringIO()):
            call, unknown = tyro.cli(
                target, args=arguments, prog=name, description=description, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            return EXIT_OK
        problem = _incomplete(target, arguments)
        raise ConfigError(f"{problem}; '{name} --help' lists the options") from None
    except BadValue as error:
        raise ConfigError(f"{error}; '{name} --help' lists the options") from None
    if unknown:
        raise ConfigError(_unknown(unknown[0], option_names(target), name))
    return call() or EXIT_OK


def _with_truth_values(target: Any, arguments: Sequence[str]) -> list[str]:
    """The arguments with True after each option that takes True or False and has no value."""
    names = {
        f"--{name.replace('_', '-')}"
        for name, kind, _ in options_of(target)
        if BOOLEAN in str(kind)
    }
    complete = []
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        complete.append(word)
        if word.replace("_", "-") in names and following.startswith("--"):
            complete.append("True")
    return complete


def _incomplete(target: Any, arguments: Sequence[str]) -> str:
    """The reason why the parser refused arguments that are all known."""
    options = list(options_of(target))
    flags = {f"--{name.replace('_', '-')}" for name, kind, _ in options if kind is bool}
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        takes_value = "=" not in word and word not in flags and f"--{word[5:]}" not in flags
        if word.startswith("--") and takes_value and following.startswith("--"):
            return f"{word}: the value is missing"
    needed = [
        name.upper().replace("_", "-") if "Positional" in repr(kind) else f"--{name}"
        for name, kind, required in options
        if required
    ]
    return f"missing argument: {', '.join(needed).replace('_', '-')}"


def _unknown(word: str, names: Sequence[str], name: str) -> str:
    more = f"'{name} --help' lists the options"
    if not word.startswith("-"):
        return f"unknown argument '{word}'; {more}"
    option = word.partition("=")[0]
    if retired := RETIRED.get(option.lstrip("-").replace("-", "_")):
        return f"option '{option}': {retired.reason}"
    meant = SYNONYMS.get(option.lstrip("-").replace("-", "_"), "").replace("_", "-")
    close = difflib.get_close_matches(option, names, n=1)
    if f"--{meant}" in names:
        close = [f"--{meant} workers=N" if meant == "loader-options" else f"--{meant}"]
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown option '{option}'{hint} {more}"
