"""AFID: attention-based feature interaction between two sub-networks. The graph of its loss."""

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture


def afid_graph(temperature: float = 3.0, lambda_kd: float = 1.0, teacher_eps: float = 0.0, label_smoothing: float = 0.0) -> Graph:
    """Two sub-networks ``branch1``, ``branch2`` and a ``fusion`` head: three rows of logits.

    ``L = CE(z^1) + CE(z^2) + CE(fusion) + kd_weight * lambda_kd * T^2 [ KL(fusion || z^1) + KL(fusion || z^2) +
    KL(mean || fusion) ]``, ``mean = (z^1 + z^2) / 2``, every teacher detached: the form of the authors' code, which
    adds ``teacher_eps=1e-7`` (here 0) and ramps up over 80 epochs. The attention exchange between the sub-networks is
    part of the forward pass, not of the loss.
    """
    def teach(teacher: str, student: str) -> KL:
        return KL(teacher, student, lambda_kd, temperature, detach=True, eps=teacher_eps)

    heads = ("branch1", "branch2", "fusion")
    return Graph(
        "afid",
        (*map(Logits, heads), Mixture("mean", heads[:2], (0.5, 0.5))),
        (*map(CrossEntropy, heads), teach("fusion", "branch1"), teach("fusion", "branch2"), teach("mean", "fusion")),
        label_smoothing,
    )
