"""FFM: Multi-branch Diversity Enhancement with a Feature Fusion Module (Li et al., ACCV 2020). The graph of its loss."""

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import branch_names


def ffm_graph(num_branches: int = 4, temperature: float = 3.0, lambda_peer: float = 1.0, lambda_leader: float = 2.0,
              detach_teacher: bool = False, teacher_eps: float = 0.0, label_smoothing: float = 0.0) -> Graph:
    """M-1 auxiliary branches ``branch1`` .. and the ``leader`` (the last row of logits, which is kept).

    ``L = sum_i CE(z^i) + CE(leader) + kd_weight * T^2 [ lambda_peer sum_i KL(fusion || z^i) + lambda_leader KL(mean ||
    leader) ]`` (eq. 8 without L_cd): ``fusion`` mixes the auxiliaries' logits with the run-time ``fusion_weights``
    [B, M-1], ``mean`` averages them; alpha and beta are ``lambda_peer`` and ``lambda_leader``.

    The classifier-diversity loss L_cd acts on weights, not on logits, and is outside the graph. The paper gives
    neither ramp-up, detaching nor eps.
    """
    peers = branch_names("ffm_graph", num_branches, 3)[:-1]

    def teach(teacher: str, student: str, weight: float) -> KL:
        return KL(teacher, student, weight, temperature, detach=detach_teacher, eps=teacher_eps)

    nodes = (*map(Logits, (*peers, "leader")), Mixture("fusion", peers, "fusion_weights"),
             Mixture("mean", peers, (1.0 / len(peers),) * len(peers)))
    terms = (
        *(CrossEntropy(name) for name in (*peers, "leader")),
        *(teach("fusion", name, lambda_peer) for name in peers),
        teach("mean", "leader", lambda_leader),
    )
    return Graph("ffm", nodes, terms, label_smoothing)
