"""The tensors that a plan is evaluated on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of one evaluation of a plan: B rows, C classes, M logits rows, T terms."""

    logits: Sequence[Tensor]
    """M tensors [B, C] of one dtype (float16, bfloat16, float32, float64), with any strides."""
    weights: Sequence[Tensor]
    """One tensor [B, K] for each weight source, any floating dtype; rows may have stride 0."""
    externals: Sequence[Tensor]
    """Tensors [B, C] of probabilities; constants."""
    target: Tensor
    """int64 [B], or floating [B, C] class probabilities; a constant."""
    term_weights: Tensor
    """[T], or [B, T] for separate weights in each row, in the compute dtype. With [B, T] a term of
    weight 0 adds 0 to its row, even if its value is non-finite."""

    @property
    def differentiable(self) -> list[Tensor]:
        """The tensors that can have a gradient: logits, then weights."""
        return [*self.logits, *self.weights]


Outputs = tuple[Tensor, Tensor, Tensor]
"""Rows [B], unweighted terms [T, B], statistics for the backward pass [num_stats, B]."""
Needs = Sequence[bool]
"""For each differentiable tensor, whether its gradient is needed."""
Gradients = list[Tensor | None]
"""For each differentiable tensor, its gradient; None where it is not needed."""


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_transformed() -> bool:
    """True while ``torch.compile`` or ``torch.func`` transform the calling code: tensors may be
    symbols, and nothing may be kept for the next call.
    """
    # torch.func has no public function for this.
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
