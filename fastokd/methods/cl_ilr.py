"""CL-ILR: Collaborative Learning (Song and Chai, NeurIPS 2018). The graph of its loss."""

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import branch_names


def cl_ilr_graph(num_branches: int = 4, temperature: float = 3.0, lambda_kd: float = 1.0, detach_teacher: bool = False,
                 teacher_eps: float = 0.0, label_smoothing: float = 0.0) -> Graph:
    """``L = sum_m CE(z^m) + kd_weight * lambda_kd * sum_m T^2 KL(others_m || z^m)``, ``others_m`` the mean of the other heads.

    The form of the OKDDip repository: teachers not detached, ramped up over 80 epochs, ``teacher_eps=1e-7`` there
    (here 0). The original weights hard and soft targets by a convex combination and takes the teacher as a constant
    (``detach_teacher=True``). The division of the trunk's gradient by M (the ILR of the name) is not part of the loss.
    """
    branches = branch_names("cl_ilr_graph", num_branches, 2)
    share = (1.0 / (num_branches - 1),) * (num_branches - 1)
    others = [
        Mixture(f"others{m}", tuple(name for name in branches if name != student), share)
        for m, student in enumerate(branches, start=1)
    ]
    terms = (
        *map(CrossEntropy, branches),
        *(KL(node.name, student, lambda_kd, temperature, detach=detach_teacher, eps=teacher_eps)
          for node, student in zip(others, branches, strict=True)),
    )
    return Graph("cl_ilr", (*map(Logits, branches), *others), terms, label_smoothing)
