"""Batches for the graphs, and the comparison of the Triton kernels with float64.

Used by ``triton_numerics.py`` (interpreter) and ``test_triton_gpu.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastokd.graph import Graph, lower
from fastokd.graph.plan import Plan
from fastokd.ops import Inputs
from fastokd.ops.reference import EXECUTOR as REFERENCE
from fastokd.ops.triton import EXECUTOR as TRITON


@dataclass
class Batch:
    """Inputs of one call of an executor."""

    plan: Plan
    logits: list[Tensor]
    weights: list[Tensor]
    externals: list[Tensor]
    target: Tensor
    term_weights: Tensor
    grad_rows: Tensor
    needs: list[bool] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        return [
            *self.logits,
            *self.weights,
            *self.externals,
            self.target,
            self.term_weights,
            self.grad_rows,
        ]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def each(values: Sequence[Tensor]) -> list[Tensor]:
            return [change(value) for value in values]

        return Batch(
            self.plan,
            each(self.logits),
            each(self.weights),
            each(self.externals),
            change(self.target),
            change(self.term_weights),
            change(self.grad_rows),
            self.needs,
        )

    def to(self, device: str) -> "Batch":
        return self.mapped(lambda tensor: tensor.to(device))

    def double(self) -> "Batch":
        return self.mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    @property
    def inputs(self) -> Inputs:
        """The executor's argument after the plan."""
        return Inputs(self.logits, self.weights, self.externals, self.target, self.term_weights)


def make(
    graph: Graph,
    batch: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    soft: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    plan = lower(graph)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = Batch(
        plan,
        [(normal(batch, classes) * scale).to(dtype) for _ in range(plan.num_logits)],
        [normal(batch, width).softmax(1) for width in plan.weight_widths],
        [normal(batch, classes).softmax(1) for _ in range(plan.num_externals)],
        (
            normal(batch, classes).softmax(1)
            if soft
            else torch.randint(classes, (batch,), generator=random)
        ),
        normal(plan.num_terms).abs().to(compute),
        normal(batch).abs().to(compute),
        [True] * (plan.num_logits + len(plan.weight_widths)),
    )
    return inputs.to(device)


def run(executor: object, inputs: Batch) -> list[Tensor | None]:
    """Rows, each term, each gradient."""
    rows, terms, stats = executor.forward(inputs.plan, inputs.inputs)
    grads = executor.backward(inputs.plan, inputs.grad_rows, inputs.inputs, stats, inputs.needs)
    return [rows, *terms, *grads]


def check(inputs: Batch, slack: float = 32, huge: bool = False, executor: object = TRITON) -> None:
    """The kernels' error is at most twice the reference's in the same dtype, plus ``slack`` units
    of rounding.

    Units are those of float32 arithmetic at the size of the result; for values at that of the
    logits (a KL is a difference of numbers of that size), for gradients at that of their factors
    (they are differences of probabilities). With an undetached teacher the gradient of a logit
    holds a whole KL too, and that of a mixing weight its product with logits: ``huge`` allows for
    that where it shows; the reference escapes it only where a softmax is exactly one-hot. A
    gradient is also rounded to its own dtype (half a unit; both executors do that).
    """
    before = [tensor.clone() for tensor in inputs.tensors()]
    found, plain, truth = (
        run(executor, inputs),
        run(REFERENCE, inputs),
        run(REFERENCE, inputs.double()),
    )
    unit = torch.finfo(inputs.term_weights.dtype).eps
    size = max((float(row.abs().max()) for row in inputs.logits if row.numel()), default=0.0)
    values = 1 + inputs.plan.num_terms
    factors = [
        float(weight) * term.scale / term.temperature
        for weight, term in zip(inputs.term_weights, inputs.plan.terms, strict=True)
    ]
    factor = max(factors) * float(inputs.grad_rows.max() if inputs.grad_rows.numel() else 0.0)
    for number, (mine, theirs, exact) in enumerate(zip(found, plain, truth, strict=True)):
        if exact is None:
            assert mine is None
            continue
        assert mine.shape == exact.shape
        assert mine.dtype == theirs.dtype
        if not exact.numel():
            continue
        scale = max(float(exact.abs().max()), factor if number >= values else 0.0)
        if number < values or huge:
            scale = max(scale, size, size * size if number >= values + len(inputs.logits) else 0.0)
        own = (
            torch.finfo(mine.dtype).eps * float(exact.abs().max())
            if mine.dtype != inputs.term_weights.dtype
            else 0.0
        )
        error, other = (
            float((mine.double() - exact).abs().max()),
            float((theirs.double() - exact).abs().max()),
        )
        assert error <= 2 * other + slack * unit * scale + own, (
            f"output {number}: error {error:.3g}, reference {other:.3g}, scale {scale:.3g}"
        )
    for tensor, copy in zip(inputs.tensors(), before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"


def fused(inputs: Batch, executor: object = TRITON) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    return executor.forward_backward(inputs.plan, inputs.inputs, inputs.needs)
