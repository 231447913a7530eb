"""The frozen teacher of a run, which ``teacher`` names: a network or stored rows."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastokd.data.files import IMAGENET_MEAN, IMAGENET_STD
from fastokd.errors import CheckpointError, ConfigError, class_differences, first_line, summarize
from fastokd.export import find_export, load_student, load_weights
from fastokd.methods import get_method
from fastokd.models.libraries import LIBRARIES, library_network, suggest_library, without_auxiliary
from fastokd.train.build import before_teaching, build_model, is_before_teaching
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig, one_teacher
from fastokd.train.config_files import load_config, load_run_plugins
from fastokd.train.data import AnyDataset, Normalization
from fastokd.train.pretrained import pretrained_weights
from fastokd.train.weight_files import fingerprint, read_file, unwrapped, without_prefix

RESIDENT_BYTES = 2**30
"""Stored rows up to this size are kept on the device; of larger ones each batch reads its own."""
LOOKED_AT = 1024
"""The number of stored rows that are checked and hashed for the fingerprint."""


class StoredRows:
    """A teacher's rows, floating [N, C], in the order of the training split."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self.table = table.to(device) if table.nbytes <= RESIDENT_BYTES else table

    def __call__(self, index: Tensor) -> Tensor:
        """The rows [B, C] in float32 of the images at positions int64 [B], on their device."""
        return self.table[index.to(self.table.device)].to(index.device, torch.float32)


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher: a network, images [B, 3, H, W] to logits [B, C], or stored rows.

    ``fingerprint`` is a SHA-256 of its weights, or of the stored rows' shape and of some of them;
    ``normalization`` is that of the images that the network needs.
    """

    description: str
    fingerprint: str
    network: nn.Module | None = None
    rows: StoredRows | None = None
    normalization: Normalization | None = None


class Renormalized(nn.Module):
    """A network, applied to images that are normalized by mean and standard deviation ``given``,
    where it needs ``wanted``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Normalization, wanted: Normalization) -> None:
        super().__init__()
        self.network = network
        mean, std, own_mean, own_std = torch.tensor([*given, *wanted]).view(4, 3, 1, 1)
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, C]."""
        return self.network(x * self.scale + self.shift)


def with_absolute_teacher(config: TrainConfig) -> TrainConfig:
    """The configuration with an absolute path of the teacher, to resume the run from any folder, in
    the field ``teacher``.
    """
    config = one_teacher(config)
    library, name, path = _parse(config.teacher_spec())
    if path is None:
        return config
    absolute = f"{library}:{name}:{path.absolute()}" if library else str(path.absolute())
    return dataclasses.replace(config, teacher=absolute)


def check_teacher(config: TrainConfig) -> None:
    """Check a run's teacher as far as possible before its data is read.

    Raises:
        ConfigError: the option is wrong.
        CheckpointError: the file is missing.
    """
    if not (spec := config.teacher_spec()):
        return
    library, name, path = _parse(spec)
    if path is None:
        pretrained_weights(library, name)
    elif not path.exists():
        known = None if library or path.name != spec else suggest_library(spec)
        hint = f"; for the published weights pass {known}" if known else "; pass its path"
        raise CheckpointError(f"there is no teacher at {path} (teacher={spec}){hint}")
    elif path.is_dir():
        find_export(path, (".safetensors",))
    elif not library and path.suffix not in (".pt", ".npy", ".safetensors"):
        raise ConfigError(
            f"teacher={spec}: {path.name} is not a run folder, a checkpoint (.pt), an exported"
            " student (.safetensors) or stored rows (.npy, .safetensors); for weights of a"
            " library's network use torchvision:NAME:FILE or timm:NAME:FILE"
        )
    stored = _holds_rows(library, path)
    for field in ("mixup", "cutmix"):
        if stored and (alpha := getattr(config, field)):
            raise ConfigError(
                f"{field}={alpha:g}: stored rows are of unmixed images; use 0, or a network"
            )
    if not stored and (rows := _setting(config, "teacher_rows")) != "logits":
        raise ConfigError(f"teacher_rows={rows!r}: teacher={spec} is a network; use logits")
    normalization = _setting(config, "teacher_normalization")
    if normalization != "data" and (not library or path is None):
        raise ConfigError(
            f"teacher_normalization={normalization!r} is for networks of torchvision and timm with"
            f" weights in a file, not for teacher={spec}; omit it"
        )
    if normalization == "library":
        pretrained_weights(library, name)


def _setting(config: TrainConfig, name: str) -> str:
    """The value of a field about the teacher, which methods that need one have as an option."""
    value = getattr(config, name)
    if get_method(config.method).needs_teacher:
        value = {**config.loss_options(), **config.model_options()}.get(name, value)
    return str(value)


def open_teacher(config: TrainConfig, dataset: AnyDataset, device: torch.device) -> Teacher | None:
    """The teacher that a run's configuration names; None without one.

    Raises:
        ConfigError, MissingExtra: the option is wrong, or its library is not installed.
        CheckpointError: missing, damaged, or with other classes or images than the run's.
    """
    if not (spec := config.teacher_spec()):
        return None
    library, name, path = _parse(spec)
    given: Normalization = (dataset.mean, dataset.std)
    wanted: Normalization
    if path is None:
        network, wanted = _pretrained_network(config, library, name, dataset)
    elif library:
        network = _library_network(library, name, path, len(dataset.classes))
        wanted = given
        if (choice := _setting(config, "teacher_normalization")) == "imagenet":
            wanted = IMAGENET_MEAN, IMAGENET_STD
        elif choice == "library":
            weights = pretrained_weights(library, name)
            wanted = weights.mean, weights.std
    elif _holds_rows(library, path):
        return _open_rows(path, _setting(config, "teacher_rows"), dataset, device)
    else:
        network, wanted = _own_network(path, dataset)
    _check_finite(network, spec)
    digest = fingerprint(network.state_dict())
    count = sum(parameter.numel() for parameter in network.parameters())
    if not np.allclose(given, wanted, rtol=1e-6, atol=1e-9):
        network = Renormalized(network, given, wanted)
    return Teacher(f"{spec}, {count:,} parameters", digest, network, normalization=wanted)


def _check_finite(network: nn.Module, spec: str) -> None:
    """Raise ``CheckpointError`` for a teacher with weights that are NaN or infinite."""
    states = network.state_dict().items()
    broken = [name for name, each in states if not bool(each.isfinite().all())]
    if broken:
        problem = f"non-finite numbers in {len(broken)} weights, e.g. {broken[0]}"
        raise CheckpointError(f"the teacher {spec} has {problem}; use another file of weights")


def teacher_network(config: TrainConfig, num_classes: int) -> nn.Module | None:
    """The network of a run's teacher, for its costs; None for stored rows and without a teacher.

    Raises:
        ConfigError, CheckpointError, MissingExtra: as ``open_teacher``. The weights of a library's
            network are not read.
    """
    library, name, path = _parse(config.teacher_spec())
    if library:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return library_network(f"{library}:{name}", num_classes)
    return None if path is None or _holds_rows(library, path) else read_network(path)[0]


def _parse(spec: str) -> tuple[str, str, Path | None]:
    """Library and network ("" for fastokd's own), and the file or folder; None for the library's
    published weights, and for no teacher.
    """
    head, _, rest = spec.partition(":")
    if head not in LIBRARIES:
        return "", "", Path(spec) if spec else None
    name, mark, file = rest.partition(":")
    if not name or bool(mark) != bool(file):
        raise ConfigError(
            f"teacher={spec}: name the network, {head}:NAME for its published weights or"
            f" {head}:NAME:FILE"
        )
    return head, name, Path(file) if file else None


def _holds_rows(library: str, path: Path | None) -> bool:
    """True if a file holds stored rows, not a network or weights of a library's network."""
    if library or path is None:
        return False
    if path.suffix != ".safetensors":
        return path.suffix == ".npy"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "fastokd" not in (file.metadata() or {}) and len(file.keys()) == 1
    except (SafetensorError, OSError) as error:
        message = f"{path} is damaged or not a safetensors file ({first_line(error)})"
        raise CheckpointError(message) from error


def _open_rows(path: Path, kind: str, dataset: AnyDataset, device: torch.device) -> Teacher:
    if path.suffix == ".npy":
        try:
            # Copy on write still reads rows on demand, and torch takes no read-only arrays.
            table = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        except (OSError, ValueError, TypeError) as error:
            message = f"{path} is damaged or not numeric ({first_line(error)})"
            raise CheckpointError(message) from error
    else:
        from safetensors.torch import load_file

        (table,) = load_file(path).values()
    wanted = (len(dataset.train), len(dataset.classes))
    if tuple(table.shape) != wanted or not table.is_floating_point():
        raise CheckpointError(
            f"{path} holds {table.dtype} {list(table.shape)}; rows for {wanted[0]} training images"
            f" and {wanted[1]} classes are floating {list(wanted)}"
        )
    index = torch.linspace(0, wanted[0] - 1, min(LOOKED_AT, wanted[0])).long()
    checked = table[index].contiguous()
    sample = checked.double()
    if not sample.isfinite().all():
        raise CheckpointError(f"{path} holds non-finite numbers")
    sums_to_one = bool((sample >= 0).all()) and bool(((sample.sum(1) - 1).abs() < 1e-2).all())
    if sums_to_one != (kind == "probabilities"):
        other = "logits" if kind == "probabilities" else "probabilities"
        rows = "probabilities" if sums_to_one else "rows that are not probabilities"
        raise CheckpointError(
            f"{path} holds {rows}, and teacher_rows={kind}; pass teacher_rows={other}"
        )
    labels = dataset.train.targets[index]
    accuracy = _check_agreement(path, sample.argmax(1), labels, wanted[1])
    header, content = repr((wanted, str(table.dtype))), checked.view(torch.uint8).numpy().tobytes()
    fingerprint = hashlib.sha256(header.encode() + content).hexdigest()
    description = f"{path}, {kind} of {wanted[0]} images; {accuracy}"
    return Teacher(description, fingerprint, rows=StoredRows(table, device))


def _check_agreement(path: Path, predicted: Tensor, labels: Tensor, classes: int) -> str:
    """The accuracy of stored rows on the training labels in words.

    Raises:
        CheckpointError: it is no better than that of the same predictions in random order, as for
            rows of other images or columns in another order.
    """
    count = len(labels)
    shares = [torch.bincount(each, minlength=classes) / count for each in (predicted, labels)]
    chance, accuracy = float(shares[0] @ shares[1]), float((predicted == labels).double().mean())
    text = f"accuracy {100 * accuracy:.1f} % on {count} training labels"
    if accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count) and chance < 0.9:
        raise CheckpointError(
            f"{path}: {text}, and {100 * chance:.1f} % is expected by chance; store the rows in the"
            " order of the training images and the columns in the order of the classes"
        )
    return text


def read_network(path: Path) -> tuple[nn.Module, Sequence[str], Mapping[str, Any]]:
    """The network of a run's checkpoint or of an exported student, its classes, and the record of
    its data.
    """
    if path.suffix != ".pt":
        network, record = load_student(path)
        return network, record["classes"], record["preprocessing"]
    state = load_checkpoint(path)
    classes = state["classes"]
    config = load_config(state["config"], f"the configuration in {path}")
    config = load_run_plugins(config, path.parent)
    if is_before_teaching(config, state):
        config = before_teaching(config)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, len(classes), torch.device("cpu"))
    load_weights(model, state["model"], str(path))
    return model.student().eval(), classes, state["data"]


def _own_network(path: Path, dataset: AnyDataset) -> tuple[nn.Module, Normalization]:
    """The network of a run's checkpoint or of an exported student, and its normalization."""
    network, classes, data = read_network(path)
    if list(classes) != list(dataset.classes):
        raise CheckpointError(
            f"the teacher {path} has the classes {summarize(classes, 4)}, the data has"
            f" {summarize(dataset.classes, 4)}{class_differences(classes, dataset.classes)}; use a"
            " teacher with the same classes and order"
        )
    if list(size := data["image_size"]) != list(dataset.image_size):
        own, (height, width) = dataset.image_size, size
        raise CheckpointError(
            f"the teacher {path} was trained on images of {height} x {width}, the run's are"
            f" {own[0]} x {own[1]}; use another teacher"
            + (f", or --image-size {height}" if height == width else "")
        )
    return network, (data["mean"], data["std"])


def _pretrained_network(
    config: TrainConfig, library: str, name: str, dataset: AnyDataset
) -> tuple[nn.Module, Normalization]:
    """A network of torchvision or timm with its published weights, and their normalization."""
    weights, count = pretrained_weights(library, name), len(dataset.classes)
    if weights.num_classes != count:
        raise CheckpointError(
            f"the teacher {weights.name} has weights for {weights.num_classes} classes, the data"
            f" has {count} ({summarize(dataset.classes, 4)}); use a teacher with the same classes"
            f" and order, or {weights.name}:FILE"
        )
    option = "--teacher-normalization library"
    if get_method(config.method).needs_teacher:
        option = "--method-options teacher_normalization=library"
    state = weights.read(f"pass it as {weights.name}:FILE with {option}")
    network = _with_weights(library, name, state, count, weights.source)
    return network, (weights.mean, weights.std)


def _library_network(library: str, name: str, path: Path, num_classes: int) -> nn.Module:
    """A network of torchvision or timm with the weights in a file."""
    weights, _ = unwrapped(read_file(path)[0], path)
    return _with_weights(library, name, weights, num_classes, str(path))


def _with_weights(
    library: str, name: str, weights: Mapping[str, Tensor], num_classes: int, where: str
) -> nn.Module:
    full_name = f"{library}:{name}"
    network = library_network(full_name, num_classes)
    weights = without_prefix(weights, network.state_dict())
    others = {
        value.shape[0]
        for name, value in weights.items()
        if (own := network.state_dict().get(name)) is not None
        if own.shape != value.shape and own.shape[0] == num_classes
        if own.shape[1:] == value.shape[1:]
    }
    if len(others) == 1:
        raise CheckpointError(
            f"the teacher {where} has weights for {others.pop()} classes, the data has"
            f" {num_classes}; use a teacher with the same classes and order"
        )
    try:
        load_weights(network, without_auxiliary(full_name, weights), where)
    except CheckpointError as error:
        setting = f"{library}'s {name} with the data's {num_classes} classes"
        raise CheckpointError(f"{error} ({setting})") from error
    return network
