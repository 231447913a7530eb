"""ONE: Knowledge Distillation by On-the-fly Native Ensemble (Lan et al., NeurIPS 2018)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.losses import options
from fastokd.losses.checks import as_rows
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.method import Method, Schedule
from fastokd.methods.modules import BranchPass, BranchSpec, MethodModules


@options.loss_options
class ONELoss(MethodLoss):
    """``L = sum_m CE(z^m) + CE(e) + kd_weight * lambda_kd * sum_m T^2 KL(e || z^m)`` with ``e =
    sum_m gate_m z^m``.

    Source: AHBF eq. 6-7, which write the mixture over probabilities; the published code mixes
    logits, as here. Differences of the published codes: both add ``teacher_eps=1e-7`` (here 0); the
    official one detaches the teacher, as here, the OKDDip repository's does not
    (``detach_teacher=False``). Both ramp the KL up over 80 epochs (``kd_weight``).
    """

    presets: ClassVar[Presets] = {
        # The equations, with a constant teacher as in the official code.
        "paper": {},
        # The official code: 1e-7 on the teacher's row.
        "code": {"teacher_eps": 1e-7},
    }

    num_branches: int = options.num_branches(3, 2, "M, at least 2.")
    temperature: float = options.temperature()
    lambda_kd: float = options.weight(1.0, "weight of ensemble -> branch.")
    detach_teacher: bool = options.switch(
        True, "the ensemble is a constant in the KL terms; the gate learns from its cross-entropy."
    )
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        branches = self.branch_names()
        nodes: list[Node] = [*map(Logits, branches), Mixture("ensemble", branches, "gate")]
        terms: list[Term] = [*map(CrossEntropy, (*branches, "ensemble"))]
        terms += [self.teach("ensemble", name, self.lambda_kd) for name in branches]
        return Graph("one", nodes, terms, self.label_smoothing)

    def labels(self) -> dict[str, str]:
        return {"gate": "scores[0]"}

    def graph_inputs(
        self, branch_logits: Rows, target: Tensor | None = None, *, scores: Rows
    ) -> GraphInputs:
        """``scores``: one tensor [B, M] in a sequence, or [1, B, M]: shares of the branches."""
        return GraphInputs([*branch_logits], {"gate": as_rows(scores, 1, "scores")[0]})


one_graph = ONELoss.make_graph


def pooled_channels(shared: Tensor, channels: int) -> Tensor:
    """The mean [B, channels] of maps [B, channels, H, W] or [B, H, W, channels], or of tokens
    [B, T, channels].
    """
    if shared.ndim == 4 and shared.shape[1] == channels:
        return F.adaptive_avg_pool2d(shared, 1).flatten(1)
    return shared.flatten(1, -2).mean(1)


class ONEGate(MethodModules):
    """The gate on the shared trunk: pooling, a linear layer to M values with batch norm, ReLU and
    softmax (official code).
    """

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        num_branches = len(spec.channels)
        self.fc = nn.Linear(spec.trunk_channels, num_branches)
        self.bn = nn.BatchNorm1d(num_branches)

    def forward(self, seen: BranchPass) -> dict[str, tuple[Tensor]]:
        """``scores``: one tensor [B, M], each branch's share."""
        pooled = pooled_channels(seen.shared, self.fc.in_features)
        return {"scores": (torch.softmax(F.relu(self.bn(self.fc(pooled))), 1),)}


METHOD = Method(
    name="one",
    summary="On-the-fly Native Ensemble: a gated mixture of all branches teaches each of them",
    loss_class=ONELoss,
    build_companion=ONEGate,
    schedule=Schedule((80, 300)),  # the published codes
)
