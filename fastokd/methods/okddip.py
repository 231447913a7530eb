"""OKDDip: Online Knowledge Distillation with Diverse Peers (Chen et al., AAAI 2020)."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, ProbabilityMixture, Term
from fastokd.losses import options
from fastokd.losses.checks import as_rows
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.method import Method, Schedule
from fastokd.methods.modules import BranchPass, BranchSpec, MethodModules


@options.loss_options
class OKDDipLoss(MethodLoss):
    """M-1 peers ``branch1`` .. and the ``leader`` (the last row of logits, which is kept).

    ``L = sum_a CE(z^a) + CE(leader) + kd_weight * T^2 [ lambda_peer sum_a KL(group_a || z^a) +
    lambda_leader KL(ensemble || leader) ]``. ``group_a`` mixes all peers, a itself included, with
    an attention row; ``ensemble`` is the mean of the peers.

    The slides mix softened probabilities (``mix="probabilities"``), the published code logits (the
    default); the slides do not define the leader's teacher, the mean is the code's. The code adds
    ``teacher_eps=1e-7`` (here 0) and ramps both levels up over 80 epochs (``kd_weight``); the
    slides have no ramp. Nothing is detached in the code.
    """

    presets: ClassVar[Presets] = {
        # The slides' equations.
        "paper": {"mix": "probabilities"},
        # The published code.
        "code": {"mix": "logits", "teacher_eps": 1e-7},
    }

    num_branches: int = options.num_branches(4, 3, "M: two or more peers, then the leader.")
    temperature: float = options.temperature()
    lambda_peer: float = options.weight(1.0, "weight of group -> peer, the first level.")
    lambda_leader: float = options.weight(1.0, "weight of ensemble -> leader, the second level.")
    mix: Literal["logits", "probabilities"] = options.choice(
        "logits",
        ("logits", "probabilities"),
        'the rows that the attention mixes: "logits" (the published code) or softened'
        ' "probabilities" (the slides).',
    )
    detach_teacher: bool = options.switch(
        False,
        "groups and ensemble are constants in the KL terms; the attention is then not trained.",
    )
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        peers = self.branch_names()[:-1]

        def mixture(name: str, weights: str | tuple[float, ...]) -> Mixture | ProbabilityMixture:
            if self.mix == "logits":
                return Mixture(name, peers, weights)
            return ProbabilityMixture(name, peers, weights, self.temperature)

        nodes: list[Node] = [*map(Logits, (*peers, "leader"))]
        terms: list[Term] = [*map(CrossEntropy, (*peers, "leader"))]
        for a, peer in enumerate(peers, start=1):
            nodes.append(mixture(f"group{a}", f"attention{a}"))
            terms.append(self.teach(f"group{a}", peer, self.lambda_peer))
        nodes.append(mixture("ensemble", (1.0 / len(peers),) * len(peers)))
        terms.append(self.teach("ensemble", "leader", self.lambda_leader))
        return Graph("okddip", nodes, terms, self.label_smoothing)

    def labels(self) -> dict[str, str]:
        return {f"attention{a}": f"scores[{a - 1}]" for a in range(1, self.num_branches)}

    def graph_inputs(
        self, branch_logits: Rows, target: Tensor | None = None, *, scores: Rows
    ) -> GraphInputs:
        """``scores``: M-1 tensors [B, M-1], or one [M-1, B, M-1]: each peer's attention to all."""
        weights = enumerate(as_rows(scores, self.num_branches - 1, "scores"), start=1)
        return GraphInputs([*branch_logits], {f"attention{a}": row for a, row in weights})


okddip_graph = OKDDipLoss.make_graph


class OKDDipAttention(MethodModules):
    """Each peer's attention to all peers: ``softmax_b( (W_L h_a) . (W_E h_b) )`` on the peers'
    pooled features h (published code).

    Both projections go from c to c / 8 channels without bias and are shared by all peers; there is
    no scaling by the square root of the width.

    Raises:
        ValueError: the M-1 peers' features differ in their channels c.
    """

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        peers = spec.channels[:-1]
        if len(set(peers)) > 1:
            widths = " and ".join(map(str, sorted(set(peers))))
            raise ValueError(
                f"the attention compares the peers' features, which have {widths} channels; give"
                " peers of one width (the leader, which is the last, may differ)"
            )
        self.num_peers, channels = len(peers), peers[0]
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


METHOD = Method(
    name="okddip",
    summary="Diverse peers: each peer learns from an attention-weighted mixture of the peers, the"
    " leader from their mean",
    loss_class=OKDDipLoss,
    build_companion=OKDDipAttention,
    topologies=("branches", "peers"),
    kept=-1,
    schedule=Schedule({"code": (80, 300)}),  # the slides have no ramp
)
