"""KDCL: Online Knowledge Distillation via Collaborative Learning (Guo et al., CVPR 2020). The graphs of its loss."""

from typing import Literal

from fastokd.errors import did_you_mean
from fastokd.graph import KL, CrossEntropy, Graph, Logits, LowestCrossEntropy, MinLogit, Mixture
from fastokd.methods.base import branch_names


def kdcl_graph(variant: Literal["naive", "linear", "minlogit", "general"] = "minlogit", num_branches: int = 2,
               temperature: float = 3.0, lambda_kd: float = 1.0, teacher_eps: float = 0.0,
               label_smoothing: float = 0.0) -> Graph:
    """``L = sum_i CE(z_i) + kd_weight * lambda_kd * sum_i T^2 KL(teacher || z_i)``, all from one constant ``teacher``.

    ``naive``: for each sample the row with the lowest cross-entropy. ``minlogit``: the elementwise minimum of the rows,
    each shifted so that its label's logit is 0. ``linear`` and ``general``: the mixture of the rows with the run-time
    weights ``teacher_weights``: for ``linear`` [B, M], the solution of a convex problem per sample; for ``general``
    [M], from the inverse error correlation on held-out data. Solving for them is outside the graph.

    The slides give neither T, nor lambda, nor whether the teacher is detached: the temperature is that of the other
    methods here, the teacher a constant, T^2 is on.
    """
    branches = branch_names("kdcl_graph", num_branches, 2)
    if variant == "naive":
        teacher = LowestCrossEntropy("teacher", branches)
    elif variant == "minlogit":
        teacher = MinLogit("teacher", branches)
    elif variant in ("linear", "general"):
        teacher = Mixture("teacher", branches, "teacher_weights")
    else:
        raise ValueError(f"unknown variant '{variant}'{did_you_mean(variant, ('naive', 'linear', 'minlogit', 'general'))}")
    terms = (
        *map(CrossEntropy, branches),
        *(KL("teacher", name, lambda_kd, temperature, detach=True, eps=teacher_eps) for name in branches),
    )
    return Graph(f"kdcl_{variant}", (*map(Logits, branches), teacher), terms, label_smoothing)
