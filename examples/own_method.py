"""Add a custom method as a plug-in: every branch learns from the mean of all logits.

fastokd show consensus --plugin examples/own_method.py
fastokd train --data path/to/images --method consensus --plugin examples/own_method.py --epochs 10
"""

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.losses import MethodLoss
from fastokd.methods import Method, register_method


class ConsensusLoss(MethodLoss):
    """``sum_m [ CE(z^m) + kd_weight * T^2 KL(c || z^m) ]`` with the constant ``c = mean_m z^m``."""

    def __init__(
        self,
        num_branches: int = 3,
        temperature: float = 3.0,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        names = tuple(f"branch{m}" for m in range(1, num_branches + 1))
        nodes = (
            *map(Logits, names),
            Mixture("consensus", names, (1 / num_branches,) * num_branches),
        )
        teaching = [KL("consensus", name, temperature=temperature, detach=True) for name in names]
        graph = Graph("consensus", nodes, (*map(CrossEntropy, names), *teaching))
        super().__init__(graph, num_branches, reduction, impl)


METHOD = Method(
    name="consensus",
    summary="every branch learns from the mean of all branches",
    loss_class=ConsensusLoss,
    branch_range=(2, 8),
    default_branches=3,
)
register_method("consensus", __name__)
