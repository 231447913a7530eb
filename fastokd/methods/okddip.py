"""OKDDip: Online Knowledge Distillation with Diverse Peers (Chen et al., AAAI 2020). The graph of its loss."""

from typing import Literal

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture, ProbabilityMixture
from fastokd.methods.base import branch_names


def okddip_graph(num_branches: int = 4, temperature: float = 3.0, lambda_peer: float = 1.0, lambda_leader: float = 1.0,
                 mix: Literal["logits", "probabilities"] = "logits", detach_teacher: bool = False,
                 teacher_eps: float = 0.0, label_smoothing: float = 0.0) -> Graph:
    """M-1 peers ``branch1`` .. and the ``leader`` (the last row of logits, which is kept).

    ``L = sum_a CE(z^a) + CE(leader) + kd_weight * T^2 [ lambda_peer sum_a KL(group_a || z^a)
    + lambda_leader KL(mean || leader) ]``. ``group_a`` mixes all peers, a itself included, with the attention row
    ``attention{a}`` [B, M-1] given at run time; ``mean`` averages the peers.

    The slides mix softened probabilities (``mix="probabilities"``), the published code logits (the default); the
    slides do not define the leader's teacher, the mean is the code's. The code adds ``teacher_eps=1e-7`` (here 0) and
    ramps both levels up over 80 epochs (``kd_weight``); the slides have no ramp. Nothing is detached in the code.
    """
    if mix not in ("logits", "probabilities"):
        raise ValueError(f"mix={mix!r}; use 'logits' (the published code) or 'probabilities' (the slides)")
    peers = branch_names("okddip_graph", num_branches, 3)[:-1]

    def mixture(name: str, weights: str | tuple[float, ...]) -> Mixture | ProbabilityMixture:
        return Mixture(name, peers, weights) if mix == "logits" else ProbabilityMixture(name, peers, weights, temperature)

    def teach(teacher: str, student: str, weight: float) -> KL:
        return KL(teacher, student, weight, temperature, detach=detach_teacher, eps=teacher_eps)

    groups = [mixture(f"group{a}", f"attention{a}") for a in range(1, num_branches)]
    nodes = (*map(Logits, (*peers, "leader")), *groups, mixture("mean", (1.0 / len(peers),) * len(peers)))
    terms = (
        *(CrossEntropy(name) for name in (*peers, "leader")),
        *(teach(group.name, peer, lambda_peer) for group, peer in zip(groups, peers, strict=True)),
        teach("mean", "leader", lambda_leader),
    )
    return Graph("okddip", nodes, terms, label_smoothing)
