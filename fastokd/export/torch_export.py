"""The ``torch.export`` format (``.pt2``): a program for PyTorch that needs no Python source.

PyTorch's loader evaluates expressions of such a file and unpickles the parts declared as pickles.
Pickles are refused here, but do not open files from untrusted sources.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastokd.errors import CheckpointError, first_line
from fastokd.export.formats import ExportFormat, Runtime, torch_runtime
from fastokd.export.preprocessing import example_images, run_on_pixels
from fastokd.export.record import KEY

_RECORD_FILE = f"{KEY}.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_FILES = ("archive_format", "archive_version", "byteorder", "models/model.json", _SAMPLE_INPUTS)


def _describe(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {"torch": torch.__version__}


def _encode(student: nn.Module, record: dict[str, Any]) -> bytes:
    program = torch.export.export(
        student, (example_images(record),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains local paths
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_RECORD_FILE: json.dumps(record)})
    return buffer.getvalue()


def _read_entries(blob: bytes) -> dict[str, bytes]:
    """Every file of an archive, by its name below the archive's only folder.

    Raises:
        zipfile.BadZipFile: not an archive, truncated, damaged, or with two files of one name in any
            case.
    """
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = [(name, name.partition("/")[2]) for name in archive.namelist()]
        # PyTorch could read a second entry after the first was inspected; it ignores case.
        if len({inner.lower() for _, inner in names}) != len(names):
            raise zipfile.BadZipFile("a name is in it twice")
        return {inner: archive.read(name) for name, inner in names}  # read compares checksums


def _find_record(blob: bytes) -> bytes | None:
    return _read_entries(blob).get(f"extra/{_RECORD_FILE}")


def _unsafe_reason(entries: Mapping[str, bytes]) -> str | None:
    """The reason why PyTorch must not load an archive of these files, because it would unpickle
    data or load a library; None if it can.
    """
    for name in entries:
        in_folder = name.startswith((".data/", "extra/", "data/weights/", "data/constants/"))
        if name not in _FILES and not (in_folder and not name.endswith((".pt", ".so"))):
            return f"it holds {name}"
    for part in ("weights/model_weights", "constants/model_constants"):
        for name, entry in json.loads(entries[f"data/{part}_config.json"])["config"].items():
            if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                return f"{name} is a pickle"
    # PyTorch's loader would unpickle data that weights_only refuses.
    torch.load(io.BytesIO(entries[_SAMPLE_INPUTS]), weights_only=True)
    return None


def _open(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
    from torch.export.passes import move_to_device_pass

    try:
        entries = _read_entries(blob)
        if reason := _unsafe_reason(entries):
            reason = f"{reason}, which no student needs"
            raise CheckpointError(f"{where} is refused: {reason}; export it again")
        # Written again, so that PyTorch reads exactly the inspected content.
        inspected = io.BytesIO()
        with zipfile.ZipFile(inspected, "w") as archive:
            for name, content in entries.items():
                archive.writestr(f"archive/{name}", content)
        inspected.seek(0)
        network = move_to_device_pass(torch.export.load(inspected), device).module()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the loader raise almost any exception
        reason = f"torch {torch.__version__} ({first_line(error)}); export it again"
        raise CheckpointError(f"{where} cannot be loaded by {reason}") from error
    runtime = torch_runtime(network, device, where)
    return runtime._replace(run=run_on_pixels(runtime.run, record))


TORCH_EXPORT = ExportFormat(
    "torch-export",
    "student.pt2",
    ".pt2",
    1e-4,
    _describe,
    _encode,
    _find_record,
    _open,
    is_program=True,
)
