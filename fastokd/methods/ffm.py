"""FFM + CD: Multi-branch Diversity Enhancement (Li et al., ACCV 2020)."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.losses import options
from fastokd.losses.graph_loss import ExtraTerm, GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss
from fastokd.losses.options import Reduction, keyword
from fastokd.methods.method import Method, Schedule
from fastokd.methods.modules import BranchPass, BranchSpec, MethodModules


def classifier_diversity(weights: Sequence[Tensor]) -> Tensor:
    """L_cd: the sum of the absolute entries of ``W_i W_j^T`` over all pairs of classifiers (eq. 5).

    The paper writes W as features x classes, and ``W_i^T W_j``; here, as layers keep it, W is [C,
    d], without the bias. The norm is not stated: the sum of all C x C absolute entries is what fits
    the tiny weight of 5e-8.
    """
    pairs = itertools.combinations(weights, 2)
    return torch.stack([(one @ other.T).abs().sum() for one, other in pairs]).sum()


@options.loss_options
class FFMLoss(MethodLoss):
    """M-1 auxiliary branches ``branch1`` .. and the ``leader`` (the last row of logits, which is
    kept).

    ``L = sum_i CE(z^i) + CE(leader) + kd_weight * T^2 [ lambda_peer sum_i KL(fusion || z^i) +
    lambda_leader KL(ensemble || leader) ] + lambda_cd L_cd`` (eq. 8): ``fusion`` mixes the
    auxiliaries' logits with the shares of the fusion module, ``ensemble`` averages them.

    The classifier-diversity loss L_cd acts on weights, not on logits, and is outside the graph, see
    ``classifier_diversity``. The paper gives neither ramp-up, detaching nor eps.
    """

    num_branches: int = options.num_branches(4, 3, "M, the leader included, at least 3.")
    temperature: float = options.temperature()
    lambda_peer: float = options.weight(1.0, "weight of fusion -> auxiliary branch (alpha).")
    lambda_leader: float = options.weight(2.0, "weight of auxiliaries' mean -> leader (beta).")
    lambda_cd: float = options.weight(5e-8, "weight of ``classifier_diversity`` (gamma); 0: none.")
    detach_teacher: bool = options.switch(
        False, "teachers are constants in the KL terms. The fusion module is then not trained."
    )
    teacher_eps: float = options.teacher_eps()
    reduction: Reduction = keyword(
        default=options.reduction('"mean"; "sum" and "none" need ``lambda_cd=0``.'), kw_only=True
    )

    def build_graph(self) -> Graph:
        peers = self.branch_names()[:-1]
        heads, share = (*peers, "leader"), (1.0 / len(peers),) * len(peers)
        nodes: list[Node] = [*map(Logits, heads), Mixture("fusion", peers, "fusion_weights")]
        nodes.append(Mixture("ensemble", peers, share))
        terms: list[Term] = [*map(CrossEntropy, heads)]
        terms += [self.teach("fusion", name, self.lambda_peer) for name in peers]
        terms.append(self.teach("ensemble", "leader", self.lambda_leader))
        return Graph("ffm", nodes, terms, self.label_smoothing)

    def build_extra_terms(self) -> dict[str, ExtraTerm]:
        return {"classifier_diversity": ExtraTerm(self.lambda_cd)} if self.lambda_cd else {}

    def graph_inputs(
        self,
        branch_logits: Rows,
        target: Tensor | None = None,
        *,
        fusion_weights: Tensor,
        classifiers: Sequence[Tensor] = (),
    ) -> GraphInputs:
        """``fusion_weights`` [B, M-1]: the auxiliaries' shares. ``classifiers``: M of [C, d]."""
        inputs = GraphInputs([*branch_logits], {"fusion_weights": fusion_weights})
        if not self.extra_terms or target is None:
            return inputs
        shapes = [list(weight.shape) for weight in classifiers]
        matrices = len(shapes) == self.num_branches and len(shapes[0]) == 2
        if not matrices or any(shape != shapes[0] for shape in shapes):
            fix = f"pass the {self.num_branches} branches' classifier weights, each [C, d], or"
            raise ValueError(f"classifiers has the shapes {shapes}; {fix} set lambda_cd=0")
        extras = {"classifier_diversity": classifier_diversity(classifiers)}
        return inputs._replace(extras=extras)


ffm_graph = FFMLoss.make_graph


class FeatureFusion(MethodModules):
    """The feature-fusion module: the M-1 auxiliaries' feature maps to their shares of the fusion.

    A 3x3 convolution of the concatenated maps to ``fusion_channels`` with batch norm and ReLU,
    pooling, a linear layer and softmax. The paper draws convolutions, batch norm and ReLU and gives
    no sizes.
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
        classifiers = [classifier_weight(branch, self.num_classes) for branch in seen.branches]
        return {"fusion_weights": weights, "classifiers": tuple(classifiers)}


def classifier_weight(branch: nn.Module, num_classes: int) -> Tensor:
    """The weight [C, d] of a branch's last linear layer or 1x1 convolution; a ValueError if that
    does not have one output for each class.
    """
    layers = [
        module
        for module in branch.modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    if not layers or layers[-1].weight.shape[0] != num_classes:
        last = f"the last is {layers[-1]}" if layers else "the network has no such layer"
        raise ValueError(
            "the classifier-diversity loss acts on the weight of a linear layer or 1x1 convolution"
            f" to {num_classes} classes, and {last}; use a network that ends in one"
        )
    return layers[-1].weight.flatten(1)


def _build_fusion(spec: BranchSpec, fusion_channels: int = 0) -> FeatureFusion:
    channels = spec.channels[0]
    shapes = {tuple(classifier_weight(branch, spec.num_classes).shape) for branch in spec.branches}
    if len(set(spec.channels)) > 1 or len(shapes) > 1:
        widths = ", ".join(map(str, spec.channels))
        raise ValueError(
            f"the branches' feature maps have {widths} channels and their classifiers the shapes"
            f" {sorted(shapes)}; fusion and classifier diversity need equal ones"
        )
    sizes = len(spec.channels) - 1, channels, spec.num_classes
    return FeatureFusion(*sizes, fusion_channels or channels)


METHOD = Method(
    name="ffm",
    summary="Feature Fusion Module with Classifier Diversity: fused features teach the auxiliary"
    " branches, whose mean teaches the leader",
    loss_class=FFMLoss,
    build_companion=_build_fusion,
    model_options={
        "fusion_channels": options.integer(
            0, "output channels of the fusion's convolution; 0 for as many as a branch has."
        )
    },
    kept=-1,
    # The paper uses OKDDip's settings, whose code ramps up over 80 of its 300 epochs.
    schedule=Schedule((80, 300)),
)
