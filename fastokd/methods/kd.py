"""KD: knowledge distillation from a frozen teacher (Hinton et al., 2015)."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastokd.graph import KL, CrossEntropy, External, Graph, Logits
from fastokd.methods.base import Impl, Reduction, as_rows, check_choice, check_options
from fastokd.methods.method import (
    BranchPass,
    Companion,
    GraphInputs,
    Layout,
    Method,
    MethodLoss,
    Presets,
)

Rows = Literal["logits", "probabilities"]


def kd_graph(
    temperature: float = 3.0,
    lambda_kd: float = 1.0,
    teacher_rows: Rows = "logits",
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """``L = CE(z) + kd_weight * lambda_kd * T^2 KL(teacher || z)`` (AHBF eq. 3-5) for the student
    ``branch1``.

    The ``teacher`` is a second row of logits (detached), or a row of stored probabilities, softened
    at T already. The OKDDip repository adds ``teacher_eps=1e-7`` (here 0). Other libraries weigh
    the cross-entropy by ``1 - lambda_kd`` as well; the paper form does not.
    """
    check_choice("teacher_rows", teacher_rows, ("logits", "probabilities"))
    source = Logits("teacher") if teacher_rows == "logits" else External("teacher")
    terms = (
        CrossEntropy("branch1"),
        KL("teacher", "branch1", lambda_kd, temperature, detach=True, eps=teacher_eps),
    )
    return Graph("kd", (Logits("branch1"), source), terms, label_smoothing)


class KDLoss(MethodLoss):
    """The loss of a student with a frozen teacher, see ``kd_graph`` for the formula.

    Args:
        num_branches: must be 1, the student.
        temperature: T of the KL term.
        lambda_kd: weight of the KL term.
        teacher_rows: what the teacher's rows are: "logits", or "probabilities" that were softened
            at ``temperature``.
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for the cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {
        "paper": {},
        # The OKDDip repository's training with a teacher.
        "code": {"teacher_eps": 1e-7},
    }

    def __init__(
        self,
        num_branches: int = 1,
        temperature: float = 3.0,
        lambda_kd: float = 1.0,
        teacher_rows: Rows = "logits",
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        if num_branches != 1:
            raise ValueError(
                f"num_branches={num_branches}; the teacher is frozen and only the student is"
                " trained, use num_branches=1"
            )
        check_options(
            temperature=temperature,
            lambda_kd=lambda_kd,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        super().__init__(
            kd_graph(temperature, lambda_kd, teacher_rows, teacher_eps, label_smoothing),
            num_branches,
            reduction,
            impl,
            {"teacher": "teacher"},
        )
        self.teacher_rows = teacher_rows

    def graph_inputs(
        self,
        branch_logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        *,
        teacher: Tensor | None = None,
    ) -> GraphInputs:
        """``teacher``: [B, C], the teacher's logits or stored probabilities, as ``teacher_rows``
        says; a constant.
        """
        (student,) = as_rows(branch_logits, 1, "branch_logits")
        if teacher is None:
            raise ValueError(f"teacher is missing: pass the teacher's {self.teacher_rows} [B, C]")
        if self.teacher_rows == "probabilities":
            return GraphInputs([student], externals={"teacher": teacher.detach()})
        # A teacher may run in another precision than the student.
        return GraphInputs([student, teacher.detach().to(student.dtype)])

    @torch.no_grad()
    def named_rows(
        self, branch_logits: Sequence[Tensor] | Tensor, *, teacher: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The student's row, and the teacher's where there is one: stored rows are known for
        training images alone.
        """
        (student,) = as_rows(branch_logits, 1, "branch_logits")
        return {"branch1": student} if teacher is None else {"branch1": student, "teacher": teacher}


class FrozenTeacher(Companion):
    """A trained network that looks at the student's images, in evaluation mode whatever the
    student's is.

    It is the run's input, as the images are: it is in no checkpoint, and its parameters are not the
    model's.

    Args:
        network: images [B, 3, H, W] to logits [B, C]; None where the teacher's rows are stored, or
            nobody trains.
    """

    def __init__(self, network: nn.Module | None) -> None:
        super().__init__()
        # In a list, which registers nothing: not in state_dict(), parameters(), train() or
        # student().
        self._network = [] if network is None else [network.eval().requires_grad_(False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenTeacher":
        """Follow the model to another device, dtype or memory format."""
        super()._apply(fn, recurse)
        for network in self._network:
            network._apply(fn, recurse)
        return self

    def forward(self, seen: BranchPass) -> dict[str, Tensor]:
        """``teacher``: its logits [B, C], without gradient; nothing if there is no network."""
        if not self._network:
            return {}
        with torch.no_grad():
            return {"teacher": self._network[0](seen.images)}


def _build_teacher(
    layout: Layout, teacher: str = "", teacher_normalization: str = "data"
) -> FrozenTeacher:
    """The frozen teacher. The options say where it comes from; who trains has read it by now.

    Args:
        teacher: where the teacher is: a run folder, a checkpoint or an exported student of fastokd;
            "torchvision:NAME:FILE" or "timm:NAME:FILE", that network with the weights in that file;
            or a file of its rows for every training image, .npy or .safetensors.
        teacher_normalization: how a torchvision or timm teacher wants its images: as the "data" is
            normalised, or by the means and deviations of "imagenet".
    """
    return FrozenTeacher(layout.teacher)


METHOD = Method(
    name="kd",
    summary="Hinton's distillation: a frozen, trained teacher and one student",
    loss_class=KDLoss,
    branch_range=(1, 1),
    default_branches=1,
    build_companion=_build_teacher,
    model_options={"teacher": "", "teacher_normalization": "data"},
    choices={"teacher_normalization": ("data", "imagenet")},
    needs_teacher=True,
)
