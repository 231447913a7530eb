"""The list of commands. A command's module is imported when it is chosen."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastokd.cli.options import Parser, add_field
from fastokd.errors import ConfigError, did_you_mean


class Command(NamedTuple):
    """A command.

    Attributes:
        target: module and name of its function, or of its ``Parser``.
        summary: for the list of commands.
        fields: the fields of ``TrainConfig`` that are options too.
    """

    target: str
    summary: str
    fields: str = ""

    def parser(self, name: str = "fastokd", arguments: Sequence[str] = ()) -> Parser:
        """The parser of these arguments."""
        module, _, attribute = self.target.partition(":")
        target: Any = getattr(importlib.import_module(f"fastokd.cli.{module}"), attribute)
        if isinstance(target, type):
            return target(name, arguments)
        parser = Parser(name, target)
        for field in self.fields.split():
            add_field(parser, field)
        return parser


COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "demo": Command("sweeps:demo", "Compare a student trained alone and with AHBF"),
    "train": Command("train:TrainParser", "Train a student with its branches, or alone"),
    "eval": Command("runs:evaluate", "Measure the accuracy of a run or an exported student"),
    "analyze": Command("runs:analyze", "Measure how branches and teacher assistants differ"),
    "export": Command("runs:export", "Write the plain student of a run"),
    "compare": Command("reports:compare", "Compare the errors and costs of runs"),
    "plot": Command("reports:plot", "Plot the curves of runs"),
    "report": Command("reports:report", "Write an HTML page about runs"),
    "sweep": Command("sweeps:sweep", "Train a grid of configurations with several seeds"),
    "reproduce": Command("sweeps:reproduce", "Run the recipes of a published table"),
    "show": Command(
        "catalog:show", "Draw the distillation graph of a method", "branches preset method_options"
    ),
    "models": Command(
        "models:models",
        "List the networks and their costs",
        "method branches aux_blocks at topology compression image_size",
    ),
    "methods": Command("catalog:methods", "List the methods"),
    "recipes": Command("catalog:recipes", "List or print the published configurations"),
    "data": {
        "check": Command("data:check", "Check every image of a dataset"),
        "convert": Command("data:convert", "Scale the images of a dataset down"),
    },
    "bench": {
        "step": Command(
            "bench:step",
            "Measure a training step, one optimization at a time",
            "model method branches aux_blocks at batch_size image_size device",
        ),
        "compare": Command("bench:compare", "Removed; use pytest-benchmark compare"),
    },
    "doctor": Command("catalog:doctor", "Report the environment with a fix for each problem"),
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
