"""The student as TorchScript, for programs that still load it; PyTorch calls it deprecated and
points to ``torch.export``.

Such a file is a program for PyTorch's interpreter. It runs no Python, but a file from a stranger
should not be opened.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastokd.errors import CheckpointError, first_line
from fastokd.export.archive import RECORD_FILE, find_record
from fastokd.export.formats import ExportFormat, Runtime, torch_runtime


@contextlib.contextmanager
def _deprecated() -> Iterator[None]:
    """Without PyTorch's notes that TorchScript is deprecated: the help of ``fastokd export`` says
    so.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)"
        )
        yield


def _describe(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {"torch": torch.__version__}


def _encode(student: nn.Module, record: dict[str, Any]) -> bytes:
    example, buffer = torch.zeros(2, 3, *record["preprocessing"]["image_size"]), io.BytesIO()
    with _deprecated():
        # Traced again PyTorch would compare outputs for these zeros; they are compared for real
        # images instead.
        torch.jit.save(
            torch.jit.trace(student, example, check_trace=False),
            buffer,
            _extra_files={RECORD_FILE: json.dumps(record)},
        )
    return buffer.getvalue()


def _open(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
    try:
        with _deprecated():
            network = torch.jit.load(io.BytesIO(blob), map_location=device)
    except Exception as error:  # damaged bytes make the loader raise almost anything
        raise CheckpointError(
            f"{where} cannot be loaded by torch {torch.__version__} ({first_line(error)}); export"
            " it again"
        ) from error
    return torch_runtime(network, device, where)


TORCHSCRIPT = ExportFormat(
    "torchscript",
    "student.torchscript.pt",
    ".torchscript.pt",
    1e-4,
    _describe,
    _encode,
    find_record,
    _open,
)
