"""KD: knowledge distillation from a frozen teacher (Hinton et al., 2015)."""

import functools
from typing import ClassVar, Literal

from fastokd.graph import CrossEntropy, Graph, Logits
from fastokd.losses import options
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.method import Method


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
        nodes, terms = (Logits("branch1"),), (CrossEntropy("branch1"),)
        student = Graph("kd", nodes, terms, self.label_smoothing)
        factors, eps = (self.lambda_kd, self.temperature), self.teacher_eps
        rows = self.teacher_rows
        return student.with_teacher("branch1", *factors, rows=rows, eps=eps, scheduled=True)


kd_graph = functools.partial(KDLoss.make_graph, 1)


METHOD = Method(
    name="kd",
    summary="Hinton's distillation: a frozen, trained teacher and one student",
    loss_class=KDLoss,
    model_options={
        "teacher": options.Option(
            "",
            "the teacher's source: a run folder, a checkpoint or an exported student of fastokd;"
            ' "torchvision:NAME" or "timm:NAME", that network with its published weights, or'
            ' "torchvision:NAME:FILE" with those in a file;'
            " or a file of its rows for every training image, .npy or .safetensors.",
        ),
        "teacher_normalization": options.choice(
            "data",
            ("data", "imagenet", "library"),
            "the normalization of images for a library's teacher with weights in a file: of the"
            ' "data", "imagenet", or the one that the "library" states for the network.',
        ),
    },
    needs_teacher=True,
)
