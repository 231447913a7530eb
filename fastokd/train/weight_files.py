"""Files of weights: the dictionary of tensors in them, whatever wraps it."""

import argparse
import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.errors import CheckpointError, first_line, summarize
from fastokd.export import strip_wrappers

ENTRIES = ("state_dict", "model", "model_state_dict", "network", "net", "module")
"""Entries of a file that may hold the weights, in order of preference."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Entries with averaged weights, used if the file has no entry of ``ENTRIES``."""


def _harmless() -> list[Any]:
    """Classes of settings and numbers that training scripts save next to weights. Their
    construction runs no code of the file.
    """
    scalar = np.dtype(np.float64).type(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    # numpy before 2.0 has the function in another module, under which older files name it.
    old = (scalar, "numpy.core.multiarray.scalar")
    return [argparse.Namespace, scalar, old, np.dtype, *kinds, codecs.encode]


def read_file(path: Path) -> tuple[Mapping[str, Any], bool]:
    """The content of a file on the CPU, and True for a student or checkpoint of fastokd.

    Raises:
        CheckpointError: unreadable, damaged, or with pickled objects other than tensors.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if path.suffix in (".onnx", ".pt2"):
        fix = "pass the run, or its export in the format safetensors"
        raise CheckpointError(f"{path} is an exported program without a network's weights; {fix}")
    try:
        if path.suffix != ".safetensors":
            with torch.serialization.safe_globals(_harmless()):
                content = torch.load(path, map_location="cpu", weights_only=True)
            content = content if isinstance(content, Mapping) else {}
            return content, {"config_hash", "classes", "model"} <= content.keys()
        with safe_open(path, framework="pt") as file:
            is_own = "fastokd" in (file.metadata() or {})
        return load_file(path), is_own
    except Exception as error:  # damaged bytes raise many kinds
        if isinstance(error, OSError) and error.strerror:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        reason = "the file is empty" if isinstance(error, EOFError) else first_line(error)
        # torch's errors for bytes that are no pickle, such as text
        if reason.isdigit() or "Unsupported operand" in str(error):
            reason = "it was not written by torch.save or safetensors"
        elif "weights_only" in str(error) or "Weights only" in reason:
            named = re.search(r"(?:GLOBAL|global|class) '?([\w.]+\.\w+)", str(error))
            raise CheckpointError(
                f"{path} has pickled objects other than tensors"
                f"{f' ({named[1]})' if named else ''}, which are not loaded because they could run"
                " code; save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        message = f"{path} is damaged or not a file of weights ({reason})"
        raise CheckpointError(message) from error


def unwrapped(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in the content of a file, without prefixes of wrappers, and its entry, such as
    "model"; "" if it is the whole content.

    Raises:
        CheckpointError: no tensors; the message names ``path``.
    """
    entries: list[str] = []
    while True:
        names = (name for name in (*ENTRIES, *AVERAGES) if isinstance(content.get(name), Mapping))
        if (entry := next(names, None)) is None:
            break
        entries.append(entry)
        content = content[entry]
    tensors = {name: each for name, each in content.items() if isinstance(each, Tensor)}
    if not tensors:
        others = f" ({summarize([str(name) for name in content])})" if content else ""
        raise CheckpointError(
            f"{path} has no weights: no dictionary of tensors{others}; save the weights alone:"
            " torch.save(model.state_dict(), FILE)"
        )
    return current_names(strip_wrappers(tensors)), ".".join(entries)


def without_prefix(tensors: Mapping[str, Tensor], names: Collection[str]) -> Mapping[str, Tensor]:
    """Weights without a prefix, such as Lightning's "model.", with which alone they match a
    network's tensors ``names``.
    """
    if not any(name in tensors for name in names):
        prefixes = Counter(
            title.removesuffix(name)
            for title in tensors
            for name in names
            if title.endswith(f".{name}")
        )
        for prefix, _ in prefixes.most_common(1):
            return {title.removeprefix(prefix): each for title, each in tensors.items()}
    return tensors


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of today's torchvision, whose published DenseNet files have older
    names: "denselayer1.norm.1.weight" is now "denselayer1.norm1.weight".
    """
    older = re.compile(r"(\bdenselayer\d+\.(?:norm|conv))\.([12]\.)")
    return {older.sub(r"\1\2", name): value for name, value in tensors.items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names and values, in their order."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + content.numpy().tobytes())
    return digest.hexdigest()
