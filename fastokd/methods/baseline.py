"""The student alone: cross-entropy, no teacher."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.methods.base import GraphLoss, Impl, Method, Reduction


def baseline_graph(label_smoothing: float = 0.0) -> Graph:
    """One row of logits and its cross-entropy."""
    return Graph("baseline", (Logits("branch1"),), (CrossEntropy("branch1"),), label_smoothing)


class BaselineLoss(nn.Module):
    """Cross-entropy of the student alone, in the same shape as every other method's loss.

    Args:
        num_branches: must be 1.
        label_smoothing: in [0, 1).
        reduction: "mean", "sum" or "none".
        impl: "auto", "reference", "triton" or "cpu".
    """

    def __init__(self, num_branches: int = 1, label_smoothing: float = 0.0, reduction: Reduction = "mean", impl: Impl = "auto") -> None:
        super().__init__()
        if num_branches != 1:
            raise ValueError(f"num_branches={num_branches}; the baseline trains the student alone, use num_branches=1")
        self.graph_loss = GraphLoss(baseline_graph(label_smoothing), reduction, impl)

    @property
    def graph(self) -> Graph:
        return self.graph_loss.graph

    def forward(self, branch_logits: Sequence[Tensor] | Tensor, target: Tensor, *, kd_weight: float | Tensor = 1.0,
                return_terms: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """``branch_logits``: one tensor [B, C] in a sequence, or [1, B, C]. The rest as in ``GraphLoss``."""
        return self.graph_loss(branch_logits, target, kd_weight=kd_weight, return_terms=return_terms)

    def forward_backward(self, branch_logits: Sequence[Tensor] | Tensor, target: Tensor, *,
                         kd_weight: float | Tensor = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """``forward`` and ``loss.backward()`` at once, see ``GraphLoss.forward_backward``."""
        return self.graph_loss.forward_backward(branch_logits, target, kd_weight=kd_weight)

    def mixtures(self, branch_logits: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
        """There are none."""
        return {}


METHOD = Method(
    name="baseline",
    summary="the student alone, trained with cross-entropy",
    loss_class=BaselineLoss,
    branch_range=(1, 1),
    default_branches=1,
)
