"""The command line: ``fastokd demo | train | eval | analyze | export | compare | plot | report |
sweep | reproduce | show | models | methods | data | bench | doctor | recipes``.

Heavy rooms are imported inside the commands, so that ``--help`` and mistakes answer at once.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fastokd.errors import (
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_OK,
    EXIT_USAGE,
    ConfigError,
    DataError,
    FastOKDError,
    did_you_mean,
)

DESCRIPTION = """Online knowledge distillation: train a small classifier with deeper branches that
teach it, and keep the small one.

Exit codes: 0 done; 1 a bug in fastokd, with a traceback; 2 wrong usage or configuration, a loss
that is not finite, or too little memory; 3 data; 4 checkpoint or export; 5 the disk refused;
6 another process of the run ended; 75 stopped by SIGTERM or SIGUSR1 and saved, to be continued;
130 interrupted."""

DATA_DESCRIPTION = """Look at a dataset before it is trained on, or write it anew.

Exit codes: 0 done; 3 problems were found; others as of fastokd."""

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()

BENCH_DESCRIPTION = """Measure a training step on this machine.

Exit codes as of fastokd."""

bench_app = tyro.extras.SubcommandApp()


_arguments: list[str] = []
"""The command line that is run, for commands that start themselves again."""


def command(
    function: Callable[..., int | None], group: tyro.extras.SubcommandApp = app
) -> Callable[..., None]:
    """Register a subcommand. Parsing gives the call, which ``main`` makes afterwards: their errors
    are not the same.
    """

    @functools.wraps(function)
    def deferred(*args: Any, **options: Any) -> Callable[[], int | None]:
        return functools.partial(function, *args, **options)

    group.command(name=function.__name__.rstrip("_"))(deferred)
    return function


Pos = tyro.conf.Positional
# What may be left out: the help says the default in words, because it comes from the recipe or file
# if there is one.
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Whole = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Switch = Annotated[bool | None, tyro.conf.arg(metavar="{True,False}", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
Numbers = Annotated[tuple[float, ...], tyro.conf.arg(metavar="[X ...]", help_behavior_hint="")]
Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
]
Options = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="[NAME=VALUE ...]", help_behavior_hint="")
]
Settings = tyro.conf.UseAppendAction[
    Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint="(may be repeated)"),
    ]
]


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


@command
def demo(out: Path = Path("demo-out"), seeds: int = 3, epochs: int = 24, branches: int = 3) -> None:
    """Train a small student alone and with AHBF on embedded digits, compare them, and export the
    student.

    Args:
        out: folder for the runs, the curves and the exported student; replaced if it holds an
            earlier demo.
        seeds: number of seeds for each method, at least 3.
        epochs: epochs of every run.
        branches: branches of the AHBF runs, 3 to 8.
    """
    from fastokd.experiments.demo import run_demo

    run_demo(out, seeds, epochs, branches)


@command
def train(
    data: Text = None,
    recipe: Text = None,
    config: File = None,
    model: Text = None,
    at: Text = None,
    method: Text = None,
    preset: Text = None,
    branches: Whole = None,
    topology: Text = None,
    aux_blocks: Whole = None,
    compression: Switch = None,
    method_options: Options = (),
    epochs: Whole = None,
    batch_size: Annotated[
        str | None, tyro.conf.arg(metavar="{N,auto,auto:N}", help_behavior_hint="")
    ] = None,
    device_batch: Whole = None,
    optimizer: Text = None,
    lr: Number = None,
    lr_scaling: Text = None,
    lr_batch_size: Whole = None,
    schedule: Text = None,
    lr_decay_at: Numbers = (),
    lr_gamma: Number = None,
    lr_final: Number = None,
    warmup_epochs: Number = None,
    momentum: Number = None,
    nesterov: Switch = None,
    betas: Numbers = (),
    weight_decay: Number = None,
    clip_grad: Number = None,
    ema: Number = None,
    ramp_epochs: Whole = None,
    seed: Whole = None,
    image_size: Whole = None,
    val_split: Number = None,
    pad: Whole = None,
    flip: Switch = None,
    padding: Text = None,
    mixup: Number = None,
    cutmix: Number = None,
    resize_schedule: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[EPOCH:SIZE ...]", help_behavior_hint="")
    ] = (),
    loader: Text = None,
    loader_options: Options = (),
    bad_images: Text = None,
    device: Text = None,
    precision: Text = None,
    channels_last: Switch = None,
    impl: Text = None,
    compile: Switch = None,
    cuda_graph: Switch = None,
    streams: Switch = None,
    flat: Switch = None,
    sync_bn: Switch = None,
    deterministic: Switch = None,
    on_nonfinite: Text = None,
    keep_checkpoints: Whole = None,
    save_minutes: Number = None,
    log_to: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")
    ] = (),
    out: File = None,
    resume: Text = None,
    allow_config_change: bool = False,
    gpus: Whole = None,
    quiet: bool = False,
) -> int:
    """Train a student with its branches, or alone. What is not given comes from --recipe or
    --config, else from the defaults.

    Args:
        data: a folder with train/ and val/ (or test/) and one folder per class in each; one folder
            of class folders, with --val-split; a .csv list of path,label,split; a folder of
            WebDataset shards; ImageNet, Tiny-ImageNet, CINIC-10, SVHN or CIFAR as they are
            unpacked; or digits.
        recipe: start from this published configuration (see 'fastokd recipes').
        config: start from this YAML file, for example a run's config.yaml.
        model: the network, for example resnet20 (default resnet32; 'fastokd models' lists them), or
            torchvision:NAME or timm:NAME; peers may differ: resnet20,resnet32.
        at: for networks of torchvision and timm, the first module that every branch has for itself,
            for example layer3.
        method: ahbf (default), or another that 'fastokd methods' lists.
        preset: the method's loss options: paper (default) or code.
        branches: number of branches, the student included.
        topology: branches, which share a trunk, or peers, which are whole networks (default: the
            method's).
        aux_blocks: auxiliary blocks that each hierarchy level adds (default 4).
        compression: make the student the deepest branch, and each other smaller by aux_blocks
            blocks (default False).
        method_options: the method's options as NAME=VALUE, for example temperature=4 lambda_ta=2.
        epochs: passes over the training images (default 300).
        batch_size: images per step, over all processes (default 128). auto: as many as fit into the
            memory, at most 1024 (auto:N for at most N) and a twentieth of the training images; the
            learning rate stays what it is, see --lr-scaling.
        device_batch: images that a process takes at once; gradients are added up until its share of
            the batch is done (default: the whole share).
        optimizer: sgd (default) or adamw.
        lr: learning rate (default 0.1).
        lr_scaling: how it follows the batch size: none (default), linear or sqrt in batch_size /
            lr_batch_size.
        lr_batch_size: the batch size that lr is meant for (default 256).
        schedule: step (default), cosine or onecycle.
        lr_decay_at: of step: fractions of the epochs after which the learning rate is multiplied by
            lr_gamma (default 0.5 0.75).
        lr_gamma: see lr_decay_at (default 0.1).
        lr_final: of cosine and onecycle: the fraction of the learning rate at the end (default 0).
        warmup_epochs: epochs over which the learning rate rises (default 0; onecycle: 0.3 of all).
        momentum: of SGD (default 0.9).
        nesterov: Nesterov momentum (default True).
        betas: of AdamW and LAMB (default 0.9 0.999).
        weight_decay: for every parameter (default 5e-4).
        clip_grad: largest norm of the whole gradient (default 0: any).
        ema: decay per step of a moving average of the student's weights, which is then evaluated
            and handed over (default 0: none).
        ramp_epochs: epochs over which the distillation terms ramp up (default: the preset's).
        seed: of initialisation, order and augmentation (default 0).
        image_size: height and width in pixels (default: the data's own).
        val_split: evaluate on this fraction of the training images instead of the test split
            (default 0).
        pad: padding of the random crop in pixels (default: the data's).
        flip: random horizontal flips (default: the data's).
        padding: what the random crop is padded with: zero (default) or reflect.
        mixup: blend training images and labels in pairs, by a weight from Beta(X, X); 0 for none
            (default).
        cutmix: paste boxes of other training images, by areas from Beta(X, X); 0 for none
            (default).
        resize_schedule: sides of the training images in pixels and the epochs, from 0, that they
            begin with: 0:128 60:192.
        loader: resident, dali, torchvision, or auto (default), which keeps small images decoded on
            the device and decodes others while training, with DALI where it is installed.
        loader_options: what can be tuned of dali and torchvision as NAME=VALUE, for example
            threads=8 hw_decoder_load=0.3.
        bad_images: training images that cannot be decoded: fail (default), or replace by others, 1
            % at most.
        device: auto (default), cpu, cuda or cuda:N.
        precision: fp32, tf32, bf16, fp16 (with loss scaling) or auto, which is bf16 on a GPU and
            fp32 on a CPU.
        channels_last: keep images and weights in channels-last memory format (default True).
        impl: the executor of the loss: auto (default), reference, triton or cpu.
        compile: compile trunk, branches and gates (default: on a GPU).
        cuda_graph: replay the whole step as one CUDA graph (default: on a GPU).
        streams: run the branches on CUDA streams of their own (default: on a GPU).
        flat: keep all parameters in one tensor, so that the optimizer is one operation (default:
            where it can be).
        sync_bn: batch norm over the images of all processes (default False).
        deterministic: only operations that give the same bits again (default False).
        on_nonfinite: about a loss or gradient that is not finite: stop (default), skip the step, or
            rollback to the last checkpoint.
        keep_checkpoints: how many of the newest checkpoints are kept, beside the best (default 2).
        save_minutes: minutes after which a checkpoint is written within an epoch, 0 for only at its
            end (default 15).
        log_to: where metrics go beside the run folder: tensorboard, wandb.
        out: the run folder (default runs/MODEL-METHOD-seedN).
        resume: continue the run in this folder. Where, how far and how fast it goes on may change
            with it (--data if it was moved, --device, --epochs, --compile and the like); what it
            computes may not, unless --allow-config-change says so. "auto": continue the run in
            --out if one is there, else begin it; for commands that are started again as they are.
        allow_config_change: let --resume go on with another configuration; what changed is listed.
        gpus: train together in this many processes on this machine, one for each GPU; torchrun does
            the same, also on several.
        quiet: print only the result.
    """
    from fastokd.train.launch import check_launched, launch, launched
    from fastokd.train.signals import StopSignals

    if gpus is not None:
        if not launched():
            return launch(gpus, _arguments)
        check_launched(gpus)
    with StopSignals() as signals:  # before torch is imported, which takes seconds
        given = {
            name: value
            for name, value in locals().items()
            if name in _field_names() and value is not None and value != ()
        }
        if gpus is not None:
            given.setdefault("device", "cuda")  # not "auto", which would settle for the CPU
        return _train(given, recipe, config, out, resume, allow_config_change, quiet, signals)


@command
def eval_(
    path: Pos[Path],
    data: Text = None,
    which: Literal["last", "best"] = "last",
    split: Text = None,
    device: str = "auto",
) -> None:
    """Measure the accuracy of a run (student, every branch, every teacher assistant) or of an
    exported student.

    Args:
        path: a run folder, or an exported student: a file of any format, or a folder that holds
            one.
        data: the dataset; for a run the default is the one it was trained on. For an exported
            student a folder needs no train/, and may hold the class folders themselves.
        which: the checkpoint of the last or of the best epoch; for runs only.
        split: train, val or test (default: what the run is evaluated on).
        device: auto, cpu, cuda or cuda:N; ONNX runs on the CPU.
    """
    if not (path / "config.yaml").is_file():
        _evaluate_export(path, data, split, device)
        return
    from fastokd.train.runs import load_run

    run = load_run(path, which, data, device, split)
    images = run.dataset.evaluation if split is None else run.dataset.split(split)
    _console().print(
        f"{path}: {which} checkpoint, {run.state['epoch']} epochs; {run.dataset.name},"
        f" {len(images)} {images.name} images",
        markup=False,
    )
    _print_accuracies(run.evaluator.evaluate(run.loader), run.evaluator.reported)


@command
def analyze(
    run: Pos[Path],
    data: Text = None,
    which: Literal["last", "best"] = "last",
    split: Text = None,
    out: File = None,
    max_images: int = 500,
    device: str = "auto",
) -> None:
    """Measure how a run's branches and teacher assistants differ, where they err, and what the
    gates do: numbers and pictures.

    Args:
        run: the run folder.
        data: the dataset (default: the one the run was trained on); its classes must be the same.
        which: the checkpoint of the last or of the best epoch.
        split: train, val or test (default: what the run is evaluated on).
        out: the folder for analysis.json and the pictures (default RUN/analysis).
        max_images: how many of the images that the student gets wrong the t-SNE shows at most; 0
            for no t-SNE.
        device: auto, cpu, cuda or cuda:N.
    """
    from fastokd.experiments.analysis.study import analyze_run

    with (
        _progress_bar("reading images") as decoding,
        _progress_bar("looking at images") as progress,
    ):
        analysis = analyze_run(run, which, data, split, max_images, device, decoding, progress)
    folder = out or run / "analysis"
    pictures = analysis.write(folder)
    _print_analysis(analysis.record)
    _console().print(
        f"wrote {folder / 'analysis.json'}"
        + (f" and as .svg and .png: {', '.join(pictures)}" if pictures else ""),
        markup=False,
    )


def _print_analysis(record: Mapping[str, Any]) -> None:
    console, student = _console(), record["student"]
    console.print(
        f"{record['run']}: {record['checkpoint']} checkpoint, {record['epochs']} epochs;"
        f" {record['data']}, {record['images']} {record['split']} images, of which {student} gets"
        f" {record['student_errors']} wrong",
        markup=False,
    )
    columns = (
        ("accuracy\n%", "accuracy", 100, ".2f"),
        ("cross-\nentropy", "cross_entropy", 1, ".3f"),
        ("calibration\nerror %", "calibration_error", 100, ".2f"),
        ("agreement\n%", "agreement", 100, ".2f"),
        ("logit\ndistance", "logit_distance", 1, ".3f"),
        ("softmax\ndistance", "softmax_distance", 1, ".3f"),
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("row")
    for heading, *_ in columns:
        table.add_column(heading, justify="right")
    for name in record["rows"]:
        cells = []
        for _, key, factor, form in columns:
            values = record["measures"][key]["values"]
            to_student = len(record["measures"][key]["axes"]) == 2
            value = (
                None
                if to_student and name == student
                else values[student][name]
                if to_student
                else values[name]
            )
            cells.append("" if value is None else f"{factor * value:{form}}")
        table.add_row(f"{name} (student)" if name == student else name, *cells)
    Console(highlight=False).print(table)
    console.print(
        f"agreement and distances are with {student}, those of logits over the images that it gets"
        " wrong",
        markup=False,
    )
    for measure in record["measures"].values():
        if not measure["axes"] and measure["values"] is not None:
            console.print(f"{measure['title']}: {measure['values']:.4f}", markup=False)
    for mixture, weights in (
        record["measures"]["mixing"]["values"].items() if "mixing" in record["measures"] else ()
    ):
        console.print(
            f"{mixture}: " + " + ".join(f"{weight:.3f} {name}" for name, weight in weights.items()),
            markup=False,
        )
    for note in record["notes"]:
        console.print(f"note: {note}", markup=False)


@command
def export(
    run: Pos[Path],
    to: Literal["safetensors", "torchvision", "timm", "onnx", "torch-export"] = "safetensors",
    out: File = None,
    which: Literal["last", "best"] = "last",
    branch: Text = None,
    data: Text = None,
    device: str = "auto",
) -> None:
    """Write the plain student of a run, with its classes, preprocessing, accuracy and provenance,
    checked on real images.

    Args:
        run: the run folder.
        to: the format. safetensors: weights, for load_student. torchvision, timm: weights that load
            into that library's own network, where it has one. onnx: for onnxruntime and others.
            torch-export: a .pt2 program for PyTorch.
        out: the folder to write to (default RUN/export).
        which: the student of the last or of the best epoch.
        branch: another branch than the student, by number or name: 2 or branch2.
        data: real images for the check (default: the run's dataset).
        device: auto, cpu, cuda or cuda:N.
    """
    from fastokd.export import export_student, get_format, measure_accuracy, student_record
    from fastokd.train.run_folder import RunFolder
    from fastokd.train.runs import load_run, provenance

    folder, form = RunFolder.open(run), get_format(to)
    settings = folder.load_config()
    index = None if branch is None else _branch_index(branch, settings.num_branches())
    form.describe(
        {"name": _network_name(settings, index)}
    )  # what cannot be made is refused before the images are read
    trained = load_run(run, which, data, device)
    model = trained.evaluator.model
    student = (trained.evaluator.student() if index is None else model.student(index)).eval()
    name, layout = (
        (model.name, {}) if index is None else _branch_architecture(trained, index, student)
    )
    # Measured as it is deployed, alone and in float32, not under the run's autocast.
    accuracy = measure_accuracy(student, trained.loader)
    record = student_record(
        name,
        trained.dataset,
        accuracy=accuracy,
        epoch=trained.state["epoch"],
        layout=layout,
        provenance={
            **provenance(settings, folder, trained.state["data"].get("fingerprint")),
            "checkpoint": which,
            "branch": (model.kept if index is None else index) + 1,
        },
    )
    target, compared = export_student(
        student, record, to, out or run / "export", trained.loader, trained.evaluator.device
    )
    console = _console()
    parameters = sum(value.numel() for value in student.parameters())
    same = (
        "the same logits bit for bit"
        if not compared.difference
        else (
            f"logits within {compared.difference:.1e} (allowed: {form.tolerance:g} of the largest),"
            f" the same class for {compared.same_top1}"
        )
    )
    console.print(
        f"wrote {target} and {form.record_name}: {name} alone, {parameters:,} parameters",
        markup=False,
    )
    console.print(
        f"run from that file without the branches: {same} on {compared.num_images} images, accuracy"
        f" {100 * compared.accuracy:.2f} %",
        markup=False,
    )


@command
def compare(
    runs: Runs = (),
    out: File = None,
    format: Literal["auto", "terminal", "markdown", "csv", "html"] = "auto",
    latency: bool = True,
) -> None:
    """Compare runs: errors over seeds, what the students cost, and what training costs beside the
    student alone.

    Args:
        runs: run folders. Those that differ in the seed alone are taken together.
        out: write to this file (default: print).
        format: auto is what --out ends in, .md, .csv or .html, else terminal.
        latency: measure the students' latencies on this machine.
    """
    from fastokd.experiments.analysis.compare import compare as compare_groups
    from fastokd.experiments.analysis.runs import read_runs

    found = compare_groups(read_runs(runs), latency)
    ending = out.suffix.lower() if out else ""
    form = (
        {".md": "markdown", ".csv": "csv", ".html": "html"}.get(ending, "terminal")
        if format == "auto"
        else format
    )
    text = {
        "terminal": found.as_text,
        "markdown": found.as_markdown,
        "csv": found.as_csv,
        "html": found.as_html,
    }[form]()
    if out is None:
        print(text, end="")
    else:
        _write_text(out, text)


@command
def plot(runs: Runs = (), out: Path = Path("plots")) -> None:
    """Draw what runs recorded: accuracies, loss terms, schedules and throughput by epoch, as PNG
    and SVG files.

    Args:
        runs: run folders. Those that differ in the seed alone are one line with a band.
        out: the folder for the pictures.
    """
    from fastokd.experiments.analysis.curves import PICTURES, draw_curves
    from fastokd.experiments.analysis.runs import read_runs, remarks_of, title

    groups = read_runs(runs)
    files = draw_curves(
        {group.label: [run.records for run in group.runs] for group in groups},
        out,
        title(groups),
        ("png", "svg"),
        PICTURES,
    )
    console = _console()
    for remark in remarks_of(groups):
        console.print(remark, markup=False)
    console.print(
        f"wrote {len(files)} files to {out}:"
        f" {', '.join(dict.fromkeys(file.stem for file in files))}",
        markup=False,
    )


@command
def report(runs: Runs = (), out: Path = Path("report.html"), latency: bool = True) -> None:
    """Write one HTML page about runs: their comparison, what differs in their configurations, their
    curves, and what 'fastokd analyze' found of them. The page needs no other file and no network.

    Args:
        runs: run folders. Those that differ in the seed alone are taken together.
        out: the page.
        latency: measure the students' latencies on this machine.
    """
    from fastokd.experiments.analysis.compare import compare as compare_groups
    from fastokd.experiments.analysis.curves import require_matplotlib
    from fastokd.experiments.analysis.report import report_page
    from fastokd.experiments.analysis.runs import read_runs

    groups = read_runs(runs)
    require_matplotlib()  # before anything is measured
    _write_text(out, report_page(groups, compare_groups(groups, latency)))


def _write_text(path: Path, text: str) -> None:
    from fastokd.storage import write_text

    write_text(path, text)
    _console().print(f"wrote {path}", markup=False)


@command
def sweep(
    recipe: Text = None,
    config: File = None,
    data: Text = None,
    set: Settings = (),
    seeds: int = 1,
    out: File = None,
    devices: str = "auto",
    per_device: str = "auto",
    dry_run: bool = False,
) -> int:
    """Train every combination of some values, with several seeds, and compare the students' errors.
    The same command again goes on.

    A run that fails is reported, and the others go on; the exit code is then that of the first that
    failed.

    Args:
        recipe: start from this published configuration (see 'fastokd recipes').
        config: start from this YAML file, for example a run's config.yaml.
        data: the dataset, as 'fastokd train --data' takes it.
        set: a field of the configuration, or an option as method_options.NAME, with its value, or
            with several for the grid: branches=2,3,4. Values are written as in YAML: null for the
            default, brackets around a list, quotes around a comma.
        seeds: how many runs of every point, with seeds from 0.
        out: the folder (default sweeps/RECIPE, or sweeps/MODEL-METHOD). A larger grid may go on in
            the folder of a smaller.
        devices: cpu, or GPUs as cuda:0,cuda:1; auto is all GPUs, or the CPU where there is none.
        per_device: how many runs at once on each device; auto is as many as its memory and the
            cores allow.
        dry_run: print the runs, and what is measured so far; train nothing.
    """
    from fastokd.experiments.recipes import get_recipe
    from fastokd.experiments.sweep.grid import parse_values
    from fastokd.experiments.sweep.sweep import Results, plan_sweep, run_sweep

    base = _settings(recipe, config, _absolute_data(data))
    plan = plan_sweep(base, get_recipe(recipe) if recipe else None, parse_values(set), seeds, out)
    return _run_queue(
        plan,
        dry_run,
        devices,
        per_device,
        run_sweep,
        lambda failed: Results.of(plan, failed).as_text(),
    )


@command
def reproduce(
    table: Pos[Text] = None,
    data: Text = None,
    rows: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[PATTERN ...]", help_behavior_hint="")
    ] = (),
    seeds: Whole = None,
    epochs: Whole = None,
    set: Settings = (),
    out: File = None,
    devices: str = "auto",
    per_device: str = "auto",
    dry_run: bool = False,
) -> int:
    """Run the recipes of a published table, and put what they measured beside what the paper
    reports. The same command again goes on.

    Args:
        table: the table, for example ahbf-table1; without it the tables are listed.
        data: the dataset, as 'fastokd train --data' takes it.
        rows: only recipes with such names, for example '*-resnet32-*' (default: all of the table).
            The others stay as they are.
        seeds: how many runs of each recipe, with seeds from 0 (default: as many as the paper has).
        epochs: scale all schedules to this number of epochs (default: the recipes' own).
        set: another value for a field of every recipe, as 'fastokd sweep --set' takes it:
            precision=fp32.
        out: the folder (default reproduce/TABLE).
        devices: cpu, or GPUs as cuda:0,cuda:1; auto is all GPUs, or the CPU where there is none.
        per_device: how many runs at once on each device; auto is as many as its memory and the
            cores allow.
        dry_run: print the runs, and what is measured so far; train nothing.
    """
    from fastokd.experiments.sweep.grid import parse_values
    from fastokd.experiments.sweep.reproduce import (
        ReproductionResults,
        plan_reproduction,
        run_reproduction,
        table_of_tables,
    )

    if table is None:
        print(table_of_tables().as_text())
        return EXIT_OK
    plan = plan_reproduction(
        table, _absolute_data(data).get("data", ""), rows, seeds, epochs, parse_values(set), out
    )
    return _run_queue(
        plan,
        dry_run,
        devices,
        per_device,
        run_reproduction,
        lambda failed: ReproductionResults.of(plan, failed).as_text(),
    )


def _absolute_data(data: str | None) -> dict[str, Any]:
    """The field ``data``, if it was given, so that runs can be resumed and evaluated from any
    folder.
    """
    from fastokd.data import absolute_spec

    return {} if data is None else {"data": absolute_spec(data)}


def _run_queue(
    plan: Any,
    dry_run: bool,
    devices: str,
    per_device: str,
    run: Callable[..., Any],
    results: Callable[[Mapping[str, str]], str],
) -> int:
    """Run what is planned, or only say what that is, and print what is measured."""
    from fastokd.experiments.sweep.queue import parse_devices, parse_per_device

    say = functools.partial(_console().print, markup=False)
    if dry_run:
        plan.check()
        states = [(job.name, job.state()) for job in plan.queue]
        for name, state in states:
            say(f"{name}: {state}")
        say(
            f"{len(states)} runs in {plan.out}, {sum(state == 'finished' for _, state in states)}"
            " finished\n"
        )
        print(results({}))
        return EXIT_OK
    outcome = run(plan, parse_devices(devices), parse_per_device(per_device), say)
    print(f"\n{results(outcome.failed)}\n")
    say(f"runs, tables and numbers: {plan.out}")
    if outcome.failed:
        failed = ", ".join(outcome.failed)
        print(
            f"fastokd: {len(outcome.failed)} of {len(plan.queue)} runs failed: {failed}; the same"
            " command tries them again",
            file=sys.stderr,
        )
    if outcome.signal:
        print(f"fastokd: stopped by {outcome.signal}; the same command goes on", file=sys.stderr)
    return outcome.exit_code


@command
def show(
    method: Pos[str],
    branches: Whole = None,
    preset: str = "paper",
    format: Literal["text", "mermaid", "svg"] = "text",
    method_options: Options = (),
) -> None:
    """Draw a method's distillation graph with its effective coefficients.

    Args:
        method: the method, for example ahbf.
        branches: number of branches (default: the method's).
        preset: the loss options: paper or code.
        format: text, a Mermaid flowchart, or an SVG picture.
        method_options: loss options as NAME=VALUE.
    """
    from fastokd.graph import draw_mermaid, draw_svg
    from fastokd.methods import get_method
    from fastokd.train.config import TrainConfig, check_method

    config = TrainConfig(
        method=method,
        preset=preset,
        branches=branches,
        method_options=_parse_options(method_options),
    )
    check_method(config)
    loss = get_method(method).loss_class(
        num_branches=config.num_branches(), **config.loss_options()
    )
    print(
        loss.draw()
        if format == "text"
        else {"mermaid": draw_mermaid, "svg": draw_svg}[format](loss.graph)
    )


@command
def data() -> None:
    """Look at a dataset before it is trained on, or write it anew: see 'fastokd data --help'."""


@functools.partial(command, group=data_app)
def check(
    data: Pos[str],
    write_list: File = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
    workers: Whole = None,
) -> None:
    """Look at every image, and say what is wrong: damaged and misnamed files, classes, duplicates.
    Exit code 3 if there are problems.

    Args:
        data: the dataset, as 'fastokd train --data' takes it.
        write_list: write the images without problems to this .csv file, which --data takes.
        json_output: print JSON, with every file that has a problem.
        workers: processes that decode (default: one per CPU core).
    """
    from fastokd.data.check import PROBLEMS, REMARKS, check_dataset
    from fastokd.errors import summarize

    if write_list is not None and write_list.suffix.lower() != ".csv":
        raise ConfigError(
            f"--write-list {write_list}: --data knows a list by its name, so it must end in .csv"
        )
    with _progress_bar("looking at images") as progress:
        report = check_dataset(data, workers, progress)
    if write_list is not None:
        report.write_clean(write_list)
    if json_output:
        print(json.dumps(report.as_json(), indent=2))
    else:
        console = _console()
        counts = ", ".join(
            f"{count} {split or 'training'} images in {report.classes[split]} classes"
            for split, count in report.images.items()
        )
        console.print(f"{report.root}: {counts}", markup=False)
        if report.sizes:
            (small, large), formats = (
                report.sizes,
                ", ".join(f"{count} {name}" for name, count in report.formats.items()),
            )
            console.print(
                f"sizes {small[0]} x {small[1]} to {large[0]} x {large[1]}; {formats}; colours: "
                + ", ".join(f"{count} {name}" for name, count in report.modes.items()),
                markup=False,
            )
        for title, found, meaning in (
            ("problem", report.problems, PROBLEMS),
            ("remark", report.remarks, REMARKS),
        ):
            if found:
                table = Table(box=None, pad_edge=False)
                for column in (title, "number", "what it means"):
                    table.add_column(column, justify="right" if column == "number" else "left")
                for what, names in found.items():
                    table.add_row(what, str(len(names)), meaning[what])
                Console(highlight=False).print(table)
                for what, names in found.items():
                    console.print(f"  {what}: {summarize(names, 3)}", markup=False)
        if write_list is not None:
            console.print(
                f"wrote {write_list}: {len(report.clean)} images without problems; train with"
                f" --data {write_list}",
                markup=False,
            )
    if report.problems:
        raise DataError(
            f"{sum(map(len, report.problems.values()))} problems; --json names every file,"
            " --write-list FILE.csv writes a list without them"
        )


@functools.partial(command, group=data_app)
def convert(data: Pos[str], out: Path, shorter_side: int, workers: Whole = None) -> None:
    """Write a dataset again, scaled down, as a tree of class folders. After an interruption, the
    same command continues.

    Args:
        data: the dataset, as 'fastokd train --data' takes it.
        out: a new folder.
        shorter_side: scale images down to this shorter side in pixels.
        workers: processes (default: one per CPU core).
    """
    from fastokd.data.convert import convert_dataset

    with _progress_bar("converting") as progress:
        outcome = convert_dataset(data, out, shorter_side, workers, progress)
    _console().print(
        f"wrote {outcome.written} images to {outcome.out}"
        + (f"; {outcome.kept} were there already" if outcome.kept else "")
        + f"; train with --data {outcome.out}",
        markup=False,
    )


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Says on stderr how far something is: a bar on a terminal, else a line now and then."""
    from fastokd.train.progress import Counter

    counter = Counter(title)
    try:
        yield counter
    finally:
        counter.close()


@command
def bench() -> None:
    """Measure a training step on this machine, one optimization at a time: see 'fastokd bench
    --help'.
    """


@functools.partial(command, group=bench_app)
def step(
    model: str = "resnet32",
    method: str = "ahbf",
    branches: Whole = None,
    aux_blocks: int = 4,
    at: Text = None,
    batch_size: int = 128,
    data: str = "synthetic",
    image_size: Whole = None,
    num_classes: Whole = None,
    device: str = "auto",
    seconds: float = 10.0,
    steps: Whole = None,
    out: Path = Path("bench-out"),
    profile: bool = False,
) -> None:
    """Train as research code does, then with one more optimization per row: images per second,
    memory, and the loss's share of the step.

    Writes step-ladder.json and, where matplotlib is installed, step-ladder.svg. The rows train the
    same network on the same images.

    Args:
        model: the network, as 'fastokd train' takes it.
        method: the method; it must not need a trained teacher.
        branches: number of branches (default: the method's).
        aux_blocks: auxiliary blocks that each hierarchy level adds.
        at: for networks of torchvision and timm, the first module that every branch has for itself.
        batch_size: images per step.
        data: synthetic (random images), or a dataset as 'fastokd train --data' takes it, of which a
            part is decoded.
        image_size: height and width in pixels (default: 32, or the data's own).
        num_classes: of synthetic images (default 10).
        device: auto, cpu, cuda or cuda:N.
        seconds: how long each row is measured; the first row is measured as long beside each.
        steps: steps of each of the five windows of a row, instead of --seconds.
        out: folder for the files.
        profile: also write step-trace.json, a trace of the last row for Perfetto or
            chrome://tracing, and print its top operations.
    """
    from fastokd.data import absolute_spec
    from fastokd.experiments.step_benchmark import (
        StepBenchmark,
        StepRow,
        decoded_images,
        report,
        synthetic_images,
    )
    from fastokd.train.config import TrainConfig, check_config
    from fastokd.train.data import open_data, with_augmentation
    from fastokd.train.distributed import choose_device

    synthetic = data == "synthetic"
    if not synthetic and num_classes is not None:
        raise ConfigError(
            f"--num-classes {num_classes} is for synthetic images; {data} has classes of its own:"
            " leave it out"
        )
    if num_classes is not None and num_classes < 2:
        raise ConfigError(f"--num-classes {num_classes}: it must be at least 2")
    config = TrainConfig(
        data="" if synthetic else absolute_spec(data),
        model=model,
        method=method,
        branches=branches,
        aux_blocks=aux_blocks,
        at=at,
        batch_size=batch_size,
        image_size=image_size,
        lr=0.01,
        device=device,
    )
    where = choose_device(device)
    check_config(config)
    if synthetic:
        images = synthetic_images(config, 10 if num_classes is None else num_classes)
    else:
        with _progress_bar("reading images") as progress:
            images = decoded_images(
                config, with_augmentation(config, open_data(config, where, progress=progress))
            )
    benchmark = StepBenchmark(config, images, where, seconds=seconds, steps=steps)
    console = _console()
    height, width = images.image_size
    console.print(
        f"{model}, method {method}, {config.num_branches()} branches, batch {batch_size}, {height}"
        f" x {width}, {images.num_classes} classes ({images.name}), on {where}",
        markup=False,
    )
    rows: list[StepRow] = []
    for row in benchmark.rows():
        rows.append(row)
        console.print(
            f"  {row.name}: "
            + (
                row.reason
                or f"{row.images_per_second[0]:,.0f} images/s, {row.times_first[0]:.2f} x"
            ),
            markup=False,
        )
    found = report(benchmark, rows)
    _print_ladder(found)
    _write_ladder(found, out)
    if profile:
        trace, table = benchmark.profile(out)
        console.print(table, markup=False)
        console.print(f"wrote {trace}: open it in https://ui.perfetto.dev", markup=False)


def _print_ladder(found: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    on_gpu = any(row["peak_bytes"] is not None for row in found["rows"])
    for column in (
        "row",
        "images/s",
        "slowest-fastest",
        "ms/step",
        "x first",
        "loss",
        *["GPU memory"] * on_gpu,
        "start, s",
    ):
        table.add_column(column, justify="left" if not table.columns else "right", no_wrap=True)
    for row in found["rows"]:
        name = {"lever": "+ ", "alternative": "or ", "student": "= "}.get(row["kind"], "") + row[
            "name"
        ]
        if row["reason"]:
            table.add_row(f"{name}: {row['reason']}".replace("[", "\\["))
            continue
        median, low, high = row["images_per_second"]
        memory = [f"{row['peak_bytes'] / 2**30:.2f} GiB"] if on_gpu else []
        table.add_row(
            name,
            f"{median:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            f"{row['milliseconds']:.2f}",
            f"{row['times_first'][0]:.2f}",
            "-" if row["loss_share"] is None else f"{row['loss_share']:.1%}",
            *memory,
            f"{row['start_seconds']:.1f}",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(
        console.width, 120
    )  # a narrow window wraps lines, which is better than numbers cut off
    console.print("")
    console.print(table)
    print(
        "\n+ one more optimization than the + rows above; or: an alternative; =: the"
        f" student without teaching. Images/s: median of {found['windows']} windows; x first: each"
        " window against one of the first row right before it;\nloss: its share of a step, timed"
        " alone; start: the first steps, with compilation"
    )
    if found["teaching_costs"]:
        print(
            "teaching costs: a step with all optimizations takes"
            f" {found['teaching_costs']:.2f} times that of the student alone"
        )


def _write_ladder(found: dict[str, Any], out: Path) -> None:
    from fastokd.errors import MissingExtra
    from fastokd.experiments.analysis.step_figure import draw_step_benchmark
    from fastokd.storage import write_json

    path = out / "step-ladder.json"
    write_json(path, found)
    try:
        picture = f" and {draw_step_benchmark(found, path.with_suffix('.svg'))}"
    except MissingExtra as error:
        picture = f"; no picture: {error}"
    _console().print(f"wrote {path}{picture}", markup=False)


@command
def methods() -> None:
    """List the methods, and how many branches each takes."""
    from fastokd.methods import get_method, list_methods

    table = Table(box=None, pad_edge=False)
    for column in ("method", "branches", "networks", "presets", "what it is"):
        table.add_column(column, no_wrap=column == "method")
    for name in list_methods():
        method = get_method(name)
        low, high = method.branch_range
        count = f"{low} to {high} ({method.default_branches})" if high > low else f"{low}"
        table.add_row(
            name,
            count,
            " or ".join(method.topologies),
            ", ".join(method.loss_class.presets),
            method.summary,
        )
    Console(highlight=False).print(table)
    print("train with one: fastokd train --method NAME; see its graph: fastokd show NAME")


@command
def models(
    name: Pos[Text] = None,
    method: str = "ahbf",
    branches: Whole = None,
    aux_blocks: int = 4,
    at: Text = None,
    topology: Text = None,
    compression: bool = False,
    num_classes: int = 10,
    image_size: Whole = None,
) -> None:
    """List the networks with what they cost, or one in detail, branch by branch.

    Args:
        name: the network to show in detail: one of the list, or torchvision:NAME or timm:NAME;
            peers may differ: resnet20,resnet32.
        method: the method whose training network is counted.
        branches: number of branches (default: the method's).
        aux_blocks: auxiliary blocks that each hierarchy level adds.
        at: for networks of torchvision and timm, the first module that every branch has for itself;
            without it the places where they can be split are listed.
        topology: branches, which share a trunk, or peers, which are whole networks (default: the
            method's).
        compression: make the student the deepest branch, and each other smaller by aux_blocks
            blocks.
        num_classes: number of classes.
        image_size: height and width in pixels (default: what the network is made for).
    """
    from fastokd.methods import get_method
    from fastokd.models import is_library_name, list_models

    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size}: it must be at least 1")
    layout = {
        "method": method,
        "num_classes": num_classes,
        "num_branches": branches,
        "aux_blocks": aux_blocks,
        "topology": topology,
        "compression": compression,
    }
    if name is None:
        _print_networks(list_models(), layout, image_size)
        return
    if (
        is_library_name(name)
        and "," not in name
        and at is None
        and "peers" not in (topology, get_method(method).topologies[0])
    ):
        from fastokd.models.libraries import library_split_points

        print(f"{name} can be split at: {', '.join(library_split_points(name)) or 'no place'}")
        print(
            f"what it costs: fastokd models {name} --at PLACE; train it: fastokd train --model"
            f" {name} --at PLACE --data FOLDER"
        )
        return
    _print_network(name, {**layout, "at": at}, image_size)


@command
def doctor(json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Say what this machine has and what is missing, with the command that mends it. Put it into
    every bug report.

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


@command
def recipes(name: Pos[Text] = None) -> None:
    """List the published configurations with the errors that the papers report in %, or print one
    whole.

    Args:
        name: the recipe to print, with the source of every value; or a part of some names, for
            example cifar100-resnet32.
    """
    from fastokd.experiments.recipes import get_recipe, list_recipes, recipe_groups

    part = name or ""
    if part in list_recipes() or not any(part in key for key in list_recipes()):
        print(get_recipe(part).to_yaml(), end="")
        return
    for heading, _, group in recipe_groups():
        shown = {key: recipe for key, recipe in group.items() if part in key}
        if shown:
            table = Table(box=None, pad_edge=False)
            table.add_column("recipe", no_wrap=True)
            table.add_column("error, %, published")
            for key, recipe in shown.items():
                table.add_row(key, recipe.reported())
            print(heading)
            Console(highlight=False).print(table, "")
    print(
        "see one whole with: fastokd recipes NAME; run it with: fastokd train --recipe NAME --data"
        " FOLDER"
    )


def _costs(
    name: str, layout: Mapping[str, Any], image_size: int | None
) -> tuple[dict[str, Any], int]:
    """The costs of networks laid out by these keywords of ``create_model``, and the image size they
    are for. No weights are made.
    """
    import torch

    from fastokd.models import create_model, find_backbone
    from fastokd.models.summary import check_images, model_costs

    with torch.device("meta"):
        model = create_model(name, **layout)
    made_for = max(find_backbone(part, layout.get("at")).image_size for part in model.names)
    if image_size is not None:
        check_images(model, (image_size, image_size), made_for)
    size = image_size or made_for
    return model_costs(model, size), size


def _print_networks(
    names: Sequence[str], layout: Mapping[str, Any], image_size: int | None
) -> None:
    from fastokd.methods import list_methods
    from fastokd.models import allowed_methods

    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("network", "left"),
        ("pixels", "right"),
        ("million\nparams", "right"),
        ("\nMFLOPs", "right"),
        (f"{layout['method']}:\nparams", "right"),
        ("\nMFLOPs", "right"),
        ("methods", "left"),
    ):
        table.add_column(column, justify=justify, no_wrap=True, vertical="bottom")
    for name in names:
        costs, size = _costs(name, layout, image_size)
        cells = [
            text
            for part in ("student", "training")
            for text in (f"{costs[part].parameters / 1e6:.2f}", f"{costs[part].flops / 1e6:.0f}")
        ]
        allowed = allowed_methods(name)
        table.add_row(
            name, str(size), *cells, "all" if allowed == list_methods() else ", ".join(allowed)
        )
    Console(highlight=False, soft_wrap=True).print(table)
    print(
        f"student and training network for {layout['num_classes']} classes; FLOPs of one image"
        " forward, 2 per multiply-add; one in detail: fastokd models NAME; all methods:"
        f" {', '.join(list_methods())}"
    )
    print(
        "any classifier of torchvision or timm: torchvision:NAME or timm:NAME with --at PLACE;"
        " fastokd models torchvision:resnet18 lists the places"
    )


def _print_network(name: str, layout: Mapping[str, Any], image_size: int | None) -> None:
    from fastokd.methods import get_method, list_methods
    from fastokd.models import allowed_methods

    costs, size = _costs(name, layout, image_size)
    peers = (layout["topology"] or get_method(layout["method"]).topologies[0]) == "peers"
    table = Table(box=None, pad_edge=False)
    for column in (f"{name}, {layout['method']}", "parameters", "MFLOPs"):
        table.add_column(column, justify="left" if not table.columns else "right")
    titles = {"student": "student, alone", "training": "training network"}
    for part, cost in costs.items():
        table.add_row(
            titles.get(part, f"{part}, a peer" if peers else f"{part}, with the trunk"),
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:,.2f}",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    allowed = [
        method
        for method in list_methods()
        if all(method in allowed_methods(part.strip()) for part in name.split(","))
    ]
    print(
        f"{layout['num_classes']} classes, images of {size} x {size}; methods: {', '.join(allowed)}"
    )


def _train(
    given: dict[str, Any],
    recipe: str | None,
    config: Path | None,
    out: Path | None,
    resume: str | None,
    allow_config_change: bool,
    quiet: bool,
    signals: Any,
) -> int:
    """The command ``train`` with the fields of the configuration that were ``given``, in each of
    its processes.
    """
    from fastokd.data import absolute_spec
    from fastokd.train.distributed import process_group
    from fastokd.train.progress import Reporter
    from fastokd.train.run_folder import RunFolder
    from fastokd.train.session import begin_run, resume_run
    from fastokd.train.trainer import RunIsFinished

    if "data" in given:
        given["data"] = absolute_spec(
            given["data"]
        )  # the run can then be resumed and evaluated from any folder
    batch_size = given.pop("batch_size", None)
    number, largest_batch = _parse_batch_size(batch_size)
    if number is not None:
        given["batch_size"] = number
    for name in ("method_options", "loader_options"):
        if name in given:
            given[name] = _parse_options(given[name])
    if "resize_schedule" in given:
        given["resize_schedule"] = _parse_schedule(given["resize_schedule"])
    begins = resume in (None, "auto")
    if begins:
        settings = _settings(recipe, config, given)
    elif others := [
        name for name, value in (("recipe", recipe), ("config", config), ("out", out)) if value
    ]:
        raise ConfigError(
            "--resume goes on with the run's own configuration; leave out"
            f" {', '.join('--' + name for name in others)}"
        )
    elif largest_batch is not None:
        raise ConfigError(
            f"--resume goes on with the run's own batch size; leave out --batch-size {batch_size}"
        )
    else:
        settings = dataclasses.replace(RunFolder.open(Path(resume)).load_config(), **given)
    name = (
        f"{recipe or settings.model.replace(':', '-') + '-' + settings.method}-seed{settings.seed}"
    )
    with process_group(settings.device) as ranks:
        reporter = Reporter(quiet=quiet, silent=not ranks.is_main)
        if not ranks.is_main:
            warnings.simplefilter("ignore")  # the main process warns of the same
        try:
            if begins:
                trainer = begin_run(
                    settings,
                    out,
                    name,
                    reporter,
                    resume == "auto",
                    allow_config_change,
                    signals,
                    largest_batch,
                )
            else:
                trainer = resume_run(Path(resume), reporter, allow_config_change, signals, **given)
        except RunIsFinished as error:
            if resume != "auto":
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


def _field_names() -> set[str]:
    from fastokd.train.config import TrainConfig

    return {item.name for item in dataclasses.fields(TrainConfig)}


def _settings(recipe: str | None, config: Path | None, given: dict[str, Any]) -> Any:
    """The configuration: a recipe or a file or the defaults, with what was given on top."""
    from fastokd.experiments.recipes import get_recipe
    from fastokd.train.config import TrainConfig, override, read_config

    if recipe and config:
        raise ConfigError("give --recipe or --config, not both")
    if recipe:
        base = get_recipe(recipe).config
    elif config:
        base = read_config(config)
    else:
        base = TrainConfig()
    return override(base, given)


def _parse_options(items: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values are read as numbers and booleans where they are."""
    from fastokd.train.config import option_value

    options: dict[str, Any] = {}
    for item in items:
        name, mark, text = item.partition("=")
        if not mark or not name:
            raise ConfigError(f"method option '{item}' is not of the form NAME=VALUE")
        options[name] = option_value(text)
    return options


def _parse_batch_size(text: str | None) -> tuple[int | None, int | None]:
    """The batch size, or the largest that may be chosen by memory."""
    from fastokd.train.memory import LARGEST_BATCH

    if text is None:
        return None, None
    found = re.fullmatch(r"(auto)(?::(\d+))?|(\d+)", text, re.ASCII)
    if found is None or (found[2] is not None and int(found[2]) < 8):
        raise ConfigError(
            f"--batch-size {text}: it is a whole number, auto, or auto:N with the most that it may"
            " choose, at least 8"
        )
    if found[1]:
        return None, int(found[2] or LARGEST_BATCH)
    return int(text), None


def _parse_schedule(items: Sequence[str]) -> dict[int, int]:
    """``EPOCH:SIZE`` pairs."""
    found = [re.fullmatch(r"(\d+):(\d+)", item) for item in items]
    if wrong := [item for item, match in zip(items, found, strict=True) if match is None]:
        raise ConfigError(
            f"resize schedule '{wrong[0]}' is not of the form EPOCH:SIZE, such as 0:128"
        )
    return {int(match[1]): int(match[2]) for match in found if match is not None}


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
        table.add_row(
            f"{name} (student)" if name == kept else name,
            f"{100 * summary.last[name]:.2f} %",
            f"{100 * summary.best[name]:.2f} %",
        )
    Console(highlight=False).print(table)
    console = _console()
    console.print(
        f"{summary.images_per_second:.0f} img/s, {summary.seconds:.1f} s of training; best = the"
        " student's best epoch on the evaluation split",
        markup=False,
    )
    console.print(f"student: {summary.student}   run: {path}", markup=False)


def _branch_index(text: str, num_branches: int) -> int:
    number = text.removeprefix("branch")
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= num_branches:
        raise ConfigError(
            "unknown branch"
            f" '{text}'{did_you_mean(text, [f'branch{m}' for m in range(1, num_branches + 1)])}"
        )
    return int(number) - 1


def _network_name(config: Any, index: int | None) -> str:
    """The registry's name of the network that a branch has, of the kept one for None, before
    anything is built.
    """
    from fastokd.methods import get_method
    from fastokd.models import model_name
    from fastokd.models.libraries import is_library_name

    names = config.model_names()
    name = (
        names[0]
        if len(names) == 1
        else names[get_method(config.method).kept if index is None else index]
    )
    return name if is_library_name(name) else model_name(name)


def _branch_architecture(trained: Any, index: int, network: Any) -> tuple[str, dict[str, Any]]:
    """The name of a branch's network and, unless it is the plain one of that name, which branch of
    which model it is.
    """
    from fastokd.models import create_student
    from fastokd.train.build import model_layout

    def shapes(module: Any) -> dict[str, Any]:
        return {name: value.shape for name, value in module.state_dict().items()}

    name = trained.evaluator.model.names[index]
    if shapes(create_student(name, len(trained.dataset.classes))) == shapes(network):
        return name, {}
    return trained.config.model, {"branch": index, **model_layout(trained.config)}


def _evaluate_export(path: Path, data: str | None, split: str | None, device: str) -> None:
    from fastokd.data import Augment, open_evaluation
    from fastokd.data.loader import best_file_loader, get_loader_kind
    from fastokd.errors import CheckpointError, DataError, escape, summarize
    from fastokd.export import measure_accuracy, open_export
    from fastokd.train.distributed import choose_device

    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder or an exported student")
    file, record, runtime = open_export(path, choose_device(device))
    stored, preprocessing, classes = record["accuracy"], record["preprocessing"], record["classes"]
    if data is None:
        raise ConfigError(
            f"an exported student needs --data; {file} was measured on {escape(stored['data'])}"
        )
    height, width = preprocessing["image_size"]
    mean, std, side = preprocessing["mean"], preprocessing["std"], min(height, width)
    # Scaled further than to what is cut: the student was trained on random resized crops, and so
    # are the pictures framed.
    cropped = preprocessing.get("shorter_side", side) > side
    found = open_evaluation(data, split, height if height == width else None, decoded=not cropped)
    if list(found.classes) != classes:
        raise CheckpointError(
            f"the student knows {len(classes)} classes ({summarize(classes, 3)}), the data has"
            f" {len(found.classes)} ({summarize(found.classes, 3)})"
        )
    settings: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "num_classes": len(classes),
        "augment": Augment(crop_scale=(0.08, 1.0)) if cropped else Augment(),
    }
    if cropped:
        kind = get_loader_kind(best_file_loader(runtime.device, [found.images]))
        settings["size"] = (height, width)
    else:
        kind = get_loader_kind("resident")
        size = tuple(found.images.images.shape[2:])
        if size != (height, width):
            raise DataError(
                f"{found.name}: the images are {size[0]} x {size[1]}, the student takes {height} x"
                f" {width}; bring them to that size"
            )
    accuracy = measure_accuracy(
        runtime.run, kind.make(found.images, 256, False, runtime.device, 0, **settings)
    )
    console = _console()
    console.print(
        f"{file}: {escape(record['architecture']['name'])} alone ({record['export']['to']}) on"
        f" {found.name}, {len(found.images)} {found.images.name} images",
        markup=False,
    )
    console.print(
        f"accuracy {100 * accuracy:.2f} % (stored with the export: {100 * stored['top1']:.2f} % on"
        f" {escape(stored['data'])}, {stored['num_images']} {escape(stored['split'])} images)",
        markup=False,
    )


def _usage_error(text: str, name: str) -> str:
    """The parser's complaint, which it prints as a box, as one line that says how to mend it."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        line = line.strip(" |│")
        if re.fullmatch(r"[─-]{10,}", line):
            sections.append([])
        elif not line.startswith(("╭", "╰", "+")):
            sections[-1] += line.split()
    # Drawn in ASCII, the first section is the title.
    whole, body = (
        " ".join(" ".join(part) for part in sections),
        " ".join(sections[-1 if len(sections) == 1 else "╭" not in text]),
    )
    more = f"'{name} --help' lists what there is"
    if found := re.match(r"Unrecognized options: ([^\s,]+)", body):
        meant = re.search(r"Perhaps you meant: (--\S+)", whole)
        hint = f"; did you mean '{meant[1]}'?" if meant else ";"
        what = "option" if found[1].startswith("-") else "argument"
        return f"unknown {what} '{found[1]}'{hint} {more}"
    if found := re.match(r"Error parsing (\S+): .*? from \['(.*?)'\]", body):
        takes = re.search(rf"Argument helptext: {re.escape(found[1])} (\S+)", whole)
        kind = {"N": "a whole number", "X": "a number"}.get(
            takes[1] if takes else "", "a value it takes"
        )
        return f"{found[1]}: '{found[2]}' is not {kind}; {more}"
    if found := re.match(
        r"(invalid choice '.*?' for argument '.*?')\. Expected one of \((.*?)\)", body
    ):
        # In whatever order the parser keeps them, and with a None that only says that the option
        # may be left out.
        choices = sorted(choice for choice in re.findall(r"'(.*?)'", found[2]) if choice != "None")
        return f"{found[1]} (choices: {', '.join(choices)}); {more}"
    return f"{body.rstrip('.')}; {more}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        from fastokd.version import __version__

        print(f"fastokd {__version__}")
        return EXIT_OK
    group, prog, description = app, "fastokd", DESCRIPTION
    commands: tuple[str, ...] = (
        "demo",
        "train",
        "eval",
        "analyze",
        "export",
        "compare",
        "plot",
        "report",
        "sweep",
        "reproduce",
        "show",
        "models",
        "methods",
        "data",
        "bench",
        "doctor",
        "recipes",
    )
    if arguments[:1] == ["data"]:
        arguments = arguments[1:]
        group, prog, description, commands = (
            data_app,
            "fastokd data",
            DATA_DESCRIPTION,
            ("check", "convert"),
        )
    elif arguments[:1] == ["bench"]:
        arguments = arguments[1:]
        group, prog, description, commands = (
            bench_app,
            "fastokd bench",
            BENCH_DESCRIPTION,
            ("step",),
        )
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        print(
            f"fastokd: unknown command '{arguments[0]}'{did_you_mean(arguments[0], commands)}",
            file=sys.stderr,
        )
        return EXIT_USAGE
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call = group.cli(
                args=arguments or ["--help"],
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            print(
                f"fastokd: {_usage_error(complaint.getvalue(), ' '.join([prog, arguments[0]]))}",
                file=sys.stderr,
            )
            return EXIT_USAGE
        return EXIT_OK
    _arguments[:] = given
    try:
        return call() or EXIT_OK
    except FastOKDError as error:
        if not error.repeated:
            print(f"fastokd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        if not getattr(error, "repeated", False):
            print(f"fastokd: {error}" if str(error) else "fastokd: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        # What the machine refuses outside the files we write ourselves: a name too long, standard
        # output full or closed.
        print(
            f"fastokd: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"[
                :500
            ],
            file=sys.stderr,
        )
        return EXIT_IO
