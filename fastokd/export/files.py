"""Export of a student in any format, verified before it is written, and opening it again."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastokd.data import Batch
from fastokd.errors import CheckpointError, ConfigError, MissingExtra, first_line
from fastokd.export.check import Comparison, compare_logits
from fastokd.export.formats import ExportFormat, Runtime, get_format, list_formats
from fastokd.export.preprocessing import Normalize
from fastokd.export.record import parse_record
from fastokd.export.state_dict import build_student
from fastokd.export.weights import unwrap
from fastokd.storage import write_atomically, write_json


class Export(NamedTuple):
    """An exported student: its file, the record in it, and a runtime."""

    path: Path
    record: dict[str, Any]
    runtime: Runtime


def export_student(
    student: nn.Module,
    record: dict[str, Any],
    to: str,
    folder: Path,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    with_preprocessing: bool = False,
) -> tuple[Path, Comparison]:
    """Write a student and a JSON file with its record, after verifying that the file's content
    reproduces the student's logits.

    Args:
        student: images [B, 3, H, W] to logits [B, C], float32; not changed.
        record: see ``student_record``; its entry ``export`` is filled in.
        to: a format, see ``list_formats``.
        folder: the output folder, created if missing. An export of the same run is replaced.
        batches: real images on any device, for verification.
        device: of the verification, for formats that run on other devices than the CPU.
        with_preprocessing: write a program that takes pixels, uint8 [B, 3, H, W], and divides and
            normalizes them itself; formats onnx and torch-export.

    Raises:
        ConfigError: an unknown format or one that does not fit the network, or an existing file of
            another run.
        MissingExtra: a package is missing.
        CheckpointError: the export does not reproduce the student.
        StorageError: the disk refused.
    """
    form = get_format(to)
    path = folder / form.filename
    record = {
        **record,
        "export": {
            "to": to,
            "tolerance": form.tolerance,
            **form.describe(record["architecture"]),
            **({"with_preprocessing": True} if with_preprocessing else {}),
        },
    }
    check_preprocessing(to, with_preprocessing)
    _check_replaceable(path, record)
    try:
        network = _plain(student, "cpu")
        if with_preprocessing:
            network = nn.Sequential(Normalize(record["preprocessing"]), network).eval()
        blob = form.encode(network, record)
    except Exception as error:  # exporters raise any exception for unsupported networks
        name = record["architecture"]["name"]
        reason = f"{first_line(error)}; use --to safetensors"
        raise CheckpointError(f"{name} cannot be written as {to}: {reason}") from error
    runtime = form.open(blob, parse_record(form.find_record(blob), to), to, torch.device(device))
    on_device = (
        Batch(batch.images.to(runtime.device), batch.target.to(runtime.device), batch.index)
        for batch in batches
    )
    trained = _plain(student, runtime.device)
    comparison = compare_logits(trained, runtime.run, on_device, form.tolerance)
    write_atomically(path, lambda file: file.write(blob))
    write_json(path.with_name(form.record_name), record)
    return path, comparison


def check_preprocessing(to: str, with_preprocessing: bool) -> None:
    """Raise a ``ConfigError`` if a format cannot include the preprocessing."""
    if with_preprocessing and not get_format(to).is_program:
        programs = " or ".join(name for name in list_formats() if get_format(name).is_program)
        raise ConfigError(
            f"--with-preprocessing: {to} files hold weights only; use --to {programs}"
        )


def _plain(student: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy without wrappers, in evaluation mode, with contiguous weights as in a file: those of
    channels-last weights may round differently in convolutions.
    """
    student = unwrap(student).to(device).to(memory_format=torch.contiguous_format)
    return student.eval().requires_grad_(False)


def open_export(path: str | Path, device: torch.device | str = "cpu") -> Export:
    """Open an exported student of any format for running.

    Args:
        path: the file, or a folder that holds one export.
        device: the device to run on; ONNX always runs on the CPU.

    Raises:
        CheckpointError: missing, damaged, not an export of fastokd, or several exports.
        MissingExtra: a required package is missing.
    """
    path = find_export(Path(path))
    blob = _read(path)
    form, record = _identify(path, blob)
    return Export(path, record, form.open(blob, record, str(path), torch.device(device)))


def load_student(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A student as a plain network in evaluation mode, and its record.

    Args:
        path: a safetensors file (format safetensors, torchvision or timm), or a folder that holds
            one.

    Raises:
        CheckpointError: missing, damaged, or of an unknown architecture.
    """
    path = find_export(Path(path), (".safetensors",))
    blob = _read(path)
    _, record = _identify(path, blob)
    return build_student(blob, record, str(path)), record


def find_export(path: Path, suffixes: Collection[str] = ()) -> Path:
    """The export at a path: the file; in a folder ``student.safetensors``, else the only one.

    Args:
        suffixes: allowed endings of its name; empty for every format.

    Raises:
        CheckpointError: no export, or several.
    """
    known = tuple(dict.fromkeys(get_format(name).suffix for name in list_formats()))
    wanted = tuple(suffixes) or known
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        names = [name for name in names if name.endswith(wanted) and not name.startswith(".")]
        if (default := get_format("safetensors").filename) in names:
            names = [default]
        if len(names) > 1:
            listed = ", ".join(names)
            raise CheckpointError(f"{path} holds {len(names)} exports ({listed}); name the file")
        path = path.joinpath(*names)
    if not path.is_file():
        raise CheckpointError(f"there is no student at {path}; make one with 'fastokd export RUN'")
    if path.name.endswith(".torchscript.pt"):
        fix = "export the run again with --to torch-export or onnx"
        raise CheckpointError(f"{path}: TorchScript exports are no longer supported; {fix}")
    if not path.name.endswith(known):
        endings = f"which ends in {', '.join(known)}; for a run, pass its folder"
        raise CheckpointError(f"{path} is not an export by its name, {endings}")
    if not path.name.endswith(wanted):
        fix = "run it with open_export or 'fastokd eval', or export it with --to safetensors"
        raise CheckpointError(f"{path} is a program without a network's weights: {fix}")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = f"{error.strerror}; check its permissions"
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def _identify(path: Path, blob: bytes) -> tuple[ExportFormat, dict[str, Any]]:
    """The format of a file and its record.

    Raises:
        CheckpointError: damaged, or not an export of fastokd.
    """
    forms = {name: get_format(name) for name in list_formats()}
    forms = {name: form for name, form in forms.items() if path.name.endswith(form.suffix)}
    kind = path.suffix.removeprefix(".")
    try:
        text = next(iter(forms.values())).find_record(blob)
    except MissingExtra:
        raise
    except Exception as error:  # damaged bytes make readers raise almost any exception
        reason = f"damaged or not a {kind} file ({first_line(error)})"
        raise CheckpointError(f"{path} is {reason}; export it again") from error
    record = parse_record(text, str(path))
    to = record["export"]["to"]
    if to not in forms:
        wrong = f"declares the format {to!r}, which a {kind} file cannot have"
        raise CheckpointError(f"{path} {wrong}; export it again")
    return forms[to], record


_SAME_RUN = ("run", "method", "preset", "branches", "branch", "aux_blocks", "seed")


def _check_replaceable(path: Path, record: dict[str, Any]) -> None:
    """Raise ``ConfigError`` if a file is in the way that is not an export of the same run."""

    def identity(one: dict[str, Any]) -> list[Any]:
        parts = [one[name] for name in ("architecture", "classes", "preprocessing")]
        return [*parts, *(one["provenance"].get(name) for name in _SAME_RUN)]

    record_file = path.with_name(get_format(record["export"]["to"]).record_name)
    existing = path if path.exists() else record_file
    if not existing.exists():
        return
    try:
        blob = _read(existing)
        is_record = existing is record_file
        other = parse_record(blob, str(existing)) if is_record else _identify(path, blob)[1]
    except CheckpointError:
        fix = "move it, or choose another folder with --out"
        raise ConfigError(f"{existing} exists and is not an export of fastokd; {fix}") from None
    if identity(other) != identity(record):
        values = {name: other["provenance"].get(name) for name in _SAME_RUN}
        run = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
        run = f"{other['architecture']['name']}, {run}"
        fix = "choose another folder with --out"
        raise ConfigError(f"{existing} is the export of another run ({run}); {fix}")
