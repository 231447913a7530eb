"""The ``torch.export`` format (``.pt2``): a program for PyTorch that needs no Python source.

PyTorch's loader evaluates expressions of such a file and unpickles the parts declared as pickles.
Pickles are refused here, but do not open files from untrusted sources.
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
        node.meta.pop("stack_trace", None)  # contains local paths
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={RECORD_FILE: json.dumps(record)})
    return buffer.getvalue()


def _unsafe_reason(entries: Mapping[str, bytes]) -> str | None:
    """The reason why PyTorch must not load an archive of these files, because it would unpickle
    data or load a library; None if it can.
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
    # PyTorch's loader would unpickle data that weights_only refuses.
    torch.load(io.BytesIO(entries["data/sample_inputs/model.pt"]), weights_only=True)
    return None


def _open(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
    from torch.export.passes import move_to_device_pass

    try:
        entries = read_entries(blob)
        if reason := _unsafe_reason(entries):
            raise CheckpointError(
                f"{where} is refused: {reason}, which no student needs; export it again"
            )
        network = move_to_device_pass(
            torch.export.load(io.BytesIO(write_entries(entries))), device
        ).module()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the loader raise almost any exception
        raise CheckpointError(
            f"{where} cannot be loaded by torch {torch.__version__} ({first_line(error)}); export"
            " it again"
        ) from error
    return torch_runtime(network, device, where)


TORCH_EXPORT = ExportFormat(
    "torch-export", "student.pt2", ".pt2", 1e-4, _describe, _encode, find_record, _open
)
