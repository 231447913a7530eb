"""KDCL: Online Knowledge Distillation via Collaborative Learning (Guo et al., CVPR 2020)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.graph import KL, CrossEntropy, Graph, Logits, LowestCrossEntropy, MinLogit, Mixture
from fastokd.methods.base import (
    Impl,
    Reduction,
    branch_names,
    check_choice,
    check_options,
    check_target,
    checked_rows,
    mean_prediction,
)
from fastokd.methods.method import GraphInputs, Method, MethodLoss, Presets
from fastokd.methods.simplex import MAX_ROWS, lowest_cross_entropy_weights
from fastokd.ranks import sum_over_ranks

Variant = Literal["naive", "linear", "minlogit", "general"]
VARIANTS = ("naive", "linear", "minlogit", "general")


def kdcl_graph(
    variant: Variant = "minlogit",
    num_branches: int = 2,
    temperature: float = 3.0,
    lambda_kd: float = 1.0,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """``L = sum_i CE(z_i) + kd_weight * lambda_kd * sum_i T^2 KL(teacher || z_i)``, all from one
    constant ``teacher``.

    ``naive``: for each sample the row with the lowest cross-entropy. ``minlogit``: the elementwise
    minimum of the rows, each shifted so that its label's logit is 0. ``linear`` and ``general``:
    the mixture of the rows with the run-time weights ``teacher_weights``: for ``linear`` [B, M],
    the solution of a convex problem per sample; for ``general`` [M], from the inverse error
    correlation on held-out data. Solving for them is outside the graph.

    The slides give neither T, nor lambda, nor whether the teacher is detached: the temperature is
    that of the other methods here, the teacher a constant, T^2 is on.
    """
    branches = branch_names("kdcl_graph", num_branches, 2)
    check_choice("variant", variant, VARIANTS)
    if variant == "naive":
        teacher = LowestCrossEntropy("teacher", branches)
    elif variant == "minlogit":
        teacher = MinLogit("teacher", branches)
    else:
        teacher = Mixture("teacher", branches, "teacher_weights")
    terms = (
        *map(CrossEntropy, branches),
        *(
            KL("teacher", name, lambda_kd, temperature, detach=True, eps=teacher_eps)
            for name in branches
        ),
    )
    return Graph(f"kdcl_{variant}", (*map(Logits, branches), teacher), terms, label_smoothing)


def error_correlation_weights(correlation: Tensor) -> Tensor:
    """KDCL-General's weights [M] from the error correlation C [M, M]: ``w = C^-1 1``, scaled to add
    up to 1.

    The scale of C does not matter. The closed form does not keep the weights in [0, 1] as the paper
    wants them: negative ones become 0, and the rest is scaled again. Where networks make exactly
    the same errors C is singular, and they share equally.
    """
    inverse = torch.linalg.pinv(correlation.double(), hermitian=True)
    weights = inverse.sum(1).clamp_min(0)
    total = weights.sum()
    return torch.where(total > 0, weights / total, 1 / len(correlation))


class KDCLLoss(MethodLoss):
    """The KDCL loss, see ``kdcl_graph`` for the formula: all networks learn from one teacher made
    of their logits.

    The teacher's weights are solved for here: in ``linear`` for every sample, the mixture of lowest
    cross-entropy; in ``general`` once per epoch by ``see_held_out``, from held-out images; until
    then all networks weigh the same.

    Args:
        num_branches: M networks, at least 2; ``linear`` takes at most 6.
        variant: "naive", "linear", "minlogit" or "general".
        temperature: T of the KL terms; the teacher is chosen at temperature 1.
        lambda_kd: weight of teacher -> network.
        held_out: for ``general``, the fraction of every class's training images that nobody trains
            on, in (0, 1).
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {"paper": {}}

    teacher_weights: Tensor

    def __init__(
        self,
        num_branches: int = 2,
        variant: Variant = "minlogit",
        temperature: float = 3.0,
        lambda_kd: float = 1.0,
        held_out: float = 0.1,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(
            temperature=temperature,
            lambda_kd=lambda_kd,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        if not isinstance(held_out, float) or not 0 < held_out < 1:
            raise ValueError(
                f"held_out={held_out!r}; it must be a fraction of the training images, in (0, 1)"
            )
        super().__init__(
            kdcl_graph(variant, num_branches, temperature, lambda_kd, teacher_eps, label_smoothing),
            num_branches,
            reduction,
            impl,
        )
        if variant == "linear" and num_branches > MAX_ROWS:
            raise ValueError(
                f"num_branches={num_branches}; variant 'linear' solves for the weights of at most"
                f" {MAX_ROWS} networks; use fewer, or variant minlogit"
            )
        self.variant = variant
        if variant == "general":
            self.held_out = held_out
            self.register_buffer(
                "teacher_weights",
                torch.full((num_branches,), 1 / num_branches, dtype=torch.float64),
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KDCLLoss":
        """Follow a move to another device, but not ``half()`` and the like: the teacher's weights
        are never rounded.
        """
        before = self._buffers.get("teacher_weights")
        super()._apply(fn, recurse)
        if before is not None and self.teacher_weights.dtype != before.dtype:
            self.teacher_weights = before.to(self.teacher_weights.device)
        return self

    def graph_inputs(
        self, branch_logits: Sequence[Tensor] | Tensor, target: Tensor | None = None
    ) -> GraphInputs:
        """``target`` is needed by ``linear``, which solves for the mixture that fits it best."""
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        if self.variant == "linear":
            check_target(target, rows[0])
            return GraphInputs(
                rows, {"teacher_weights": lowest_cross_entropy_weights(rows, target)}
            )
        if self.variant == "general":
            return GraphInputs(rows, {"teacher_weights": self.teacher_weights})
        return GraphInputs(rows)

    @torch.no_grad()
    def see_held_out(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Weigh the networks by the correlation of their errors, ``C_ij = mean of <p_1(z_i) - y,
        p_1(z_j) - y>``.

        Logits and targets are as in ``forward``. With torch.distributed the sums run over the
        batches of all processes.
        """
        correlation = self.teacher_weights.new_zeros(self.num_branches, self.num_branches)
        for rows, target in batches:
            rows = checked_rows(rows, self.num_branches, "branch_logits")
            check_target(target, rows[0])
            p = torch.stack(rows).double().softmax(2)
            errors = (
                p - (target if target.is_floating_point() else F.one_hot(target, p.shape[2]))
            ).flatten(1)
            correlation += errors @ errors.T
        self.teacher_weights.copy_(error_correlation_weights(sum_over_ranks(correlation)))

    @torch.no_grad()
    def named_rows(self, branch_logits: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
        """The networks' logits [B, C], their ``ensemble`` (the mean of their predictions), and
        ``general``'s teacher.

        The teachers of the other variants are made with the labels, and have no accuracy.
        """
        rows = checked_rows(branch_logits, self.num_branches, "branch_logits")
        found = {
            **dict(zip(self.graph.logits, rows, strict=True)),
            "ensemble": mean_prediction(rows),
        }
        return (
            {**found, **self.graph_loss.mixtures(rows, {"teacher_weights": self.teacher_weights})}
            if self.variant == "general"
            else found
        )


def _views(options: Mapping[str, Any]) -> bool:
    """Whether every network has a view of its own.

    Args:
        icl: invariant collaborative learning: every network sees each image with an augmentation of
            its own.
    """
    if not isinstance(options["icl"], bool):
        raise TypeError(f"icl={options['icl']!r}; it must be True or False")
    return options["icl"]


METHOD = Method(
    name="kdcl",
    summary=(
        "Collaborative Learning: all networks learn from one teacher, the best that their logits"
        " can make"
    ),
    loss_class=KDCLLoss,
    branch_range=(2, 8),
    default_branches=2,
    model_options={"icl": True},
    topologies=("peers",),
    views=_views,
)
