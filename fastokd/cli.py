"""The command line: ``fastokd demo | train | eval | export | show | doctor | recipes``.

Exit codes: 0 done; 1 a bug in fastokd (with a traceback); 2 wrong usage or configuration; 3 data; 4 checkpoint or
export; 5 the disk refused; 130 interrupted.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fastokd.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, FastOKDError, did_you_mean

app = tyro.extras.SubcommandApp()

Pos = tyro.conf.Positional
# What may be left out: the help says the default in words, because it comes from the recipe or file if there is one.
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Whole = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Switch = Annotated[bool | None, tyro.conf.arg(metavar="{True,False}", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
Options = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=VALUE ...]", help_behavior_hint="")]


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


@app.command
def demo(out: Path = Path("demo-out"), seeds: int = 3, epochs: int = 24, branches: int = 3) -> None:
    """Train a small student alone and with AHBF on embedded digits, compare them, and export the student.

    Args:
        out: folder for the runs, the curves and the exported student; replaced if it holds an earlier demo.
        seeds: number of seeds for each method, at least 3.
        epochs: epochs of every run.
        branches: branches of the AHBF runs, 3 to 8.
    """
    from fastokd.demo import run_demo

    run_demo(out, seeds, epochs, branches)


@app.command
def train(
    data: Text = None,
    recipe: Text = None,
    config: File = None,
    model: Text = None,
    method: Text = None,
    preset: Text = None,
    branches: Whole = None,
    aux_blocks: Whole = None,
    method_options: Options = (),
    epochs: Whole = None,
    batch_size: Whole = None,
    lr: Number = None,
    lr_decay_at: Annotated[tuple[float, ...], tyro.conf.arg(metavar="[X ...]", help_behavior_hint="")] = (),
    lr_gamma: Number = None,
    momentum: Number = None,
    nesterov: Switch = None,
    weight_decay: Number = None,
    ramp_epochs: Whole = None,
    seed: Whole = None,
    image_size: Whole = None,
    val_split: Number = None,
    pad: Whole = None,
    flip: Switch = None,
    device: Text = None,
    precision: Text = None,
    channels_last: Switch = None,
    impl: Text = None,
    out: File = None,
    resume: File = None,
    quiet: bool = False,
) -> None:
    """Train a student with its branches, or alone. What is not given comes from --recipe or --config, else from the defaults.

    Args:
        data: a folder with train/ and val/ (or test/) and one folder per class in each; cifar10:FOLDER or
            cifar100:FOLDER for torchvision's files; or digits.
        recipe: start from this published configuration (see 'fastokd recipes').
        config: start from this YAML file, for example a run's config.yaml.
        model: the backbone, for example resnet20 (default resnet32).
        method: ahbf (default) or baseline.
        preset: the method's loss options: paper (default) or code.
        branches: number of branches, the student included.
        aux_blocks: auxiliary blocks that each hierarchy level adds (default 4).
        method_options: loss options as NAME=VALUE, for example temperature=4 lambda_ta=2.
        epochs: passes over the training images (default 300).
        batch_size: images per step (default 128).
        lr: learning rate at the start (default 0.1).
        lr_decay_at: fractions of the epochs after which the learning rate is multiplied by lr_gamma (default 0.5 0.75).
        lr_gamma: see lr_decay_at (default 0.1).
        momentum: of SGD (default 0.9).
        nesterov: Nesterov momentum (default True).
        weight_decay: of SGD, for every parameter (default 5e-4).
        ramp_epochs: epochs over which the distillation terms ramp up (default: the preset's).
        seed: of initialisation, order and augmentation (default 0).
        image_size: height and width in pixels (default: the data's own).
        val_split: evaluate on this fraction of the training images instead of the test split (default 0).
        pad: padding of the random crop in pixels (default: the data's).
        flip: random horizontal flips (default: the data's).
        device: auto (default), cpu, cuda or cuda:N.
        precision: fp32, bf16 or auto, which is bf16 on a GPU and fp32 on a CPU.
        channels_last: keep images and weights in channels-last memory format (default True).
        impl: the executor of the loss: auto (default), reference, triton or cpu.
        out: the run folder (default runs/MODEL-METHOD-seedN).
        resume: continue the run in this folder; only --epochs, --device and --quiet may be given with it.
        quiet: print only the result.
    """
    given = {name: value for name, value in locals().items() if name in _field_names() and value is not None and value != ()}
    from fastokd.data import absolute_spec
    from fastokd.train.loop import Trainer
    from fastokd.train.progress import Reporter
    from fastokd.train.run_folder import RunFolder, default_run_path

    reporter = Reporter(quiet=quiet)
    if data is not None:
        given["data"] = absolute_spec(data)  # the run can then be resumed and evaluated from any folder
    if "method_options" in given:
        given["method_options"] = _parse_options(method_options)
    if resume is not None:
        others = sorted(set(given) - {"epochs", "device"}) + [name for name, value in (("recipe", recipe), ("config", config), ("out", out)) if value]
        if others:
            raise ConfigError(f"--resume keeps the run's configuration; it cannot be changed with {', '.join('--' + name.replace('_', '-') for name in others)}")
        run = RunFolder.open(resume)
        trainer = Trainer(dataclasses.replace(run.load_config(), **given), run, reporter)
        trainer.resume()
    else:
        settings = _settings(recipe, config, given)
        from fastokd.train.config import check_config

        check_config(settings)
        name = recipe or f"{settings.model}-{settings.method}"
        run = RunFolder.create(out or default_run_path(f"{name}-seed{settings.seed}"))
        try:
            trainer = Trainer(settings, run, reporter)
            trainer.start()
        except BaseException:
            run.discard_if_unused()
            raise
    _print_summary(trainer.run(), trainer.kept, run.path)


@app.command(name="eval")
def evaluate(path: Pos[Path], data: Text = None, which: Literal["last", "best"] = "last", device: str = "auto") -> None:
    """Measure the accuracy of a run (student, every branch, every teacher assistant) or of an exported student.

    Args:
        path: a run folder, or an exported student (a folder or .safetensors file).
        data: the dataset; for a run the default is the one it was trained on.
        which: the checkpoint of the last or of the best epoch; for runs only.
        device: auto, cpu, cuda or cuda:N.
    """
    from fastokd.train.loop import load_run
    from fastokd.train.step import evaluate_model

    console = _console()
    if (path / "config.yaml").is_file():
        trainer, state = load_run(path, which, data, device)
        console.print(f"{path}: {which} checkpoint, {state['epoch']} epochs; {trainer.dataset.name}, {len(trainer.dataset.evaluation)} {trainer.dataset.evaluation.name} images", markup=False)
        _print_accuracies(evaluate_model(trainer.step, trainer.eval_loader), trainer.kept)
        return
    _evaluate_student(path, data, device)


@app.command
def export(run: Pos[Path], to: Literal["safetensors"] = "safetensors", out: File = None, which: Literal["last", "best"] = "last",
           data: Text = None, device: str = "auto") -> None:
    """Write the plain student of a run, and measure it again from the written file.

    Args:
        run: the run folder.
        to: the format: safetensors, with a JSON beside it (classes, preprocessing, architecture, accuracy).
        out: the folder to write to (default RUN/export).
        which: the student of the last or of the best epoch.
        data: real images for the check (default: the run's dataset).
        device: auto, cpu, cuda or cuda:N.
    """
    from fastokd.export import check_same_logits, load_student, measure_accuracy, student_record, write_student
    from fastokd.train.loop import load_run
    from fastokd.train.step import evaluate_model

    trainer, state = load_run(run, which, data, device)
    trainer.model.eval()
    student = trainer.model.student().eval()
    accuracy = evaluate_model(trainer.step, trainer.eval_loader)[trainer.kept]
    target = (out or run / "export") / f"student.{to}"
    settings = trainer.config
    write_student(target, student, student_record(
        settings.model, trainer.dataset, accuracy=accuracy, epoch=state["epoch"],
        provenance={"method": settings.method, "preset": settings.preset, "branches": settings.num_branches(), "seed": settings.seed}))
    loaded, _ = load_student(target)
    loaded.to(trainer.device)
    compared = check_same_logits(student, loaded, trainer.eval_loader)
    again = measure_accuracy(loaded, trainer.eval_loader)
    console = _console()
    parameters = sum(value.numel() for value in loaded.parameters())
    console.print(f"wrote {target} and {target.with_suffix('.json').name}: {settings.model} alone, {parameters:,} parameters", markup=False)
    console.print(f"loaded again without the branches: the same logits bit for bit on {compared} images, accuracy {100 * again:.2f} %", markup=False)


@app.command
def show(method: Pos[str], branches: Whole = None, preset: str = "paper", format: Literal["text", "mermaid"] = "text",
         method_options: Options = ()) -> None:
    """Draw a method's distillation graph with its effective coefficients.

    Args:
        method: the method, for example ahbf.
        branches: number of branches (default: the method's).
        preset: the loss options: paper or code.
        format: text, or a Mermaid flowchart.
        method_options: loss options as NAME=VALUE.
    """
    from fastokd.graph import draw_mermaid, draw_text
    from fastokd.methods import get_method
    from fastokd.train.config import TrainConfig, check_config

    config = TrainConfig(method=method, preset=preset, branches=branches, method_options=_parse_options(method_options))
    check_config(config)
    loss = get_method(method).loss_class(num_branches=config.num_branches(), **config.loss_options())
    print(draw_text(loss.graph) if format == "text" else draw_mermaid(loss.graph))


@app.command
def doctor(json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Say what this machine has and what is missing, with the command that mends it. Put it into every bug report.

    Args:
        json_output: print JSON.
    """
    from fastokd.doctor import examine

    findings = examine()
    if json_output:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return
    marks = {"ok": "[green]ok[/]", "absent": "[yellow]--[/]", "problem": "[red]!![/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, finding.text.replace("[", "\\["))
    Console(highlight=False).print(table)
    problems = sum(finding.state == "problem" for finding in findings)
    _console().print("nothing needs mending" if not problems else f"{problems} to mend, marked !!")


@app.command
def recipes(name: Pos[Text] = None) -> None:
    """List the recipes, or print one whole.

    Args:
        name: the recipe to print, with where its values come from.
    """
    from fastokd.recipes import describe_recipe, get_recipe, list_recipes

    if name is None:
        table = Table(box=None, pad_edge=False)
        table.add_column("recipe", no_wrap=True)
        table.add_column("what it is")
        for key, line in list_recipes().items():
            table.add_row(key, line)
        Console(highlight=False).print(table)
        print("run one with: fastokd train --recipe NAME --data FOLDER")
        return
    print("\n".join(f"# {line}".rstrip() for line in describe_recipe(name).splitlines()))
    print(get_recipe(name).to_yaml(), end="")


def _field_names() -> set[str]:
    from fastokd.train.config import TrainConfig

    return {item.name for item in dataclasses.fields(TrainConfig)}


def _settings(recipe: str | None, config: Path | None, given: dict[str, Any]) -> Any:
    """The configuration: a recipe or a file or the defaults, with what was given on top."""
    from fastokd.recipes import get_recipe
    from fastokd.train.config import TrainConfig, load_config

    if recipe and config:
        raise ConfigError("give --recipe or --config, not both")
    if recipe:
        base = get_recipe(recipe)
    elif config:
        try:
            base = load_config(config.read_text(encoding="utf-8"), str(config))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {config}: {getattr(error, 'strerror', None) or error}") from None
    else:
        base = TrainConfig()
    if given.get("method", base.method) != base.method:
        # Branch counts and loss options belong to the method they were written for.
        base = dataclasses.replace(base, branches=None, method_options={}, ramp_epochs=None)
    return dataclasses.replace(base, **given)


def _parse_options(items: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values are read as numbers and booleans where they are."""
    import yaml

    options = {}
    for item in items:
        name, mark, text = item.partition("=")
        if not mark or not name:
            raise ConfigError(f"method option '{item}' is not of the form NAME=VALUE")
        value = yaml.safe_load(text)
        try:
            options[name] = value if isinstance(value, (bool, int, float)) else float(text)
        except ValueError:
            options[name] = text
    return options


def _print_accuracies(accuracies: dict[str, float], kept: str) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("row")
    table.add_column("accuracy %", justify="right")
    for name, value in accuracies.items():
        table.add_row(f"{name} (student)" if name == kept else name, f"{100 * value:.2f}")
    Console(highlight=False).print(table)


def _print_summary(summary: Any, kept: str, path: Path) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("row")
    table.add_column(f"last epoch ({summary.epochs})", justify="right")
    table.add_column(f"best epoch ({summary.best_epoch + 1})", justify="right")
    for name in summary.last:
        table.add_row(f"{name} (student)" if name == kept else name, f"{100 * summary.last[name]:.2f} %", f"{100 * summary.best[name]:.2f} %")
    Console(highlight=False).print(table)
    console = _console()
    console.print(f"{summary.images_per_second:.0f} img/s, {summary.seconds:.1f} s of training; best = the student's best epoch on the evaluation split", markup=False)
    console.print(f"student: {summary.student}   run: {path}", markup=False)


def _evaluate_student(path: Path, data: str | None, device: str) -> None:
    from fastokd.data import ResidentLoader, open_dataset
    from fastokd.errors import CheckpointError
    from fastokd.export import load_student, measure_accuracy, student_file
    from fastokd.train.step import choose_device

    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder or an exported student")
    student, record = load_student(path)
    if data is None:
        raise ConfigError(f"an exported student needs --data; {student_file(path)} was measured on {record['accuracy']['data']}")
    where = choose_device(device)
    preprocessing = record["preprocessing"]
    height, width = preprocessing["image_size"]
    dataset = open_dataset(data, image_size=height if height == width else None)
    if list(dataset.classes) != record["classes"]:
        raise CheckpointError(f"the student knows {len(record['classes'])} classes ({', '.join(record['classes'][:3])}, ...), the data has {len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...)")
    loader = ResidentLoader(dataset.evaluation, 256, train=False, device=where, mean=preprocessing["mean"], std=preprocessing["std"])
    accuracy = measure_accuracy(student.to(where), loader)
    stored = record["accuracy"]
    console = _console()
    console.print(f"{student_file(path)}: {record['architecture']['name']} alone on {dataset.name}, {len(dataset.evaluation)} {dataset.evaluation.name} images", markup=False)
    console.print(f"accuracy {100 * accuracy:.2f} % (stored with the export: {100 * stored['top1']:.2f} % on {stored['data']}, {stored['num_images']} {stored['split']} images)", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        from fastokd.version import __version__

        print(f"fastokd {__version__}")
        return EXIT_OK
    commands = ("demo", "train", "eval", "export", "show", "doctor", "recipes")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        print(f"fastokd: unknown command '{arguments[0]}'{did_you_mean(arguments[0], commands)}", file=sys.stderr)
        return 2
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        app.cli(args=arguments or ["--help"], prog="fastokd", description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except FastOKDError as error:
        print(f"fastokd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"fastokd: {error}" if str(error) else "fastokd: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK
