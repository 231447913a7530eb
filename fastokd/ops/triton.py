"""The Triton executor: one forward and one backward kernel for any graph, on NVIDIA GPUs.

With ``TRITON_INTERPRET=1`` set before Triton is first imported it runs on CPU tensors through
Triton's interpreter, slowly, for tests.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastokd.graph.plan import Plan
from fastokd.kernels.triton import split
from fastokd.kernels.triton.kernels import KERNELS
from fastokd.kernels.triton.spec import Spec
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
from fastokd.ops.inputs import Inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_INPUTS = 16
"""Rows of logits and external rows."""
MAX_SUMS = 72
"""Running sums per thread; compiled kernels hold 66 (eight branches, 21 edges) without spilling,
and not 80.
"""
MANY_INPUTS = 8
MAX_SUMS_OF_MANY = 60
"""The same for graphs of more than ``MANY_INPUTS`` input rows, whose columns fill registers too: 59
(eight branches and seven teachers of their own, 14 edges) do not spill.
"""
_Arguments = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]
"""Logits, weights, externals and target, as kernels take them."""
_device_of: Any = torch.cuda.device_of  # torch does not annotate it
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TritonExecutor:
    """One kernel per direction, whatever the graph; a few where rows are few and long. See
    ``fastokd.kernels.triton``.
    """

    name = "triton"

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        if case.device != "cuda" and not (INTERPRETED and case.device == "cpu"):
            return f"it runs on CUDA devices, and the logits are on '{case.device}'"
        if case.device == "cuda" and not torch.cuda.is_available():
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
            return (
                f"the graph needs {count} running sums; a kernel's registers hold {most} beside"
                f" {inputs} rows of inputs"
            )
        return None

    def num_stats(self, plan: Plan) -> int:
        return int(specialize(plan).num_stats)

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        spec = specialize(plan)
        term_weights, first = inputs.term_weights, inputs.logits[0]
        batch = first.shape[0]
        rows = term_weights.new_empty(batch)
        terms = term_weights.new_empty((spec.num_terms, batch))
        # A [num_stats, B] tensor by contract; the kernels write it row after row, and only they
        # read it.
        stats = term_weights.new_empty((spec.num_stats, batch))
        if batch:
            tile = _tile(spec, inputs)
            arguments = _arguments(inputs)
            if tile.splits > 1:
                _forward_split(spec, tile, arguments, term_weights, rows, terms, stats)
            else:
                _launch("forward", spec, tile, first, *arguments, term_weights, rows, terms, stats)
        return rows, terms, stats

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        spec = specialize(plan)
        term_weights, first = inputs.term_weights, inputs.logits[0]
        grads = _gradients(inputs, needs)
        if first.shape[0] and any(needs):
            tile = _tile(spec, inputs, needs, grad_rows.stride(0))
            arguments = _arguments(inputs)
            destinations = _destinations(grads, inputs)
            if tile.splits > 1:
                _backward_split(
                    spec, tile, *destinations, grad_rows, arguments, term_weights, stats
                )
            else:
                _launch(
                    "backward",
                    spec,
                    tile,
                    first,
                    *destinations,
                    grad_rows,
                    *arguments,
                    term_weights,
                    stats,
                )
        return grads

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Rows [B], terms [T, B] and the gradients of the mean of the rows, in one kernel.

        Split rows run the kernels of both passes, because no program sees a whole row.
        """
        spec = specialize(plan)
        term_weights, first = inputs.term_weights, inputs.logits[0]
        batch = first.shape[0]
        rows = term_weights.new_empty(batch)
        terms = term_weights.new_empty((spec.num_terms, batch))
        grads = _gradients(inputs, needs)
        if batch:
            tile = _tile(spec, inputs, needs, forward_backward=True)
            arguments = _arguments(inputs)
            destinations = _destinations(grads, inputs)
            if tile.splits > 1:
                stats = term_weights.new_empty((spec.num_stats, batch))
                _forward_split(spec, tile, arguments, term_weights, rows, terms, stats)
                if any(needs):
                    grad_rows = term_weights.new_full((1,), 1 / batch)
                    _backward_split(
                        spec, tile, *destinations, grad_rows, arguments, term_weights, stats
                    )
            else:
                outputs = term_weights, rows, terms
                _launch("forward_backward", spec, tile, first, *destinations, *arguments, *outputs)
        return rows, terms, grads


def _arguments(inputs: Inputs) -> _Arguments:
    return tuple(inputs.logits), tuple(inputs.weights), tuple(inputs.externals), inputs.target


def _gradients(inputs: Inputs, needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if need else None
        for tensor, need in zip((*inputs.logits, *inputs.weights), needs, strict=True)
    ]


def _destinations(
    grads: Sequence[Tensor | None], inputs: Inputs
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors that the kernel writes gradients to.

    Gradients that are not needed are never written; the input itself provides a pointer of the
    right dtype.
    """
    tensors = [
        tensor if grad is None else grad
        for grad, tensor in zip(grads, (*inputs.logits, *inputs.weights), strict=True)
    ]
    count = len(inputs.logits)
    return tuple(tensors[:count]), tuple(tensors[count:])


def _tile(
    spec: Spec,
    inputs: Inputs,
    needs: Sequence[bool] = (),
    grad_stride: int = 0,
    forward_backward: bool = False,
) -> Tile:
    logits = inputs.logits
    first = logits[0]
    batch, num_classes = first.shape
    size = first.element_size()
    aligned = all(
        row.stride(1) == 1
        and row.stride(0) * size % VECTOR_BYTES == 0
        and row.data_ptr() % VECTOR_BYTES == 0
        for row in logits
    )
    splits = choose_splits(batch, num_classes)
    # Split rows have no kernel of their own for both at once, and are to give the same bits either
    # way.
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


def _launch(which: str, spec: Spec, tile: Tile, first: Tensor, *args: Any) -> None:
    batch = first.shape[0]
    with _device_of(first):
        KERNELS[which][(-(-batch // tile.rows),)](
            *args,
            batch,
            0,
            spec,
            tile,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
            maxnreg=register_limit(which, spec.num_nodes),
        )


def _forward_split(
    spec: Spec,
    tile: Tile,
    inputs: _Arguments,
    term_weights: Tensor,
    rows: Tensor,
    terms: Tensor,
    stats: Tensor,
) -> None:
    """A launch per pass over the columns, then the merge."""
    first = inputs[0][0]
    batch = first.shape[0]
    partials = term_weights.new_empty((batch, spec.num_partials(tile.soft_target), tile.splits))
    with _device_of(first):
        for stage in range(3):
            if stage == 1 or (
                spec.needs_first_pass(tile.soft_target) if stage == 0 else spec.normalized_edges
            ):
                split.partial_kernel[(batch * tile.splits,)](
                    *inputs,
                    partials,
                    batch,
                    0,
                    stage,
                    spec,
                    tile,
                    num_warps=tile.num_warps,
                    enable_fp_fusion=True,
                )
        split.merge_kernel[(batch,)](
            *inputs,
            term_weights,
            partials,
            rows,
            terms,
            stats,
            batch,
            0,
            spec,
            tile,
            num_warps=1,
            enable_fp_fusion=True,
        )


def _backward_split(
    spec: Spec,
    tile: Tile,
    grad_logits: tuple[Tensor, ...],
    grad_weights: tuple[Tensor, ...],
    grad_rows: Tensor,
    inputs: _Arguments,
    term_weights: Tensor,
    stats: Tensor,
) -> None:
    first = inputs[0][0]
    batch = first.shape[0]
    products = term_weights.new_empty((batch, spec.num_weights * tile.needs_weights, tile.splits))
    with _device_of(first):
        split.columns_kernel[(batch * tile.splits,)](
            grad_logits,
            grad_rows,
            *inputs,
            term_weights,
            stats,
            products,
            batch,
            0,
            spec,
            tile,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
        if tile.needs_weights:
            split.weights_kernel[(batch,)](
                grad_weights,
                grad_rows,
                inputs[1],
                term_weights,
                stats,
                products,
                batch,
                spec,
                tile,
                num_warps=1,
                enable_fp_fusion=True,
            )


EXECUTOR = TritonExecutor()
