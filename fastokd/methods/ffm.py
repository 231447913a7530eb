"""FFM + CD: Online Knowledge Distillation via Multi-branch Diversity Enhancement (Li et al., ACCV
2020).
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import Impl, Reduction, as_rows, branch_names, check_options
from fastokd.methods.method import (
    BranchPass,
    Companion,
    ExtraTerm,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    Presets,
)


def ffm_graph(
    num_branches: int = 4,
    temperature: float = 3.0,
    lambda_peer: float = 1.0,
    lambda_leader: float = 2.0,
    detach_teacher: bool = False,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """M-1 auxiliary branches ``branch1`` .. and the ``leader`` (the last row of logits, which is
    kept).

    ``L = sum_i CE(z^i) + CE(leader) + kd_weight * T^2 [ lambda_peer sum_i KL(fusion || z^i) +
    lambda_leader KL(ensemble || leader) ]`` (eq. 8 without L_cd): ``fusion`` mixes the auxiliaries'
    logits with the run-time ``fusion_weights`` [B, M-1], ``ensemble`` averages them; alpha and beta
    are ``lambda_peer`` and ``lambda_leader``.

    The classifier-diversity loss L_cd acts on weights, not on logits, and is outside the graph. The
    paper gives neither ramp-up, detaching nor eps.
    """
    peers = branch_names("ffm_graph", num_branches, 3)[:-1]

    def teach(teacher: str, student: str, weight: float) -> KL:
        return KL(teacher, student, weight, temperature, detach=detach_teacher, eps=teacher_eps)

    nodes = (
        *map(Logits, (*peers, "leader")),
        Mixture("fusion", peers, "fusion_weights"),
        Mixture("ensemble", peers, (1.0 / len(peers),) * len(peers)),
    )
    terms = (
        *(CrossEntropy(name) for name in (*peers, "leader")),
        *(teach("fusion", name, lambda_peer) for name in peers),
        teach("ensemble", "leader", lambda_leader),
    )
    return Graph("ffm", nodes, terms, label_smoothing)


def classifier_diversity(weights: Sequence[Tensor]) -> Tensor:
    """L_cd: over all pairs of classifiers the sum of the absolute entries of ``W_i W_j^T`` (eq. 5),
    0-d.

    The paper writes W as features x classes, and ``W_i^T W_j``; here, as layers keep it, W is [C,
    d], without the bias. The norm is not stated: the sum of all C x C absolute entries is what fits
    the tiny weight of 5e-8.
    """
    return torch.stack(
        [(one @ other.T).abs().sum() for one, other in itertools.combinations(weights, 2)]
    ).sum()


class FFMLoss(MethodLoss):
    """The loss of FFM + CD, see ``ffm_graph`` for the formula; the last of the M branches is the
    leader, which is kept.

    Args:
        num_branches: M, the leader included, at least 3.
        temperature: T of the KL terms.
        lambda_peer: weight of fusion -> auxiliary branch (the paper's alpha).
        lambda_leader: weight of the auxiliaries' mean -> leader (the paper's beta).
        lambda_cd: weight of ``classifier_diversity`` (the paper's gamma); 0 leaves the term out,
            and ``classifiers`` with it.
        detach_teacher: teachers are constants in the KL terms. The fusion module learns from
            nothing else, and would not learn at all.
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch; "sum" and "none" need ``lambda_cd=0``.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {"paper": {}}

    def __init__(
        self,
        num_branches: int = 4,
        temperature: float = 3.0,
        lambda_peer: float = 1.0,
        lambda_leader: float = 2.0,
        lambda_cd: float = 5e-8,
        detach_teacher: bool = False,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(
            temperature=temperature,
            lambda_peer=lambda_peer,
            lambda_leader=lambda_leader,
            lambda_cd=lambda_cd,
            detach_teacher=detach_teacher,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        graph = ffm_graph(
            num_branches,
            temperature,
            lambda_peer,
            lambda_leader,
            detach_teacher,
            teacher_eps,
            label_smoothing,
        )
        super().__init__(
            graph,
            num_branches,
            reduction,
            impl,
            {"fusion_weights": "fusion_weights"},
            {"classifier_diversity": ExtraTerm(lambda_cd)} if lambda_cd else None,
        )

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        fusion_weights: Tensor,
        classifiers: Sequence[Tensor] = (),
    ) -> GraphInputs:
        """``fusion_weights`` [B, M-1]: each auxiliary's share of the fusion. ``classifiers``: the M
        branches' [C, d].
        """
        rows, extras = as_rows(branch_logits, self.num_branches, "branch_logits"), {}
        if self.extra_terms and target is not None:
            shapes = {tuple(weight.shape) for weight in classifiers}
            if (
                len(classifiers) != self.num_branches
                or len(shapes) != 1
                or len(classifiers[0].shape) != 2
            ):
                raise ValueError(
                    f"classifiers has the shapes {[list(weight.shape) for weight in classifiers]};"
                    f" pass the {self.num_branches} branches' classifier weights, each [C, d], or"
                    " set lambda_cd=0"
                )
            extras["classifier_diversity"] = classifier_diversity(classifiers)
        return GraphInputs(rows, {"fusion_weights": fusion_weights}, extras=extras)


class FeatureFusion(Companion):
    """The feature-fusion module: the auxiliaries' feature maps to each one's share of the fusion.

    A 3x3 convolution of the concatenated maps with batch norm and ReLU, pooling, a linear layer and
    softmax. The paper draws convolutions, batch norm and ReLU and gives no sizes.

    Args:
        num_auxiliaries: M-1.
        channels: c, of each branch's feature maps.
        num_classes: C.
        fusion_channels: what the convolution puts out.
    """

    def __init__(
        self, num_auxiliaries: int, channels: int, num_classes: int, fusion_channels: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Conv2d(num_auxiliaries * channels, fusion_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(fusion_channels)
        self.fc = nn.Linear(fusion_channels, num_auxiliaries)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, seen: BranchPass) -> dict[str, Any]:
        """``fusion_weights`` [B, M-1], and the M branches' ``classifiers`` [C, d]."""
        fused = F.relu(self.bn(self.conv(torch.cat(seen.features[:-1], 1))))
        weights = torch.softmax(self.fc(F.adaptive_avg_pool2d(fused, 1).flatten(1)), 1)
        return {
            "fusion_weights": weights,
            "classifiers": tuple(
                classifier_weight(branch, self.num_classes) for branch in seen.branches
            ),
        }


def classifier_weight(branch: nn.Module, num_classes: int) -> Tensor:
    """The weight [C, d] of a branch's classifier: its last linear layer or 1x1 convolution.

    Raises:
        ValueError: that layer does not put out one value for each class.
    """
    layers = [
        module
        for module in branch.modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    if not layers or layers[-1].weight.shape[0] != num_classes:
        found = f"the last is {layers[-1]}" if layers else "there is none"
        raise ValueError(
            "the classifier-diversity loss acts on the weight of a linear layer or 1x1 convolution"
            f" to {num_classes} classes, and {found}; use a network that ends in one"
        )
    return layers[-1].weight.flatten(1)


def _build_fusion(layout: Layout, fusion_channels: int) -> FeatureFusion:
    """The fusion module for these branches.

    Args:
        fusion_channels: channels that the fusion's convolution puts out; 0 for as many as a branch
            has.
    """
    if (
        isinstance(fusion_channels, bool)
        or not isinstance(fusion_channels, int)
        or fusion_channels < 0
    ):
        raise ValueError(
            f"fusion_channels={fusion_channels!r}; it must be a whole number, 0 for as many as a"
            " branch has"
        )
    channels = layout.channels[0]
    shapes = {
        tuple(classifier_weight(branch, layout.num_classes).shape) for branch in layout.branches
    }
    if len(set(layout.channels)) > 1 or len(shapes) > 1:
        raise ValueError(
            f"the branches' feature maps have {', '.join(map(str, layout.channels))} channels and"
            f" their classifiers the shapes {sorted(shapes)}; fusion and classifier diversity need"
            " equal ones"
        )
    return FeatureFusion(
        len(layout.channels) - 1, channels, layout.num_classes, fusion_channels or channels
    )


METHOD = Method(
    name="ffm",
    summary=(
        "Feature Fusion Module with Classifier Diversity: fused features teach the auxiliary"
        " branches, their mean the leader"
    ),
    loss_class=FFMLoss,
    branch_range=(3, 8),
    default_branches=4,
    build_companion=_build_fusion,
    model_options={"fusion_channels": 0},
    kept=-1,
    # The paper takes OKDDip's settings, whose code ramps up over 80 of its 300 epochs.
    ramp_epochs=lambda epochs, preset: round(epochs * 80 / 300),
)
