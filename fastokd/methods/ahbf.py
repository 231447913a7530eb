"""AHBF-OKD: Adaptive Hierarchy-Branch Fusion (Gong et al., AAAI 2023).

Branch 1 is the student; deeper branches teach it through recursively mixed teacher assistants
(TAs).
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.losses import options
from fastokd.losses.checks import as_rows
from fastokd.losses.graph_loss import GraphInputs, LoweredGraph, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.attention import ATTENTIONS
from fastokd.methods.method import Method, Schedule
from fastokd.methods.modules import BranchPass, BranchSpec, MethodModules

PRESETS: Presets = {
    # The paper, eq. 8-14 and section 4.1.
    "paper": {"lambda_ta": 4.0, "lambda_branch": 2.0, "lambda_self": 0.0, "teacher_eps": 0.0},
    # The published code with its readme's command: lambda_1 = 2, lambda_2 = 4 and an edge TA(m) ->
    # branch m that the paper does not have, all times its hidden factor 0.5 * 1.5. The factor is
    # multiplied out here, so that for both presets kd_weight is the ramp-up value alone.
    "code": {"lambda_ta": 1.5, "lambda_branch": 3.0, "lambda_self": 1.5, "teacher_eps": 1e-7},
}


@options.loss_options
class AHBFLoss(MethodLoss):
    """The AHBF loss (eq. 14): cross-entropies of branches and TAs, and a cascade of KL edges.

    ``L = sum_m CE(z^m) + sum_{m>=2} CE(ta^m) + kd_weight * sum_{m>=2} T^2 [ lambda_ta KL(ta^m ||
    ta^{m-1}) + lambda_branch KL(z^m || ta^{m-1}) + lambda_self KL(ta^m || z^m) ]`` with ``ta^1 =
    z^1`` and ``ta^m = s_1^m z^m + s_2^m ta^{m-1}``; every KL softens both rows with the temperature
    T.

    A call gives either the mixing weights ``scores``, or ``ta_logits`` for models that mix their
    TAs themselves, see ``graph_inputs``.
    """

    presets: ClassVar[Presets] = PRESETS

    num_branches: int = options.num_branches(4, 2, "M, at least 2. Branch 1 is the student.")
    temperature: float = options.temperature(3.0, "T of the KL terms; T = 1 elsewhere.")
    lambda_ta: float = options.weight(4.0, "weight of TA(m) -> TA(m-1) (the paper's lambda_1).")
    lambda_branch: float = options.weight(2.0, "weight of branch m -> TA(m-1) (lambda_2).")
    lambda_self: float = options.weight(0.0, "weight of TA(m) -> branch m, in the code only.")
    detach_teacher: bool = options.switch(False, "teachers are constants in the KL terms.")
    teacher_eps: float = options.teacher_eps()

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = {name: f"branch_logits[{m}]" for m, name in enumerate(self.branch_names())}
        labels |= {f"ta{m}": f"ta_logits[{m - 2}]" for m in range(2, self.num_branches + 1)}
        graph = self.with_divergence(self.build_graph(mix=False))
        self.premixed = LoweredGraph.of(graph, labels)

    def build_graph(self, mix: bool = True) -> Graph:
        """The graph; its TAs are mixtures with the weights ``scores2`` .. ``scoresM`` (eq. 8), or
        without ``mix`` rows of logits after the branches.
        """
        branches = self.branch_names()
        tas = ["branch1"] + [f"ta{m}" for m in range(2, self.num_branches + 1)]
        nodes: list[Node] = [Logits(name) for name in branches]
        terms: list[Term] = [CrossEntropy(name) for name in (*branches, *tas[1:])]
        for m in range(1, self.num_branches):
            mixture = Mixture(tas[m], (branches[m], tas[m - 1]), f"scores{m + 1}")
            nodes.append(mixture if mix else Logits(tas[m]))
            for teacher, student, weight in (
                (tas[m], tas[m - 1], self.lambda_ta),
                (branches[m], tas[m - 1], self.lambda_branch),
                (tas[m], branches[m], self.lambda_self),
            ):
                if weight:
                    terms.append(self.teach(teacher, student, weight))
        return Graph("ahbf", nodes, terms, self.label_smoothing)

    def add_teacher(self, students: str | Sequence[str], *arguments: Any, **options: Any) -> Self:
        change = self.with_divergence
        self.premixed = self.premixed.with_teacher(change, students, *arguments, **options)
        return super().add_teacher(students, *arguments, **options)

    def labels(self) -> dict[str, str]:
        return {f"scores{m}": f"scores[{m - 2}]" for m in range(2, self.num_branches + 1)}

    def graph_inputs(
        self,
        branch_logits: Rows,
        target: Tensor | None = None,
        *,
        scores: Rows | None = None,
        ta_logits: Rows | None = None,
    ) -> GraphInputs:
        """The graph's inputs from either ``scores`` or ``ta_logits``.

        Args:
            branch_logits: M tensors [B, C], or one [M, B, C]; index 0 is the student.
            target: as in ``forward``.
            scores: M-1 tensors [B, 2], or one [M-1, B, 2]: the mixing weights of ta^2 .. ta^M;
                column 0 weighs branch m, column 1 the previous TA.
            ta_logits: M-1 tensors [B, C], or one [M-1, B, C], for models that mix their TAs.
        """
        if (scores is None) == (ta_logits is None):
            choices = "scores (the loss mixes the TAs) and ta_logits (the model has mixed them)"
            raise ValueError(f"give exactly one of {choices}")
        if ta_logits is not None:
            tas = as_rows(ta_logits, self.num_branches - 1, "ta_logits")
            return GraphInputs([*branch_logits, *tas], lowered=self.premixed)
        assert scores is not None
        weights = enumerate(as_rows(scores, self.num_branches - 1, "scores"), start=2)
        return GraphInputs([*branch_logits], {f"scores{m}": row for m, row in weights})


def ahbf_graph(*arguments: Any, mix: bool = True, **options: Any) -> Graph:
    """The graph of ``AHBFLoss`` with these constructor arguments."""
    loss = AHBFLoss(*arguments, **options)
    return loss.with_divergence(loss.build_graph(mix))


class AHBFGate(nn.Module):
    """The gate A^m: the shares of branch m and the previous TA in ta^m (eq. 9-12, published code).

    A 1x1 convolution of the concatenated feature maps with batch norm gives the fused map F~^m;
    pooled, a linear layer to two values with batch norm, ReLU and softmax gives the scores.

    Args:
        channels: c, channels of branch m's features.
        fused_channels: c', channels of F~^{m-1} (F~^1 is branch 1's features).
        attention: on F~^m before it is pooled and passed on: "none" (the paper), or options of the
            published code for 64 channels: "se", "cbam", "nonlocal".
    """

    def __init__(self, channels: int, fused_channels: int, attention: str = "none") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + fused_channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 2)
        self.score_bn = nn.BatchNorm1d(2)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.attention = ATTENTIONS[attention](channels)

    def forward(self, features: Tensor, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, c, H, W] and F~^{m-1} [B, c', H, W] to F~^m and scores [B, 2]."""
        fused = self.attention(self.bn(self.conv(torch.cat((features, fused), 1))))
        pooled = F.adaptive_avg_pool2d(fused, 1).flatten(1)
        return fused, torch.softmax(F.relu(self.score_bn(self.fc(pooled))), 1)


class AHBFGates(MethodModules):
    """The chain of the M-1 gates: each receives the fused map of the one before."""

    def __init__(self, spec: BranchSpec, gate_attention: str = "none") -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            AHBFGate(width, before, gate_attention)
            for before, width in itertools.pairwise(spec.channels)
        )

    def forward(self, seen: BranchPass) -> dict[str, tuple[Tensor, ...]]:
        """M-1 ``scores`` [B, 2]: column 0 weighs branch m, column 1 the previous TA."""
        fused, scores = seen.features[0], []
        for gate, features in zip(self.gates, seen.features[1:], strict=True):
            fused, score = gate(features, fused)
            scores.append(score)
        return {"scores": tuple(scores)}


METHOD = Method(
    name="ahbf",
    summary="Adaptive Hierarchy-Branch Fusion: deeper branches teach through recursively mixed"
    " teacher assistants",
    loss_class=AHBFLoss,
    build_companion=AHBFGates,
    model_options={
        "gate_attention": options.choice(
            "none",
            ATTENTIONS,
            'the attention on the gates\' fused maps: "none", or an option of the published code:'
            ' "se", "cbam" or "nonlocal".',
        )
    },
    hierarchical=True,
    # The paper ramps up over the whole run, the published code over 240 of its 300 epochs.
    schedule=Schedule({"paper": (1, 1), "code": (240, 300)}),
)
