"""Errors of fastokd, and the exit codes of the command line.

They are subclasses of Python's errors, so that callers need no import from here. The command line
turns each into one line on stderr and the class's exit code.
"""

import difflib
from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_IO = 5
EXIT_PEER = 6
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, which schedulers know
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # as of programs that SIGPIPE ends

EXIT_CODES = {
    EXIT_OK: "done",
    1: "a bug in fastokd, with a traceback",
    EXIT_USAGE: "wrong usage or configuration, a non-finite loss, or too little memory",
    EXIT_DATA: "a problem of the data",
    EXIT_CHECKPOINT: "a problem of a checkpoint or exported student",
    EXIT_IO: "a file cannot be written: disk full, read-only, no permission",
    EXIT_PEER: "another process of the run ended",
    EXIT_PREEMPTED: "stopped by SIGTERM or SIGUSR1 after saving a checkpoint; resume the run",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C; a run saves a checkpoint first",
    EXIT_PIPE: "the reader of the output ended, e.g. head",
}


class FastOKDError(Exception):
    """A user error or a refusal of the machine: reported in one line, without a traceback."""

    exit_code = EXIT_USAGE
    repeated = False
    """True if another process of the same run reports it."""


class GraphError(FastOKDError, ValueError):
    """An invalid distillation graph; the message names the node or term."""


class ConfigError(FastOKDError, ValueError):
    """An unknown name or a value out of range in a configuration or on the command line."""


class ExecutorUnavailable(FastOKDError, RuntimeError):
    """An explicitly chosen executor cannot run here; the message says why and what to do."""


class MissingExtra(FastOKDError, ImportError):
    """An optional dependency is not installed; the message names the ``pip install``."""


class DataError(FastOKDError, ValueError):
    """A dataset that cannot be trained on: missing, empty, unreadable or inconsistent."""

    exit_code = EXIT_DATA


class CheckpointError(FastOKDError, RuntimeError):
    """A checkpoint or export that is missing, damaged or of another architecture."""

    exit_code = EXIT_CHECKPOINT


class StorageError(FastOKDError, OSError):
    """A file cannot be read or written: disk full, read-only, no permission."""

    exit_code = EXIT_IO


class PeerLost(FastOKDError, RuntimeError):
    """Another process of the run ended or cannot be reached, so training cannot continue."""

    exit_code = EXIT_PEER


class OutOfMemory(FastOKDError, RuntimeError):
    """A step does not fit into the device's memory; the message names options that reduce it."""


class Preempted(FastOKDError):
    """The run was preempted after saving a checkpoint; the message says how to resume it."""

    exit_code = EXIT_PREEMPTED


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, up to a word before ``limit`` characters, or its type
    if the message is empty.
    """
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit].rsplit(' ', 1)[0]} ..."


def escape(text: object) -> str:
    """Text for a one-line message: line breaks and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def summarize(items: Sequence[object], limit: int = 10) -> str:
    """The first ``limit`` items, escaped, and the number of further ones: ``a, b and 4 more``."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(escape(item) for item in items[:limit]) + more


def class_differences(known: Sequence[str], given: Sequence[str]) -> str:
    """The classes that only one of two lists has, ``known`` and the data's, for messages.

    >>> class_differences(["cat", "dog"], ["cat", "owl"])
    ' (not in the data: dog; only in the data: owl)'
    """
    missing = [name for name in known if name not in set(given)]
    new = [name for name in given if name not in set(known)]
    if not missing and not new:
        return " (in another order)"
    parts = [f"not in the data: {summarize(missing, 4)}"] * bool(missing)
    parts += [f"only in the data: {summarize(new, 4)}"] * bool(new)
    return f" ({'; '.join(parts)})"


SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "batch": "batch_size",
    "num_epochs": "epochs",
    "arch": "model",
    "network": "model",
    "dataset": "data",
    "data_dir": "data",
    "output": "out",
    "output_dir": "out",
    "opt": "optimizer",
    "scheduler": "schedule",
    "size": "image_size",
    "img_size": "image_size",
    "workers": "loader_options",
    "num_workers": "loader_options",
    "amp": "precision",
    "vanilla": "baseline",
    "scratch": "baseline",
    "mutual": "dml",
    "deep_mutual_learning": "dml",
    "hinton": "kd",
    "distillation": "kd",
}
"""Names that other tools use, and those of options and methods here."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: a choice that begins with the name or is close, and all choices.

    >>> did_you_mean("ahfb", ["ahbf", "baseline"])
    "; did you mean 'ahbf'? (choices: ahbf, baseline)"
    """
    choices = sorted(choices)
    if (meant := SYNONYMS.get(name.lower().replace("-", "_"))) in choices:
        return f"; did you mean '{meant}'? (choices: {', '.join(choices)})"
    close = [choice for choice in choices if choice.startswith(f"{name}_")]
    close = close or difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (choices: {', '.join(choices)})"
