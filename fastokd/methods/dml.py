"""DML: Deep Mutual Learning (Zhang et al., CVPR 2018)."""

from typing import ClassVar, Literal

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.methods.base import Impl, Reduction, branch_names, check_choice, check_options
from fastokd.methods.method import Method, MethodLoss, Presets


def dml_graph(
    num_branches: int = 2,
    temperature: float = 1.0,
    lambda_kd: float = 1.0,
    teacher: Literal["pairwise", "mean"] = "pairwise",
    detach_teacher: bool = True,
    teacher_eps: float = 0.0,
    label_smoothing: float = 0.0,
) -> Graph:
    """M networks that teach each other.

    ``pairwise``: ``L = sum_k [ CE(z^k) + kd_weight * lambda_kd / (M-1) * sum_{l != k} T^2 KL(z^l ||
    z^k) ]``. ``mean``: one KL per network, from the mean of the other networks' logits
    (``others{k}``), the default of the OKDDip repository's DML.

    The original updates the networks in turn, each with constant peers at T=1; here all learn in
    one step from peers that are constants (``detach_teacher=True``). The OKDDip repository uses
    T=3, ``detach_teacher=False`` and ``teacher_eps=1e-7``. Neither ramps up: leave ``kd_weight`` at
    1.
    """
    check_choice("teacher", teacher, ("pairwise", "mean"))
    branches = branch_names("dml_graph", num_branches, 2)
    nodes: list[Node] = [Logits(name) for name in branches]
    terms: list[Term] = [CrossEntropy(name) for name in branches]
    share = 1.0 / (num_branches - 1)
    for k, student in enumerate(branches, start=1):
        others = tuple(name for name in branches if name != student)
        if teacher == "mean":
            nodes.append(Mixture(f"others{k}", others, (share,) * len(others)))
        sources = others if teacher == "pairwise" else (f"others{k}",)
        weight = lambda_kd / len(sources)
        terms += [
            KL(name, student, weight, temperature, detach=detach_teacher, eps=teacher_eps)
            for name in sources
        ]
    return Graph("dml", tuple(nodes), tuple(terms), label_smoothing)


class DMLLoss(MethodLoss):
    """The loss of M networks that teach each other, see ``dml_graph`` for the formula.

    Args:
        num_branches: M, at least 2.
        temperature: T of the KL terms.
        lambda_kd: weight of each network's distillation from its peers.
        teacher: "pairwise", one KL from every peer, or "mean", one KL from the mean of the peers'
            logits.
        detach_teacher: peers are constants in the KL terms.
        teacher_eps: added to the teacher's probabilities, not renormalised.
        label_smoothing: in [0, 1), for every cross-entropy.
        reduction: "mean" over the batch, "sum", or "none" for the loss of each sample.
        impl: the executor: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    presets: ClassVar[Presets] = {
        # The original: T = 1, a KL from every peer, peers are constants.
        "paper": {},
        # The OKDDip repository.
        "code": {
            "temperature": 3.0,
            "teacher": "mean",
            "detach_teacher": False,
            "teacher_eps": 1e-7,
        },
    }

    def __init__(
        self,
        num_branches: int = 2,
        temperature: float = 1.0,
        lambda_kd: float = 1.0,
        teacher: Literal["pairwise", "mean"] = "pairwise",
        detach_teacher: bool = True,
        teacher_eps: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        check_options(
            temperature=temperature,
            lambda_kd=lambda_kd,
            detach_teacher=detach_teacher,
            teacher_eps=teacher_eps,
            label_smoothing=label_smoothing,
        )
        graph = dml_graph(
            num_branches,
            temperature,
            lambda_kd,
            teacher,
            detach_teacher,
            teacher_eps,
            label_smoothing,
        )
        super().__init__(graph, num_branches, reduction, impl)


METHOD = Method(
    name="dml",
    summary="Deep Mutual Learning: whole networks, equal or not, that teach each other",
    loss_class=DMLLoss,
    branch_range=(2, 8),
    default_branches=2,
    topologies=("peers",),
    reports_mean=True,
)
