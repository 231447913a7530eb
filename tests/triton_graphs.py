"""Graphs that together hold every kind of node and term."""

from collections.abc import Callable
from typing import Any

import pytest

from fastokd.graph import (
    DKD,
    KL,
    L1,
    MSE,
    CrossEntropy,
    External,
    Graph,
    JensenShannon,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    ProbabilityMixture,
)


def ahbf(*args: Any, **options: Any) -> Graph:
    pytest.importorskip("torch")  # the methods' own modules need it, compiling kernels does not
    from fastokd.methods.ahbf import ahbf_graph

    return ahbf_graph(*args, **options)


def logits(count: int) -> list[Logits]:
    return [Logits(f"z{k}") for k in range(count)]


def entropies(count: int) -> list[CrossEntropy]:
    return [CrossEntropy(f"z{k}") for k in range(count)]


def mutual(count: int, **options: object) -> Graph:
    edges = [KL(f"z{i}", f"z{j}", **options) for i in range(count) for j in range(count) if i != j]
    return Graph("mutual", tuple(logits(count)), (*entropies(count), *edges))


def minimum() -> Graph:
    nodes = (*logits(3), Mixture("u", ("z0", "z1"), "w"), MinLogit("m", ("z0", "u", "z2")))
    return Graph(
        "minimum",
        nodes,
        (
            CrossEntropy("z0"),
            KL("m", "z1", 1.0, 2.0, detach=True),
            KL("m", "u", 1.0, 2.5, detach=True, direction="student_first"),
        ),
    )


def selection() -> Graph:
    nodes = (*logits(3), LowestCrossEntropy("s", ("z0", "z1", "z2")))
    return Graph(
        "selection",
        nodes,
        (*entropies(3), *(KL("s", f"z{k}", 1.0, 2.0, detach=True) for k in range(3))),
        0.1,
    )


def memory(direction: str = "teacher_first") -> Graph:
    nodes = (
        *logits(2),
        External("x0"),
        External("x1"),
        ProbabilityMixture("h", ("x0", "z0"), (0.7, 0.3), 4.0),
        ProbabilityMixture("p", ("z0", "z1"), (0.5, 0.5), 4.0),
    )
    options = {"temperature": 4.0, "t2_scaling": False, "direction": direction}
    return Graph(
        "memory",
        nodes,
        (
            *entropies(2),
            KL("h", "z1", 0.5, detach=True, **options),
            KL("p", "z0", 0.5, **options),
            KL("x1", "z0", 1.0, detach=True, **options),
        ),
    )


def mixed_probabilities() -> Graph:
    nodes = (*logits(3), ProbabilityMixture("t", ("z0", "z1", "z2"), "w", 3.0))
    return Graph(
        "mixed probabilities",
        nodes,
        (CrossEntropy("z0"), *(KL("t", f"z{k}", 1.0, 3.0, eps=1e-3 * k) for k in range(3))),
    )


def outside_eps() -> Graph:
    return Graph(
        "outside eps",
        (Logits("z0"), External("x")),
        (CrossEntropy("z0"), KL("x", "z0", 1.0, 2.0, detach=True, eps=1e-3)),
    )


def first_order() -> Graph:
    nodes = (
        *logits(3),
        Mixture("u", ("z0", "z1", "z2"), "w"),
        Mixture("v", ("u", "z1"), (0.25, 0.5)),
        MinLogit("m", ("z0", "z1")),
    )
    eps = {"eps": 1e-3, "eps_mode": "first_order"}
    return Graph(
        "first order",
        nodes,
        (
            CrossEntropy("u"),
            KL("u", "z0", 1.0, 3.0, **eps),
            KL("v", "z2", 1.0, 1.5, detach=True, **eps),
            KL("m", "z1", 1.0, 2.0, detach=True, **eps),
        ),
        0.1,
    )


def shared_weights() -> Graph:
    nodes = (
        *logits(3),
        Mixture("u", ("z0", "z1"), "w"),
        Mixture("v", ("u", "z2"), "w"),
        ProbabilityMixture("h", ("v", "z0"), "w", 2.0),
    )
    return Graph(
        "shared weights",
        nodes,
        (CrossEntropy("v"), KL("h", "u", 1.0, 2.0), KL("u", "z0", 1.0, 1.0)),
    )


def divergences() -> Graph:
    nodes = (*logits(3), External("x"), ProbabilityMixture("h", ("x", "z0", "z1"), "w", 2.0))
    return Graph(
        "divergences",
        nodes,
        (
            *entropies(2),
            JensenShannon("h", "z2", 1.0, 2.0, 0.3),
            JensenShannon("x", "z0", 1.0, 2.0, detach=True),
            JensenShannon("z1", "z0", 1.0, 1.5, 0.7),
            KL("z1", "z2", 1.0, 2.0, direction="symmetric"),
            KL("x", "z2", 1.0, 2.0, detach=True, direction="symmetric"),
        ),
    )


def decoupled() -> Graph:
    return Graph(
        "decoupled",
        (*logits(3), Mixture("u", ("z0", "z1"), "w")),
        (
            CrossEntropy("z0"),
            DKD("u", "z0", 1.0, 4.0, beta=1.0),
            DKD("z2", "u", 1.0, 2.0, beta=2.0, detach=True),
            MSE("u", "z2", 0.5),
            L1("z1", "z2", 0.5, detach=True),
            KL("u", "z1", 1.0, 4.0),
        ),
        0.1,
    )


GRAPHS: dict[str, Callable[[], Graph]] = {
    "cross-entropy alone": lambda: Graph("alone", tuple(logits(1)), tuple(entropies(1)), 0.1),
    "cascade": lambda: ahbf(4, lambda_self=2.0),
    "cascade, detached": lambda: ahbf(2, detach_teacher=True),
    "cascade, exact eps": lambda: ahbf(3, lambda_self=1.0, teacher_eps=1e-3, label_smoothing=0.1),
    "cascade of eight": lambda: ahbf(8),
    "mutual": lambda: mutual(3, temperature=3.0),
    "mutual, temperature 1": lambda: mutual(2, temperature=1.0),
    "mutual, odd temperature": lambda: mutual(2, temperature=1.7, t2_scaling=False),
    "mutual, student first": lambda: mutual(2, temperature=4.0, direction="student_first"),
    "minimum": minimum,
    "selection": selection,
    "memory": memory,
    "memory, student first": lambda: memory("student_first"),
    "mixed probabilities": mixed_probabilities,
    "outside eps": outside_eps,
    "first-order eps": first_order,
    "shared weights": shared_weights,
    "divergences": divergences,
    "decoupled": decoupled,
}
