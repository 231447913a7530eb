"""Checks of a loss's arguments: every message names the argument and the fix."""

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastokd.ops.inputs import compute_dtype

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_rows(value: Sequence[Tensor] | Tensor, count: int, name: str) -> list[Tensor]:
    """The tensors of a sequence of ``count`` tensors, or of one stacked tensor [count, B, ...].

    Args:
        name: the argument's name, for messages.

    Raises:
        TypeError, ValueError: the value is neither, or has another number of tensors.
    """
    if isinstance(value, Tensor) and value.dim() < 3:
        shape = f"one tensor of the shape {tuple(value.shape)}"
        raise ValueError(f"{name} is {shape}; stacked rows have three dimensions, [{count}, B, C]")
    if not isinstance(value, (Tensor, tuple, list)):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a tensor or a sequence of {count} tensors, got {kind}")
    rows = list(value)
    if len(rows) != count:
        stacked = "; one tensor is a stack of them, so pass a list" * isinstance(value, Tensor)
        raise ValueError(f"{name} holds {len(rows)} tensors; this loss needs {count}{stacked}")
    return rows


def checked_rows(value: Sequence[Tensor] | Tensor, count: int, name: str) -> list[Tensor]:
    """``as_rows``, fully checked: for losses that compute with the rows before the graph does."""
    rows = as_rows(value, count, name)
    check_rows(rows, [f"{name}[{index}]" for index in range(count)])
    return rows


def mean_prediction(rows: Sequence[Tensor]) -> Tensor:
    """The mean of the predictions of M rows of logits [B, C], as log-probabilities [B, C]."""
    predictions = [row.to(compute_dtype(row)).log_softmax(1) for row in rows]
    return torch.stack(predictions).logsumexp(0) - math.log(len(rows))


def check_rows(rows: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Check that all rows are floating [B, C] of one shape, dtype and device; return the first."""
    for label, row in zip(labels, rows, strict=True):
        if not isinstance(row, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(row).__name__}")
    first, name = rows[0], labels[0]
    if first.dim() != 2:
        raise ValueError(f"{name} has the shape {tuple(first.shape)}; it must be [B, C]")
    if first.shape[1] < 1:
        raise ValueError(f"{name} has the shape {tuple(first.shape)}: there are no classes")
    if first.dtype not in _FLOATS:
        allowed = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{name} is {first.dtype}; logits must be {allowed}")
    for label, row in zip(labels, rows, strict=True):
        for attribute in ("shape", "dtype", "device"):
            value, expected = getattr(row, attribute), getattr(first, attribute)
            if value != expected:
                if attribute == "shape":
                    value, expected = tuple(value), tuple(expected)
                error = TypeError if attribute == "dtype" else ValueError
                raise error(
                    f"{label} has the {attribute} {value}, {name} has {expected}; they must be"
                    " equal"
                )
    return first


def check_weight(
    name: str, width: int, weights: Mapping[str, Tensor] | None, first: Tensor, label: str
) -> Tensor:
    """The mixing weights of that name as [B, width], checked against the first row."""
    if weights is None or name not in weights:
        fix = f"this graph mixes with it; pass a tensor [B, {width}]"
        raise ValueError(f"{label} is missing: {fix}")
    value, batch = weights[name], first.shape[0]
    _check_floating(value, label)
    if value.shape not in ((width,), (batch, width)):
        allowed = f"[{batch}, {width}] or [{width}]"
        raise ValueError(f"{label} has the shape {tuple(value.shape)}; it must be {allowed}")
    if value.device != first.device:
        raise ValueError(f"{label} is on {value.device}, the logits are on {first.device}")
    return value if value.dim() == 2 else value.expand(batch, width)


def check_weights(
    weights: Mapping[str, Tensor],
    widths: Mapping[str, int],
    first: Tensor,
    labels: Mapping[str, str],
) -> list[Tensor]:
    """``check_weight`` of every name in ``widths``."""
    return [
        check_weight(name, width, weights, first, labels[name]) for name, width in widths.items()
    ]


def check_external(name: str, externals: Mapping[str, Tensor] | None, first: Tensor) -> Tensor:
    """The external row [B, C] of that name, checked against the first row."""
    label = f"externals['{name}']"
    if externals is None or name not in externals:
        raise ValueError(f"{label} is missing: pass probabilities {list(first.shape)}")
    value = externals[name]
    _check_floating(value, label)
    if value.shape != first.shape or value.device != first.device:
        logits = f"the logits are {tuple(first.shape)} on {first.device}"
        raise ValueError(f"{label} is {tuple(value.shape)} on {value.device}; {logits}")
    return value


def _check_floating(value: object, label: str) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{label} must be a floating tensor, got {kind}")


def check_kd_weight(kd_weight: float | Tensor, device: torch.device) -> None:
    """Check that ``kd_weight`` is a finite number, or a 0-d tensor on the logits' device."""
    if isinstance(kd_weight, Tensor):
        if kd_weight.dim() != 0 or kd_weight.device != device:
            value = f"shape {tuple(kd_weight.shape)} on {kd_weight.device}"
            raise ValueError(f"kd_weight must be a float or a 0-d tensor on {device}, got {value}")
        return
    if torch.compiler.is_compiling():
        return  # A number that changes is a symbol there, without a value to check.
    if not isinstance(kd_weight, numbers.Real):
        raise TypeError(f"kd_weight must be a float or a 0-d tensor, got {kd_weight!r}")
    if not math.isfinite(kd_weight):
        raise ValueError(f"kd_weight={kd_weight}; it must be finite")


def check_target(target: object, first: Tensor) -> Tensor:
    """The target, checked against the first row of logits [B, C].

    Labels on a GPU are checked only with FASTOKD_CHECK_LABELS=1, because that waits for the device;
    otherwise a label out of range makes the loss NaN there.
    """
    batch, num_classes = first.shape
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.device != first.device:
        raise ValueError(f"target is on {target.device}, the logits are on {first.device}")
    if target.dtype in _FLOATS:
        if target.shape != first.shape:
            shape = f"target is floating with the shape {tuple(target.shape)}"
            raise ValueError(f"{shape}; class probabilities must be [{batch}, {num_classes}]")
        if target.requires_grad:
            raise ValueError("target requires a gradient, but is a constant; pass target.detach()")
        return target
    if target.dtype != torch.int64:
        fix = "labels must be int64 (use target.long()), class probabilities floating"
        raise TypeError(f"target is {target.dtype}; {fix}")
    if target.shape != (batch,):
        raise ValueError(f"target has the shape {tuple(target.shape)}; labels must be [{batch}]")
    check_labels(target, first)
    return target


def check_labels(target: Tensor, first: Tensor) -> None:
    """Check that labels are in range; see ``check_target``."""
    batch, num_classes = first.shape
    if target.dtype in _FLOATS or not batch:
        return
    if _values_are_checked(target):
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= num_classes:
            label = low if low < 0 else high
            position = int((target == label).nonzero()[0])
            classes = f"{num_classes} classes (labels 0 to {num_classes - 1})"
            raise ValueError(f"target[{position}] is {label}, but the logits have {classes}")


def _values_are_checked(value: Tensor) -> bool:
    """False where that would wait for a device, unless the user requests it, or stop tracing."""
    if torch.compiler.is_compiling():
        return False
    return value.is_cpu or os.environ.get("FASTOKD_CHECK_LABELS") == "1"


def checked_ignore_index(ignore_index: object) -> int | None:
    """The argument ``ignore_index`` of a loss.

    Raises:
        TypeError: it is neither an integer nor None.
    """
    is_integer = isinstance(ignore_index, numbers.Integral) and not isinstance(ignore_index, bool)
    if ignore_index is not None and not is_integer:
        raise TypeError(f"ignore_index={ignore_index!r}; it must be an integer or None")
    return None if ignore_index is None else int(cast(int, ignore_index))


def check_ignore_index(ignore_index: int | None, num_classes: int) -> None:
    """Check that the label of ignored rows is not one of the classes."""
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        classes = f"is one of the {num_classes} classes (0 to {num_classes - 1})"
        fix = "use a label that is no class, such as -100, or None"
        raise ValueError(f"ignore_index={ignore_index} {classes}; {fix}")


def ignored_rows(target: object, ignore_index: int | None) -> Tensor | None:
    """The rows [N] whose label is ``ignore_index``; None if there are certainly none."""
    if ignore_index is None or not isinstance(target, Tensor) or target.dtype != torch.int64:
        return None
    ignored = target == ignore_index
    if target.is_cpu and not torch.compiler.is_compiling() and not ignored.any():
        return None
    return ignored


def check_row_factors(
    first: Tensor, class_weight: Tensor | None, sample_weight: object
) -> tuple[Tensor | None, Tensor | None]:
    """The weights of classes [C] and samples [N], checked against the first row of logits [N, C].

    Values on a GPU are checked as labels are, see ``check_target``.
    """
    given: dict[str, tuple[Any, int]] = {
        "class_weight": (class_weight, first.shape[1]),
        "sample_weight": (sample_weight, first.shape[0]),
    }
    for name, (value, size) in given.items():
        if value is None:
            continue
        _check_floating(value, name)
        if value.shape != (size,):
            raise ValueError(f"{name} has the shape {tuple(value.shape)}; it must be [{size}]")
        if value.device != first.device:
            fix = "; move the loss: loss.to(device)" if name == "class_weight" else ""
            raise ValueError(f"{name} is on {value.device}, the logits are on {first.device}{fix}")
    sample = given["sample_weight"][0]
    if sample is not None and _values_are_checked(sample):
        _check_factors(sample, "sample_weight")
    return class_weight, sample


def checked_class_weight(class_weight: object) -> Tensor | None:
    """The argument ``class_weight`` of a loss, or None.

    Raises:
        TypeError, ValueError: it is not a tensor [C] of finite numbers of at least 0.
    """
    if class_weight is None:
        return None
    _check_floating(class_weight, "class_weight")
    assert isinstance(class_weight, Tensor)
    if class_weight.dim() != 1 or not len(class_weight):
        raise ValueError(f"class_weight has the shape {tuple(class_weight.shape)}; it must be [C]")
    _check_factors(class_weight, "class_weight")
    return class_weight.detach().clone()


def _check_factors(factors: Tensor, name: str) -> None:
    wrong = ~(factors.isfinite() & (factors >= 0))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        value = float(factors[position])
        raise ValueError(f"{name}[{position}] is {value}; it must be finite and at least 0")
