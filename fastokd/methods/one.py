"""ONE: Knowledge Distillation by On-the-fly Native Ensemble (Lan et al., NeurIPS 2018)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import Impl, Reduction, as_rows, branch_names, check_options
from fastokd.methods.method import (
    BranchPass,
    Companion,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    Presets,
)


def one_graph(
    num_branches: int = 3,
    temperature: float = 3.0,
    lambda_kd: float = 1.0,
    detach_teacher: bool = True,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """``L = sum_m CE(z^m) + CE(e) + kd_weight * lambda_kd * sum_m T^2 KL(e || z^m)`` with ``e =
    sum_m gate_m z^m``.

    The run-time weights are ``gate`` [B, M]. Source: AHBF eq. 6-7, which write the mixture over
    probabilities; the published code mixes logits, as here. Differences of the published codes:
    both add ``teacher_eps=1e-7`` (here 0); the official one detaches the teacher, as here, the
    OKDDip repository's does not (``detach_teacher=False``). Both ramp the KL up over 80 epochs
    (``kd_weight``).
    """
    branches = branch_names("one_graph", num_branches, 2)
    nodes = (*map(Logits, branches), Mixture("ensemble", branches, "gate"))
    terms = [CrossEntropy(name) for name in (*branches, "ensemble")]
    terms += [
        KL("ensemble", name, lambda_kd, temperature, detach=detach_teacher, eps=teacher_eps)
        for name in branches
    ]
    return Graph("one", nodes, tuple(terms), label_smoothing)


class ONELoss(MethodLoss):
    """The ONE loss (AHBF eq. 6-7), see ``one_graph`` for the formula.

    Args:
        num_branches: M, at least 2.
        temperature: T of the KL terms.
        lambda_kd: weight of ensemble -> branch.
        detach_teacher: the ensemble is a constant in the KL terms, so that the gate learns from its
            cross-entropy alone.
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {
        # The equations, with a constant teacher as in the official code.
        "paper": {},
        # The official code: 1e-7 on the teacher's row.
        "code": {"teacher_eps": 1e-7},
    }

    def __init__(
        self,
        num_branches: int = 3,
        temperature: float = 3.0,
        lambda_kd: float = 1.0,
        detach_teacher: bool = True,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(
            temperature=temperature,
            lambda_kd=lambda_kd,
            detach_teacher=detach_teacher,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        graph = one_graph(
            num_branches, temperature, lambda_kd, detach_teacher, teacher_eps, label_smoothing
        )
        super().__init__(graph, num_branches, reduction, impl, {"gate": "scores[0]"})

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        scores: Sequence[Tensor] | Tensor,
    ) -> GraphInputs:
        """``scores``: one tensor [B, M] in a sequence, or [1, B, M]: each branch's share of the
        ensemble.
        """
        return GraphInputs(
            as_rows(branch_logits, self.num_branches, "branch_logits"),
            {"gate": as_rows(scores, 1, "scores")[0]},
        )


class ONEGate(Companion):
    """The gate on the shared trunk: pooling, a linear layer to M values with batch norm, ReLU and
    softmax (official code).

    Args:
        channels: of the trunk's output.
        num_branches: M.
    """

    def __init__(self, channels: int, num_branches: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_branches)
        self.bn = nn.BatchNorm1d(num_branches)

    def forward(self, seen: BranchPass) -> dict[str, tuple[Tensor]]:
        """``scores``: one tensor [B, M], each branch's share."""
        pooled = F.adaptive_avg_pool2d(seen.shared, 1).flatten(1)
        return {"scores": (torch.softmax(F.relu(self.bn(self.fc(pooled))), 1),)}


def _build_gate(layout: Layout) -> ONEGate:
    return ONEGate(layout.trunk_channels, len(layout.channels))


METHOD = Method(
    name="one",
    summary="On-the-fly Native Ensemble: a gated mixture of all branches teaches each of them",
    loss_class=ONELoss,
    branch_range=(2, 8),
    default_branches=3,
    build_companion=_build_gate,
    # 80 of the published codes' 300 epochs.
    ramp_epochs=lambda epochs, preset: round(epochs * 80 / 300),
)
