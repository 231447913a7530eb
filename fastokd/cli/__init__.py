"""The command line: ``fastokd COMMAND``. Commands are listed in ``fastokd.cli.commands``."""

import os
import select
import sys
import warnings
from collections.abc import Sequence

from fastokd.cli.commands import GROUPS, Command, find_command
from fastokd.cli.options import describe_unknown, print_table
from fastokd.errors import (
    EXIT_CODES,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_OK,
    EXIT_PIPE,
    ConfigError,
    FastOKDError,
)
from fastokd.version import __version__

DESCRIPTION = f"""Online knowledge distillation: train a small classifier with deeper branches that
teach it, and keep the small one.

Exit codes: {"; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())}."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except FastOKDError as error:
        message, code, is_repeated = str(error), error.exit_code, error.repeated
    except KeyboardInterrupt as error:
        message, code = str(error) or "interrupted", EXIT_INTERRUPTED
        is_repeated = getattr(error, "repeated", False)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            return EXIT_PIPE
        # Refused outside the files that fastokd writes itself, e.g. a name that is too long.
        name = f": {error.filename}" if error.filename else ""
        message, code, is_repeated = f"{error.strerror or error}{name}"[:500], EXIT_IO, False
    if not is_repeated:
        print(f"fastokd: {message}", file=sys.stderr)
    return code


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
    words, rest = arguments[:depth], arguments[depth:]
    name = " ".join(["fastokd", *words])
    if isinstance(command, Command):
        return command.parser(name, rest).run(rest)
    if rest and rest[0] not in ("-h", "--help"):
        raise ConfigError(f"{describe_unknown(rest[0], [])}; '{name} --help' lists the commands")
    print(f"usage: {name} COMMAND [OPTIONS]\n\n{GROUPS[words[0]] if words else DESCRIPTION}\n")
    summaries = [
        (key, each.summary if isinstance(each, Command) else GROUPS[key])
        for key, each in command.items()
    ]
    print_table(("", ""), summaries, texts=(1,))
    return EXIT_OK
