"""The Triton executor: one forward and one backward kernel for any graph, on NVIDIA GPUs; with
``TRITON_INTERPRET=1`` before the first import of Triton also on CPU tensors, slowly, for tests.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastokd.graph.plan import Plan
from fastokd.kernels.triton import launch
from fastokd.kernels.triton.launch import INTERPRETED
from fastokd.kernels.triton.spec import Spec
from fastokd.kernels.triton.specialize import specialize
from fastokd.ops.executors import Case
from fastokd.ops.inputs import Gradients, Inputs, Needs, Outputs

MAX_INPUTS = 16
"""Rows of logits and external rows."""
MAX_SUMS = 72
"""Running sums per thread: 66 (eight branches, 21 edges) do not spill, 80 do."""
MANY_INPUTS = 8
MAX_SUMS_OF_MANY = 60
"""The same for more than ``MANY_INPUTS`` input rows, whose columns fill registers too: 59 (eight
branches and seven separate teachers, 14 edges) do not spill."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TritonExecutor:
    """One kernel per direction for every graph, or a few for few long rows."""

    name = "triton"

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        if case.device != "cuda" and not (INTERPRETED and case.device == "cpu"):
            return f"it runs on CUDA devices, and the logits are on '{case.device}'"
        if case.device == "cuda" and not _has_cuda():
            return "this machine has no CUDA device"
        if case.dtype not in _DTYPES:
            return f"it has no arithmetic for {case.dtype}"
        if plan is None:
            return None
        inputs = plan.num_logits + plan.num_externals
        if inputs > MAX_INPUTS:
            return f"the graph has {inputs} rows of inputs; a kernel takes {MAX_INPUTS}"
        spec = specialize(plan)
        count = max(spec.num_running_sums, spec.num_normalized)
        most = MAX_SUMS if inputs <= MANY_INPUTS else MAX_SUMS_OF_MANY
        if count > most:
            rows = f"next to {inputs} rows of inputs"
            return f"the graph needs {count} running sums; a kernel's registers hold {most} {rows}"
        return None

    def num_stats(self, plan: Plan) -> int:
        return int(specialize(plan).num_stats)

    def forward(self, plan: Plan, inputs: Inputs) -> Outputs:
        spec, batch = specialize(plan), inputs.logits[0].shape[0]
        rows, terms = _outputs(spec, inputs)
        # [num_stats, B] by contract; the kernels write it row after row, and only they read it.
        stats = rows.new_empty((spec.num_stats, batch))
        if batch:
            with device_of(inputs.logits[0]):
                launch.forward(spec, _placed(inputs), rows, terms, stats)
        return rows, terms, stats

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Needs
    ) -> Gradients:
        grads = _gradients(inputs, needs)
        if inputs.logits[0].shape[0] and any(needs):
            with device_of(inputs.logits[0]):
                launch.backward(specialize(plan), _placed(inputs), grads, grad_rows, stats, needs)
        return grads

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Needs
    ) -> tuple[Tensor, Tensor, Gradients]:
        spec, grads = specialize(plan), _gradients(inputs, needs)
        rows, terms = _outputs(spec, inputs)
        if inputs.logits[0].shape[0]:
            with device_of(inputs.logits[0]):
                launch.forward_backward(spec, _placed(inputs), grads, rows, terms, needs)
        return rows, terms, grads


def _placed(inputs: Inputs) -> Inputs:
    """The inputs with separate weights of terms [B, T] row after row, as the kernels read them."""
    weights = inputs.term_weights
    return inputs if weights.dim() == 1 else inputs._replace(term_weights=weights.contiguous())


def _has_cuda() -> bool:
    # The first question is the faster one, and usually answers the second.
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types
    return initialized or torch.cuda.is_available()


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Context in which the tensor's device is current. It does nothing if it already is, because
    entering ``torch.cuda.device`` is slow.
    """
    index = tensor.get_device()
    if index < 0 or index == torch.cuda.current_device():  # -1 for the interpreter's tensors
        return nullcontext()
    device: AbstractContextManager[None] = torch.cuda.device(index)
    return device


def _outputs(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Empty tensors for rows [B] and terms [T, B]."""
    batch, empty = inputs.logits[0].shape[0], inputs.term_weights.new_empty
    return empty(batch), empty((spec.num_terms, batch))


def _gradients(inputs: Inputs, needs: Needs) -> Gradients:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
        for tensor, need in zip(inputs.differentiable, needs, strict=True)
    ]


EXECUTOR = TritonExecutor()
