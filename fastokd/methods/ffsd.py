"""FFSD: Feature Fusion and Self-Distillation (Li et al.). The graph of the logit part of its loss."""

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import branch_names


def ffsd_graph(num_students: int = 2, temperature: float = 2.0, lambda_kd: float = 1.0, teacher_eps: float = 0.0,
               label_smoothing: float = 0.0) -> Graph:
    """K students ``branch1`` .., then the ``leader`` (kept) and the ``fusion`` head: K + 2 rows of logits.

    ``L = sum_i [ CE(z^i) + w/(K-1) sum_{j != i} T^2 KL(z^j || z^i) ] + CE(fusion) + w T^2 KL(mean || fusion) +
    CE(leader) + w T^2 KL(fusion || leader)`` with ``w = kd_weight * lambda_kd``, ``mean`` of the students' logits, and
    every teacher detached: the form of the official code, which does not ramp the KL up (``kd_weight=1``).

    Outside the graph: the losses on feature and attention maps, the self-distillation decoders, and the separate
    optimizers; the fusion head reads detached features.
    """
    students = branch_names("ffsd_graph", num_students, 2, "num_students")

    def teach(teacher: str, student: str, share: float = 1.0) -> KL:
        return KL(teacher, student, lambda_kd * share, temperature, detach=True, eps=teacher_eps)

    heads = (*students, "leader", "fusion")
    share = 1.0 / (num_students - 1)
    terms = (
        *map(CrossEntropy, heads),
        *(teach(other, student, share) for student in students for other in students if other != student),
        teach("mean", "fusion"),
        teach("fusion", "leader"),
    )
    nodes = (*map(Logits, heads), Mixture("mean", students, (1.0 / num_students,) * num_students))
    return Graph("ffsd", nodes, terms, label_smoothing)
