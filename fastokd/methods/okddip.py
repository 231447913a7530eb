"""OKDDip: Online Knowledge Distillation with Diverse Peers (Chen et al., AAAI 2020)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture, ProbabilityMixture
from fastokd.methods.base import Impl, Reduction, as_rows, branch_names, check_choice, check_options
from fastokd.methods.method import (
    BranchPass,
    Companion,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    Presets,
)


def okddip_graph(
    num_branches: int = 4,
    temperature: float = 3.0,
    lambda_peer: float = 1.0,
    lambda_leader: float = 1.0,
    mix: Literal["logits", "probabilities"] = "logits",
    detach_teacher: bool = False,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """M-1 peers ``branch1`` .. and the ``leader`` (the last row of logits, which is kept).

    ``L = sum_a CE(z^a) + CE(leader) + kd_weight * T^2 [ lambda_peer sum_a KL(group_a || z^a) +
    lambda_leader KL(ensemble || leader) ]``. ``group_a`` mixes all peers, a itself included, with
    the attention row ``attention{a}`` [B, M-1] given at run time; ``ensemble`` is the mean of the
    peers.

    The slides mix softened probabilities (``mix="probabilities"``), the published code logits (the
    default); the slides do not define the leader's teacher, the mean is the code's. The code adds
    ``teacher_eps=1e-7`` (here 0) and ramps both levels up over 80 epochs (``kd_weight``); the
    slides have no ramp. Nothing is detached in the code.
    """
    check_choice("mix", mix, ("logits", "probabilities"))
    peers = branch_names("okddip_graph", num_branches, 3)[:-1]

    def mixture(name: str, weights: str | tuple[float, ...]) -> Mixture | ProbabilityMixture:
        return (
            Mixture(name, peers, weights)
            if mix == "logits"
            else ProbabilityMixture(name, peers, weights, temperature)
        )

    def teach(teacher: str, student: str, weight: float) -> KL:
        return KL(teacher, student, weight, temperature, detach=detach_teacher, eps=teacher_eps)

    groups = [mixture(f"group{a}", f"attention{a}") for a in range(1, num_branches)]
    nodes = (
        *map(Logits, (*peers, "leader")),
        *groups,
        mixture("ensemble", (1.0 / len(peers),) * len(peers)),
    )
    terms = (
        *(CrossEntropy(name) for name in (*peers, "leader")),
        *(teach(group.name, peer, lambda_peer) for group, peer in zip(groups, peers, strict=True)),
        teach("ensemble", "leader", lambda_leader),
    )
    return Graph("okddip", nodes, terms, label_smoothing)


class OKDDipLoss(MethodLoss):
    """The OKDDip loss, see ``okddip_graph`` for the formula.

    Args:
        num_branches: M, at least 3: two peers and the leader, which is the last.
        temperature: T of the KL terms.
        lambda_peer: weight of group -> peer, the first level.
        lambda_leader: weight of ensemble -> leader, the second level.
        mix: what the attention mixes: "logits" (the published code) or softened "probabilities"
            (the slides).
        detach_teacher: groups and ensemble are constants in the KL terms. The attention then learns
            nothing, because no other term reaches it.
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {
        # The slides' equations.
        "paper": {"mix": "probabilities"},
        # The published code.
        "code": {"mix": "logits", "teacher_eps": 1e-7},
    }

    def __init__(
        self,
        num_branches: int = 4,
        temperature: float = 3.0,
        lambda_peer: float = 1.0,
        lambda_leader: float = 1.0,
        mix: Literal["logits", "probabilities"] = "logits",
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
            detach_teacher=detach_teacher,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        graph = okddip_graph(
            num_branches,
            temperature,
            lambda_peer,
            lambda_leader,
            mix,
            detach_teacher,
            teacher_eps,
            label_smoothing,
        )
        labels = {f"attention{a}": f"scores[{a - 1}]" for a in range(1, num_branches)}
        super().__init__(graph, num_branches, reduction, impl, labels)

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        scores: Sequence[Tensor] | Tensor,
    ) -> GraphInputs:
        """``scores``: M-1 tensors [B, M-1], or one [M-1, B, M-1]: for each peer its attention to
        all peers, itself included.
        """
        rows = as_rows(scores, self.num_branches - 1, "scores")
        return GraphInputs(
            as_rows(branch_logits, self.num_branches, "branch_logits"),
            {f"attention{a}": row for a, row in enumerate(rows, start=1)},
        )


class OKDDipAttention(Companion):
    """Which peers each peer learns from: ``softmax_b( (W_L h_a) . (W_E h_b) )`` on the peers'
    pooled features h (published code).

    Both projections go from c to c / 8 channels without bias and are shared by all peers; there is
    no scaling by the square root of the width.

    Args:
        channels: c, of every peer's feature maps.
        num_peers: M-1.
    """

    def __init__(self, channels: int, num_peers: int) -> None:
        super().__init__()
        self.num_peers = num_peers
        self.query = nn.Linear(channels, max(channels // 8, 1), bias=False)
        self.key = nn.Linear(channels, max(channels // 8, 1), bias=False)

    def forward(self, seen: BranchPass) -> dict[str, tuple[Tensor, ...]]:
        """``scores``: for each peer one tensor [B, M-1], its attention to all peers."""
        pooled = torch.stack(
            [F.adaptive_avg_pool2d(maps, 1).flatten(1) for maps in seen.features[: self.num_peers]],
            1,
        )
        attention = torch.softmax(self.query(pooled) @ self.key(pooled).transpose(1, 2), 2)
        return {"scores": attention.unbind(1)}


def _build_attention(layout: Layout) -> OKDDipAttention:
    peers = layout.channels[:-1]
    if len(set(peers)) > 1:
        raise ValueError(
            "the attention compares the peers' features, which have"
            f" {' and '.join(map(str, sorted(set(peers))))} channels; give peers of one width (the"
            " leader, which is the last, may differ)"
        )
    return OKDDipAttention(peers[0], len(peers))


METHOD = Method(
    name="okddip",
    summary=(
        "Diverse peers: each learns from its own attention-weighted group, and a leader from all of"
        " them"
    ),
    loss_class=OKDDipLoss,
    branch_range=(3, 8),
    default_branches=4,
    build_companion=_build_attention,
    topologies=("branches", "peers"),
    kept=-1,
    # 80 of the published code's 300 epochs; the slides have no ramp.
    ramp_epochs=lambda epochs, preset: round(epochs * 80 / 300) if preset == "code" else 0,
)
