"""The student alone: cross-entropy, no teacher."""

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.losses import options
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods.method import Method


@options.loss_options
class BaselineLoss(MethodLoss):
    """Cross-entropy of the student alone, in the same form as every other method's loss."""

    num_branches: int = options.num_branches(1, 1, "must be 1, the student.", high=1)

    def build_graph(self) -> Graph:
        nodes, terms = (Logits("branch1"),), (CrossEntropy("branch1"),)
        return Graph("baseline", nodes, terms, self.label_smoothing)


def baseline_graph(label_smoothing: float = 0.0) -> Graph:
    """The graph of ``BaselineLoss``."""
    return BaselineLoss(label_smoothing=label_smoothing).graph


METHOD = Method(
    name="baseline",
    summary="the student alone, trained with cross-entropy",
    loss_class=BaselineLoss,
)
