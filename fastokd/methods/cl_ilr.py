"""CL-ILR: Collaborative Learning (Song and Chai, NeurIPS 2018): heads on one trunk, whose gradient
is rescaled.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture
from fastokd.methods.base import Impl, Reduction, branch_names, check_options
from fastokd.methods.method import Companion, Layout, Method, MethodLoss, Presets


def cl_ilr_graph(
    num_branches: int = 4,
    temperature: float = 3.0,
    lambda_ce: float = 1.0,
    lambda_kd: float = 1.0,
    detach_teacher: bool = False,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """``L = sum_m [ lambda_ce CE(z^m) + kd_weight * lambda_kd * T^2 KL(others_m || z^m) ]``,
    ``others_m`` the mean of the other heads.

    The form of the OKDDip repository: teachers not detached, ramped up over 80 epochs,
    ``teacher_eps=1e-7`` there (here 0). The original takes the teacher as a constant
    (``detach_teacher=True``) and a convex combination of hard and soft targets (``lambda_ce = 1 -
    lambda_kd``). The division of the trunk's gradient by M (the ILR of the name) is not part of the
    loss, see ``GradientRescaling``.
    """
    branches = branch_names("cl_ilr_graph", num_branches, 2)
    share = (1.0 / (num_branches - 1),) * (num_branches - 1)
    others = [
        Mixture(f"others{m}", tuple(name for name in branches if name != student), share)
        for m, student in enumerate(branches, start=1)
    ]
    terms = (
        *(CrossEntropy(name, lambda_ce) for name in branches),
        *(
            KL(node.name, student, lambda_kd, temperature, detach=detach_teacher, eps=teacher_eps)
            for node, student in zip(others, branches, strict=True)
        ),
    )
    return Graph("cl_ilr", (*map(Logits, branches), *others), terms, label_smoothing)


class CLILRLoss(MethodLoss):
    """The loss of collaborative learning, see ``cl_ilr_graph`` for the formula.

    Args:
        num_branches: M, at least 2.
        temperature: T of the KL terms.
        lambda_ce: weight of every cross-entropy.
        lambda_kd: weight of every KL term.
        detach_teacher: the mean of the other heads is a constant in the KL terms.
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {
        # The original's constant teacher; hard and soft targets weigh the same, as in the code.
        "paper": {"detach_teacher": True},
        # The OKDDip repository.
        "code": {"teacher_eps": 1e-7},
    }

    def __init__(
        self,
        num_branches: int = 4,
        temperature: float = 3.0,
        lambda_ce: float = 1.0,
        lambda_kd: float = 1.0,
        detach_teacher: bool = False,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(
            temperature=temperature,
            lambda_ce=lambda_ce,
            lambda_kd=lambda_kd,
            detach_teacher=detach_teacher,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        graph = cl_ilr_graph(
            num_branches,
            temperature,
            lambda_ce,
            lambda_kd,
            detach_teacher,
            teacher_eps,
            label_smoothing,
        )
        super().__init__(graph, num_branches, reduction, impl)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class GradientRescaling(Companion):
    """Divides the gradient that enters the shared trunk by M: M heads pull at it as strongly as
    one.

    Args:
        num_branches: M.
    """

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        self.factor = 1.0 / num_branches

    def at_split(self, shared: Tensor) -> Tensor:
        """The trunk's output [B, c, H, W] as it is; its gradient comes back divided by M."""
        return _ScaleGradient.apply(shared, self.factor)


def _build_rescaling(layout: Layout) -> GradientRescaling:
    return GradientRescaling(len(layout.channels))


METHOD = Method(
    name="cl_ilr",
    summary=(
        "Collaborative Learning: heads taught by the mean of the others, the trunk's gradient"
        " divided among them"
    ),
    loss_class=CLILRLoss,
    branch_range=(2, 8),
    default_branches=4,
    build_companion=_build_rescaling,
    reports_mean=True,
    # 80 of the repository's 300 epochs; nothing is known of a ramp in the original.
    ramp_epochs=lambda epochs, preset: round(epochs * 80 / 300) if preset == "code" else 0,
)
