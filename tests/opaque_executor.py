"""A toy executor: the reference behind the registered operator, as a kernel would be.

``evaluate(impl="reference")`` differentiates the formula directly and never calls the operator;
this one makes ``_GraphFunction``, the operator's fake implementations and its gradients run
wherever the reference does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastokd.graph import Plan
from fastokd.ops import Inputs, register_executor
from fastokd.ops.reference import ReferenceExecutor


class OpaqueExecutor(ReferenceExecutor):
    name = "opaque"

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The reference's gradients in buffers made by ``empty_like``, as kernels do: transposed
        for transposed inputs.
        """
        grads = super().backward(plan, grad_rows, inputs, stats, needs)
        return [
            None if grad is None else torch.empty_like(tensor).copy_(grad)
            for tensor, grad in zip((*inputs.logits, *inputs.weights), grads, strict=True)
        ]


EXECUTOR = OpaqueExecutor()


def register() -> str:
    """Registers it and returns its name."""
    register_executor("opaque", __name__)
    return "opaque"
