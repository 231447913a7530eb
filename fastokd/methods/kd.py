"""KD: knowledge distillation from a frozen teacher (Hinton et al., 2015)."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fastokd.graph import CrossEntropy, External, Graph, Logits
from fastokd.losses import options
from fastokd.losses.graph_loss import GraphInputs, Rows
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.method import Method
from fastokd.methods.modules import BranchPass, BranchSpec, MethodModules


@options.loss_options
class KDLoss(MethodLoss):
    """``L = CE(z) + kd_weight * lambda_kd * T^2 KL(teacher || z)`` (AHBF eq. 3-5) for the student
    ``branch1``.

    The ``teacher`` is a second row of logits (detached), or a row of stored probabilities that are
    softened at T already. The OKDDip repository adds ``teacher_eps=1e-7`` (here 0). Other libraries
    weigh the cross-entropy by ``1 - lambda_kd`` as well; the paper's form does not.
    """

    presets: ClassVar[Presets] = {
        "paper": {},
        # The OKDDip repository's training with a teacher.
        "code": {"teacher_eps": 1e-7},
    }

    num_branches: int = options.num_branches(1, 1, "must be 1, the student.", high=1)
    temperature: float = options.temperature(3.0, "T of the KL term.")
    lambda_kd: float = options.weight(1.0, "weight of the KL term.")
    teacher_rows: Literal["logits", "probabilities"] = options.choice(
        "logits",
        ("logits", "probabilities"),
        'the teacher\'s rows: "logits", or "probabilities" that are softened at ``temperature``.',
    )
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        source = Logits("teacher") if self.teacher_rows == "logits" else External("teacher")
        terms = (CrossEntropy("branch1"), self.teach("teacher", "branch1", self.lambda_kd))
        return Graph("kd", (Logits("branch1"), source), terms, self.label_smoothing)

    def labels(self) -> dict[str, str]:
        return {"teacher": "teacher"}

    def graph_inputs(
        self, branch_logits: Rows, target: Tensor | None = None, *, teacher: Tensor | None = None
    ) -> GraphInputs:
        """``teacher``: [B, C], see ``teacher_rows``; a constant, not needed by ``named_logits``."""
        (student,) = branch_logits
        if teacher is None:
            if target is None:
                return GraphInputs([student])
            raise ValueError(f"teacher is missing: pass the teacher's {self.teacher_rows} [B, C]")
        teacher = teacher.detach()
        if self.teacher_rows == "probabilities":
            return GraphInputs([student], externals={"teacher": teacher})
        if target is not None:
            # A teacher may run in another precision than the student.
            teacher = teacher.to(student.dtype)
        return GraphInputs([student, teacher])


kd_graph = functools.partial(KDLoss.make_graph, 1)


class FrozenTeacher(MethodModules):
    """A trained network that always runs in evaluation mode on the student's images.

    It is an input of the run, like the images: it is in no checkpoint, and its parameters are not
    the model's. None if the teacher's rows are stored.
    """

    def __init__(self, network: nn.Module | None) -> None:
        super().__init__()
        # A list registers nothing: not in state_dict(), parameters(), train() or student().
        self._network: list[Any] = [] if network is None else [network.eval().requires_grad_(False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, dtype or memory format."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
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
    spec: BranchSpec, teacher: str = "", teacher_normalization: str = "data"
) -> FrozenTeacher:
    """The frozen teacher, which the trainer opens by these options."""
    return FrozenTeacher(spec.teacher)


METHOD = Method(
    name="kd",
    summary="Hinton's distillation: a frozen, trained teacher and one student",
    loss_class=KDLoss,
    build_companion=_build_teacher,
    model_options={
        "teacher": options.Option(
            "",
            "the teacher's source: a run folder, a checkpoint or an exported student of fastokd;"
            ' "torchvision:NAME:FILE" or "timm:NAME:FILE", that network with the weights in that'
            " file; or a file of its rows for every training image, .npy or .safetensors.",
        ),
        "teacher_normalization": options.choice(
            "data",
            ("data", "imagenet"),
            'the normalization of images for a library\'s teacher: of the "data", or "imagenet".',
        ),
    },
    needs_teacher=True,
)
