"""ONE: On-the-fly Native Ensemble (Lan et al., NeurIPS 2018). The graph of its loss."""

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import branch_names


def one_graph(num_branches: int = 3, temperature: float = 3.0, lambda_kd: float = 1.0, detach_teacher: bool = True,
              teacher_eps: float = 0.0, label_smoothing: float = 0.0) -> Graph:
    """``L = sum_m CE(z^m) + CE(e) + kd_weight * lambda_kd * sum_m T^2 KL(e || z^m)`` with ``e = sum_m gate_m z^m``.

    The run-time weights are ``gate`` [B, M]. Source: AHBF eq. 6-7, which write the mixture over probabilities; the
    published code mixes logits, as here. Differences of the published codes: both add ``teacher_eps=1e-7`` (here 0);
    the official one detaches the teacher, as here, the OKDDip repository's does not (``detach_teacher=False``).
    Both ramp the KL up over 80 epochs (``kd_weight``).
    """
    branches = branch_names("one_graph", num_branches, 2)
    nodes = (*map(Logits, branches), Mixture("ensemble", branches, "gate"))
    terms = [CrossEntropy(name) for name in (*branches, "ensemble")]
    terms += [KL("ensemble", name, lambda_kd, temperature, detach=detach_teacher, eps=teacher_eps) for name in branches]
    return Graph("one", nodes, tuple(terms), label_smoothing)
