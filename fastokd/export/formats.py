"""The interface of an export format and the registry of formats."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastokd.errors import CheckpointError, first_line
from fastokd.registry import Registry


class Runtime(NamedTuple):
    """A loaded file."""

    run: Callable[[Tensor], Tensor]
    """Normalized images float32 [B, 3, H, W] on ``device`` to logits [B, C]."""
    device: torch.device


def torch_runtime(network: nn.Module, device: torch.device, where: str) -> Runtime:
    """The runtime of a network or program on ``device``; ``where`` names its file in messages."""

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        try:
            return network(images)
        except (RuntimeError, AssertionError) as error:  # programs assert their image sizes
            reason = f"images {list(images.shape)} ({first_line(error)}); export it again"
            raise CheckpointError(f"{where} cannot be run on {reason}") from error

    return Runtime(run, device)


@dataclass(frozen=True)
class ExportFormat:
    """A file format.

    Args:
        name: as in ``--to``.
        filename: of the file in the export folder.
        suffix: the ending by which a file is recognized.
        tolerance: allowed difference from the student's logits, as a fraction of the largest (or of
            1); 0 for formats that run the same PyTorch kernels and give equal bits.
        describe: maps a record's ``architecture`` to further entries of its ``export``; raises
            ``ConfigError`` or ``MissingExtra`` if the format does not support it.
        encode: maps the student (on the CPU, in evaluation mode) and its record to the content.
        find_record: maps the content to the record's JSON, or None if it is not an export; raises
            any exception for damage.
        open: maps content, record, the file's name for messages and a device to a runtime; raises
            ``CheckpointError`` or ``MissingExtra``.
        is_program: the file holds a program, which can include the preprocessing.
    """

    name: str
    filename: str
    suffix: str
    tolerance: float
    describe: Callable[[Mapping[str, Any]], dict[str, Any]]
    encode: Callable[[nn.Module, dict[str, Any]], bytes]
    find_record: Callable[[bytes], str | bytes | None]
    open: Callable[[bytes, dict[str, Any], str, torch.device], Runtime]
    is_program: bool = False

    @property
    def record_name(self) -> str:
        """The name of the JSON file with the record."""
        return "student.json" if self.name == "safetensors" else f"student.{self.name}.json"


_formats: Registry[ExportFormat] = Registry(
    "export format",
    "FORMAT",
    {
        "safetensors": "fastokd.export.state_dict:SAFETENSORS",
        "torchvision": "fastokd.export.state_dict:TORCHVISION",
        "timm": "fastokd.export.state_dict:TIMM",
        "onnx": "fastokd.export.onnx:ONNX",
        "torch-export": "fastokd.export.torch_export:TORCH_EXPORT",
    },
)


def list_formats() -> list[str]:
    """The names of all formats."""
    return list(_formats)


def get_format(name: str) -> ExportFormat:
    """The format of that name; a ``ConfigError`` suggests the closest one."""
    return _formats.get(name)
