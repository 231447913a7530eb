"""Initial weights of a run: a file (``weights``) or a library's weights (``pretrained``)."""

import dataclasses
import difflib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.errors import CheckpointError, ConfigError, class_differences, summarize
from fastokd.export import find_export
from fastokd.export.state_dict import TWINS
from fastokd.models import BranchedModel, model_name
from fastokd.models.libraries import without_auxiliary
from fastokd.train.config import TrainConfig
from fastokd.train.copies import copy_to_branches, separate
from fastokd.train.distributed import local_main_first
from fastokd.train.pretrained import PretrainedWeights, pretrained_weights
from fastokd.train.teacher import read_network
from fastokd.train.weight_files import fingerprint, read_file, unwrapped, without_prefix

LEAST_MATCHED = 0.5
"""Files that match fewer of the network's tensors are of another architecture."""


@dataclass(frozen=True)
class InitialWeights:
    """Trained weights of a plain network.

    Attributes:
        source: the file and its entry, or the library's name, for messages.
        tensors: the state dict, without prefixes of wrappers.
        classes: the names of the classes, if known.
        normalization: mean and standard deviation of the images, each [3], if known.
    """

    source: str
    tensors: Mapping[str, Tensor]
    classes: Sequence[str] | None = None
    normalization: tuple[Any, Any] | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of names and values: the same for all copies and formats of a file."""
        return fingerprint(dict(sorted(self.tensors.items())))


# --- reading


def with_absolute_weights(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths of weights, to resume the run from any folder.

    Raises:
        ConfigError: one of several paths contains a comma.
    """
    paths = [str(Path(file).absolute()) for file in config.weight_files()]
    if len(paths) > 1 and any("," in path for path in paths):
        raise ConfigError(
            f"weights={','.join(paths)}: with several networks no path may contain a comma; rename"
            " the folder"
        )
    return dataclasses.replace(config, weights=",".join(paths)) if paths else config


def check_initial(config: TrainConfig) -> None:
    """Check ``weights`` and ``pretrained`` before the data is read; downloads nothing.

    Raises:
        ConfigError, MissingExtra: a network without trained weights, or timm is not installed.
        CheckpointError: a file is missing.
    """
    for file in config.weight_files():
        if not Path(file).exists():
            several = "; one network starts from one file" if "," in file else ""
            raise CheckpointError(f"weights={file}: there is no such file or run folder{several}")
    if config.pretrained:
        for name in config.model_names():
            published_weights(name)
    if config.normalization == "library":
        library_normalization(config)


def read_initial(config: TrainConfig) -> list[InitialWeights]:
    """The initial weights of each of the run's networks; empty if they start from random ones.

    Raises:
        CheckpointError: a file is damaged, has non-finite numbers or cannot be downloaded.
        ConfigError, MissingExtra: as ``check_initial``.
    """
    if config.pretrained:
        with local_main_first():  # one process of each machine downloads
            return [pretrained(name) for name in config.model_names()]
    return [read_weights(Path(file)) for file in config.weight_files()]


def normalization_of(
    config: TrainConfig, initial: Sequence[InitialWeights]
) -> tuple[Any, Any] | None:
    """The normalization of the student's initial weights, if known, or that of its library."""
    if config.normalization == "library":
        return library_normalization(config)
    if not initial:
        return None
    return initial[config.kept_branch() if len(initial) > 1 else 0].normalization


def normalization_notes(config: TrainConfig, initial: Sequence[InitialWeights]) -> list[str]:
    """Lines about weights whose normalization is not known, or not the one that the run uses."""
    if not initial or config.normalization in ("data", "imagenet"):
        return []
    if (chosen := normalization_of(config, initial)) is None:
        return [
            "the weights do not state their normalization, so the data's is used; pass"
            " --normalization library for a library's weights, or imagenet for others trained on it"
        ]
    return [
        f"the weights from {each.source} are for another normalization than the student's, which"
        " all networks use"
        for each in initial
        if len(initial) > 1 and each.normalization is not None
        if not np.allclose(each.normalization, chosen, rtol=1e-6)
    ]


def library_normalization(config: TrainConfig) -> tuple[Any, Any]:
    """The normalization that a library states for its weights of the student's network.

    Raises:
        ConfigError, MissingExtra: as ``published_weights``.
    """
    names = config.model_names()
    name = names[config.kept_branch() if len(names) > 1 else 0]
    fix = "use data, imagenet or weights"
    weights = published_weights(name, "normalization=library", fix)
    return weights.mean, weights.std


def read_weights(path: Path) -> InitialWeights:
    """The weights in a file: safetensors, a state dict of ``torch.save`` (alone or in an entry such
    as "model" or "state_dict"), or a student or checkpoint of fastokd; or in a run folder.

    Raises:
        CheckpointError: unreadable, without weights, or with non-finite numbers.
    """
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise CheckpointError(f"{path} is not a run folder: it has no student.safetensors")
        path = find_export(path, (".safetensors",))
    content, is_own = read_file(path)
    if is_own:
        network, classes, data = read_network(path)
        normalization = (data["mean"], data["std"])
        initial = InitialWeights(str(path), network.state_dict(), classes, normalization)
    else:
        tensors, entry = unwrapped(content, path)
        initial = InitialWeights(f"{path}, entry '{entry}'" if entry else str(path), tensors)
    _check_values(initial.tensors, path)
    return initial


def _check_values(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ``CheckpointError`` for values that are non-finite or cannot be parameters."""
    for name, value in tensors.items():
        try:
            is_finite = bool(value.float().isfinite().all())
        except RuntimeError as error:  # quantized or packed numbers
            dtype = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: '{name}' has values of type {dtype}, which cannot be converted to"
                " float32; save the weights as float32"
            ) from error
        if not is_finite:
            raise CheckpointError(
                f"{path}: '{name}' has NaN or infinite values; use another file of weights"
            )


def published_weights(
    name: str, setting: str = "pretrained=True", fix: str = "pass a file with --weights"
) -> PretrainedWeights:
    """The trained weights that a library publishes for a network of any kind.

    Args:
        setting, fix: the option that needs them and a replacement, for the error message.

    Raises:
        ConfigError, MissingExtra: as ``pretrained_weights``.
    """
    name = name if ":" in name else model_name(name)
    if ":" not in name and name not in TWINS["torchvision"]:
        known = ", ".join(TWINS["torchvision"])
        raise ConfigError(
            f"{setting}: no trained weights are published for {name}; they are for {known},"
            f" torchvision:NAME and timm:NAME; {fix}"
        )
    full = name if ":" in name else f"torchvision:{TWINS['torchvision'][name]}"
    library, _, network = full.partition(":")
    return pretrained_weights(library, network)


def pretrained(name: str) -> InitialWeights:
    """The trained weights of a network, through its library's download and cache.

    Raises:
        CheckpointError: they cannot be downloaded and are not in the cache.
        ConfigError, MissingExtra: as ``published_weights``.
    """
    weights = published_weights(name)
    fix = "pass it with --weights FILE --normalization library"
    tensors = without_auxiliary(weights.name, weights.read(fix))
    normalization = (weights.mean, weights.std)
    return InitialWeights(f"trained weights of {weights.name}", tensors, None, normalization)


# --- loading


@torch.no_grad()
def start_from(
    model: BranchedModel,
    initial: Sequence[InitialWeights],
    *,
    classes: Sequence[str] | None = None,
    branch_init: str = "copy",
    image_size: tuple[int, int] = (32, 32),
    seed: int = 0,
    own_views: bool = False,
) -> list[str]:
    """Load trained weights into a newly created model, in place.

    The trunk and the kept branch get the weights. With ``branch_init="copy"`` every other branch
    gets the same values, see ``copy_to_branches``; with "fresh" it stays as initialized.
    Every peer gets the weights of its network; peers that equal another one get noise on their
    heads.
    A last layer for another number of classes, or for other classes, stays as initialized.

    Args:
        initial: the weights of each of the model's networks, or of the one network of all branches;
            if empty, nothing is loaded.
        classes: the names of the data's classes, which are compared if the weights have names.
        image_size: height and width of the images on which new blocks are compared with the
            identity.
        seed: of the noise.
        own_views: every branch is trained on its own views of the images, which differ; then equal
            branches get no noise.

    Returns:
        Lines about what was loaded, skipped and is new.

    Raises:
        CheckpointError: the weights are of another architecture: a tensor of another shape, less
            than half of the tensors, or another number of blocks.
    """
    if not initial:
        return []
    if model.trunk is None:
        lines = _start_peers(model, initial, classes, branch_init)
        noisy = 0 if own_views else separate(model, seed)
        if noisy:
            peers = f"{noisy} peer{'s' * (noisy > 1)} with the weights of another peer"
            lines.append(f"noise is added to the last layers of {peers}")
        return lines
    fresh, line = _load_into(model, model.kept, initial[0], classes)
    if model.num_branches == 1 or branch_init == "fresh":
        return [line]
    different = copy_to_branches(model, image_size, fresh)
    noisy = 0 if own_views else separate(model, seed)
    copies = "the other branches start as copies of the student's"
    if own_views:
        copies += ", without noise because their views of the images differ"
    if noisy:
        copies += f", with noise on the last layers of {noisy} of equal depth"
    if different:
        copies += f"; {different} of them have additional blocks that start fresh, since they"
        copies += " cannot be the identity"
    return [line, copies]


def _start_peers(
    model: BranchedModel,
    initial: Sequence[InitialWeights],
    classes: Sequence[str] | None,
    branch_init: str,
) -> list[str]:
    lines = []
    for index in range(model.num_branches):
        if index != model.kept and branch_init == "fresh":
            continue
        weights = initial[index] if len(initial) > 1 else initial[0]
        _, line = _load_into(model, index, weights, classes)
        lines.append(f"network {index + 1}: {line}")
    return lines


def _load_into(
    model: BranchedModel, index: int, initial: InitialWeights, classes: Sequence[str] | None
) -> tuple[list[Tensor], str]:
    """Load weights into the plain network of a branch or peer; the tensors that stay as
    initialized, and a line.
    """
    expected = model.live_student(index).state_dict(keep_vars=True)
    tensors = without_prefix(initial.tensors, expected)
    head, reason = _new_head(expected, tensors, classes, initial.classes)
    matched = [name for name in expected if name in tensors and name not in head]
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    common, problem = _compare(expected, tensors, set(matched))
    if problem:
        raise CheckpointError(
            f"{initial.source} is of another architecture: {problem}; pass the network that the"
            f" file belongs to with --model (given: {model.names[index]})"
        )
    for name in matched:
        expected[name].copy_(tensors[name])
    new = [name for name in needed if name not in matched]
    unused = [name for name in tensors if name not in expected]
    digest = f"SHA-256 of the tensors: {initial.fingerprint[:12]}"
    line = f"weights from {initial.source} ({digest}): {common} tensors loaded"
    if new:
        line += f"; new: {summarize(new)}{reason}"
    if unused:
        line += f"; not used: {summarize(unused)}"
    return [expected[name] for name in new], line


def _compare(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], matched: Collection[str]
) -> tuple[int, str]:
    """The number of a network's tensors that a file has, and the difference of the architectures in
    words; "" if they are equal.
    """
    wrong = [name for name in expected if name in matched]
    wrong = [name for name in wrong if expected[name].shape != tensors[name].shape]
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    common = sum(name in matched and name not in wrong for name in needed)
    problem = _other_depth(expected, tensors)
    if wrong:
        name = wrong[0]
        shapes = list(tensors[name].shape), list(expected[name].shape)
        problem = f"{name} is {shapes[0]}, the model's is {shapes[1]}"
    if common < LEAST_MATCHED * len(needed):
        problem = f"{common} of {len(needed)} tensors match; {_closest(expected, tensors)}"
    return common, problem


def _other_depth(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """A sequence of blocks whose length differs, in words; "" if all are equal. The last layer's
    sequence is not compared, since classifiers are replaced.
    """
    lengths = _lengths(tensors)
    last = _last_layer(expected)
    for path, count in _lengths(expected).items():
        length = lengths.get(path, count)
        if length != count and not last.startswith(f"{path}." if path else ""):
            subject = f"{path} has" if path else "it has"
            return f"{subject} {length} module{'s' * (length > 1)}, the model's has {count}"
    return ""


def _lengths(names: Iterable[str]) -> dict[str, int]:
    """The number of different indices after each path, as in the names of a sequence of modules."""
    indices: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdecimal():
                indices.setdefault(".".join(parts[:at]), set()).add(part)
    return {path: len(numbers) for path, numbers in indices.items()}


def _last_layer(expected: Mapping[str, Tensor]) -> str:
    """The name of the weights of a network's last layer."""
    return next(name for name in reversed(list(expected)) if expected[name].dim() > 1)


def _new_head(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    classes: Sequence[str] | None,
    known: Sequence[str] | None,
) -> tuple[set[str], str]:
    """The tensors of the last layers, if they are for other classes than the weights', and the
    reason.

    Args:
        classes, known: the names of the data's classes and of the file's, if they have names.
    """
    last = _last_layer(expected)
    if last not in tensors:
        return set(), ""
    shape, other = expected[last].shape, tensors[last].shape
    layers = [last]
    if shape == other:
        if not (classes and known and list(classes) != list(known)):
            return set(), ""
        reason = f" (other classes than the file's{class_differences(known, classes)})"
    else:  # some networks have several classifiers of one size
        layers = [
            name
            for name, value in expected.items()
            if value.dim() > 1 and name in tensors
            if (value.shape[0], tensors[name].shape[0]) == (shape[0], other[0])
            if value.shape[1:] == tensors[name].shape[1:]
        ]
        reason = f" ({other[0]} classes in the file, {shape[0]} in the data)"
    paths = {name.rpartition(".")[0] for name in layers}
    head = {name for name in expected if name.rpartition(".")[0] in paths}
    return head, reason if layers else ""


def _closest(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """The first tensors that are missing, each with the closest name in the file."""
    pairs = []
    for name in [name for name in expected if name not in tensors][:3]:
        close = difflib.get_close_matches(name, tensors, n=1, cutoff=0.0)
        pairs.append(f"{name} (closest: {close[0] if close else 'none'})")
    return f"missing, e.g. {', '.join(pairs)}" if pairs else "shapes differ"
