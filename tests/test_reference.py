"""The reference executor against independent formulas, and the registered operator against the
reference.
"""

from dataclasses import replace

import numpy as np
import opaque_executor
import pytest
import torch
from graph_catalog import Inputs, catalog, make_inputs
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
from fastokd.methods.ahbf import ahbf_graph
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
from fastokd.ops.operator import plan_text

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


@settings(max_examples=60, deadline=None)
@given(random_graphs(), st.integers(0, 1000), st.booleans(), st.integers(2, 6))
def test_reference_on_any_graph_equals_oracle_and_operator(
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
def test_ahbf_graph_equals_gradients_derived_by_hand(
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
def test_method_graph_equals_its_equations(name: str) -> None:
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
def test_tsb_graph_equals_its_equations(options: dict, formula: dict) -> None:
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
def test_stored_teacher_equals_equation_and_its_logits(eps: float) -> None:
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


def test_kdcl_graphs_match_worked_values() -> None:
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


def test_tsb_graph_matches_worked_values() -> None:
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
def test_executor_gradients_match_differences(name: str) -> None:
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


def test_reference_second_derivatives_match_differences() -> None:
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
def test_reference_of_extreme_logits_is_finite(name: str, temperature: float, kind: str) -> None:
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


# --- the registered operator
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ahbf_code", "kdcl_naive", "tsb", "repeated_input"])
def test_operator_passes_opcheck(name: str) -> None:
    graph = next(case.graph for case in catalog() if case.name == name)
    inputs = make_inputs(graph, 4, 6, requires_grad=False)
    text = plan_text(inputs.plan)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*inputs.arguments(), text, "reference")
    torch.library.opcheck(torch.ops.fastokd.graph_forward.default, arguments, test_utils=checks)
    rows, _, stats = torch.ops.fastokd.graph_forward(*arguments)
    needs = [index % 2 == 0 for index in range(len(inputs.leaves()))]
    backward = (torch.ones_like(rows), *inputs.arguments(), stats, text, "reference", needs)
    torch.library.opcheck(torch.ops.fastokd.graph_backward.default, backward, test_utils=checks)
    # Transposed logits and an executor that follows their layout: the operator's results keep the
    # promised one.
    strided = [z.t().contiguous().t() for z in inputs.logits]
    backward = (torch.ones_like(rows), strided, *backward[2:-2], OPAQUE, needs)
    torch.library.opcheck(torch.ops.fastokd.graph_backward.default, backward, test_utils=checks)
