"""``fastokd train``: the options of a run, and one for each field of ``TrainConfig``."""

import argparse
import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from fastokd.cli.options import Parser, add_field, print_table, row_title, say, with_hyphens
from fastokd.errors import EXIT_OK, ConfigError
from fastokd.train.config import TrainConfig, override, read_config
from fastokd.train.fields import GROUPS, infos
from fastokd.train.launch import check_launched, launch, launched
from fastokd.train.signals import StopSignals


class TrainParser(Parser):
    """The parser; its help shows the values of the recipe, file or run in the arguments."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        super().__init__(name, train)
        first = Parser(name, train)
        first.add_argument("--batch-size", dest="batch_size")
        base = _base(vars(first.parse_known_args(with_hyphens(arguments))[0]))
        self.function = functools.partial(train, base, arguments)
        special: dict[str, dict[str, Any]] = {
            "batch_size": {"metavar": "{N,auto,auto:N}", "type": str},
            "resize_schedule": {"metavar": "EPOCH:SIZE", "type": _epoch_and_size},
        }
        sections = {group: self.add_argument_group(group) for group in GROUPS}
        hints = get_type_hints(TrainConfig)
        for field, info in infos(TrainConfig).items():
            settings = special.get(field, {})
            words = () if callable(info.choices) else info.choices
            if hints[field] in (bool, bool | None):
                words = ("True", "False")
            if words:
                settings["metavar"] = "{" + ",".join(words) + "}"
            add_field(sections[info.group], field, base, **settings)


def _epoch_and_size(text: str) -> tuple[int, int]:
    if (match := re.fullmatch(r"(\d+):(\d+)", text)) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form EPOCH:SIZE, such as 0:128")
    return int(match[1]), int(match[2])


def _base(options: Mapping[str, Any]) -> TrainConfig:
    """The configuration that the options change: of a recipe, a file or a run, or the defaults."""
    resume = options.get("resume", "auto")
    if resume == "auto":
        return start_from(options.get("recipe"), options.get("config"))
    from fastokd.train.run_folder import RunFolder

    others = [f"--{name}" for name in ("recipe", "config", "out") if name in options]
    if options.get("batch_size", "").startswith("auto"):
        others.append("--batch-size auto")
    if others:
        raise ConfigError(
            f"--resume continues with the configuration of the run; omit {', '.join(others)}"
        )
    return RunFolder.open(Path(resume)).load_config()


def start_from(recipe: str | None, config: Path | None) -> TrainConfig:
    """The configuration of a recipe or a file, or the defaults."""
    if recipe and config:
        raise ConfigError("--recipe and --config: give --recipe or --config, not both")
    if recipe:
        from fastokd.experiments.recipes import get_recipe

        return get_recipe(recipe).config
    return read_config(config) if config else TrainConfig()


def train(
    base: TrainConfig,
    arguments: Sequence[str],
    /,
    recipe: str | None = None,
    config: Path | None = None,
    out: Path | None = None,
    resume: str | None = None,
    allow_config_change: bool = False,
    gpus: int | None = None,
    quiet: bool = False,
    **fields: Any,
) -> int:
    """Train a student with its branches, or alone.

    Args:
        recipe: Start from this published configuration (see 'fastokd recipes')
        config: Start from this YAML file, e.g. the config.yaml of a run
        out: Run folder (default: runs/MODEL-METHOD-seedN)
        resume: Continue the run in this folder. Only options that do not influence the results may
            be changed. auto: start the run in --out, or continue it if it exists
        allow_config_change: Let --resume continue with any changed option; changes are listed
        gpus: Train in this many processes on this machine, one per GPU, as torchrun does
        quiet: Print only the result
    """
    if gpus is not None:
        if not launched():
            return launch(gpus, ["train", *arguments])
        check_launched(gpus)
        fields.setdefault("device", "cuda")  # "auto" would fall back to the CPU
    with StopSignals() as signals:  # before torch is imported, which takes seconds
        from fastokd.data import absolute_spec
        from fastokd.train.distributed import process_group
        from fastokd.train.progress import Reporter
        from fastokd.train.session import begin_run, resume_run
        from fastokd.train.trainer import RunIsFinished

        if "data" in fields:  # the run can then be resumed and evaluated from any folder
            fields["data"] = absolute_spec(fields["data"])
        largest = _largest_batch(fields)
        run = None if resume in (None, "auto") else Path(resume)
        settings = dataclasses.replace(base, **fields) if run else override(base, fields)
        name = recipe or f"{settings.model.replace(':', '-')}-{settings.method}"
        with process_group(settings.device) as ranks:
            reporter = Reporter(quiet=quiet, silent=not ranks.is_main)
            if not ranks.is_main:
                warnings.simplefilter("ignore")  # the main process prints the same warnings
            try:
                if run:
                    trainer = resume_run(run, reporter, allow_config_change, signals, **fields)
                else:
                    trainer = begin_run(
                        settings,
                        out,
                        f"{name}-seed{settings.seed}",
                        reporter,
                        resume == "auto",
                        allow_config_change,
                        signals,
                        largest,
                    )
            except RunIsFinished as error:
                if run:
                    raise
                reporter.print(str(error))
                return EXIT_OK
            try:
                summary = trainer.run()
            finally:
                if ranks.is_main:
                    trainer.run_folder.discard_without_checkpoint()
            if ranks.is_main:
                _print_summary(summary, trainer.kept, trainer.run_folder.path)
    return EXIT_OK


def _largest_batch(fields: dict[str, Any]) -> int | None:
    """Convert the text of ``--batch-size``. For "auto", remove it and return the largest size."""
    if (text := fields.pop("batch_size", None)) is None:
        return None
    match = re.fullmatch(r"(auto)(?::(\d+))?|(\d+)", text, re.ASCII)
    if match is None or (match[2] is not None and int(match[2]) < 8):
        raise ConfigError(
            f"--batch-size {text}: it must be a whole number, auto, or auto:N with the largest"
            " allowed size, at least 8"
        )
    if match[1]:
        from fastokd.train.memory import LARGEST_BATCH

        return int(match[2] or LARGEST_BATCH)
    fields["batch_size"] = int(text)
    return None


def _print_summary(summary: Any, kept: str, path: Path) -> None:
    headings = ("row", f"last epoch ({summary.epochs})", f"best epoch ({summary.best_epoch + 1})")
    rows = [
        (row_title(name, kept), f"{100 * value:.2f} %", f"{100 * summary.best[name]:.2f} %")
        for name, value in summary.last.items()
    ]
    print_table(headings, rows)
    say(
        f"{summary.images_per_second:.0f} img/s, {summary.seconds:.1f} s of training; best = the"
        " student's best epoch on the evaluation split"
    )
    say(f"student: {summary.student}   run: {path}")
