"""Ind: branches on one trunk, or whole networks, trained without distillation."""

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.losses import options
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods.method import Method


@options.loss_options
class IndependentLoss(MethodLoss):
    """``L = sum_m CE(z^m)``: the "individual branches" that the papers compare with."""

    num_branches: int = options.num_branches(4, 2, "M, at least 2.")

    def build_graph(self) -> Graph:
        branches = self.branch_names()
        nodes, terms = [*map(Logits, branches)], [*map(CrossEntropy, branches)]
        return Graph("independent", nodes, terms, self.label_smoothing)


METHOD = Method(
    name="independent",
    summary="Ind: branches or networks trained without distillation, for comparison",
    loss_class=IndependentLoss,
    topologies=("branches", "peers"),
    reports_mean=True,
)
