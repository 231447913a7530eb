"""Launches of the kernels on the tensors of an evaluation, on the current device and stream.

Tensors are torch's; ``inputs`` are the ``Inputs`` of ``fastokd.ops``. In every call of a kernel,
Triton finds out again for which types and alignments it is compiled, which takes ten times as long
as the launch. A ``Launcher`` looks the compiled kernel up by a key of the caller and by the
alignment of the addresses, and launches it with the addresses alone.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastokd.kernels.triton import split
from fastokd.kernels.triton.kernels import KERNELS
from fastokd.kernels.triton.spec import FIRST_PASS, MAIN_PASS, NORMALIZED_PASS, Spec
from fastokd.kernels.triton.tile import (
    VECTOR_BYTES,
    Tile,
    choose_splits,
    choose_tile,
    make_tile,
    register_limit,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MOST_LAUNCHES = 4096

Tensor = Any
Inputs = Any
Gradients = Sequence[Any]
"""For each row of logits and source of weights its gradient, or None where it is not needed."""


class Launch(NamedTuple):
    """A compiled kernel, its grid, and its last arguments, which are not tensors."""

    kernel: CompiledKernel
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]


class Launcher:
    """Launches kernels, and remembers the compiled ones."""

    def __init__(self) -> None:
        self.launches: dict[Hashable, Launch] = {}

    def __call__(
        self,
        key: tuple[Hashable, ...],
        device: int,
        tensors: tuple[Any, ...],
        first_launch: Callable[[], tuple[Any, int, tuple[Any, ...]]],
    ) -> None:
        """Launch a kernel on the current stream of the current device.

        Args:
            key: all that the choice of the kernel, its specialization, the grid and the constants
                depend on, except for alignments.
            device: the index of the current device; -1 for the interpreter's tensors.
            tensors: the kernel's first arguments.
            first_launch: launches the kernel by Triton; returns Triton's result, the number of
                programs, and the kernel's last arguments.
        """
        addresses, alignment = _addresses(tensors)
        key = (*key, device, alignment)
        launch = self.launches.get(key)
        if launch is not None:
            stream = driver.active.get_current_stream(device)
            launch.kernel[launch.grid](*addresses, *launch.constants, stream=stream)
            return
        kernel, programs, constants = first_launch()
        if isinstance(kernel, CompiledKernel):  # Triton's interpreter returns None
            if len(self.launches) >= MOST_LAUNCHES:
                self.launches.clear()
            self.launches[key] = Launch(kernel, (programs, 1, 1), constants)


def _addresses(tensors: tuple[Any, ...]) -> tuple[list[Any], Hashable]:
    """The addresses, in tuples where the tensors are, and which of them are aligned: True if all
    are.
    """
    addresses: list[Any] = []
    flat: list[int] = []
    for tensor in tensors:
        if isinstance(tensor, tuple):
            part = tuple([each.data_ptr() for each in tensor])
            addresses.append(part)
            flat += part
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            flat.append(address)
    bits = 0
    for address in flat:
        bits |= address
    if not bits % VECTOR_BYTES:
        return addresses, True
    return addresses, tuple([address % VECTOR_BYTES == 0 for address in flat])


_launcher = Launcher()


def forward(spec: Spec, inputs: Inputs, rows: Tensor, terms: Tensor, stats: Tensor) -> None:
    """Compute rows, terms and statistics of at least one row."""
    if _is_split(inputs):
        _forward_split(spec, _tile(spec, inputs), inputs, rows, terms, stats)
    else:
        _launch("forward", spec, inputs, (), (rows, terms, stats))


def backward(
    spec: Spec,
    inputs: Inputs,
    grads: Gradients,
    grad_rows: Tensor,
    stats: Tensor,
    needs: Sequence[bool],
) -> None:
    """Compute the gradients of ``sum(grad_rows * rows)``."""
    stride = grad_rows.stride(0)
    if _is_split(inputs):
        tile = _tile(spec, inputs, needs, stride)
        _backward_split(spec, tile, inputs, grads, grad_rows, stats)
    else:
        sources = *_destinations(grads, inputs), grad_rows
        _launch("backward", spec, inputs, sources, (stats,), needs, stride)


def forward_backward(
    spec: Spec, inputs: Inputs, grads: Gradients, rows: Tensor, terms: Tensor, needs: Sequence[bool]
) -> None:
    """Compute rows, terms, and the gradients of the mean of the rows, in one kernel; split rows run
    those of both passes, as no program sees a whole row.
    """
    if not _is_split(inputs):
        destinations = _destinations(grads, inputs)
        _launch("forward_backward", spec, inputs, destinations, (rows, terms), needs)
        return
    batch, tile = len(rows), _tile(spec, inputs, needs)
    stats = rows.new_empty((spec.num_stats, batch))
    _forward_split(spec, tile, inputs, rows, terms, stats)
    if any(needs):
        grad_rows = rows.new_full((1,), 1 / batch)
        _backward_split(spec, tile, inputs, grads, grad_rows, stats)


def _is_split(inputs: Inputs) -> bool:
    """True if several programs share each row."""
    return choose_splits(*inputs.logits[0].shape) > 1


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(inputs.logits), tuple(inputs.weights), tuple(inputs.externals), inputs.target


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
    needs: Sequence[bool] = (),
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
    double = first.element_size() == 8
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
        inputs.term_weights.dim() - 1,
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
    needs: Sequence[bool] = (),
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
    per_row = inputs.term_weights.dim() - 1
    key = (
        which,
        spec,
        first.shape,
        first.dtype,
        tuple(needs),
        grad_stride,
        per_row,
        *strides,
        *others,
    )

    def first_launch() -> tuple[Any, int, tuple[Any, ...]]:
        tile = _tile(spec, inputs, needs, grad_stride, which == "forward_backward")
        batch, limit = first.shape[0], register_limit(which, spec.num_nodes)
        programs, warps, constants = -(-batch // tile.rows), tile.num_warps, (batch, 0)
        kernel = _run(
            KERNELS[which], programs, spec, tile, warps, *tensors, *constants, maxnreg=limit
        )
        return kernel, programs, (*constants, spec, tile)

    _launcher(key, first.get_device(), tensors, first_launch)


def _forward_split(
    spec: Spec, tile: Tile, inputs: Inputs, rows: Tensor, terms: Tensor, stats: Tensor
) -> None:
    """A launch per pass over the columns, then the merge."""
    batch, weights, soft = rows.shape[0], inputs.term_weights, tile.soft_target
    partials = weights.new_empty((batch, spec.num_partials(soft), tile.splits))
    passes = [FIRST_PASS, MAIN_PASS] if spec.needs_first_pass(soft) else [MAIN_PASS]
    passes += [NORMALIZED_PASS] if spec.normalized_edges else []
    arguments = _arguments(inputs)
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
    columns = grad_logits, grad_rows, *arguments, *sources, batch, 0
    _run(split.columns_kernel, batch * tile.splits, spec, tile, tile.num_warps, *columns)
    if tile.needs_weights:
        products = grad_weights, grad_rows, arguments[1], *sources, batch
        _run(split.weights_kernel, batch, spec, tile, 1, *products)
