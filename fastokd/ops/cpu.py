"""The CPU executor: the C++ library of ``kernels/cpu`` behind its C ABI, called through ctypes.

The library is loaded at first use. ctypes releases the interpreter's lock during each call.
"""

import ctypes
import json
import os
import weakref
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.graph.plan import Plan
from fastokd.ops.executors import Case
from fastokd.ops.inputs import Gradients, Inputs, Needs, Outputs, compute_dtype

ABI_VERSION = 2
"""FASTOKD_ABI_VERSION of kernels/cpu/fastokd.h."""

_NATIVE = Path(os.environ.get("FASTOKD_NATIVE_DIR") or Path(__file__).parents[1] / "_native")
"""The folder of the library. The variable is for custom builds, such as one with sanitizers."""
_LIBRARIES = ("libfastokd_cpu.so", "libfastokd_cpu.dylib")
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
_NO_MEMORY = 8
_ISA_VARIABLE = "FASTOKD_CPU_ISA"


class LibraryUnusable(Exception):
    """The library is absent or unusable; the message states the reason and the fix."""


def build_info(folder: Path = _NATIVE) -> dict[str, Any]:
    """The record of the build (status, reason, compiler, flags, ...); empty without a build. A
    damaged file is a LibraryUnusable.
    """
    path = folder / "build_info.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LibraryUnusable(f"{path} cannot be read ({error}); install fastokd again") from error


def open_library(folder: Path = _NATIVE) -> ctypes.CDLL:
    """The library in ``folder``, with its functions' types declared, or a LibraryUnusable."""
    path = next((folder / name for name in _LIBRARIES if (folder / name).is_file()), None)
    if path is None:
        info = build_info(folder)
        reason = f"was not built ({info.get('status')}): {info.get('reason')}"
        fix = "is not built; run `pip install -e .` (it needs cmake and a C++17 compiler)"
        raise LibraryUnusable(f"the native library {reason if info else fix}")
    try:
        library = ctypes.CDLL(str(path))
        library.fastokd_abi_version.restype = ctypes.c_int32
        version = library.fastokd_abi_version()
    except (OSError, AttributeError) as error:
        reason = f"cannot be loaded ({error}); install fastokd again"
        raise LibraryUnusable(f"{path} {reason}") from error
    if version != ABI_VERSION:
        reason = f"has ABI version {version}, this fastokd needs {ABI_VERSION}; install it again"
        raise LibraryUnusable(f"{path} {reason}")
    pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, result, arguments in (
        ("fastokd_status_message", ctypes.c_char_p, [count]),
        ("fastokd_isa", ctypes.c_char_p, [count]),
        ("fastokd_plan_create", count, [pointer, size, pointer, size, ctypes.c_char_p, pointer]),
        ("fastokd_plan_destroy", None, [pointer]),
        ("fastokd_plan_num_stats", size, [pointer]),
        ("fastokd_forward", count, [pointer, size, size, *[pointer] * 5, count]),
        ("fastokd_backward", count, [pointer, size, size, *[pointer] * 5, count]),
        ("fastokd_forward_backward", count, [pointer, size, size, *[pointer] * 7, count]),
        ("fastokd_math", count, [ctypes.c_char_p, count, count, pointer, pointer, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why it cannot be used; final for this process."""
    try:
        library = open_library()
    except LibraryUnusable as error:
        return str(error)
    isa = os.environ.get(_ISA_VARIABLE)
    if isa and isa not in (names := available_isas(library)):
        return f"{_ISA_VARIABLE}={isa} is not one of this build and machine ({', '.join(names)})"
    return library


def available_isas(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that this build has and this machine can run, best first."""
    names: list[str] = []
    while name := library.fastokd_isa(len(names)):
        names.append(name.decode())
    return names


class CompiledPlan:
    """A plan as the library decoded it, or a ValueError; ``isa`` is one of ``available_isas``."""

    def __init__(
        self,
        library: ctypes.CDLL,
        ints: Sequence[int],
        floats: Sequence[float],
        isa: str | None = None,
    ) -> None:
        handle = ctypes.c_void_p()
        status = library.fastokd_plan_create(
            (ctypes.c_int64 * len(ints))(*ints),
            len(ints),
            (ctypes.c_double * len(floats))(*floats),
            len(floats),
            isa.encode() if isa else None,
            ctypes.byref(handle),
        )
        if status:
            message = library.fastokd_status_message(status).decode()
            raise ValueError(f"the native library refuses the plan: {message}")
        self.library, self.handle = library, handle
        self.num_stats = int(library.fastokd_plan_num_stats(handle))
        weakref.finalize(self, library.fastokd_plan_destroy, handle)

    def call(self, name: str, inputs: Inputs, *arrays: Any) -> None:
        """Call ``fastokd_{name}`` for a batch; ``arrays`` are tensors or arrays of ctypes.

        Raises:
            MemoryError, ValueError: the library refuses the call.
        """
        status = getattr(self.library, f"fastokd_{name}")(
            self.handle,
            *inputs.logits[0].shape,
            _describe((*inputs.differentiable, *inputs.externals), inputs.target),
            *(each.data_ptr() if isinstance(each, Tensor) else each for each in arrays),
            torch.get_num_threads(),
        )
        if status:
            message = self.library.fastokd_status_message(status).decode()
            if status == _NO_MEMORY:
                raise MemoryError(message)
            raise ValueError(f"the native library refuses the call: {message}")


@lru_cache(maxsize=512)
def _compiled(plan: Plan) -> CompiledPlan:
    library = _library()
    assert isinstance(library, ctypes.CDLL), "an executor that refuses is not called"
    return CompiledPlan(library, *plan.encode(), os.environ.get(_ISA_VARIABLE))


def _describe(tensors: Sequence[Tensor], last: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The array of ``fastokd_tensor`` for matrices and, last, a matrix or vector.

    Each is four words: address, two strides (0 for a missing dimension), dtype. A scalar stands
    for a vector of equal values.
    """
    words: list[int] = []
    for tensor in (*tensors, last):
        strides = (*tensor.stride(), 0, 0)[:2]
        words += (tensor.data_ptr(), *strides, _DTYPES[tensor.dtype])
    return (ctypes.c_int64 * len(words))(*words)


class CPUExecutor:
    """Float16, bfloat16, float32 and float64 logits on the CPU."""

    name = "cpu"
    computes_early = True

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        if case.device != "cpu":
            return f"it runs on the CPU, the logits are on '{case.device}'"
        library = _library()
        return library if isinstance(library, str) else None

    def num_stats(self, plan: Plan) -> int:
        return _compiled(plan).num_stats

    def forward(self, plan: Plan, inputs: Inputs) -> Outputs:
        term_weights, outputs = _term_weights(inputs), _outputs(plan, inputs.logits[0])
        _compiled(plan).call("forward", inputs, _describe((), term_weights), *outputs)
        return outputs

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Needs
    ) -> Gradients:
        term_weights, stats = _term_weights(inputs), stats.contiguous()
        grad_rows = grad_rows.to(term_weights.dtype)
        grads, addresses = _gradients(inputs, needs)
        upstream = _describe((), grad_rows)
        weights = _describe((), term_weights)
        _compiled(plan).call("backward", inputs, weights, stats, upstream, addresses)
        return grads

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Needs
    ) -> tuple[Tensor, Tensor, Gradients]:
        term_weights, outputs = _term_weights(inputs), _outputs(plan, inputs.logits[0])
        upstream = term_weights.new_full((), 1 / max(len(inputs.logits[0]), 1))
        grads, addresses = _gradients(inputs, needs)
        weights = _describe((), term_weights)
        arrays = weights, *outputs, _describe((), upstream), addresses
        _compiled(plan).call("forward_backward", inputs, *arrays)
        return *outputs[:2], grads


def _term_weights(inputs: Inputs) -> Tensor:
    """The weights of the terms as [B, T], with a row stride of 0 if the rows share them."""
    weights = inputs.term_weights.to(compute_dtype(inputs.logits[0]))
    return weights.expand(inputs.logits[0].shape[0], -1)


def _outputs(plan: Plan, first: Tensor) -> Outputs:
    """Empty tensors for rows [B], terms [T, B] and statistics [num_stats, B]."""
    batch, dtype = first.shape[0], compute_dtype(first)
    return (
        torch.empty(batch, dtype=dtype),
        torch.empty((plan.num_terms, batch), dtype=dtype),
        torch.empty((_compiled(plan).num_stats, batch), dtype=dtype),
    )


def _gradients(inputs: Inputs, needs: Needs) -> tuple[Gradients, ctypes.Array[ctypes.c_void_p]]:
    """Empty tensors for the gradients that are needed, and the addresses of all.

    The logits' gradients share one block: the C library would return several large blocks to the
    system, and allocating their pages again costs a third of the next step.
    """
    logits, weights = inputs.logits, inputs.weights
    first = logits[0]
    rows = iter(first.new_empty((sum(needs[: len(logits)]), *first.shape)).unbind())
    grads = [next(rows) if need else None for need in needs[: len(logits)]]
    grads += [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
        for tensor, need in zip(weights, needs[len(logits) :], strict=True)
    ]
    addresses = (None if grad is None else grad.data_ptr() for grad in grads)
    return grads, (ctypes.c_void_p * len(grads))(*addresses)


EXECUTOR = CPUExecutor()
