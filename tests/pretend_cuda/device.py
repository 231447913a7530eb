"""The record of the pretend device, for a program that ``pretend_cuda.run`` runs."""

import contextlib
import ctypes
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import torch


class Work(NamedTuple):
    """Equal kernels, copies or graph launches."""

    phase: str
    captured: bool
    count: int
    name: str


class Record(NamedTuple):
    """Everything since the last ``reset``."""

    work: list[Work]
    violations: list[str]
    """Broken rules of stream capture, each with its name first."""
    captures: list[list[int]]
    """For each capture the numbers of nodes of its streams."""
    synchronizations: dict[str, int]
    """Number of times the host waited for the device, by the call."""

    @property
    def kernels(self) -> int:
        """The number of kernels, copies and graph launches."""
        return sum(each.count for each in self.work)

    def phases(self) -> dict[str, int]:
        """The number of kernels by phase."""
        counts: dict[str, int] = {}
        for each in self.work:
            counts[each.phase] = counts.get(each.phase, 0) + each.count
        return counts


LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"])
LIBRARY.pretend_report.restype = ctypes.c_char_p
LIBRARY.pretend_unordered_nodes.restype = ctypes.c_size_t
_phases = [""]


def reset() -> None:
    """Forget the record."""
    LIBRARY.pretend_reset()


def record() -> Record:
    """The record since the last ``reset``."""
    result = Record([], [], [], {})
    for line in LIBRARY.pretend_report().decode().splitlines():
        kind, *fields = line.split("\t")
        if kind == "work":
            phase, captured, count, name = fields
            result.work.append(Work(phase, captured == "captured", int(count), name))
        elif kind == "violation":
            result.violations.append(fields[0])
        elif kind == "capture":
            result.captures.append([int(field) for field in fields])
        else:
            _, call, count = fields
            result.synchronizations[call] = result.synchronizations.get(call, 0) + int(count)
    return result


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the kernels that are launched meanwhile, those of autograd's threads too."""
    _phases.append(name)
    LIBRARY.pretend_set_phase(name.encode())
    try:
        yield
    finally:
        _phases.pop()
        LIBRARY.pretend_set_phase(_phases[-1].encode())


def unordered_kernels() -> int:
    """While a capture is under way the number of its kernels that may run after or alongside the
    next kernel of the current stream.
    """
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    return LIBRARY.pretend_unordered_nodes(stream)


def in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose kernels are in a phase."""

    @functools.wraps(function)
    def inside(*arguments: Any, **keywords: Any) -> Any:
        with phase(name):
            return function(*arguments, **keywords)

    return inside


def finish(result: Any) -> NoReturn:
    """End the program with its result, as JSON.

    It skips the end of the interpreter, which aborts if a thread of autograd still runs.
    """
    print(json.dumps(result), flush=True)
    os._exit(0)


@contextlib.contextmanager
def comparisons_hold() -> Iterator[None]:
    """Let checks such as ``0 <= lr`` of PyTorch's optimizers pass for scalars on the device, whose
    values are meaningless.
    """
    with contextlib.ExitStack() as patches:
        for name in ("__le__", "__ge__", "__lt__", "__gt__"):
            comparison = _answering(name, answer=name in ("__le__", "__ge__"))
            patches.enter_context(patch.object(torch.Tensor, name, comparison))
        yield


def _answering(name: str, answer: bool) -> Callable[[torch.Tensor, Any], Any]:
    original = getattr(torch.Tensor, name)

    def compare(self: torch.Tensor, other: Any) -> Any:
        return answer if self.is_cuda and self.dim() == 0 else original(self, other)

    return compare
