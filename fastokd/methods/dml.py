"""DML: Deep Mutual Learning (Zhang et al., CVPR 2018)."""

from typing import ClassVar, Literal

from fastokd.graph import CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.losses import options
from fastokd.losses.method_loss import MethodLoss, Presets
from fastokd.methods.method import Method


@options.loss_options
class DMLLoss(MethodLoss):
    """M networks that teach each other.

    ``pairwise``: ``L = sum_k [ CE(z^k) + kd_weight * lambda_kd / (M-1) * sum_{l != k} T^2 KL(z^l ||
    z^k) ]``. ``mean``: one KL per network, from the mean of the other networks' logits
    (``others{k}``), the default of the OKDDip repository's DML.

    The original updates the networks in turn, each with constant peers at T=1; here all learn in
    one step from peers that are constants (``detach_teacher=True``). The OKDDip repository uses
    T=3, ``detach_teacher=False`` and ``teacher_eps=1e-7``. Neither has a ramp-up: leave
    ``kd_weight`` at 1.
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

    num_branches: int = options.num_branches(2, 2, "M, at least 2.")
    temperature: float = options.temperature(1.0)
    lambda_kd: float = options.weight(1.0, "weight of each network's distillation from its peers.")
    teacher: Literal["pairwise", "mean"] = options.choice(
        "pairwise",
        ("pairwise", "mean"),
        '"pairwise", one KL from every peer, or "mean", one from the mean of the peers\' logits.',
    )
    detach_teacher: bool = options.switch(True, "peers are constants in the KL terms.")
    teacher_eps: float = options.teacher_eps()

    def build_graph(self) -> Graph:
        branches = self.branch_names()
        nodes: list[Node] = [Logits(name) for name in branches]
        terms: list[Term] = [CrossEntropy(name) for name in branches]
        share = 1.0 / (self.num_branches - 1)
        for k, student in enumerate(branches, start=1):
            others = tuple(name for name in branches if name != student)
            if self.teacher == "mean":
                nodes.append(Mixture(f"others{k}", others, (share,) * len(others)))
            teachers = others if self.teacher == "pairwise" else (f"others{k}",)
            weight = self.lambda_kd / len(teachers)
            terms += [self.teach(name, student, weight) for name in teachers]
        return Graph("dml", nodes, terms, self.label_smoothing)


dml_graph = DMLLoss.make_graph

METHOD = Method(
    name="dml",
    summary="Deep Mutual Learning: whole networks, equal or not, that teach each other",
    loss_class=DMLLoss,
    topologies=("peers",),
    reports_mean=True,
)
