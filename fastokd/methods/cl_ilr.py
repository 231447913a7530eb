"""CL-ILR: Collaborative Learning (Song and Chai, NeurIPS 2018): heads on a shared trunk."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.losses import options
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.method import Method, Schedule
from fastokd.methods.modules import BranchSpec, MethodModules


@options.loss_options
class CLILRLoss(MethodLoss):
    """``L = sum_m [ lambda_ce CE(z^m) + kd_weight * lambda_kd * T^2 KL(others_m || z^m) ]``, with
    ``others_m`` the mean of the other heads.

    The form of the OKDDip repository: teachers not detached, ramped up over 80 epochs,
    ``teacher_eps=1e-7`` there (here 0). The original takes the teacher as a constant
    (``detach_teacher=True``) and a convex combination of hard and soft targets (``lambda_ce = 1 -
    lambda_kd``). The division of the trunk's gradient by M (the ILR of the name) is not part of the
    loss, see ``GradientRescaling``.
    """

    presets: ClassVar[Presets] = {
        # The original's constant teacher; hard and soft targets weigh the same, as in the code.
        "paper": {"detach_teacher": True},
        # The OKDDip repository.
        "code": {"teacher_eps": 1e-7},
    }

    num_branches: int = options.num_branches(4, 2, "M, at least 2.")
    temperature: float = options.temperature()
    lambda_ce: float = options.weight(1.0, "weight of every cross-entropy.")
    lambda_kd: float = options.weight(1.0, "weight of every KL term.")
    detach_teacher: bool = options.switch(
        False, "the mean of the other heads is a constant in the KL terms."
    )
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        branches = self.branch_names()
        share = (1.0 / (self.num_branches - 1),) * (self.num_branches - 1)
        nodes: list[Node] = [*map(Logits, branches)]
        terms: list[Term] = [CrossEntropy(name, self.lambda_ce) for name in branches]
        for m, student in enumerate(branches, start=1):
            others = tuple(name for name in branches if name != student)
            nodes.append(Mixture(f"others{m}", others, share))
            terms.append(self.teach(f"others{m}", student, self.lambda_kd))
        return Graph("cl_ilr", nodes, terms, self.label_smoothing)


cl_ilr_graph = CLILRLoss.make_graph


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


class GradientRescaling(MethodModules):
    """Divide the gradient that enters the shared trunk by M: M heads affect it as one would."""

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        self.factor = 1.0 / len(spec.channels)

    def at_split(self, shared: Tensor) -> Tensor:
        """The trunk's output [B, c, H, W], unchanged; its gradient is divided by M."""
        scaled: Tensor = _ScaleGradient.apply(shared, self.factor)
        return scaled


METHOD = Method(
    name="cl_ilr",
    summary="Collaborative Learning: each head learns from the mean of the other heads; the trunk's"
    " gradient is divided by their number",
    loss_class=CLILRLoss,
    build_companion=GradientRescaling,
    reports_mean=True,
    # The repository's; nothing is known of a ramp in the original.
    schedule=Schedule({"code": (80, 300)}),
)
