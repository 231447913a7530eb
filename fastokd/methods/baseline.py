"""The student alone: cross-entropy, no teacher."""

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.methods.base import Impl, Reduction, check_options
from fastokd.methods.method import Method, MethodLoss


def baseline_graph(label_smoothing: float = 0.0) -> Graph:
    """One row of logits and its cross-entropy."""
    return Graph("baseline", (Logits("branch1"),), (CrossEntropy("branch1"),), label_smoothing)


class BaselineLoss(MethodLoss):
    """Cross-entropy of the student alone, in the same shape as every other method's loss.

    Args:
        num_branches: must be 1.
        label_smoothing: in [0, 1).
        reduction: "mean", "sum" or "none".
        impl: "auto", "reference", "triton" or "cpu".
    """

    def __init__(
        self,
        num_branches: int = 1,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        if num_branches != 1:
            raise ValueError(
                f"num_branches={num_branches}; the baseline trains the student alone, use"
                " num_branches=1"
            )
        check_options(label_smoothing=label_smoothing)
        super().__init__(baseline_graph(label_smoothing), num_branches, reduction, impl)


METHOD = Method(
    name="baseline",
    summary="the student alone, trained with cross-entropy",
    loss_class=BaselineLoss,
    branch_range=(1, 1),
    default_branches=1,
)
