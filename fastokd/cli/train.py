"""``fastokd train``, generated from ``TrainConfig``."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro

from fastokd import plugins
from fastokd.cli.options import (
    PLUGINS,
    BadValue,
    make_table,
    option_spec,
    plugin_words,
    print_table,
    say,
    spec,
    with_options,
)
from fastokd.errors import EXIT_OK, ConfigError
from fastokd.train.config import TrainConfig, override
from fastokd.train.config_files import load_plugins, read_config
from fastokd.train.fields import GROUPS, Info, infos
from fastokd.train.launch import check_launched, launch, launched
from fastokd.train.signals import StopSignals

if TYPE_CHECKING:
    from fastokd.train.outcome import Summary
    from fastokd.train.run_folder import RunFolder


@with_options
@dataclass(frozen=True)
class RunOptions:
    """Options that are not part of the configuration.

    Attributes:
        recipe: Start from this published configuration (see 'fastokd recipes')
        config: Start from this YAML file, e.g. the config.yaml of a run
        out: Run folder (default: runs/MODEL-METHOD-seedN)
        resume: Continue the run in this folder. Only options that do not influence the results may
            be changed. auto: start the run in --out, or continue it if it exists
        allow_config_change: Let --resume continue with any changed option; changes are listed
        gpus: Train in this many processes on this machine, one per GPU, as torchrun does
        quiet: Print only the result
    """

    recipe: str | None = None
    config: Path | None = None
    out: Path | None = None
    resume: str | None = None
    allow_config_change: bool = False
    gpus: int | None = None
    quiet: bool = False


def parser(arguments: Sequence[str]) -> type:
    """The type that tyro parses, with the defaults of the recipe, file or run in the arguments."""
    words: dict[str, str] = {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, mark, text = word.partition("=")
        words[name.replace("-", "_")] = text if mark else following
    base = _base(words)
    groups: dict[str, list[Any]] = {group: [] for group in GROUPS}
    for name, info in infos(TrainConfig).items():
        default = functools.partial(getattr, base, name)
        field = dataclasses.field(default_factory=default)
        groups[info.group].append((name, _option(name, info, default()), field))
    fields: list[Any] = [("run", Annotated[RunOptions, tyro.conf.OmitArgPrefixes], RunOptions())]
    for group, options in groups.items():
        made = dataclasses.make_dataclass(group, options, namespace={"__doc__": ""})
        fields.append((group, made, dataclasses.field(default_factory=made)))

    def call(parsed: Any) -> int:
        changed = [name for name in infos(TrainConfig) if f"__{name}" in words]
        values = {
            name: value for group in groups for name, value in vars(getattr(parsed, group)).items()
        }
        values["plugin"] = (*base.plugin, *plugins.load_plugins(plugin_words(arguments)))
        return _train(parsed.run, base, {name: values[name] for name in changed}, arguments)

    namespace = {"__doc__": "Train a student with its branches, or alone.", "__call__": call}
    return dataclasses.make_dataclass("train", fields, namespace=namespace, frozen=True)


def _option(name: str, info: Info, default: Any) -> Any:
    """The type of a field's option, for tyro."""
    hint = get_type_hints(TrainConfig)[name]
    if name == "batch_size":
        parse = spec(lambda texts: texts[0], "{N,auto,auto:N}")
    elif name == "resize_schedule":
        parse = spec(_parse_sizes, "[EPOCH:SIZE ...]", "*")
    else:
        parse = option_spec(name, hint, () if callable(info.choices) else info.choices)
    if name == "plugin":
        return Annotated[PLUGINS, tyro.conf.arg(prefix_name=False)]
    shown = default
    if isinstance(default, Mapping):
        shown = " ".join(f"{key}={value}" for key, value in default.items())
    elif isinstance(default, tuple):
        shown = " ".join(map(str, default))
    shown = info.unset if default is None else shown
    text = "" if shown == "" else f"(default: {shown})"
    argument = tyro.conf.arg(prefix_name=False, help=info.help, help_behavior_hint=text)
    annotated: Any = Annotated
    return annotated[hint, parse, tyro.conf.FlagConversionOff, argument]


def _base(words: Mapping[str, str]) -> TrainConfig:
    """The configuration that the options change: of a recipe, a file or a run, or the defaults."""
    resume = words.get("__resume", "auto")
    if resume == "auto":
        config = words.get("__config")
        return start_from(words.get("__recipe"), Path(config) if config else None)
    if others := [name for name in ("recipe", "config", "out") if f"__{name}" in words]:
        raise ConfigError(
            "--resume continues with the configuration of the run; omit"
            f" {', '.join('--' + name for name in others)}"
        )
    if words.get("__batch_size", "").startswith("auto"):
        raise ConfigError(
            "--resume continues with the batch size of the run; omit --batch-size auto"
        )
    from fastokd.train.run_folder import RunFolder

    return RunFolder.open(Path(resume)).load_config()


def start_from(recipe: str | None, config: Path | None) -> TrainConfig:
    """The configuration of a recipe or a file, or the defaults."""
    if recipe and config:
        raise ConfigError("--recipe and --config: give --recipe or --config, not both")
    if recipe:
        from fastokd.experiments.recipes import get_recipe

        return get_recipe(recipe).config
    return load_plugins(read_config(config)) if config else TrainConfig()


def _train(
    run: RunOptions, base: TrainConfig, given: dict[str, Any], arguments: Sequence[str]
) -> int:
    """Run the command in each process of the run."""
    if run.gpus is not None:
        if not launched():
            program = plugins.script()  # a custom method's file is a plug-in of the processes
            own = [] if program is None else ["--plugin", str(program)]
            return launch(run.gpus, ["train", *arguments, *own])
        check_launched(run.gpus)
        if base.device == "auto":  # which would fall back to the CPU
            given.setdefault("device", "cuda")
    with StopSignals() as signals:  # before torch is imported, which takes seconds
        return _train_here(run, base, given, signals)


def _train_here(
    run: RunOptions, base: TrainConfig, given: dict[str, Any], signals: StopSignals
) -> int:
    from fastokd.data import absolute_spec
    from fastokd.train.batches import BATCH_FIELDS, BatchChoice
    from fastokd.train.distributed import process_group
    from fastokd.train.progress import Reporter
    from fastokd.train.session import begin_run, resume_run
    from fastokd.train.trainer import RunIsFinished

    if "data" in given:  # the run can then be resumed and evaluated from any folder
        given["data"] = absolute_spec(given["data"])
    largest: BatchChoice = _parse_batch_size(given) if "batch_size" in given else None
    if not (BATCH_FIELDS & given.keys() or largest or run.recipe or run.config):
        largest = "data"
    elif BATCH_FIELDS & given.keys() == {"lr"} and not (largest or run.recipe or run.config):
        largest = "split"
    resumed = Path(run.resume) if run.resume not in (None, "auto") else None
    settings = dataclasses.replace(base, **given) if resumed else override(base, given)
    with process_group(settings.device) as ranks:
        reporter = Reporter(quiet=run.quiet, silent=not ranks.is_main)
        if not ranks.is_main:
            warnings.simplefilter("ignore")  # the main process prints the same warnings
        try:
            if resumed:
                trainer = resume_run(resumed, reporter, run.allow_config_change, signals, **given)
            else:
                name = run.recipe or f"{settings.model.replace(':', '-')}-{settings.method}"
                trainer = begin_run(
                    settings,
                    run.out,
                    f"{name}-seed{settings.seed}",
                    reporter,
                    run.resume == "auto",
                    run.allow_config_change,
                    signals,
                    largest,
                )
        except RunIsFinished as error:
            if run.resume != "auto":
                raise
            reporter.print(str(error))
            return EXIT_OK
        try:
            summary = trainer.run()
        except KeyboardInterrupt as error:
            if error.args:
                raise
            problem = "interrupted before the first step, so nothing new is saved"
            raise KeyboardInterrupt(problem) from None
        finally:
            if ranks.is_main:
                trainer.run_folder.discard_without_checkpoint()
        if ranks.is_main:
            _print_summary(summary, trainer.student_name, trainer.run_folder)
    return EXIT_OK


def _parse_batch_size(given: dict[str, Any]) -> int | None:
    """Convert the text of ``--batch-size``, or remove it and return the largest allowed size."""
    text = given.pop("batch_size")
    match = re.fullmatch(r"(auto)(?::(\d+))?|(\d+)", text, re.ASCII)
    if match is None or (match[2] is not None and int(match[2]) < 8):
        raise ConfigError(
            f"--batch-size {text}: it must be a whole number, auto, or auto:N with the largest"
            " allowed size, at least 8"
        )
    if match[1]:
        from fastokd.train.memory import LARGEST_BATCH

        return int(match[2] or LARGEST_BATCH)
    given["batch_size"] = int(text)
    return None


def _parse_sizes(items: Sequence[str]) -> dict[int, int]:
    """``EPOCH:SIZE`` pairs."""
    sizes = {}
    for item in items:
        match = re.fullmatch(r"(\d+):(\d+)", item)
        if match is None:
            raise BadValue(
                f"--resize-schedule: '{item}' is not of the form EPOCH:SIZE, such as 0:128"
            )
        sizes[int(match[1])] = int(match[2])
    return sizes


def _print_summary(summary: "Summary", kept: str, folder: "RunFolder") -> None:
    from fastokd.metrics import METRICS

    metrics = folder.read_metrics()[-1].get("metrics", {})
    shown = {key: metric for key, metric in METRICS.items() if key in metrics}
    headings = [metric.heading for metric in shown.values()]
    epochs = f"last epoch ({summary.epochs})", f"best epoch ({summary.best_epoch + 1})"
    table = make_table("row", *epochs, *headings)
    for name in summary.last:
        table.add_row(
            f"{name} (student)" if name == kept else name,
            f"{100 * summary.last[name]:.2f} %",
            f"{100 * summary.best[name]:.2f} %",
            *(metric.text(metrics[key].get(name)) for key, metric in shown.items()),
        )
    print_table(table)
    say(
        f"{summary.images_per_second:.0f} img/s, {summary.seconds:.1f} s of training; best = the"
        " student's best epoch on the evaluation split"
    )
    if shown:
        say(f"{', '.join(headings)}: of the last epoch")
    say(f"student: {summary.student}   run: {folder.path}")
