"""DML: Deep Mutual Learning (Zhang et al., CVPR 2018). The graph of its loss."""

from typing import Literal

from fastokd.graph import KL, CrossEntropy, Graph, Logits, Mixture, Node, Term
from fastokd.methods.base import branch_names


def dml_graph(num_branches: int = 2, temperature: float = 1.0, lambda_kd: float = 1.0,
              teacher: Literal["pairwise", "mean"] = "pairwise", detach_teacher: bool = True, teacher_eps: float = 0.0,
              label_smoothing: float = 0.0) -> Graph:
    """M networks that teach each other.

    ``pairwise``: ``L = sum_k [ CE(z^k) + kd_weight * lambda_kd / (M-1) * sum_{l != k} T^2 KL(z^l || z^k) ]``.
    ``mean``: one KL per network, from the mean of the other networks' logits (``others{k}``), the default of the
    OKDDip repository's DML.

    The original updates the networks in turn, each with constant peers at T=1; here all learn in one step from peers
    that are constants (``detach_teacher=True``). The OKDDip repository uses T=3, ``detach_teacher=False`` and
    ``teacher_eps=1e-7``. Neither ramps up: leave ``kd_weight`` at 1.
    """
    if teacher not in ("pairwise", "mean"):
        raise ValueError(f"teacher={teacher!r}; use 'pairwise' or 'mean'")
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
        terms += [KL(name, student, weight, temperature, detach=detach_teacher, eps=teacher_eps) for name in sources]
    return Graph("dml", tuple(nodes), tuple(terms), label_smoothing)
