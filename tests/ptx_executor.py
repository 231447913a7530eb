"""The Triton executor on CPU tensors: every launch executes the PTX that Triton compiles for a GPU.

The name for ``evaluate`` is that returned by ``register``. ``EXECUTOR.capability`` selects the GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from ptx import Program
from ptx import launch as execute
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastokd.graph import Plan
from fastokd.kernels.triton import launch, split
from fastokd.kernels.triton.kernels import KERNELS
from fastokd.ops import Inputs, register_executor
from fastokd.ops import triton as triton_executor
from fastokd.ops.executors import Case

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
ALIGNED = [["tt.divisibility", 16]]


class PtxExecutor(triton_executor.TritonExecutor):
    """The executor, its compiled kernels, and the number of launches."""

    name = "ptx"

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability
        self.programs: dict[Any, tuple[Program, int]] = {}
        self.launches = 0

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        return None

    @contextmanager
    def _replaced_kernels(self) -> Iterator[None]:
        names = ("partial_kernel", "merge_kernel", "columns_kernel", "weights_kernel")
        kernels = {name: Kernel(self, function) for name, function in KERNELS.items()}
        split_kernels = {name: Kernel(self, getattr(split, name)) for name in names}
        with patch.multiple(launch, KERNELS=kernels, split=SimpleNamespace(**split_kernels)):
            yield

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        with self._replaced_kernels():
            return super().forward(plan, inputs)

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        with self._replaced_kernels():
            return super().backward(plan, grad_rows, inputs, stats, needs)

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        with self._replaced_kernels():
            return super().forward_backward(plan, inputs, needs)


class Kernel:
    """A kernel that is launched as Triton's own are: ``kernel[grid](*arguments, **options)``."""

    def __init__(self, executor: PtxExecutor, function: Any) -> None:
        self.executor, self.function = executor, function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.run, grid[0])

    def run(self, grid: int, *arguments: Any, **options: Any) -> None:
        signature: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        constants: dict[tuple[int, ...], Any] = {}
        flat: list[Tensor | int] = []
        for position, value in enumerate(arguments):
            name = self.function.arg_names[position]
            tensors = value if isinstance(value, tuple) else (value,)
            if all(isinstance(tensor, Tensor) for tensor in tensors):
                types = tuple(TYPES[tensor.dtype] for tensor in tensors)
                signature[name] = types if isinstance(value, tuple) else types[0]
                flat += tensors
                for k, tensor in enumerate(tensors):
                    if tensor.data_ptr() % 16 == 0:
                        path = (position, k) if isinstance(value, tuple) else (position,)
                        attributes[path] = ALIGNED
            elif name in ("batch", "shift"):
                signature[name] = "i32"
                flat.append(value)
            else:
                signature[name] = "constexpr"
                constants[position,] = value
        program, shared = self.compiled(signature, attributes, constants, options)
        self.executor.launches += 1
        execute(program, grid, flat, shared)

    def compiled(
        self, signature: Any, attributes: Any, constants: Any, options: Any
    ) -> tuple[Program, int]:
        """The program, and the bytes of shared memory that it needs."""
        capability = self.executor.capability
        key = repr((self.function, signature, sorted(attributes), constants, options, capability))
        if key not in self.executor.programs:
            source = ASTSource(self.function, signature, constexprs=constants, attrs=attributes)
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options=options)
            program = Program(compiled.asm["ptx"]), compiled.metadata.shared
            self.executor.programs[key] = program
        return self.executor.programs[key]


EXECUTOR = PtxExecutor()


def register() -> str:
    """Register the executor and return its name."""
    register_executor("ptx", __name__)
    return "ptx"
