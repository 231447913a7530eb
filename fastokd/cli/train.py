"""``fastokd train``, generated from ``TrainConfig``."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fastokd.cli.options import (
    BadValue,
    File,
    Text,
    Whole,
    make_table,
    one,
    parse_bool,
    parse_float,
    parse_int,
    parse_pairs,
    print_table,
    say,
    spec,
)
from fastokd.errors import EXIT_OK, ConfigError
from fastokd.train.config import TrainConfig, override, read_config
from fastokd.train.fields import GROUPS, Info, infos
from fastokd.train.launch import check_launched, launch, launched
from fastokd.train.signals import StopSignals


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

    recipe: Text = None
    config: File = None
    out: File = None
    resume: Text = None
    allow_config_change: bool = False
    gpus: Whole = None
    quiet: bool = False


class Given(NamedTuple):
    """A value from the command line, to tell it from a default."""

    value: Any


def parser(arguments: Sequence[str]) -> type:
    """The type that tyro parses, with the defaults of the recipe, file or run in the arguments."""
    base = _base(arguments)
    groups: dict[str, list[Any]] = {group: [] for group in GROUPS}
    for name, info in infos(TrainConfig).items():
        default = functools.partial(getattr, base, name)
        field = dataclasses.field(default_factory=default)
        groups[info.group].append((name, _option(name, info, default()), field))
    fields: list[Any] = [("run", Annotated[RunOptions, tyro.conf.OmitArgPrefixes], RunOptions())]
    for group, options in groups.items():
        made = dataclasses.make_dataclass(group, options, namespace={"__doc__": ""})
        fields.append((group, made, dataclasses.field(default_factory=made)))
    namespace = {
        "__doc__": "Train a student with its branches, or alone.",
        "__call__": lambda self: _train(self, arguments),
    }
    return dataclasses.make_dataclass("train", fields, namespace=namespace, frozen=True)


def _option(name: str, info: Info, default: Any) -> Any:
    """The type of a field's option, for tyro."""
    hint = get_type_hints(TrainConfig)[name]
    text = tyro.conf.arg(prefix_name=False, help=info.help, help_behavior_hint=_hint(default, info))
    annotated: Any = Annotated
    return annotated[hint, _spec(name, hint, info), tyro.conf.FlagConversionOff, text]


def _base(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the options change."""
    words: dict[str, str] = {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, mark, text = word.partition("=")
        words[name] = text if mark else following
    recipe, config, resume = (words.get(f"--{name}") for name in ("recipe", "config", "resume"))
    if recipe and config:
        raise ConfigError("--recipe and --config: give --recipe or --config, not both")
    if resume and resume != "auto":
        from fastokd.train.run_folder import RunFolder

        return RunFolder.open(Path(resume)).load_config()
    return start_from(recipe, Path(config) if config else None)


def start_from(recipe: str | None, config: Path | None) -> TrainConfig:
    """The configuration of a recipe or a file, or the defaults."""
    if recipe and config:
        raise ConfigError("--recipe and --config: give --recipe or --config, not both")
    if recipe:
        from fastokd.experiments.recipes import get_recipe

        return get_recipe(recipe).config
    return read_config(config) if config else TrainConfig()


def _spec(name: str, hint: Any, info: Info) -> PrimitiveConstructorSpec[Any]:
    """The parser of a field's option; it returns a ``Given`` value."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    kind, optional = get_origin(kinds[0]) or kinds[0], len(kinds) > 1
    words = [] if callable(info.choices) else info.choices
    if name == "batch_size":
        return one(Given, "{N,auto,auto:N}")
    if name == "resize_schedule":
        return spec(lambda texts: Given(_parse_sizes(texts)), "[EPOCH:SIZE ...]", "*")
    if kind is Mapping:
        return spec(lambda texts: Given(parse_pairs(texts)), "[NAME=VALUE ...]", "*")
    if kind is tuple:
        if get_args(kinds[0])[0] is float:
            return spec(lambda texts: Given(tuple(map(parse_float, texts))), "[X ...]", "*")
        return spec(lambda texts: Given(tuple(texts)), "[NAME ...]", "*")
    scalars: dict[Any, tuple[Callable[[str], Any], str]] = {
        bool: (parse_bool, "{True,False}"),
        int: (parse_int, "N"),
        float: (parse_float, "X"),
        str: (str, "{" + ",".join(words) + "}" if words else "TEXT"),
    }
    scalar, metavar = scalars[kind]
    return one(lambda text: Given(None if optional and text == "None" else scalar(text)), metavar)


def _hint(default: Any, info: Info) -> str:
    """The default for ``--help``."""
    if default is None:
        return f"(default: {info.unset})"
    if isinstance(default, Mapping):
        default = [f"{name}={value}" for name, value in default.items()]
    shown = " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)
    return f"(default: {shown})" if shown else ""


def _train(parsed: Any, arguments: Sequence[str]) -> int:
    """Run the command with the parsed options, in each process of the run."""
    run: RunOptions = parsed.run
    if run.gpus is not None:
        if not launched():
            return launch(run.gpus, ["train", *arguments])
        check_launched(run.gpus)
    with StopSignals() as signals:  # before torch is imported, which takes seconds
        given = {
            name: value.value
            for group in GROUPS
            for name, value in vars(getattr(parsed, group)).items()
            if isinstance(value, Given)
        }
        if run.gpus is not None:
            given.setdefault("device", "cuda")  # "auto" would fall back to the CPU
        return _train_here(run, given, signals)


def _train_here(run: RunOptions, given: dict[str, Any], signals: StopSignals) -> int:
    from fastokd.data import absolute_spec
    from fastokd.train.distributed import process_group
    from fastokd.train.progress import Reporter
    from fastokd.train.trainer import RunIsFinished

    if "data" in given:  # the run can then be resumed and evaluated from any folder
        given["data"] = absolute_spec(given["data"])
    number, largest = _parse_batch_size(given.pop("batch_size", None))
    if number is not None:
        given["batch_size"] = number
    settings = _settings(run, given, largest)
    with process_group(settings.device) as ranks:
        reporter = Reporter(quiet=run.quiet, silent=not ranks.is_main)
        if not ranks.is_main:
            warnings.simplefilter("ignore")  # the main process prints the same warnings
        try:
            trainer = _open_trainer(run, settings, given, largest, reporter, signals)
        except RunIsFinished as error:
            if run.resume != "auto":
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


def _settings(run: RunOptions, given: Mapping[str, Any], largest: int | None) -> TrainConfig:
    """The configuration of a new run, or of the resumed run with the given options."""
    if run.resume in (None, "auto"):
        return override(start_from(run.recipe, run.config), given)
    from fastokd.train.run_folder import RunFolder

    others = [name for name in ("recipe", "config", "out") if getattr(run, name)]
    if others:
        raise ConfigError(
            "--resume continues with the configuration of the run; omit"
            f" {', '.join('--' + name for name in others)}"
        )
    if largest is not None:
        raise ConfigError(
            "--resume continues with the batch size of the run; omit --batch-size auto"
        )
    return dataclasses.replace(RunFolder.open(Path(str(run.resume))).load_config(), **given)


def _open_trainer(
    run: RunOptions,
    settings: TrainConfig,
    given: Mapping[str, Any],
    largest: int | None,
    reporter: Any,
    signals: StopSignals,
) -> Any:
    from fastokd.train.session import begin_run, resume_run

    if run.resume not in (None, "auto"):
        path = Path(str(run.resume))
        return resume_run(path, reporter, run.allow_config_change, signals, **given)
    name = run.recipe or f"{settings.model.replace(':', '-')}-{settings.method}"
    return begin_run(
        settings,
        run.out,
        f"{name}-seed{settings.seed}",
        reporter,
        run.resume == "auto",
        run.allow_config_change,
        signals,
        largest,
    )


def _parse_batch_size(text: str | None) -> tuple[int | None, int | None]:
    """The batch size, or the largest that may be chosen by memory."""
    from fastokd.train.memory import LARGEST_BATCH

    if text is None:
        return None, None
    match = re.fullmatch(r"(auto)(?::(\d+))?|(\d+)", text, re.ASCII)
    if match is None or (match[2] is not None and int(match[2]) < 8):
        raise ConfigError(
            f"--batch-size {text}: it must be a whole number, auto, or auto:N with the largest"
            " allowed size, at least 8"
        )
    if match[1]:
        return None, int(match[2] or LARGEST_BATCH)
    return int(text), None


def _parse_sizes(items: Sequence[str]) -> dict[int, int]:
    """``EPOCH:SIZE`` pairs."""
    sizes = {}
    for item in items:
        match = re.fullmatch(r"(\d+):(\d+)", item)
        if match is None:
            raise BadValue(f"'{item}' is not of the form EPOCH:SIZE, such as 0:128")
        sizes[int(match[1])] = int(match[2])
    return sizes


def _print_summary(summary: Any, kept: str, path: Path) -> None:
    table = make_table(
        "row", f"last epoch ({summary.epochs})", f"best epoch ({summary.best_epoch + 1})"
    )
    for name in summary.last:
        table.add_row(
            f"{name} (student)" if name == kept else name,
            f"{100 * summary.last[name]:.2f} %",
            f"{100 * summary.best[name]:.2f} %",
        )
    print_table(table)
    say(
        f"{summary.images_per_second:.0f} img/s, {summary.seconds:.1f} s of training; best = the"
        " student's best epoch on the evaluation split"
    )
    say(f"student: {summary.student}   run: {path}")
