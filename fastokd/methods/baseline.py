"""The student alone: cross-entropy, no teacher."""

import functools

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.losses import options
from fastokd.losses.method_loss import MethodLoss
from fastokd.losses.options import Impl, Reduction, loss_options
from fastokd.methods.method import Method


@loss_options
class BaselineLoss(MethodLoss):
    """Cross-entropy of the student alone, in the same form as every other method's loss."""

    num_branches: int = options.num_branches(1, 1, "must be 1, the student.", high=1)
    label_smoothing: float = options.label_smoothing()
    reduction: Reduction = options.reduction()
    impl: Impl = options.impl()

    def build_graph(self) -> Graph:
        return Graph(
            "baseline", (Logits("branch1"),), (CrossEntropy("branch1"),), self.label_smoothing
        )


baseline_graph = functools.partial(BaselineLoss.make_graph, 1)

METHOD = Method(
    name="baseline",
    summary="the student alone, trained with cross-entropy",
    loss_class=BaselineLoss,
    branch_range=(1, 1),
    default_branches=1,
)
