"""Writing a student in any format, checked before it is there, and opening it again."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastokd.data import Batch
from fastokd.errors import CheckpointError, ConfigError, MissingExtra, first_line
from fastokd.export.check import Comparison, compare_logits
from fastokd.export.formats import ExportFormat, Runtime, get_format, list_formats
from fastokd.export.record import parse_record
from fastokd.export.state_dict import build_student
from fastokd.export.weights import unwrap
from fastokd.storage import write_atomically, write_json


class Export(NamedTuple):
    """An exported student: its file, the record in it, and how it is run."""

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
) -> tuple[Path, Comparison]:
    """Write a student and the JSON beside it; neither is there unless the file's content gives the
    student's logits.

    Args:
        student: images [B, 3, H, W] to logits [B, C], float32; left alone.
        record: see ``student_record``; ``export`` in it is filled in here.
        to: a format, see ``list_formats``.
        folder: where to; made if it is not there. A file that is an export of the same run is
            replaced.
        batches: real images on any device, for the check.
        device: where the check runs, for formats that can run elsewhere than on the CPU.

    Raises:
        ConfigError: the format is unknown or does not fit the network, or the file there is none of
            this run.
        MissingExtra: a package is missing.
        CheckpointError: what the format makes of the student is not the student.
        StorageError: the disk refused.
    """
    form = get_format(to)
    path = folder / form.filename
    record = {
        **record,
        "export": {"to": to, "tolerance": form.tolerance, **form.describe(record["architecture"])},
    }
    _check_replaceable(path, record)
    try:
        blob = form.encode(_plain(student, "cpu"), record)
    except Exception as error:  # exporters raise anything at all for a network they cannot follow
        raise CheckpointError(
            f"{record['architecture']['name']} cannot be written as {to}: {first_line(error)}; use"
            " --to safetensors"
        ) from error
    runtime = form.open(blob, parse_record(form.find_record(blob), to), to, torch.device(device))
    on_device = (
        Batch(batch.images.to(runtime.device), batch.target.to(runtime.device), batch.index)
        for batch in batches
    )
    comparison = compare_logits(
        _plain(student, runtime.device), runtime.run, on_device, form.tolerance
    )
    write_atomically(path, lambda file: file.write(blob))
    write_json(path.with_name(form.record_name), record)
    return path, comparison


def _plain(student: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy without wrappers as a file holds it: in evaluation mode, its weights contiguous, whose
    convolutions may round otherwise than those of channels-last weights.
    """
    student = unwrap(student).to(device).to(memory_format=torch.contiguous_format)
    return student.eval().requires_grad_(False)


def open_export(path: str | Path, device: torch.device | str = "cpu") -> Export:
    """An exported student of any format, ready to be run.

    Args:
        path: the file, or a folder that holds one export.
        device: where to run it; ONNX runs on the CPU all the same.

    Raises:
        CheckpointError: missing, damaged, not an export of fastokd, or one of several.
        MissingExtra: a package is missing that runs it.
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
        CheckpointError: missing, damaged, or of an architecture that this fastokd does not know.
    """
    path = find_export(Path(path), (".safetensors",))
    blob = _read(path)
    _, record = _identify(path, blob)
    return build_student(blob, record, str(path)), record


def find_export(path: Path, suffixes: Collection[str] = ()) -> Path:
    """The export that a path means: the file itself, or the one in that folder.

    Args:
        suffixes: what its name may end in; empty for every format.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    known = tuple(dict.fromkeys(get_format(name).suffix for name in list_formats()))
    wanted = tuple(suffixes) or known
    if path.is_dir():
        found = sorted(
            file
            for file in path.iterdir()
            if file.name.endswith(wanted) and file.is_file() and not file.name.startswith(".")
        )
        if len(found) > 1:
            raise CheckpointError(
                f"{path} holds {len(found)} exports ({', '.join(file.name for file in found)});"
                " name the file that is meant"
            )
        path = found[0] if found else path
    if not path.is_file():
        raise CheckpointError(f"there is no student at {path}; make one with 'fastokd export RUN'")
    if path.name.endswith(".torchscript.pt"):
        raise CheckpointError(
            f"{path}: TorchScript exports are no longer supported; export the run again with --to"
            " torch-export or onnx"
        )
    if not path.name.endswith(known):
        raise CheckpointError(
            f"{path} is no export by its name: they end in {', '.join(known)}; a run is given as"
            " its folder"
        )
    if not path.name.endswith(wanted):
        raise CheckpointError(
            f"{path} is a program and no network's weights: run it with open_export or 'fastokd"
            " eval', or export the run with --to safetensors"
        )
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; check its permissions"
        ) from error


def _identify(path: Path, blob: bytes) -> tuple[ExportFormat, dict[str, Any]]:
    """The format of a file and its record.

    Raises:
        CheckpointError: damaged, or not an export of fastokd.
    """
    forms = {
        name: get_format(name)
        for name in list_formats()
        if path.name.endswith(get_format(name).suffix)
    }
    kind = path.suffix.removeprefix(".")
    try:
        text = next(iter(forms.values())).find_record(blob)
    except MissingExtra:
        raise
    except Exception as error:  # damaged bytes make readers raise almost anything
        raise CheckpointError(
            f"{path} is damaged or not a {kind} file ({first_line(error)}); export it again"
        ) from error
    record = parse_record(text, str(path))
    if record["export"]["to"] not in forms:
        raise CheckpointError(
            f"{path} says that it is of the format {record['export']['to']!r}, which a {kind} file"
            " cannot be; export it again"
        )
    return forms[record["export"]["to"]], record


_SAME_RUN = ("run", "method", "preset", "branches", "branch", "aux_blocks", "seed")


def _check_replaceable(path: Path, record: dict[str, Any]) -> None:
    """Refuse to write over anything but an earlier export of the same run.

    Raises:
        ConfigError: something else is there.
    """

    def identity(one: dict[str, Any]) -> list[Any]:
        return [
            one["architecture"],
            one["classes"],
            one["preprocessing"],
            *(one["provenance"].get(name) for name in _SAME_RUN),
        ]

    beside = path.with_name(get_format(record["export"]["to"]).record_name)
    what = path if path.exists() else beside
    if not what.exists():
        return
    try:
        there = (
            _identify(path, _read(path))[1]
            if what is path
            else parse_record(_read(beside), str(beside))
        )
    except CheckpointError:
        raise ConfigError(
            f"{what} is there and is no export of fastokd; move it away, or choose another folder"
            " with --out"
        ) from None
    if identity(there) != identity(record):
        run = ", ".join(
            f"{name} {there['provenance'].get(name)}"
            for name in _SAME_RUN
            if there["provenance"].get(name) is not None
        )
        raise ConfigError(
            f"{what} is the export of another run ({there['architecture']['name']}, {run}); choose"
            " another folder with --out"
        )
