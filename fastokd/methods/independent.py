"""Ind: branches on one trunk, or whole networks, trained side by side without any distillation."""

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.methods.base import Impl, Reduction, branch_names, check_options
from fastokd.methods.method import Method, MethodLoss


def independent_graph(num_branches: int = 4, label_smoothing: float = 0.0) -> Graph:
    """``L = sum_m CE(z^m)``: the "individual branches" that the papers compare with."""
    branches = branch_names("independent_graph", num_branches, 2)
    return Graph(
        "independent",
        tuple(map(Logits, branches)),
        tuple(map(CrossEntropy, branches)),
        label_smoothing,
    )


class IndependentLoss(MethodLoss):
    """The sum of M cross-entropies.

    Args:
        num_branches: M, at least 2.
        label_smoothing: in [0, 1).
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    def __init__(
        self,
        num_branches: int = 4,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(label_smoothing=label_smoothing)
        super().__init__(
            independent_graph(num_branches, label_smoothing), num_branches, reduction, impl
        )


METHOD = Method(
    name="independent",
    summary=(
        "Ind: branches or networks side by side, without distillation; what the others must beat"
    ),
    loss_class=IndependentLoss,
    branch_range=(2, 8),
    default_branches=4,
    topologies=("branches", "peers"),
    reports_mean=True,
)
