"""The reference executor against independent formulas, and the registered operator against the
reference.
"""

from dataclasses import replace

import numpy as np
import opaque_executor
import pytest
import torch
from graph_catalog import Case, Inputs, catalog, make_inputs
from graph_strategy import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import graphs as graph_oracle
from oracles import methods as oracle
from oracles.ahbf import ahbf
from oracles.rows import complex_step, cross_entropy, distill, kl, log_softmax, softmax
from torch import Tensor

from fastokd.graph import KL, Graph, Logits, ProbabilityMixture
from fastokd.methods.afid import afid_graph
from fastokd.methods.ahbf import PRESETS, ahbf_graph
from fastokd.methods.cl_ilr import cl_ilr_graph
from fastokd.methods.dml import dml_graph
from fastokd.methods.ffm import ffm_graph
from fastokd.methods.ffsd import ffsd_graph
from fastokd.methods.kd import kd_graph
from fastokd.methods.kdcl import kdcl_graph
from fastokd.methods.okddip import okddip_graph
from fastokd.methods.one import one_graph
from fastokd.methods.tsb import tsb_graph
from fastokd.ops import evaluate

OPAQUE = opaque_executor.register()

# Two float64 computations of sums of some ten terms of size up to 1e3: rounding is near 1e-13 of
# the largest.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
# Values printed with six decimals, sums of which are off by a little more than half a unit of the
# last.
PRINTED = 1.1e-6


def array(tensor: Tensor) -> NDArray:
    return tensor.detach().numpy()


def run(
    inputs: Inputs, impl: str = "reference", upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows, terms and the gradients of every leaf."""
    rows, terms = evaluate(inputs.plan, *inputs.arguments(), impl=impl)
    upstream = torch.ones_like(rows) if upstream is None else upstream
    # A weight that only reaches detached teachers has no path to the loss; its gradient is 0.
    return (
        rows,
        terms,
        list(
            torch.autograd.grad(
                rows, inputs.leaves(), upstream, allow_unused=True, materialize_grads=True
            )
        ),
    )


def assert_matches_oracle(inputs: Inputs, upstream: Tensor) -> None:
    rows, terms, grads = run(inputs, upstream=upstream)
    data = (
        [array(z) for z in inputs.logits],
        {name: array(w) for name, w in inputs.weights.items()},
        {name: array(x) for name, x in inputs.externals.items()},
        array(inputs.target),
        inputs.kd_weight,
    )
    want_rows, want_terms = graph_oracle.evaluate(inputs.graph, *data)
    np.testing.assert_allclose(array(rows), want_rows, **CLOSE)
    np.testing.assert_allclose(array(terms), want_terms, **CLOSE)
    want_logits, want_weights = graph_oracle.gradients(inputs.graph, *data, array(upstream))
    for got, want in zip(grads, [*want_logits, *want_weights.values()], strict=True):
        np.testing.assert_allclose(array(got), want, **CLOSE)


@pytest.mark.parametrize("soft_target", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("case", catalog(), ids=lambda case: case.name)
def test_catalog_equals_the_interpreted_graph(case: Case, soft_target: bool) -> None:
    inputs = make_inputs(case.graph, 5, 7, torch.float64, seed=3, soft_target=soft_target)
    assert_matches_oracle(inputs, torch.linspace(-1, 2, 5, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(random_graphs(), st.integers(0, 1000), st.booleans(), st.integers(2, 6))
def test_any_graph_equals_the_interpreted_graph_and_the_operator(
    graph: Graph, seed: int, soft: bool, num_classes: int
) -> None:
    inputs = make_inputs(graph, 3, num_classes, torch.float64, seed, soft_target=soft)
    upstream = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    assert_matches_oracle(inputs, upstream)
    if not any(leaf.requires_grad for leaf in inputs.leaves()):
        return
    rows, terms, grads = run(inputs, upstream=upstream)
    op_rows, op_terms, op_grads = run(inputs, OPAQUE, upstream)
    # The same formula in the same order, so equal up to the order in which gradients are added.
    torch.testing.assert_close(op_rows, rows, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(op_terms, terms, rtol=1e-14, atol=1e-14)
    for got, want in zip(op_grads, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


AHBF_OPTIONS = {
    "paper": {},
    "paper_detached": {"detach": True},
    "code": {"lambda_ta": 1.5, "lambda_branch": 3.0, "lambda_self": 1.5, "eps": 1e-7},
    "large_eps_detached": {"lambda_self": 0.5, "eps": 0.05, "detach": True},
    "smoothed": {"smoothing": 0.1, "temperature": 0.7},
}


@pytest.mark.parametrize("soft_target", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("mix", [True, False], ids=["scores", "ta_logits"])
@pytest.mark.parametrize("options", AHBF_OPTIONS)
@pytest.mark.parametrize("num_branches", [2, 3, 5])
def test_ahbf_equals_the_gradients_derived_by_hand(
    num_branches: int, options: str, mix: bool, soft_target: bool
) -> None:
    o = AHBF_OPTIONS[options]
    graph = ahbf_graph(
        num_branches,
        o.get("temperature", 3.0),
        o.get("lambda_ta", 4.0),
        o.get("lambda_branch", 2.0),
        o.get("lambda_self", 0.0),
        o.get("detach", False),
        o.get("eps", 0.0),
        o.get("smoothing", 0.0),
        mix=mix,
    )
    inputs = make_inputs(graph, 6, 11, torch.float64, num_branches, soft_target=soft_target)
    rows, terms, grads = run(inputs)
    branches = [array(z) for z in inputs.logits[:num_branches]]
    mixing = (
        {"scores": [array(s) for s in inputs.weights.values()]}
        if mix
        else {"tas": [array(z) for z in inputs.logits[num_branches:]]}
    )
    want = ahbf(branches, array(inputs.target), **mixing, **o, kd_weight=inputs.kd_weight)
    np.testing.assert_allclose(array(rows), want.loss, **CLOSE)
    assert {term.name for term in graph.terms} == set(want.terms)
    for term, got in zip(graph.terms, terms, strict=True):
        np.testing.assert_allclose(array(got), want.terms[term.name], **CLOSE)
    for got, expected in zip(grads, [*want.logits, *want.tas, *want.scores], strict=True):
        np.testing.assert_allclose(array(got), expected, **CLOSE)


def _peers(function: object, detach: bool = False, **options: object) -> object:
    """An oracle of peers, leader and weight tensors, as one function of (logits, weights, target,
    w).
    """
    return lambda z, a, y, w: function(z[:-1], z[-1], a, y, w, **options)


# The graph, and the formula as a function of logits, weight tensors, target and ramp-up value.
METHODS = {
    "one": (one_graph(4), lambda z, a, y, w: oracle.one(z, a[0], y, w)),
    "one_attached": (
        one_graph(3, lambda_kd=1.0, detach_teacher=False, teacher_eps=1e-7),
        lambda z, a, y, w: oracle.one(z, a[0], y, w, eps=1e-7, detach=False),
    ),
    "okddip_code": (okddip_graph(4, teacher_eps=1e-7), _peers(oracle.okddip_code, eps=1e-7)),
    "okddip_slides": (okddip_graph(4, mix="probabilities"), _peers(oracle.okddip_slides)),
    "dml": (dml_graph(3), lambda z, a, y, w: oracle.dml(z, y, w, 1.0, True, True)),
    "dml_joint": (
        dml_graph(4, 3.0, detach_teacher=False, teacher_eps=1e-7),
        lambda z, a, y, w: oracle.dml(z, y, w, 3.0, True, False, 1e-7),
    ),
    "dml_mean": (
        dml_graph(4, 3.0, teacher="mean", detach_teacher=False),
        lambda z, a, y, w: oracle.dml(z, y, w, 3.0, False, False),
    ),
    "cl_ilr": (cl_ilr_graph(4), lambda z, a, y, w: oracle.cl_ilr(z, y, w)),
    "kdcl_naive": (
        kdcl_graph("naive", 3),
        lambda z, a, y, w: oracle.kdcl(z, oracle.naive_teacher(z, y), y, w, 3.0),
    ),
    "kdcl_minlogit": (
        kdcl_graph("minlogit", 3),
        lambda z, a, y, w: oracle.kdcl(z, oracle.minlogit_teacher(z, y), y, w, 3.0),
    ),
    "kdcl_linear": (
        kdcl_graph("linear", 3, 2.0),
        lambda z, a, y, w: oracle.kdcl(z, oracle.mixed_teacher(z, a[0]), y, w, 2.0),
    ),
    "ffm": (ffm_graph(4), lambda z, a, y, w: oracle.ffm(z[:-1], z[-1], a[0], y, w)),
    "ffsd": (
        ffsd_graph(3),
        lambda z, a, y, w: oracle.ffsd(z[:-2], z[-2], z[-1], y, 1.0),
    ),  # nothing is scheduled
    "afid": (afid_graph(teacher_eps=1e-7), lambda z, a, y, w: oracle.afid(*z, y, w, eps=1e-7)),
    "kd": (kd_graph(), lambda z, a, y, w: oracle.kd_logits(*z, y, w)),
}


@pytest.mark.parametrize("name", METHODS)
def test_method_graphs_equal_their_equations(name: str) -> None:
    graph, formula = METHODS[name]
    inputs = make_inputs(graph, 6, 9, torch.float64, seed=5)
    count, target = len(inputs.logits), array(inputs.target)

    def loss(*leaves: NDArray) -> NDArray:
        z, weights = leaves[:count], leaves[count:]
        # OKDDip has one weight tensor per peer, the others at most one.
        return formula(list(z), list(weights), target, inputs.kd_weight)

    leaves = [array(leaf) for leaf in inputs.leaves()]
    rows, _, grads = run(inputs)
    np.testing.assert_allclose(array(rows), loss(*leaves), **CLOSE)
    for got, want in zip(grads, complex_step(loss, leaves), strict=True):
        np.testing.assert_allclose(array(got), want, **CLOSE)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"student_first": True}, {"student_first": True}),
        ({"t2_scaling": True}, {"scale": 16.0}),
    ],
    ids=["teacher_first", "student_first", "t2"],
)
def test_tsb_equals_its_equations(options: dict, formula: dict) -> None:
    inputs = make_inputs(tsb_graph(3, **options), 6, 9, torch.float64, seed=5)
    memories, target = [array(x) for x in inputs.externals.values()], array(inputs.target)
    rows, _, grads = run(inputs)
    leaves = [array(leaf) for leaf in inputs.leaves()]

    def loss(*z: NDArray) -> NDArray:
        return oracle.tsb(z, memories, target, inputs.kd_weight, **formula)

    np.testing.assert_allclose(array(rows), loss(*leaves), **CLOSE)
    for got, want in zip(grads, complex_step(loss, leaves), strict=True):
        np.testing.assert_allclose(array(got), want, **CLOSE)


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_stored_teacher_equals_its_equation_and_the_teacher_it_stores(eps: float) -> None:
    inputs = make_inputs(
        kd_graph(teacher_rows="probabilities", teacher_eps=eps), 6, 9, torch.float64
    )
    (z,), (p,), target = inputs.logits, inputs.externals.values(), array(inputs.target)
    rows, _, grads = run(inputs)
    want = oracle.kd_stored(array(z), array(p), target, inputs.kd_weight, eps=eps)
    np.testing.assert_allclose(array(rows), want, **CLOSE)
    # p = softmax(3 log p / 3): the same teacher as logits.
    np.testing.assert_allclose(
        oracle.kd_logits(array(z), 3 * np.log(array(p)), target, inputs.kd_weight, eps=eps),
        want,
        **CLOSE,
    )
    (grad,) = complex_step(
        lambda z: oracle.kd_stored(z, array(p), target, inputs.kd_weight, eps=eps), [array(z)]
    )
    np.testing.assert_allclose(array(grads[0]), grad, **CLOSE)


# --- published float64 numbers
# -------------------------------------------------------------------------------------

Z = [
    torch.tensor([row], dtype=torch.float64)
    for row in ((1.0, 0.0, -1.0), (0.5, 1.0, -0.5), (2.0, -1.0, 0.5))
]


def weights_of(*rows: tuple[float, ...]) -> list[Tensor]:
    return [torch.tensor([row], dtype=torch.float64) for row in rows]


def worked(
    graph: Graph,
    logits: list[Tensor],
    weights: list[Tensor] = (),
    externals: list[Tensor] = (),
    w: float = 0.5,
) -> tuple[float, dict[str, float], list[Tensor]]:
    """Loss, terms and gradients for label 0 of the worked example."""
    inputs = make_inputs(graph, 1, 3, torch.float64, kd_weight=w)
    inputs.logits = [z.clone().requires_grad_() for z in logits]
    inputs.weights = dict(
        zip(inputs.weights, (a.clone().requires_grad_() for a in weights), strict=True)
    )
    inputs.externals = dict(zip(inputs.externals, externals, strict=True))
    inputs.target = torch.zeros(1, dtype=torch.long)
    rows, terms, grads = run(inputs)
    return (
        rows.item(),
        {t.name: v.item() for t, v in zip(graph.terms, terms, strict=True)},
        [g[0] for g in grads],
    )


def close(got: object, want: object) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=PRINTED)


AHBF_SCORES = ((0.6, 0.4), (0.3, 0.7))


def test_worked_ahbf_terms() -> None:
    loss, terms, _ = worked(ahbf_graph(3, lambda_self=1e-9), Z, weights_of(*AHBF_SCORES))
    assert loss == pytest.approx(4.285215, abs=2e-6)
    close([terms[f"ce/branch{m}"] for m in (1, 2, 3)], [0.407606, 1.104131, 0.241311])
    assert sum(v for name, v in terms.items() if name.startswith("ce/")) == pytest.approx(
        3.000616, abs=PRINTED
    )
    close([terms["kl/ta2->branch1"], terms["kl/ta3->ta2"]], [0.079651, 0.081410])
    close([terms["kl/branch2->branch1"], terms["kl/branch3->ta2"]], [0.218212, 0.744266])
    close([terms["kl/ta2->branch2"], terms["kl/ta3->branch3"]], [0.034841, 0.388951])


@pytest.mark.parametrize(
    ("preset", "detach", "w", "loss", "grads"),
    [
        (
            "paper",
            True,
            0.5,
            4.285215,
            [
                (-0.211609, 0.288253, -0.076643),
                (-1.515738, 1.463874, 0.051864),
                (-0.329034, 0.109383, 0.219651),
                (0.881250, -1.295249),
                (-0.924506, -0.230439),
            ],
        ),
        (
            "paper",
            False,
            0.5,
            4.285215,
            [
                (-0.293761, 0.310757, -0.016996),
                (-1.935302, 1.759042, 0.176260),
                (0.030955, -0.434477, 0.403522),
                (0.760261, -1.649746),
                (-0.021102, -0.376563),
            ],
        ),
        (
            "code",
            False,
            0.5,
            4.882989,
            [
                (-0.355319, 0.434495, -0.079176),
                (-2.144962, 2.058317, 0.086645),
                (0.249353, -0.761870, 0.512517),
                (1.034656, -1.401557),
                (-1.376208, -0.157377),
            ],
        ),
    ],
)
def test_worked_ahbf_gradients(
    preset: str, detach: bool, w: float, loss: float, grads: list
) -> None:
    got_loss, _, got = worked(
        ahbf_graph(3, detach_teacher=detach, **PRESETS[preset]), Z, weights_of(*AHBF_SCORES), w=w
    )
    close(got_loss, loss)
    for mine, want in zip(got, grads, strict=True):
        close(mine, want)
    # The oracle itself is held to the same numbers.
    p = PRESETS[preset]
    result = ahbf(
        [array(z) for z in Z],
        np.zeros(1, dtype=int),
        [array(a) for a in weights_of(*AHBF_SCORES)],
        lambda_ta=p["lambda_ta"],
        lambda_branch=p["lambda_branch"],
        lambda_self=p["lambda_self"],
        eps=p["teacher_eps"],
        detach=detach,
        kd_weight=w,
    )
    close(result.loss[0], loss)
    for mine, want in zip([*result.logits, *result.scores], grads, strict=True):
        close(mine[0], want)


@pytest.mark.parametrize(
    ("detach", "gate", "first"),
    [
        (True, (-0.560811, -0.026996, -0.990781), (-0.370900, 0.304808, 0.066092)),
        (False, (-0.652593, 0.010711, -1.247712), (-0.388437, 0.321527, 0.066910)),
    ],
)
def test_worked_one(detach: bool, gate: tuple, first: tuple) -> None:
    loss, terms, grads = worked(one_graph(3, detach_teacher=detach), Z, weights_of((0.2, 0.5, 0.3)))
    close(loss, 2.595284)
    close(terms["ce/ensemble"], 0.522747)
    close([terms[f"kl/ensemble->branch{m}"] for m in (1, 2, 3)], [0.034610, 0.174829, 0.429538])
    close(grads[3], gate)
    close(grads[0], first)


@pytest.mark.parametrize(
    ("mix", "values", "loss"),
    [
        ("logits", (0.020030, 0.034841, 0.784857), 2.172911),
        ("probabilities", (0.019538, 0.035857, 0.787748), 2.174620),
    ],
)
def test_worked_okddip(mix: str, values: tuple, loss: float) -> None:
    got, terms, _ = worked(okddip_graph(3, mix=mix), Z, weights_of((0.7, 0.3), (0.4, 0.6)))
    close(got, loss)
    close(
        [
            terms[name]
            for name in ("kl/group1->branch1", "kl/group2->branch2", "kl/ensemble->leader")
        ],
        values,
    )


@pytest.mark.parametrize(
    ("teacher", "temperature", "per_network"),
    [
        ("pairwise", 1.0, (0.618089, 1.542971, 0.935924)),
        ("mean", 3.0, (0.483713, 1.660695, 1.026168)),
    ],
)
def test_worked_dml(teacher: str, temperature: float, per_network: tuple) -> None:
    graph = dml_graph(3, temperature, teacher=teacher)
    loss, terms, _ = worked(graph, Z, w=1.0)
    assert loss == pytest.approx(sum(per_network), abs=3 * PRINTED)
    for k, want in enumerate(per_network, start=1):
        own = [
            t
            for t in graph.terms
            if getattr(t, "student", getattr(t, "node", None)) == f"branch{k}"
        ]
        close(sum(t.weight * terms[t.name] for t in own), want)


def test_worked_kdcl() -> None:
    rows = [array(z) for z in Z]
    label = np.zeros(1, dtype=int)
    # Naive picks z3, so z3's own term is 0 and the others are D_3(z3 -> z).
    _, terms, _ = worked(kdcl_graph("naive", 3), Z)
    assert terms["kl/teacher->branch3"] == pytest.approx(0, abs=1e-12)
    for m in (1, 2):
        assert terms[f"kl/teacher->branch{m}"] == pytest.approx(
            distill(rows[2], rows[m - 1], 3.0)[0], abs=1e-12
        )
    # MinLogit: (0, -3, -2), whose cross-entropy is 0.169846.
    teacher = np.array([[0.0, -3.0, -2.0]])
    close(cross_entropy(teacher, label)[0], 0.169846)
    _, terms, _ = worked(kdcl_graph("minlogit", 3), Z)
    for m in (1, 2, 3):
        assert terms[f"kl/teacher->branch{m}"] == pytest.approx(
            distill(teacher, rows[m - 1], 3.0)[0], abs=1e-12
        )
    # Linear on (1,2,-3), (1,-3,2): the even mixture (1,-0.5,-0.5), cross-entropy 0.368981.
    pair = [
        torch.tensor([row], dtype=torch.float64) for row in ((1.0, 2.0, -3.0), (1.0, -3.0, 2.0))
    ]
    even = np.array([[1.0, -0.5, -0.5]])
    close(cross_entropy(even, label)[0], 0.368981)
    _, terms, grads = worked(kdcl_graph("linear", 2), pair, weights_of((0.5, 0.5)))
    for m in (1, 2):
        assert terms[f"kl/teacher->branch{m}"] == pytest.approx(
            distill(even, array(pair[m - 1]), 3.0)[0], abs=1e-12
        )
    # The weights were solved for, not learned.
    assert grads[2].tolist() == [0, 0]


def test_worked_tsb() -> None:
    p = [softmax(array(z), 4.0) for z in Z[:2]]
    memory = [
        torch.tensor([[0.381321, 0.357817, 0.260863]], dtype=torch.float64),
        torch.from_numpy(p[1]),
    ]
    for student_first, spatial, temporal in (
        (False, 0.00330907, 0.01330442),
        (True, 0.00332130, 0.01347987),
    ):
        _, terms, _ = worked(tsb_graph(2, student_first=student_first), Z[:2], externals=memory)
        # Printed with eight decimals.
        assert terms["kl/mean->branch1"] == pytest.approx(spatial, abs=1.1e-8)
        assert terms["kl/memory2->branch1"] == pytest.approx(temporal, abs=1.1e-8)
    mean = (p[0] + p[1]) / 2
    close(mean[0], (0.381321, 0.357817, 0.260863))
    assert kl(mean, np.log(mean), log_softmax(array(Z[0]), 4.0))[0] == pytest.approx(
        0.00330907, abs=1.1e-8
    )


# --- derivatives, extremes, dtypes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ahbf_code",
        "okddip_probabilities",
        "student_first_probabilities",
        "four_deep",
        "many_temperatures",
    ],
)
def test_gradcheck(name: str) -> None:
    """Numerical differences: an error shared by the formula and the oracle would show here."""
    graph = next(case.graph for case in catalog() if case.name == name)
    # Differences cannot see that a teacher is detached, so none is here.
    graph = replace(
        graph,
        terms=tuple(replace(t, detach=False) if hasattr(t, "detach") else t for t in graph.terms),
    )
    inputs = make_inputs(graph, 2, 3, torch.float64, scale=1.0)
    count = len(inputs.logits)
    _, _, externals, target, term_weights = inputs.arguments()
    for impl in ("reference", OPAQUE):
        assert torch.autograd.gradcheck(
            lambda *leaves, impl=impl: evaluate(
                inputs.plan, leaves[:count], leaves[count:], externals, target, term_weights, impl
            )[0],
            inputs.leaves(),
        )


def test_second_derivatives_of_the_reference() -> None:
    inputs = make_inputs(ahbf_graph(2), 2, 3, torch.float64, scale=1.0)
    _, _, _, target, term_weights = inputs.arguments()
    assert torch.autograd.gradgradcheck(
        lambda *leaves: evaluate(
            inputs.plan, leaves[:2], leaves[2:], [], target, term_weights, "reference"
        )[0],
        inputs.leaves(),
    )


EXTREME_GRAPHS = (
    "ahbf_paper",
    "ahbf_code",
    "okddip_probabilities",
    "student_first_logits",
    "student_first_probabilities",
    "eps_first_order",
    "kdcl_minlogit",
    "tsb",
)


def _extreme_rows(kind: str, index: int, batch: int, num_classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    if kind == "identical":
        return torch.full((batch, num_classes), 7.5)
    if kind == "one_hot":
        return (
            1e4
            * torch.nn.functional.one_hot(torch.arange(batch) + index, batch + num_classes + 9)[
                :, :num_classes
            ].float()
        )
    return (2e4 * torch.rand((batch, num_classes), generator=generator) - 1e4).round()


@pytest.mark.parametrize("kind", ["spread", "one_hot", "identical"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("name", EXTREME_GRAPHS)
def test_extreme_logits_give_finite_values_and_gradients(
    name: str, temperature: float, kind: str
) -> None:
    """Logits to 1e4 apart at T=0.05 are 4e5 apart after softening: p underflows, log p does not."""
    graph = next(case.graph for case in catalog() if case.name == name)
    graph = replace(
        graph,
        nodes=tuple(
            replace(n, temperature=temperature) if hasattr(n, "temperature") else n
            for n in graph.nodes
        ),
        terms=tuple(
            replace(t, temperature=temperature) if hasattr(t, "temperature") else t
            for t in graph.terms
        ),
    )
    for num_classes in (2, 10, 1000):
        inputs = make_inputs(graph, 4, num_classes)
        inputs.logits = [
            _extreme_rows(kind, k, 4, num_classes).requires_grad_()
            for k in range(len(inputs.logits))
        ]
        rows, terms, grads = run(inputs)
        assert terms.isfinite().all()
        assert rows.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
        if "eps" not in name and "code" not in name:
            # KL of a row to itself or another cannot be negative beyond rounding: float32 sums of
            # terms up to 4e5.
            assert terms.min() > -0.1


@pytest.mark.parametrize("direction", ["teacher_first", "student_first"])
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_probability_mixture_of_one_row_is_that_row(direction: str, scale: float) -> None:
    """Also where every probability but one underflows: the mixture keeps the logarithm, not the
    number.
    """
    a, b = Logits("a"), Logits("b")
    mixture = ProbabilityMixture("h", ("b", "b"), (0.25, 0.75), 2.0)
    options = {"temperature": 2.0, "direction": direction}
    mixed = make_inputs(
        Graph("mixed", (a, b, mixture), (KL("h", "a", **options),)),
        4,
        10,
        torch.float64,
        scale=scale,
    )
    plain = make_inputs(
        Graph("plain", (a, b), (KL("b", "a", **options),)), 4, 10, torch.float64, scale=scale
    )
    (rows, _, grads), (want_rows, _, want_grads) = run(mixed), run(plain)
    torch.testing.assert_close(rows, want_rows, rtol=1e-12, atol=1e-12)
    # The two inputs are one row, so their shares of its gradient add up to the whole.
    for got, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-10 * scale)


def test_identical_rows_teach_nothing() -> None:
    inputs = make_inputs(ahbf_graph(3, lambda_self=1.0), 4, 10, torch.float64)
    row = inputs.logits[0].detach()
    inputs.logits = [row.clone().requires_grad_() for _ in range(3)]
    _, terms, grads = run(inputs)
    kl_terms = [
        value
        for term, value in zip(inputs.graph.terms, terms, strict=True)
        if term.name.startswith("kl/")
    ]
    assert torch.stack(kl_terms).abs().max() < 1e-13
    hard = row.softmax(1) - torch.nn.functional.one_hot(inputs.target, 10)
    # Branch 3 gets its own cross-entropy and its share of ta3's.
    torch.testing.assert_close(
        grads[2], hard * (1 + inputs.weights["scores3"][:, :1].detach()), rtol=1e-12, atol=1e-13
    )


def test_vanished_external_probabilities_stay_finite() -> None:
    """A stored teacher may hold exact zeros; their logarithm is floored, in both directions of the
    edge.
    """
    for student_first in (False, True):
        inputs = make_inputs(tsb_graph(2, student_first=student_first), 2, 4)
        for value in inputs.externals.values():
            value.zero_()
            value[:, 1] = 1.0
        rows, _, grads = run(inputs)
        assert rows.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("impl", ["reference", OPAQUE])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),  # twenty roundings of 6e-8
        (torch.bfloat16, 2**-8),  # the gradient's own last rounding: arithmetic is float32
        (torch.float16, 2**-10),
    ],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize(
    "name", ["ahbf_code", "okddip_probabilities", "kdcl_minlogit", "four_deep", "tsb"]
)
def test_low_precision_inputs_are_computed_in_float32(
    name: str, dtype: torch.dtype, tolerance: float, impl: str
) -> None:
    graph = next(case.graph for case in catalog() if case.name == name)
    low = make_inputs(graph, 8, 10, dtype, seed=2)
    exact = make_inputs(graph, 8, 10, torch.float64, seed=2)
    # The float64 run sees what the low-precision one sees: the rounded inputs.
    exact.logits = [z.detach().double().requires_grad_() for z in low.logits]
    exact.weights = {name: w.detach().double().requires_grad_() for name, w in low.weights.items()}
    exact.externals = {name: x.double() for name, x in low.externals.items()}
    rows, terms, grads = run(low, impl)
    want_rows, want_terms, want_grads = run(exact)
    assert rows.dtype == terms.dtype == torch.float32
    torch.testing.assert_close(rows.double(), want_rows, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(terms.double(), want_terms, rtol=2e-6, atol=2e-5)
    for leaf, got, want in zip(low.leaves(), grads, want_grads, strict=True):
        assert got.dtype == dtype == leaf.dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=2e-5)


def test_label_out_of_range_gives_nan_not_a_number() -> None:
    """Where labels are not looked at (a GPU), a wrong one must not pass as a loss."""
    for label in (-1, 10, -100):
        inputs = make_inputs(ahbf_graph(2), 3, 10)
        inputs.target[1] = label
        rows, _, grads = run(inputs)
        assert rows.isnan().tolist() == [False, True, False]
        assert grads[0][1].isnan().any()
        assert grads[0][[0, 2]].isfinite().all()


# --- the registered operator
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ahbf_code", "kdcl_naive", "tsb", "repeated_input"])
def test_opcheck(name: str) -> None:
    graph = next(case.graph for case in catalog() if case.name == name)
    inputs = make_inputs(graph, 4, 6, requires_grad=False)
    ints, floats = inputs.plan.encode()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*inputs.arguments(), ints, floats, "reference")
    torch.library.opcheck(torch.ops.fastokd.graph_forward.default, arguments, test_utils=checks)
    rows, _, stats = torch.ops.fastokd.graph_forward(*arguments)
    needs = [index % 2 == 0 for index in range(len(inputs.leaves()))]
    backward = (torch.ones_like(rows), *inputs.arguments(), stats, ints, floats, "reference", needs)
    torch.library.opcheck(torch.ops.fastokd.graph_backward.default, backward, test_utils=checks)
    # Transposed logits and an executor that follows their layout: the operator's results keep the
    # promised one.
    strided = [z.t().contiguous().t() for z in inputs.logits]
    backward = (torch.ones_like(rows), strided, *backward[2:-2], OPAQUE, needs)
    torch.library.opcheck(torch.ops.fastokd.graph_backward.default, backward, test_utils=checks)


def test_operator_skips_gradients_that_nobody_needs() -> None:
    inputs = make_inputs(ahbf_graph(3), 4, 6)
    inputs.logits[1].requires_grad_(False)
    inputs.weights["scores2"].requires_grad_(False)
    rows, _ = evaluate(inputs.plan, *inputs.arguments(), impl=OPAQUE)
    rows.sum().backward()
    assert inputs.logits[1].grad is None
    assert inputs.weights["scores2"].grad is None
    _, _, full = run(make_inputs(ahbf_graph(3), 4, 6))
    torch.testing.assert_close(inputs.logits[0].grad, full[0])
    torch.testing.assert_close(inputs.weights["scores3"].grad, full[4])


def test_operator_differentiates_term_weights() -> None:
    """The gradient of the loss for a term's weight is that term's value: how a learned ramp-up
    would train.
    """
    inputs = make_inputs(ahbf_graph(3), 4, 6, torch.float64)
    logits, weights, externals, target, term_weights = inputs.arguments()
    grads = {}
    for impl in ("reference", OPAQUE):
        leaf = term_weights.clone().requires_grad_()
        rows, terms = evaluate(inputs.plan, logits, weights, externals, target, leaf, impl)
        upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
        (grads[impl],) = torch.autograd.grad(rows, leaf, upstream)
        torch.testing.assert_close(grads[impl], terms @ upstream, rtol=1e-13, atol=1e-13)


def test_operator_returns_terms_as_constants() -> None:
    inputs = make_inputs(ahbf_graph(2), 4, 6)
    for impl in ("reference", OPAQUE):
        rows, terms = evaluate(inputs.plan, *inputs.arguments(), impl=impl)
        assert rows.requires_grad
        assert not terms.requires_grad
