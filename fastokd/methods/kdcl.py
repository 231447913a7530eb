"""KDCL: Online Knowledge Distillation via Collaborative Learning (Guo et al., CVPR 2020)."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.graph import (
    CrossEntropy,
    Graph,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Node,
    Term,
)
from fastokd.losses import options
from fastokd.losses.checks import check_target, checked_rows, ignored_rows
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods.method import Method
from fastokd.methods.simplex import MAX_ROWS, lowest_cross_entropy_weights
from fastokd.ranks import sum_over_ranks

Variant = Literal["naive", "linear", "minlogit", "general"]
VARIANTS = ("naive", "linear", "minlogit", "general")


def error_correlation_weights(correlation: Tensor) -> Tensor:
    """KDCL-General's weights [M] from the error correlation C [M, M]: ``w = C^-1 1``, with sum 1.

    The scale of C does not matter. The closed form does not keep the weights in [0, 1] as the paper
    requires: negative ones become 0, and the rest is scaled again. C is singular for networks with
    exactly the same errors, which get equal weights.
    """
    inverse = torch.linalg.pinv(correlation.double(), hermitian=True)
    weights = inverse.sum(1).clamp_min(0)
    total = weights.sum()
    return torch.where(total > 0, weights / total, 1 / len(correlation))


@options.loss_options
class KDCLLoss(MethodLoss):
    """``L = sum_i CE(z_i) + kd_weight * lambda_kd * sum_i T^2 KL(teacher || z_i)``, all from one
    constant ``teacher`` that is made of the networks' logits.

    ``naive``: for each sample the row with the lowest cross-entropy. ``minlogit``: the elementwise
    minimum of the rows, each shifted so that its label's logit is 0. ``linear`` and ``general``:
    a mixture of the rows. The weights of ``linear`` solve a convex problem for each sample; those
    of ``general`` follow once per epoch from the inverse error correlation on held-out images
    (``fit_held_out``), and are equal until then.

    The slides give neither T, nor lambda, nor whether the teacher is detached: the temperature is
    that of the other methods here, the teacher a constant, T^2 is on.
    """

    num_branches: int = options.num_branches(2, 2, "M networks; ``linear`` takes at most 6.")
    variant: Variant = options.choice(
        "minlogit", VARIANTS, '"naive", "linear", "minlogit" or "general".'
    )
    temperature: float = options.temperature(3.0, "T of the KL terms; the teacher is at T = 1.")
    lambda_kd: float = options.weight(1.0, "weight of teacher -> network.")
    held_out: float = options.number(
        0.1,
        "for ``general``, the held-out fraction of the training images, in (0, 1).",
        0,
        1,
        open_low=True,
        open_high=True,
    )
    teacher_eps: float = options.teacher_eps()

    ensemble_of = "predictions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "linear" and self.num_branches > MAX_ROWS:
            fix = f"'linear' solves for the weights of at most {MAX_ROWS} networks; use minlogit"
            raise ValueError(f"num_branches={self.num_branches}; {fix}")
        if self.variant == "general":
            equal = torch.full((self.num_branches,), 1 / self.num_branches, dtype=torch.float64)
            self.register_buffer("teacher_weights", equal)

    def build_graph(self) -> Graph:
        branches = self.branch_names()
        teacher: Node = Mixture("teacher", branches, "teacher_weights")
        if self.variant == "naive":
            teacher = LowestCrossEntropy("teacher", branches)
        elif self.variant == "minlogit":
            teacher = MinLogit("teacher", branches)
        nodes: list[Node] = [*map(Logits, branches), teacher]
        terms: list[Term] = [*map(CrossEntropy, branches)]
        terms += [self.teach("teacher", name, self.lambda_kd) for name in branches]
        return Graph(f"kdcl_{self.variant}", nodes, terms, self.label_smoothing)

    def graph_inputs(self, branch_logits: Rows, target: Tensor | None = None) -> GraphInputs:
        """The weights of ``linear`` fit the target best; without a target they are missing."""
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        if self.variant == "linear" and target is not None:
            target = check_target(target, rows[0])
            weights = lowest_cross_entropy_weights(rows, target, self.impl)
            return GraphInputs(rows, {"teacher_weights": weights})
        if self.variant == "general":
            return GraphInputs(rows, {"teacher_weights": self.get_buffer("teacher_weights")})
        return GraphInputs(rows)

    @property
    def held_out_fraction(self) -> float:
        return self.held_out if self.variant == "general" else 0.0

    @torch.no_grad()
    def fit_held_out(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Set the teacher's weights from ``C_ij = mean of <p_1(z_i) - y, p_1(z_j) - y>``, the
        correlation of the networks' errors, over the batches of all processes. Rows with the label
        ``ignore_index`` do not count; dense logits are rows as in the loss.
        """
        weights = self.get_buffer("teacher_weights")
        correlation = weights.new_zeros(self.num_branches, self.num_branches)
        for branch_logits, target in batches:
            rows, layout = self._dense_rows(branch_logits)
            rows = checked_rows(rows, self.num_branches, "branch_logits")
            target = target if layout is None else layout.target(target)
            ignored = ignored_rows(target, self.ignore_index)
            if ignored is not None:
                target = target.masked_fill(ignored, 0)
            check_target(target, rows[0])
            p = torch.stack(rows).double().softmax(2)
            soft = target if target.is_floating_point() else F.one_hot(target, p.shape[2])
            errors = p - soft
            if ignored is not None:
                errors = errors.masked_fill(ignored[:, None], 0)
            errors = errors.flatten(1)
            correlation += errors @ errors.T
        weights.copy_(error_correlation_weights(sum_over_ranks(correlation)))


def kdcl_graph(
    variant: Variant = "minlogit", num_branches: int = 2, *rest: Any, **options: Any
) -> Graph:
    """The graph of ``KDCLLoss`` with these constructor arguments."""
    return KDCLLoss(num_branches, variant, *rest, **options).graph


METHOD = Method(
    name="kdcl",
    summary="Collaborative Learning: all networks learn from one teacher, computed from their"
    " logits",
    loss_class=KDCLLoss,
    model_options={
        "icl": options.switch(
            True, "invariant collaborative learning: each network has its own view of an image."
        )
    },
    topologies=("peers",),
    views="icl",
)
