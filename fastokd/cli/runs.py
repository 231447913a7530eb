"""Commands for a run or an exported student."""

import json as json_format
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastokd.cli.options import Which, make_table, print_table, progress_bar, say
from fastokd.errors import EXIT_DATA, EXIT_OK, CheckpointError, ConfigError, escape
from fastokd.experiments.analysis.study import analyze_run
from fastokd.export import find_images, list_formats, open_export, predict_files
from fastokd.export.evaluate import evaluate_export
from fastokd.metrics import METRICS
from fastokd.train.distributed import choose_device
from fastokd.train.export_run import export_run
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run


def evaluate(
    path: tyro.conf.Positional[Path],
    data: str | None = None,
    which: Which = "last",
    split: str | None = None,
    device: str = "auto",
) -> None:
    """Measure the accuracy, top-5 accuracy, negative log-likelihood (NLL) and expected calibration
    error (ECE) of a run (every branch and teacher assistant) or of an exported student.

    Args:
        path: Run folder, or an exported student: a file of any format, or the folder that holds it
        data: Dataset (default: that of the run). A folder needs no train/, and may consist of class
            folders, all of whose images are then evaluated
        which: Checkpoint of the last or the best epoch; for runs only
        device: auto, cpu, cuda or cuda:N; ONNX always runs on the CPU
    """
    if not (path / "config.yaml").is_file():
        _evaluate_export(path, data, split, device)
        return
    run = load_run(path, which, data, device, split)
    images = run.images
    say(
        f"{path}: {which} checkpoint, {_epochs(run.state['epoch'])}; {run.dataset.name},"
        f" {len(images)} {images.name} images"
    )
    result = run.evaluator.measure(run.loader)
    shown = {key: metric for key, metric in METRICS.items() if key in result.metrics}
    table = make_table("row", "accuracy %", *(metric.heading for metric in shown.values()))
    for name, value in result.accuracies.items():
        student = name == run.evaluator.reported
        more = (metric.text(result.metrics[key].get(name)) for key, metric in shown.items())
        table.add_row(f"{name} (student)" if student else name, f"{100 * value:.2f}", *more)
    print_table(table)


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _evaluate_export(path: Path, data: str | None, split: str | None, device: str) -> None:
    result = evaluate_export(path, data, split, choose_device(device))
    record, stored = result.record, result.record["accuracy"]
    say(
        f"{result.file}: {escape(record['architecture']['name'])} alone"
        f" ({record['export']['to']}) on {result.data}, {result.num_images} {result.split} images"
    )
    say(
        f"accuracy {100 * result.accuracy:.2f} % (stored with the export:"
        f" {100 * stored['top1']:.2f} % on {escape(stored['data'])}, {stored['num_images']}"
        f" {escape(stored['split'])} images)"
    )
    values = result.metrics
    say(", ".join(metric.words(values[key]) for key, metric in METRICS.items() if key in values))


def predict(
    path: tyro.conf.Positional[Path],
    images: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    top: int = 5,
    json: bool = False,
    device: str = "auto",
) -> int:
    """Classify image files with the student of a run or an exported student.

    Images that cannot be read are reported in their place, and the exit code is then 3.

    Args:
        path: Run folder (the student of its last epoch), or an exported student: a file of any
            format, or the folder that holds it
        images: Image files, folders (with subfolders) or patterns such as 'photos/*.jpg'
        top: Number of most probable classes to print
        json: Print JSON
        device: auto, cpu, cuda or cuda:N; ONNX always runs on the CPU
    """
    if top < 1:
        raise ConfigError(f"--top {top}: it must be at least 1")
    if (path / "config.yaml").is_file():
        run = RunFolder.open(path)
        run.load_config()  # imports the run's plug-ins
        if not run.student.is_file():
            raise CheckpointError(
                f"{path} is not finished; write the student of its last checkpoint with"
                f" 'fastokd export {path}', and pass {path / 'export'}"
            )
        path = run.student
    files = find_images(images)
    results = []
    for result in predict_files(open_export(path, choose_device(device)), files, top):
        results.append(result)
        if not json:
            classes = (f"{escape(name)} {100 * value:.2f} %" for name, value in result.classes)
            say(f"{escape(result.file)}: {', '.join(classes) or f'not read: {result.error}'}")
    if json:
        print(json_format.dumps([result.as_json() for result in results], indent=2))
    failed = sum(bool(result.error) for result in results)
    if failed:
        print(f"fastokd: {failed} of {len(files)} images cannot be read", file=sys.stderr)
    return EXIT_DATA if failed else EXIT_OK


def analyze(
    run: tyro.conf.Positional[Path],
    data: str | None = None,
    which: Which = "last",
    split: str | None = None,
    out: Path | None = None,
    max_images: int = 500,
    device: str = "auto",
) -> None:
    """Measure how the branches and teacher assistants of a run differ, where they err, and what the
    gates do; write numbers and plots.

    Args:
        run: Run folder
        data: Dataset with the same classes (default: that of the run)
        out: Folder for analysis.json and the plots (default: RUN/analysis)
        max_images: Largest number of misclassified images in the t-SNE plot; 0: no plot
    """
    with progress_bar("reading images") as decoding, progress_bar("analyzing images") as progress:
        analysis = analyze_run(run, which, data, split, max_images, device, decoding, progress)
    folder = out or run / "analysis"
    plots = analysis.write(folder)
    _print_analysis(analysis.record)
    more = f" and as .svg and .png: {', '.join(plots)}" if plots else ""
    say(f"wrote {folder / 'analysis.json'}{more}")


_COLUMNS = (
    ("accuracy\n%", "accuracy", 100, ".2f"),
    ("top-5\n%", "top5_accuracy", 100, ".2f"),
    ("NLL", "cross_entropy", 1, ".3f"),
    ("ECE\n%", "calibration_error", 100, ".2f"),
    ("agreement\n%", "agreement", 100, ".2f"),
    ("logit\ndistance", "logit_distance", 1, ".3f"),
    ("softmax\ndistance", "softmax_distance", 1, ".3f"),
)


def _print_analysis(record: Mapping[str, Any]) -> None:
    student, measures = record["student"], record["measures"]
    say(
        f"{record['run']}: {record['checkpoint']} checkpoint, {_epochs(record['epochs'])};"
        f" {record['data']}, {record['images']} {record['split']} images, of which {student} gets"
        f" {record['student_errors']} wrong"
    )
    columns = [column for column in _COLUMNS if column[1] in measures]
    table = make_table("row", *(heading for heading, *_ in columns))
    for name in record["rows"]:
        cells = []
        for _, key, factor, form in columns:
            values = measures[key]["values"]
            if len(measures[key]["axes"]) == 2:  # compared with the student
                value = None if name == student else values[student][name]
            else:
                value = values[name]
            cells.append("" if value is None else f"{factor * value:{form}}")
        table.add_row(f"{name} (student)" if name == student else name, *cells)
    print_table(table)
    say(
        f"Agreement and distances are relative to {student}; logit distances are over the images"
        f" that {student} misclassifies."
    )
    for measure in measures.values():
        if not measure["axes"] and measure["values"] is not None:
            say(f"{measure['title']}: {measure['values']:.4f}")
    for mixture, weights in measures.get("mixing", {"values": {}})["values"].items():
        terms = (f"{weight:.3f} {name}" for name, weight in weights.items())
        say(f"{mixture}: {' + '.join(terms)}")
    for note in record["notes"]:
        say(f"note: {note}")


def export(
    run: tyro.conf.Positional[Path],
    to: Annotated[str, tuple(list_formats())] = "safetensors",
    out: Path | None = None,
    which: Which = "last",
    branch: str | None = None,
    data: str | None = None,
    device: str = "auto",
    with_preprocessing: bool = False,
) -> None:
    """Write the plain student of a run with its classes, preprocessing, accuracy and provenance,
    verified on real images.

    Args:
        run: Run folder
        to: Format. safetensors: weights for load_student. torchvision, timm: weights for a network
            of that library. onnx: for onnxruntime and others. torch-export: a .pt2 program
        out: Folder to write to (default: RUN/export)
        branch: Another branch than the student, by number or name: 2 or branch2
        data: Real images for the verification (default: the dataset of the run)
        with_preprocessing: Formats onnx and torch-export: take pixels, uint8 [B, 3, H, W] from 0 to
            255, and normalize them in the file
    """
    result = export_run(run, to, out, which, branch, data, device, with_preprocessing)
    compared = result.comparison
    same = (
        f"logits within {compared.difference:.1e} (allowed: {result.tolerance:g} of the largest),"
        f" the same class for {compared.same_top1}"
        if compared.difference
        else "the same logits bit for bit"
    )
    say(
        f"wrote {result.path} and {result.record_name}: {result.name} alone,"
        f" {result.num_parameters:,} parameters"
    )
    say(
        f"verified by running the file: {same} on {compared.num_images} images, accuracy"
        f" {100 * compared.accuracy:.2f} %"
    )
    if with_preprocessing:
        say(
            "input of the file: pixels, uint8 [B, 3, H, W] in RGB; it divides and normalizes them"
            " itself"
        )
