"""AHBF-OKD: Adaptive Hierarchy-Branch Fusion (Gong et al., AAAI 2023).

Branch 1 is the student; deeper branches teach it through recursively mixed teacher assistants
(TAs).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.attention import ATTENTIONS, build_attention
from fastokd.methods.base import GraphLoss, Impl, Reduction, as_rows, check_options
from fastokd.methods.method import (
    BranchPass,
    Companion,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    Presets,
)

PRESETS: Presets = {
    # The paper, eq. 8-14 and section 4.1.
    "paper": {"lambda_ta": 4.0, "lambda_branch": 2.0, "lambda_self": 0.0, "teacher_eps": 0.0},
    # The published code with its readme's command: lambda_1 = 2, lambda_2 = 4 and an edge TA(m) ->
    # branch m that the paper does not have, all times its hidden factor 0.5 * 1.5, which is
    # multiplied out here.
    "code": {
        "lambda_ta": 0.75 * 2,
        "lambda_branch": 0.75 * 4,
        "lambda_self": 0.75 * 2,
        "teacher_eps": 1e-7,
    },
}


def ahbf_graph(
    num_branches: int = 4,
    temperature: float = 3.0,
    lambda_ta: float = 4.0,
    lambda_branch: float = 2.0,
    lambda_self: float = 0.0,
    detach_teacher: bool = False,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
    mix: bool = True,
) -> Graph:
    """The graph of AHBF: M branches, M-1 teacher assistants, their cross-entropies and the cascade
    of KL edges.

    With ``mix`` the TAs are mixed from the branches with the weights ``scores2`` .. ``scoresM``
    (column 0 for branch m, column 1 for the previous TA, eq. 8); without it they are rows of logits
    given after the branches.
    """
    branches = [f"branch{m}" for m in range(1, num_branches + 1)]
    tas = ["branch1"] + [f"ta{m}" for m in range(2, num_branches + 1)]
    nodes: list[Logits | Mixture] = [Logits(name) for name in branches]
    terms: list[CrossEntropy | KL] = [CrossEntropy(name) for name in (*branches, *tas[1:])]

    def teach(teacher: str, student: str, weight: float) -> None:
        if weight:
            terms.append(
                KL(teacher, student, weight, temperature, detach=detach_teacher, eps=teacher_eps)
            )

    for m in range(1, num_branches):
        nodes.append(
            Mixture(tas[m], (branches[m], tas[m - 1]), f"scores{m + 1}") if mix else Logits(tas[m])
        )
        teach(tas[m], tas[m - 1], lambda_ta)
        teach(branches[m], tas[m - 1], lambda_branch)
        teach(tas[m], branches[m], lambda_self)
    return Graph("ahbf", tuple(nodes), tuple(terms), label_smoothing)


class AHBFLoss(MethodLoss):
    """The AHBF loss (eq. 14): cross-entropies of all branches and TAs, and the cascade of KL edges
    between them.

    ``L = sum_m CE(z^m) + sum_{m>=2} CE(ta^m) + kd_weight * sum_{m>=2} T^2 [ lambda_ta KL(ta^m ||
    ta^{m-1}) + lambda_branch KL(z^m || ta^{m-1}) + lambda_self KL(ta^m || z^m) ]`` with ``ta^1 =
    z^1`` and ``ta^m = s_1^m z^m + s_2^m ta^{m-1}``; every KL softens both rows with the temperature
    T.

    Args:
        num_branches: M, at least 2. Branch 1 (index 0) is the student.
        temperature: T, for the KL terms; cross-entropies are at temperature 1.
        lambda_ta: weight of TA(m) -> TA(m-1) (the paper's lambda_1).
        lambda_branch: weight of branch m -> TA(m-1) (the paper's lambda_2).
        lambda_self: weight of TA(m) -> branch m, an edge that only the published code has.
        detach_teacher: stop the gradient into the teacher of every KL edge.
        teacher_eps: added to the teacher's probabilities, not renormalised (the published code:
            1e-7).
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = PRESETS

    def __init__(
        self,
        num_branches: int = 4,
        temperature: float = 3.0,
        lambda_ta: float = 4.0,
        lambda_branch: float = 2.0,
        lambda_self: float = 0.0,
        detach_teacher: bool = False,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        if not isinstance(num_branches, int) or num_branches < 2:
            raise ValueError(
                f"num_branches={num_branches}; AHBF needs a student and at least one deeper branch:"
                " 2 or more"
            )
        check_options(
            temperature=temperature,
            lambda_ta=lambda_ta,
            lambda_branch=lambda_branch,
            lambda_self=lambda_self,
            detach_teacher=detach_teacher,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        options = (
            num_branches,
            temperature,
            lambda_ta,
            lambda_branch,
            lambda_self,
            detach_teacher,
            teacher_eps,
            label_smoothing,
        )
        labels = {f"branch{m}": f"branch_logits[{m - 1}]" for m in range(1, num_branches + 1)}
        for m in range(2, num_branches + 1):
            labels |= {f"ta{m}": f"ta_logits[{m - 2}]", f"scores{m}": f"scores[{m - 2}]"}
        super().__init__(ahbf_graph(*options), num_branches, reduction, impl, labels)
        self.mixed_loss = GraphLoss(ahbf_graph(*options, mix=False), reduction, impl, labels)
        self.temperature = temperature
        self.lambda_ta, self.lambda_branch, self.lambda_self = lambda_ta, lambda_branch, lambda_self
        self.detach_teacher, self.teacher_eps, self.label_smoothing = (
            detach_teacher,
            teacher_eps,
            label_smoothing,
        )
        self.reduction, self.impl = reduction, impl

    @classmethod
    def preset(
        cls, name: Literal["paper", "code"], num_branches: int | None = 4, **overrides: Any
    ) -> "AHBFLoss":
        """The loss of the paper, or of the published code; ``overrides`` are constructor arguments.

        ``code`` has the published code's factor 0.75 multiplied into its weights, so that for both
        presets ``kd_weight`` is the ramp-up value alone.
        """
        return super().preset(name, num_branches, **overrides)

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        scores: Sequence[Tensor] | Tensor | None = None,
    ) -> GraphInputs:
        """``scores``: M-1 tensors [B, 2], or one [M-1, B, 2]: the mixing weights of ta^2 .. ta^M;
        column 0 weighs branch m, column 1 the previous TA.
        """
        branches = as_rows(branch_logits, self.num_branches, "branch_logits")
        if scores is None:
            raise ValueError(
                "scores are missing: the loss mixes the TAs with them; pass them, or ta_logits= if"
                " the model has mixed"
            )
        rows = as_rows(scores, self.num_branches - 1, "scores")
        return GraphInputs(branches, {f"scores{m}": score for m, score in enumerate(rows, start=2)})

    def forward(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        *,
        scores: Sequence[Tensor] | Tensor | None = None,
        ta_logits: Sequence[Tensor] | Tensor | None = None,
        kd_weight: float | Tensor = 1.0,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of B samples with C classes; give either ``scores`` or ``ta_logits``.

        Args:
            branch_logits: M tensors [B, C], or one [M, B, C]; index 0 is the student.
            target: int64 [B], or floating [B, C] class probabilities.
            scores: M-1 tensors [B, 2], or one [M-1, B, 2]: the mixing weights of ta^2 .. ta^M;
                column 0 weighs branch m, column 1 the previous TA.
            ta_logits: M-1 tensors [B, C], or one [M-1, B, C], for models that mix their TAs
                themselves.
            kd_weight: the ramp-up value, a float or a 0-d tensor on the logits' device (see
                ``ramp_up``).
            return_terms: also return each term's mean over the batch before its weight, as detached
                0-d tensors.

        Raises:
            TypeError, ValueError: an argument's type, dtype, shape, device or label is wrong; the
                message names it.
        """
        loss, rows, weights = self._route(branch_logits, scores, ta_logits)
        return loss(rows, target, weights=weights, kd_weight=kd_weight, return_terms=return_terms)

    def forward_backward(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor,
        *,
        scores: Sequence[Tensor] | Tensor | None = None,
        ta_logits: Sequence[Tensor] | Tensor | None = None,
        kd_weight: float | Tensor = 1.0,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``forward`` and ``loss.backward()`` at once, see ``GraphLoss.forward_backward``; returns
        the loss and the terms, detached.
        """
        loss, rows, weights = self._route(branch_logits, scores, ta_logits)
        return loss.forward_backward(
            rows, target, weights=weights, kd_weight=kd_weight, scale=scale
        )

    def _route(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        scores: Sequence[Tensor] | Tensor | None,
        ta_logits: Sequence[Tensor] | Tensor | None,
    ) -> tuple[GraphLoss, Sequence[Tensor], Mapping[str, Tensor]]:
        """The graph that fits what was given, its rows of logits and its mixing weights."""
        if (scores is None) == (ta_logits is None):
            raise ValueError(
                "give exactly one of scores (the loss mixes the TAs) and ta_logits (the model has"
                " mixed them)"
            )
        if ta_logits is None:
            given = self.graph_inputs(branch_logits, scores=scores)
            return self.graph_loss, given.logits, given.weights
        branches = as_rows(branch_logits, self.num_branches, "branch_logits")
        return (
            self.mixed_loss,
            [*branches, *as_rows(ta_logits, self.num_branches - 1, "ta_logits")],
            {},
        )

    def mixtures(
        self, branch_logits: Sequence[Tensor] | Tensor, *, scores: Sequence[Tensor] | Tensor
    ) -> dict[str, Tensor]:
        """The logits [B, C] of ta2 .. taM, without gradient."""
        given = self.graph_inputs(branch_logits, scores=scores)
        return self.graph_loss.mixtures(given.logits, given.weights)


class AHBFGate(nn.Module):
    """The gate A^m: which share of ta^m comes from branch m, and which from the previous TA (eq.
    9-12, published code).

    A 1x1 convolution of the concatenated feature maps with batch norm gives the fused map F~^m;
    pooled, a linear layer to two values with batch norm, ReLU and softmax gives the scores.

    Args:
        channels: c, channels of branch m's features.
        fused_channels: c', channels of F~^{m-1} (F~^1 is branch 1's features).
        attention: what F~^m goes through before it is pooled and handed on: "none", "se", "cbam" or
            "nonlocal". The paper has none; the published code has the others as options, for 64
            channels only.
    """

    def __init__(self, channels: int, fused_channels: int, attention: str = "none") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + fused_channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 2)
        self.score_bn = nn.BatchNorm1d(2)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.attention = build_attention(attention, channels)

    def forward(self, features: Tensor, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Features of branch m [B, c, H, W] and F~^{m-1} [B, c', H, W] to F~^m [B, c, H, W] and
        scores [B, 2].
        """
        fused = self.attention(self.bn(self.conv(torch.cat((features, fused), 1))))
        pooled = F.adaptive_avg_pool2d(fused, 1).flatten(1)
        return fused, torch.softmax(F.relu(self.score_bn(self.fc(pooled))), 1)


class AHBFGates(Companion):
    """The chain of the M-1 gates: each receives the fused map of the one before."""

    def __init__(self, channels: Sequence[int], attention: str = "none") -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            AHBFGate(own, before, attention) for before, own in itertools.pairwise(channels)
        )

    def forward(self, seen: BranchPass) -> dict[str, tuple[Tensor, ...]]:
        """M-1 ``scores`` [B, 2]: column 0 weighs branch m, column 1 the previous TA."""
        fused, scores = seen.features[0], []
        for gate, own in zip(self.gates, seen.features[1:], strict=True):
            fused, score = gate(own, fused)
            scores.append(score)
        return {"scores": tuple(scores)}


def _build_gates(layout: Layout, gate_attention: str = "none") -> AHBFGates:
    """The gates of all branches but the first.

    Args:
        gate_attention: what the gates' fused maps go through: "none", or as options of the
            published code "se", "cbam" or "nonlocal".
    """
    return AHBFGates(layout.channels, gate_attention)


def _ramp_epochs(epochs: int, preset: str) -> int:
    """The paper ramps up over the whole run (300 of 300 epochs), the published code over 240 of its
    300.
    """
    return epochs if preset == "paper" else round(epochs * 240 / 300)


METHOD = Method(
    name="ahbf",
    summary=(
        "Adaptive Hierarchy-Branch Fusion: deeper branches teach through recursively mixed teacher"
        " assistants"
    ),
    loss_class=AHBFLoss,
    branch_range=(2, 8),
    default_branches=4,
    build_companion=_build_gates,
    model_options={"gate_attention": "none"},
    choices={"gate_attention": tuple(ATTENTIONS)},
    hierarchical=True,
    ramp_epochs=_ramp_epochs,
)
