"""The student as a ``torch.export`` program (``.pt2``): PyTorch's own way to deploy, no Python
source needed.

Such a file is a program. PyTorch's loader evaluates expressions of it and unpickles what says it is
a pickle; the latter is refused here, but a file from a stranger should still not be opened.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastokd.errors import CheckpointError, first_line
from fastokd.export.archive import RECORD_FILE, find_record, read_entries, write_entries
from fastokd.export.formats import ExportFormat, Runtime, torch_runtime


def _describe(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {"torch": torch.__version__}


def _encode(student: nn.Module, record: dict[str, Any]) -> bytes:
    example = torch.zeros(2, 3, *record["preprocessing"]["image_size"])
    program = torch.export.export(
        student, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={RECORD_FILE: json.dumps(record)})
    return buffer.getvalue()


def _refusal(entries: Mapping[str, bytes]) -> str | None:
    """Why PyTorch must not load an archive of these files: it would unpickle something, or load a
    library; None if it would not.
    """
    for name in entries:
        known = name in (
            "archive_format",
            "archive_version",
            "byteorder",
            "models/model.json",
            "data/sample_inputs/model.pt",
        ) or (
            name.startswith((".data/", "extra/", "data/weights/", "data/constants/"))
            and not name.endswith((".pt", ".so"))
        )
        if not known:
            return f"it holds {name}"
    for config in (
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
    ):
        for name, entry in json.loads(entries[config])["config"].items():
            if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                return f"{name} is a pickle"
    # What weights_only refuses, PyTorch's loader would unpickle all the same.
    torch.load(io.BytesIO(entries["data/sample_inputs/model.pt"]), weights_only=True)
    return None


def _open(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
    from torch.export.passes import move_to_device_pass

    try:
        entries = read_entries(blob)
        if reason := _refusal(entries):
            raise CheckpointError(
                f"{where} is refused: {reason}, which no student needs; export it again"
            )
        network = move_to_device_pass(
            torch.export.load(io.BytesIO(write_entries(entries))), device
        ).module()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the loader raise almost anything
        raise CheckpointError(
            f"{where} cannot be loaded by torch {torch.__version__} ({first_line(error)}); export"
            " it again"
        ) from error
    return torch_runtime(network, device, where)


TORCH_EXPORT = ExportFormat(
    "torch-export", "student.pt2", ".pt2", 1e-4, _describe, _encode, find_record, _open
)
