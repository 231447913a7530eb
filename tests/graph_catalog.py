"""Graphs that between them use everything a graph can say, and inputs for them. Every executor is
judged on these.

for case in catalog():
    inputs = make_inputs(case.graph, batch=8, num_classes=10)
    rows, terms = evaluate(inputs.plan, *inputs.arguments(), impl="...")
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    Node,
    Plan,
    ProbabilityMixture,
    Term,
    lower,
)
from fastokd.methods.afid import afid_graph
from fastokd.methods.ahbf import PRESETS, ahbf_graph
from fastokd.methods.baseline import baseline_graph
from fastokd.methods.cl_ilr import cl_ilr_graph
from fastokd.methods.dml import dml_graph
from fastokd.methods.ffm import ffm_graph
from fastokd.methods.ffsd import ffsd_graph
from fastokd.methods.kd import kd_graph
from fastokd.methods.kdcl import kdcl_graph
from fastokd.methods.okddip import okddip_graph
from fastokd.methods.one import one_graph
from fastokd.methods.tsb import tsb_graph


@dataclass(frozen=True)
class Case:
    """A graph and what it is there to show."""

    name: str
    graph: Graph


@dataclass
class Inputs:
    """Inputs of one graph. ``arguments()`` is what ``evaluate`` takes after the plan."""

    graph: Graph
    plan: Plan
    logits: list[Tensor]
    weights: dict[str, Tensor]
    externals: dict[str, Tensor]
    target: Tensor
    kd_weight: float

    @property
    def term_weights(self) -> Tensor:
        """[T] in the compute dtype: each term's weight, times ``kd_weight`` where it is
        scheduled.
        """
        values = [
            term.weight * (self.kd_weight if term.scheduled else 1.0) for term in self.graph.terms
        ]
        dtype = torch.float64 if self.logits[0].dtype == torch.float64 else torch.float32
        return torch.tensor(values, dtype=dtype, device=self.logits[0].device)

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """logits, weights, externals, target, term_weights, in the order of the plan."""
        return (
            self.logits,
            list(self.weights.values()),
            list(self.externals.values()),
            self.target,
            self.term_weights,
        )

    def leaves(self) -> list[Tensor]:
        """The differentiated tensors: the logits, then the weights."""
        return [*self.logits, *self.weights.values()]


def make_inputs(
    graph: Graph,
    batch: int = 8,
    num_classes: int = 10,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    scale: float = 3.0,
    soft_target: bool = False,
    kd_weight: float = 0.7,
    device: str = "cpu",
    requires_grad: bool = True,
) -> Inputs:
    """Logits of standard deviation ``scale``, weights on the simplex, external probabilities
    without zeros.

    Drawn on the CPU in float64 and rounded to ``dtype``, so that every dtype and device sees the
    same case. The two kinds of target are int64 labels and class probabilities of two classes each,
    as mixup makes them; graphs that need labels get labels.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = lower(graph)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def place(value: Tensor, learns: bool = False) -> Tensor:
        return value.to(device=device, dtype=dtype).requires_grad_(learns and requires_grad)

    logits = [place(scale * normal(batch, num_classes), True) for _ in graph.logits]
    weights = {
        name: place(normal(batch, width).softmax(1), True)
        for name, width in graph.weight_sources.items()
    }
    externals = {
        name: place((2 * normal(batch, num_classes)).softmax(1)) for name in graph.externals
    }
    labels = torch.randint(num_classes, (2, batch), generator=generator)
    if soft_target and not plan.needs_labels:
        share = torch.rand((batch, 1), generator=generator, dtype=torch.float64)
        one_hot = torch.nn.functional.one_hot(labels, num_classes).to(torch.float64)
        target = place(share * one_hot[0] + (1 - share) * one_hot[1])
    else:
        target = labels[0].to(device)
    return Inputs(graph, plan, logits, weights, externals, target, kd_weight)


def _graph(
    name: str, nodes: Sequence[Node], terms: Sequence[Term], label_smoothing: float = 0.0
) -> Graph:
    return Graph(name, tuple(nodes), tuple(terms), label_smoothing)


def _synthetic() -> list[Graph]:
    a, b, c = Logits("a"), Logits("b"), Logits("c")
    memory, other = External("memory"), External("other")
    ce_a, ce_b, ce_c = CrossEntropy("a"), CrossEntropy("b"), CrossEntropy("c", 0.5)
    half = ProbabilityMixture("half", ("a", "b"), (0.5, 0.5), 4.0)
    reverse = {"direction": "student_first", "temperature": 2.5}
    return [
        _graph(
            "eps_exact",
            [a, b],
            [ce_a, KL("b", "a", 1.5, 3.0, eps=1e-7), KL("a", "b", 0.5, 3.0, eps=1e-2, detach=True)],
        ),
        _graph(
            "eps_first_order",
            [a, b],
            [
                ce_a,
                KL("b", "a", 1.5, 3.0, eps=1e-7, eps_mode="first_order"),
                KL("a", "b", 0.5, 3.0, eps=1e-2, eps_mode="first_order", detach=True),
            ],
        ),
        _graph(
            "eps_exact_probabilities",
            [a, b, memory, half],
            [
                ce_b,
                KL("memory", "a", 1.0, 2.0, detach=True, eps=1e-3),
                KL("half", "b", 1.0, 4.0, eps=1e-3),
            ],
        ),
        _graph(
            "student_first_logits",
            [a, b],
            [ce_a, KL("b", "a", 1.5, **reverse), KL("a", "b", 0.5, detach=True, **reverse)],
        ),
        _graph(
            "student_first_external",
            [a, memory],
            [ce_a, KL("memory", "a", 1.5, detach=True, **reverse)],
        ),
        _graph(
            "student_first_probabilities",
            [a, b, c, half],
            [ce_a, KL("half", "c", 1.5, **reverse), KL("half", "a", 0.5, detach=True, **reverse)],
        ),
        # 0.7 sharpens: at scale 3 most of a row's probabilities lie below fp16's smallest number.
        _graph(
            "many_temperatures",
            [a, b, c],
            [
                ce_a,
                KL("b", "a", 1.0, 2.5),
                KL("c", "a", 1.0, 0.7),
                KL("a", "b", 1.0, 1.0, detach=True),
                KL("c", "b", 1.0, 20.0),
            ],
        ),
        # The same two rows at the same temperature in several edges: what an executor may compute
        # once.
        _graph(
            "one_temperature_often",
            [a, b, c],
            [KL(x, y, 0.3, 4.0) for x in "abc" for y in "abc" if x != y],
        ),
        _graph(
            "label_smoothing", [a, b], [ce_a, ce_b, KL("a", "b", 1.0, 2.0)], label_smoothing=0.1
        ),
        _graph("no_t2", [a, b], [ce_a, KL("b", "a", 2.0, 4.0, t2_scaling=False)]),
        _graph(
            "unscheduled",
            [a, b],
            [
                CrossEntropy("a", 0.3, scheduled=True),
                KL("b", "a", 2.0, 4.0, scheduled=False),
                KL("a", "b", 0.1, 4.0),
            ],
        ),
        _graph("only_distillation", [a, b], [KL("b", "a", 1.0, 3.0)]),
        _graph("weight_of_zero", [a, b], [ce_a, KL("b", "a", 0.0, 3.0), KL("a", "b", 0.4, 3.0)]),
        _graph(
            "shared_weights",
            [a, b, c, Mixture("u", ("a", "b"), "w"), Mixture("v", ("b", "c"), "w")],
            [CrossEntropy("u"), KL("v", "u", 1.0, 3.0), KL("u", "c", 1.0, 3.0)],
        ),
        # Weights that are neither on the simplex nor positive: a mixture of logits does not ask for
        # that.
        _graph(
            "constant_mixture",
            [a, b, c, Mixture("u", ("a", "b", "c"), (0.5, -0.25, 2.0))],
            [CrossEntropy("u"), KL("u", "a", 1.0, 3.0)],
        ),
        # An input twice in one node: its gradients add up.
        _graph(
            "repeated_input",
            [
                a,
                b,
                Mixture("u", ("a", "b", "a"), "w"),
                ProbabilityMixture("h", ("u", "u"), "p", 2.0),
            ],
            [CrossEntropy("u"), KL("h", "b", 1.0, 2.0)],
        ),
        _graph(
            "four_deep",
            [
                a,
                b,
                c,
                Mixture("u1", ("a", "b"), "w1"),
                Mixture("u2", ("u1", "c"), "w2"),
                Mixture("u3", ("u2", "a"), (0.3, 0.7)),
                Mixture("u4", ("u3", "u1", "b"), "w4"),
            ],
            [
                CrossEntropy("u4"),
                KL("u4", "u3", 1.0, 3.0),
                KL("u3", "u1", 1.0, 3.0),
                KL("c", "u4", 1.0, 3.0, detach=True),
            ],
        ),
        _graph(
            "out_of_order",
            [Mixture("v", ("u", "b"), "w2"), Mixture("u", ("a", "c"), "w1"), c, b, a],
            [CrossEntropy("v"), CrossEntropy("u"), KL("v", "u", 1.0, 3.0)],
        ),
        _graph(
            "probabilities_with_external",
            [
                a,
                b,
                memory,
                other,
                Mixture("u", ("a", "b"), "w"),
                ProbabilityMixture("h", ("memory", "u", "other"), "p", 2.5),
            ],
            [ce_a, KL("h", "a", 1.0, 2.5), KL("other", "b", 1.0, 2.5, detach=True)],
        ),
        # Its own temperature differs from the edges'.
        _graph(
            "probabilities_two_temperatures",
            [a, b, c, half],
            [ce_c, KL("half", "c", 1.0, 1.0), KL("half", "a", 1.0, 2.0, detach=True)],
        ),
        _graph(
            "constants_of_mixtures",
            [
                a,
                b,
                c,
                Mixture("u", ("a", "b"), "w"),
                MinLogit("low", ("u", "b", "c")),
                LowestCrossEntropy("best", ("u", "c")),
            ],
            [
                ce_a,
                KL("low", "a", 1.0, 3.0, detach=True),
                KL("best", "b", 1.0, 3.0, detach=True),
                KL("low", "u", 1.0, 3.0, detach=True),
            ],
        ),
        _graph(
            "symmetric",
            [a, b, memory],
            [
                ce_a,
                KL("b", "a", 1.5, 2.5, direction="symmetric"),
                KL("memory", "b", 0.5, 2.0, detach=True, direction="symmetric"),
            ],
        ),
        _graph(
            "jensen_shannon",
            [a, b, c, Mixture("u", ("a", "b"), "w")],
            [
                ce_a,
                JensenShannon("u", "c", 1.5, 2.5, 0.3),
                JensenShannon("c", "b", 0.5, 1.0, 0.9, t2_scaling=False, detach=True),
            ],
        ),
        _graph(
            "jensen_shannon_probabilities",
            [a, b, c, memory, half, ProbabilityMixture("h", ("memory", "c", "a"), "p", 2.0)],
            [
                ce_b,
                JensenShannon("memory", "a", 1.0, 2.0, detach=True),
                JensenShannon("half", "b", 1.0, 4.0, 0.2),
                JensenShannon("half", "c", 1.0, 4.0, 0.7, detach=True),
                JensenShannon("h", "a", 1.0, 3.0),
                KL("h", "b", 1.0, 3.0),
            ],
        ),
        _graph("decoupled", [a, b], [ce_a, DKD("b", "a", 0.5, 4.0)]),
        _graph("decoupled_alone", [a, b], [DKD("b", "a", 0.5, 1.0, 0.3, 0.7, detach=True)]),
        _graph("target_alone", [a, b], [ce_b, DKD("b", "a", 0.5, 2.0, 1.0, 0.0)]),
        _graph(
            "decoupled_mixtures",
            [a, b, c, Mixture("u", ("a", "b"), "w"), Mixture("v", ("u", "c"), (0.4, 0.6))],
            [
                CrossEntropy("u"),
                DKD("v", "u", 0.5, 3.0, 2.0, 1.0),
                DKD("c", "v", 0.5, 2.0, 0.0, 1.0, t2_scaling=False),
                DKD("u", "a", 0.5, 3.0, 1.0, 8.0, detach=True),
                KL("u", "a", 1.0, 3.0),
            ],
            label_smoothing=0.1,
        ),
        _graph(
            "errors",
            [a, b, c, Mixture("u", ("a", "b"), "w")],
            [ce_a, MSE("u", "c", 1.5), MSE("b", "a", 0.5, detach=True), L1("c", "b", 2.0)],
        ),
        _graph("squared_error_alone", [a, b], [MSE("b", "a")]),
        _graph(
            "half_attached",
            [a, b, Mixture("u", ("a", "b"), "w")],
            [ce_a, KL("u", "a", 1.0, 3.0), KL("u", "b", 1.0, 3.0, detach=True)],
        ),
    ]


def catalog() -> list[Case]:
    """Every method's graph in every variant, and synthetic graphs for all other features."""
    paper, code = PRESETS["paper"], PRESETS["code"]
    graphs = {
        "baseline": baseline_graph(),
        "baseline_smoothed": baseline_graph(0.1),
        "ahbf_paper": ahbf_graph(4, **paper),
        "ahbf_paper_detached": ahbf_graph(4, detach_teacher=True, **paper),
        "ahbf_code": ahbf_graph(4, **code),
        "ahbf_code_smoothed": ahbf_graph(3, label_smoothing=0.1, **code),
        "ahbf_mixed_outside": ahbf_graph(4, mix=False, **paper),
        "ahbf_two": ahbf_graph(2, **paper),
        "ahbf_six": ahbf_graph(6, **code),
        "one": one_graph(),
        "one_attached": one_graph(4, detach_teacher=False, teacher_eps=1e-7),
        "okddip": okddip_graph(4, teacher_eps=1e-7),
        "okddip_probabilities": okddip_graph(4, mix="probabilities"),
        "dml_pairwise": dml_graph(4),
        "dml_mean": dml_graph(4, 3.0, teacher="mean", detach_teacher=False, teacher_eps=1e-7),
        "cl_ilr": cl_ilr_graph(4),
        "kdcl_naive": kdcl_graph("naive", 3),
        "kdcl_linear": kdcl_graph("linear", 3),
        "kdcl_minlogit": kdcl_graph("minlogit", 3),
        "ffm": ffm_graph(4),
        "tsb": tsb_graph(3),
        "tsb_student_first": tsb_graph(2, student_first=True, t2_scaling=True),
        "ffsd": ffsd_graph(3),
        "afid": afid_graph(),
        "kd": kd_graph(teacher_eps=1e-7),
        "kd_stored": kd_graph(teacher_rows="probabilities"),
        "ahbf_teacher": ahbf_graph(3, **paper).with_teacher(("branch1", "branch3"), 0.5, 2.0),
        "tsb_teacher": tsb_graph(2).with_teacher("branch1", rows="probabilities"),
    }
    return [
        *(Case(name, graph) for name, graph in graphs.items()),
        *(Case(graph.name, graph) for graph in _synthetic()),
    ]
