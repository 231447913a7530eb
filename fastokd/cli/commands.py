"""The list of commands. A command's module is imported when it is chosen."""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from fastokd.cli.options import PLUGINS, with_options
from fastokd.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        target: module and name of its function.
        summary: for the list of commands.
        generated: the target is called with the arguments, and returns the type to parse.
        plugins: the command resolves names, so it has the option ``--plugin``.
    """

    target: str
    summary: str
    generated: bool = False
    plugins: bool = True

    def load(self, arguments: Sequence[str]) -> Any:
        """A type for tyro, or the function with its call deferred until the end of parsing."""
        module, _, name = self.target.partition(":")
        function = getattr(importlib.import_module(f"fastokd.cli.{module}"), name)
        if self.generated:
            return function(arguments)

        signature = inspect.signature(function)
        extra = self.plugins and "plugin" not in signature.parameters

        def defer(*args: Any, **options: Any) -> Callable[[], int | None]:
            if extra:
                options.pop("plugin", None)  # loaded before the arguments were parsed
            return functools.partial(function, *args, **options)

        deferred: Any = functools.update_wrapper(defer, function)
        if extra:
            last = inspect.Parameter(
                "plugin", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=PLUGINS
            )
            signature = signature.replace(parameters=[*signature.parameters.values(), last])
            deferred.__annotations__ = {**function.__annotations__, "plugin": PLUGINS}
        deferred.__signature__ = signature
        del deferred.__wrapped__  # tyro would read the options' types from it
        return with_options(deferred)


COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "demo": Command("sweeps:demo", "Compare a student trained alone and with AHBF", plugins=False),
    "train": Command("train:parser", "Train a student with its branches, or alone", True),
    "eval": Command("runs:evaluate", "Measure the accuracy of a run or an exported student"),
    "analyze": Command("runs:analyze", "Measure how branches and teacher assistants differ"),
    "export": Command("runs:export", "Write the plain student of a run"),
    "predict": Command("runs:predict", "Classify image files with a run or an exported student"),
    "compare": Command("reports:compare", "Compare the errors and costs of runs"),
    "plot": Command("reports:plot", "Plot the curves of runs"),
    "report": Command("reports:report", "Write an HTML page about runs"),
    "sweep": Command("sweeps:sweep", "Train a grid of configurations with several seeds"),
    "reproduce": Command("sweeps:reproduce", "Run the recipes of a published table"),
    "show": Command("catalog:show", "Draw the distillation graph of a method"),
    "models": Command("models:models", "List the networks and their costs"),
    "methods": Command("catalog:methods", "List the methods"),
    "recipes": Command("catalog:recipes", "List or print the published configurations"),
    "data": {
        "check": Command("data:check", "Check every image of a dataset"),
        "convert": Command("data:convert", "Scale the images of a dataset down"),
    },
    "bench": {
        "step": Command("bench:step", "Measure a training step, one optimization at a time"),
        "compare": Command("bench:compare", "Removed; use pytest-benchmark compare", plugins=False),
    },
    "doctor": Command(
        "catalog:doctor", "Report the environment with a fix for each problem", plugins=False
    ),
}
GROUPS = {"data": "Check or convert a dataset", "bench": "Measure fastokd on this machine"}


def find_command(arguments: Sequence[str]) -> tuple[Command | Mapping[str, Any], int]:
    """The command that the first words name, or the group where they end, and their number.

    Raises:
        ConfigError: an unknown command; the message suggests the closest one.
    """
    level: Command | Mapping[str, Any] = COMMANDS
    for depth, word in enumerate([*arguments, "--help"]):
        if isinstance(level, Command) or word.startswith("-"):
            return level, depth
        if word not in level:
            raise ConfigError(f"unknown command '{word}'{did_you_mean(word, level)}")
        level = level[word]
    return level, len(arguments)


def overview(commands: Mapping[str, Any]) -> Any:
    """A type whose ``--help`` lists commands."""
    branches = []
    for name, command in commands.items():
        summary = command.summary if isinstance(command, Command) else GROUPS[name]
        branch = tyro.conf.subcommand(name, constructor=_not_loaded, description=summary)
        branches.append(Annotated[Any, branch])
    return Union[tuple(branches)]  # noqa: UP007 - the members are computed


def options_of(target: Any) -> Iterator[tuple[str, Any, bool]]:
    """Name, type and necessity of every option of a loaded command."""
    if dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            nested = getattr(field.type, "__origin__", field.type)
            if dataclasses.is_dataclass(nested):
                yield from options_of(nested)
            else:
                yield field.name, field.type, False
    else:
        for name, parameter in inspect.signature(target).parameters.items():
            yield name, parameter.annotation, parameter.default is parameter.empty


def option_names(target: Any) -> list[str]:
    """The options of a loaded command, e.g. "--batch-size", with its positional arguments."""
    return [f"--{name.replace('_', '-')}" for name, *_ in options_of(target)]


def _not_loaded() -> None:
    """The parser of a command that was not chosen."""
