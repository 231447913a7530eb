"""The safetensors formats: for the network of fastokd, torchvision or timm."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastokd.errors import CheckpointError, ConfigError, MissingExtra, escape, first_line
from fastokd.export.formats import ExportFormat, Runtime, torch_runtime
from fastokd.export.record import KEY
from fastokd.export.weights import load_weights, strip_wrappers
from fastokd.models import create_student
from fastokd.models.libraries import LIBRARIES, library_network
from fastokd.plugins import is_loaded
from fastokd.storage import write_atomically, write_json


def encode(student: nn.Module, record: dict[str, Any]) -> bytes:
    """The weights under the network's names, with the record in the metadata."""
    from safetensors.torch import save

    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in strip_wrappers(student.state_dict()).items()
    }
    return save(tensors, metadata={KEY: json.dumps(record)})


def find_record(blob: bytes) -> str | None:
    from safetensors import deserialize

    deserialize(blob)  # checks header, offsets and length
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return header.get("__metadata__", {}).get(KEY)


def write_student(path: Path, student: nn.Module, record: dict[str, Any]) -> None:
    """Write ``path`` (safetensors) and the record (same name, ``.json``), each atomically.

    Raises:
        StorageError: the disk refused.
    """
    blob = encode(student, record)
    write_atomically(path, lambda file: file.write(blob))
    write_json(path.with_suffix(".json"), record)


def build_student(blob: bytes, record: dict[str, Any], where: str) -> nn.Module:
    """fastokd's network of a record with the weights of a file, in evaluation mode.

    Raises:
        CheckpointError: unknown architecture, or weights of another one.
    """
    architecture = record["architecture"]
    _check_code(architecture["name"], where)
    name = f"the architecture {architecture}"
    return _filled(lambda: create_student(**architecture), blob, where, name)


def _check_code(name: str, where: str) -> None:
    """Refuse to import a module because a file names it."""
    for network in name.partition("@")[0].split(","):
        module, colon, _ = network.strip().partition(":")
        if colon and module not in LIBRARIES and not is_loaded(module):
            raise CheckpointError(
                f"{where} is the network {escape(network)} of the module {escape(module)}; if you"
                " trust that code, import it first, or pass --plugin with its file or with"
                f" {escape(module)}@FOLDER"
            )


def _filled(build: Callable[[], nn.Module], blob: bytes, where: str, what: str) -> nn.Module:
    from safetensors.torch import load

    try:
        network = build()
    except MissingExtra:
        raise
    except Exception as error:  # a damaged record makes builders raise almost any exception
        raise CheckpointError(f"{where} does not fit {what}: {first_line(error)}") from error
    load_weights(network, load(blob), where)
    return network.eval()


_RESNETS = {f"resnet{depth}_imagenet": f"resnet{depth}" for depth in (18, 34, 50)}
TWINS: dict[str, dict[str, str]] = {
    "torchvision": {**_RESNETS, "mobilenetv2_x1_0_imagenet": "mobilenet_v2"},
    "timm": _RESNETS,
}
"""For each library, its names for the networks of this package with the same weights. A
``library:name`` network needs no entry.
"""

_KEYWORDS = {"googlenet": "(aux_logits=False)", "inception_v3": "(aux_logits=False)"}
"""Arguments that torchvision's constructors need in addition to the number of classes."""


def _twin(library: str, architecture: Mapping[str, Any]) -> str:
    """The library's name for a record's network.

    Raises:
        ConfigError: the library has no such network; the message lists those it has.
    """
    name, plain = architecture["name"], "branch" not in architecture
    if plain:
        if name.startswith(f"{library}:"):
            return name.partition(":")[2]
        if name in TWINS[library]:
            return TWINS[library][name]
    known = f"{', '.join(TWINS[library])} and every {library}:NAME"
    raise ConfigError(
        f"{library} has no network with the weights of {'' if plain else 'this branch of '}{name};"
        f" it has them of {known}. Use --to safetensors, onnx or torch-export"
    )


def _describe_torchvision(architecture: Mapping[str, Any]) -> dict[str, Any]:
    name = _twin("torchvision", architecture)
    return {
        "constructor": f"torchvision.models.{name}{_KEYWORDS.get(name, '')}",
        "torchvision": version("torchvision"),
    }


def _describe_timm(architecture: Mapping[str, Any]) -> dict[str, Any]:
    name = _twin("timm", architecture)
    try:
        import timm
    except ImportError:
        raise MissingExtra("the timm format needs timm: pip install -e '.[timm]'") from None
    if not timm.is_model(name):  # for example a name that it would download
        fix = "install a version that has it, or use --to safetensors"
        raise ConfigError(f"timm {timm.__version__} has no model '{name}'; {fix}")
    return {"constructor": f"timm.create_model('{name}')", "timm": timm.__version__}


def _open_student(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
    return torch_runtime(build_student(blob, record, where).to(device), device, where)


def _library_format(
    library: str, describe: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> ExportFormat:
    def open_twin(blob: bytes, record: dict[str, Any], where: str, device: torch.device) -> Runtime:
        architecture = record["architecture"]

        def build() -> nn.Module:
            describe(architecture)  # raises for what the installed library does not have
            name = f"{library}:{_twin(library, architecture)}"
            return library_network(name, architecture["num_classes"])

        network = _filled(build, blob, where, f"{record['export'].get('constructor')}")
        return torch_runtime(network.to(device), device, where)

    filename = f"student.{library}.safetensors"
    return ExportFormat(
        library, filename, ".safetensors", 0.0, describe, encode, find_record, open_twin
    )


SAFETENSORS = ExportFormat(
    "safetensors",
    "student.safetensors",
    ".safetensors",
    0.0,
    lambda architecture: {},
    encode,
    find_record,
    _open_student,
)
TORCHVISION = _library_format("torchvision", _describe_torchvision)
TIMM = _library_format("timm", _describe_timm)
