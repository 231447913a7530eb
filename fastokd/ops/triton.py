"""The Triton executor: one forward and one backward kernel for any graph, on NVIDIA GPUs; with
``TRITON_INTERPRET=1`` before the first import of Triton also on CPU tensors, slowly, for tests.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastokd.graph.plan import Plan
from fastokd.kernels.triton import split
from fastokd.kernels.triton.kernels import KERNELS
from fastokd.kernels.triton.launch import Launcher
from fastokd.kernels.triton.spec import FIRST_PASS, MAIN_PASS, NORMALIZED_PASS, Spec
from fastokd.kernels.triton.specialize import specialize
from fastokd.kernels.triton.tile import (
    VECTOR_BYTES,
    Tile,
    choose_splits,
    choose_tile,
    make_tile,
    register_limit,
)
from fastokd.ops.executors import Case
from fastokd.ops.inputs import Gradients, Inputs, Needs, Outputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_INPUTS = 16
"""Rows of logits and external rows."""
MAX_SUMS = 72
"""Running sums per thread: 66 (eight branches, 21 edges) do not spill, 80 do."""
MANY_INPUTS = 8
MAX_SUMS_OF_MANY = 60
"""The same for more than ``MANY_INPUTS`` input rows, whose columns fill registers too: 59 (eight
branches and seven separate teachers, 14 edges) do not spill."""
_Arguments = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]
"""Logits, weights, externals and target, as kernels take them."""
_device_of: Any = torch.cuda.device_of  # torch does not annotate it
_launcher = Launcher()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TritonExecutor:
    """One kernel per direction for every graph, or a few for few long rows."""

    name = "triton"

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        if case.device != "cuda" and not (INTERPRETED and case.device == "cpu"):
            return f"it runs on CUDA devices, and the logits are on '{case.device}'"
        initialized = torch.cuda.is_initialized()  # the faster question
        if case.device == "cuda" and not initialized and not torch.cuda.is_available():
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
        if batch and _is_split(inputs):
            _forward_split(spec, _tile(spec, inputs), inputs, rows, terms, stats)
        elif batch:
            _launch("forward", spec, inputs, (), (rows, terms, stats))
        return rows, terms, stats

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Needs
    ) -> Gradients:
        spec = specialize(plan)
        grads = _gradients(inputs, needs)
        if inputs.logits[0].shape[0] and any(needs):
            stride = grad_rows.stride(0)
            if _is_split(inputs):
                tile = _tile(spec, inputs, needs, stride)
                _backward_split(spec, tile, inputs, grads, grad_rows, stats)
            else:
                sources = *_destinations(grads, inputs), grad_rows
                _launch("backward", spec, inputs, sources, (stats,), needs, stride)
        return grads

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Needs
    ) -> tuple[Tensor, Tensor, Gradients]:
        """One kernel; split rows run those of both passes, as no program sees a whole row."""
        spec, batch = specialize(plan), inputs.logits[0].shape[0]
        grads = _gradients(inputs, needs)
        rows, terms = _outputs(spec, inputs)
        if not batch:
            return rows, terms, grads
        if _is_split(inputs):
            tile = _tile(spec, inputs, needs)
            stats = rows.new_empty((spec.num_stats, batch))
            _forward_split(spec, tile, inputs, rows, terms, stats)
            if any(needs):
                grad_rows = rows.new_full((1,), 1 / batch)
                _backward_split(spec, tile, inputs, grads, grad_rows, stats)
        else:
            destinations = _destinations(grads, inputs)
            _launch("forward_backward", spec, inputs, destinations, (rows, terms), needs)
        return rows, terms, grads


def _is_split(inputs: Inputs) -> bool:
    """True if several programs share each row."""
    return choose_splits(*inputs.logits[0].shape) > 1


def _outputs(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Empty tensors for rows [B] and terms [T, B]."""
    batch, empty = inputs.logits[0].shape[0], inputs.term_weights.new_empty
    return empty(batch), empty((spec.num_terms, batch))


def _arguments(inputs: Inputs) -> _Arguments:
    return tuple(inputs.logits), tuple(inputs.weights), tuple(inputs.externals), inputs.target


def _gradients(inputs: Inputs, needs: Needs) -> Gradients:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
        for tensor, need in zip(inputs.differentiable, needs, strict=True)
    ]


def _destinations(
    grads: Gradients, inputs: Inputs
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors that the kernel writes gradients to: for a gradient without need, which is never
    written, the input provides a pointer of the right dtype."""
    tensors = [
        tensor if grad is None else grad
        for grad, tensor in zip(grads, inputs.differentiable, strict=True)
    ]
    count = len(inputs.logits)
    return tuple(tensors[:count]), tuple(tensors[count:])


def _tile(
    spec: Spec,
    inputs: Inputs,
    needs: Needs = (),
    grad_stride: int = 0,
    forward_backward: bool = False,
) -> Tile:
    logits, first = inputs.logits, inputs.logits[0]
    (batch, num_classes), size = first.shape, first.element_size()
    aligned = all(
        row.stride(1) == 1
        and row.stride(0) * size % VECTOR_BYTES == 0
        and row.data_ptr() % VECTOR_BYTES == 0
        for row in logits
    )
    splits = choose_splits(batch, num_classes)
    # Split rows have no forward_backward kernel; the same tile gives the same bits in both ways.
    rows, lanes, pieces, vector, num_warps = choose_tile(
        batch, num_classes, size, spec.num_nodes, aligned, forward_backward and splits == 1
    )
    double = first.dtype == torch.float64
    return make_tile(
        num_classes,
        rows,
        lanes,
        pieces,
        vector,
        num_warps,
        splits,
        tuple(row.stride() for row in logits),
        tuple(weight.stride() for weight in inputs.weights),
        tuple(row.stride() for row in inputs.externals),
        inputs.target.stride(),
        grad_stride,
        tuple(int(need) for need in needs),
        int(double),
        int(not INTERPRETED and not double),
    )


def _run(
    kernel: Any, grid: int, spec: Spec, tile: Tile, num_warps: int, *args: Any, **options: Any
) -> Any:
    """Launch a kernel whose last arguments are the spec and the tile; returns Triton's result."""
    return kernel[(grid,)](*args, spec, tile, num_warps=num_warps, enable_fp_fusion=True, **options)


def _launch(
    which: str,
    spec: Spec,
    inputs: Inputs,
    sources: Any,
    outputs: Any,
    needs: Needs = (),
    grad_stride: int = 0,
) -> None:
    """Launch a kernel for rows that are not split."""
    first = inputs.logits[0]
    tensors = *sources, *_arguments(inputs), inputs.term_weights, *outputs
    others = [
        (tensor.dtype, tensor.stride())
        for tensor in (*inputs.weights, *inputs.externals, inputs.target)
    ]
    strides = [row.stride() for row in inputs.logits]
    key = which, spec, first.shape, first.dtype, tuple(needs), grad_stride, *strides, *others

    def first_launch() -> tuple[Any, int, tuple[Any, ...]]:
        tile = _tile(spec, inputs, needs, grad_stride, which == "forward_backward")
        batch, limit = first.shape[0], register_limit(which, spec.num_nodes)
        programs, warps, constants = -(-batch // tile.rows), tile.num_warps, (batch, 0)
        kernel = _run(KERNELS[which], programs, spec, tile, warps, *tensors, *constants, maxnreg=limit)
        return kernel, programs, (*constants, spec, tile)

    device = first.get_device()  # -1 for the tensors of the interpreter
    if device < 0 or device == torch.cuda.current_device():
        _launcher(key, device, tensors, first_launch)
    else:
        with _device_of(first):
            _launcher(key, device, tensors, first_launch)


def _forward_split(
    spec: Spec, tile: Tile, inputs: Inputs, rows: Tensor, terms: Tensor, stats: Tensor
) -> None:
    """A launch per pass over the columns, then the merge."""
    batch, weights, soft = rows.shape[0], inputs.term_weights, tile.soft_target
    partials = weights.new_empty((batch, spec.num_partials(soft), tile.splits))
    passes = [FIRST_PASS, MAIN_PASS] if spec.needs_first_pass(soft) else [MAIN_PASS]
    passes += [NORMALIZED_PASS] if spec.normalized_edges else []
    arguments = _arguments(inputs)
    with _device_of(rows):
        for number in passes:
            part = *arguments, partials, batch, 0, number
            _run(split.partial_kernel, batch * tile.splits, spec, tile, tile.num_warps, *part)
        merge = *arguments, weights, partials, rows, terms, stats, batch, 0
        _run(split.merge_kernel, batch, spec, tile, 1, *merge)


def _backward_split(
    spec: Spec, tile: Tile, inputs: Inputs, grads: Gradients, grad_rows: Tensor, stats: Tensor
) -> None:
    batch, arguments = inputs.logits[0].shape[0], _arguments(inputs)
    grad_logits, grad_weights = _destinations(grads, inputs)
    shape = batch, spec.num_weights * tile.needs_weights, tile.splits
    sources = inputs.term_weights, stats, stats.new_empty(shape)
    with _device_of(stats):
        columns = grad_logits, grad_rows, *arguments, *sources, batch, 0
        _run(split.columns_kernel, batch * tile.splits, spec, tile, tile.num_warps, *columns)
        if tile.needs_weights:
            products = grad_weights, grad_rows, arguments[1], *sources, batch
            _run(split.weights_kernel, batch, spec, tile, 1, *products)


EXECUTOR = TritonExecutor()
