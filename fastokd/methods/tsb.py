"""TSB: Temporal-Spatial Boosting of mutual distillation. The graph of its loss."""

from fastokd.graph import KL, CrossEntropy, External, Graph, Logits, ProbabilityMixture
from fastokd.methods.base import branch_names


def tsb_graph(num_branches: int = 2, temperature: float = 4.0, lambda_ta: float = 0.5, lambda_si: float = 0.5,
              student_first: bool = False, t2_scaling: bool = False, label_smoothing: float = 0.0) -> Graph:
    """M networks that learn from each other's memories and from their common mean prediction.

    ``L = sum_i [ CE(z^i) + kd_weight * ( lambda_ta sum_{j != i} KL(memory_j || z^i) + lambda_si KL(mean || z^i) ) ]``,
    rows at T. ``memory{j}`` is network j's temporal accumulator for each sample, given from outside: corrected
    (divided by ``1 - beta^t``), with the current prediction already in it. ``mean`` averages all networks' softened
    predictions, the own one included.

    The paper prints the student as first argument (``student_first=True``); the default is the usual direction. As
    printed there is no T^2 (``t2_scaling=False``). Detaching is not stated: the teachers are constants here. The first
    20 epochs are without KL (``kd_weight=0``).
    """
    branches = branch_names("tsb_graph", num_branches, 2)

    def teach(teacher: str, student: str, weight: float) -> KL:
        direction = "student_first" if student_first else "teacher_first"
        return KL(teacher, student, weight, temperature, t2_scaling, detach=True, direction=direction)

    memories = [f"memory{j}" for j in range(1, num_branches + 1)]
    mean = ProbabilityMixture("mean", branches, (1.0 / num_branches,) * num_branches, temperature)
    terms = (
        *map(CrossEntropy, branches),
        *(teach(memory, student, lambda_ta)
          for i, student in enumerate(branches) for j, memory in enumerate(memories) if j != i),
        *(teach("mean", student, lambda_si) for student in branches),
    )
    return Graph("tsb", (*map(Logits, branches), *map(External, memories), mean), terms, label_smoothing)
