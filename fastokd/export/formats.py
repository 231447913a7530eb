"""The file formats of a student, one file each (those that are state dicts share one), and what a
format is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastokd.errors import CheckpointError, first_line
from fastokd.registry import Registry


class Runtime(NamedTuple):
    """A file ready to be run."""

    run: Callable[[Tensor], Tensor]
    """Normalised images float32 [B, 3, H, W], on ``device``, to logits [B, C] on it."""
    device: torch.device


def torch_runtime(network: nn.Module, device: torch.device, where: str) -> Runtime:
    """The runtime of a network or program that lies on ``device``; ``where`` names its file in
    messages.
    """

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        try:
            return network(images)
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # programs say with an assertion which sizes they take
            raise CheckpointError(
                f"{where} cannot be run on images {list(images.shape)} ({first_line(error)});"
                " export it again"
            ) from error

    return Runtime(run, device)


@dataclass(frozen=True)
class ExportFormat:
    """A file format.

    Args:
        name: as in ``--to``.
        filename: of the file in the export folder.
        suffix: what its name ends in, by which a file is recognised.
        tolerance: by how much logits may differ from the student's, as a fraction of the largest
            (or of 1); 0 where the same PyTorch kernels run, and the logits are the student's bit
            for bit.
        describe: a record's ``architecture`` to what ``export`` says in it; raises ``ConfigError``
            or ``MissingExtra`` where the format cannot be made.
        encode: the student (on the CPU, in evaluation mode) and its record to the file's content.
        find_record: a file's content to the record's JSON, or None where it is no export; raises
            anything for damage.
        open: content, record, the file's name for messages, and the wanted device to a runtime;
            raises ``CheckpointError`` or ``MissingExtra``.
    """

    name: str
    filename: str
    suffix: str
    tolerance: float
    describe: Callable[[Mapping[str, Any]], dict[str, Any]]
    encode: Callable[[nn.Module, dict[str, Any]], bytes]
    find_record: Callable[[bytes], str | bytes | None]
    open: Callable[[bytes, dict[str, Any], str, torch.device], Runtime]

    @property
    def record_name(self) -> str:
        """The name of the JSON beside the file."""
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
    """The format of that name.

    Raises:
        ConfigError: there is none.
    """
    return _formats.get(name)
