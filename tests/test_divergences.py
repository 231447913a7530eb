"""Divergences besides KL, standardized logits, and the option that puts them on any method.

The terms themselves are compared with NumPy for every executor in ``executor_contract``.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_catalog import make_inputs
from method_runs import SHORT_RUN, few_digits, make
from oracles import graphs as graph_oracle
from torch import Tensor

from fastokd.errors import ConfigError, GraphError
from fastokd.graph import (
    DIVERGENCES,
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
    Standardized,
    draw_mermaid,
    draw_text,
    lower,
    with_divergence,
)
from fastokd.losses import AHBFLoss, BaselineLoss, GraphLoss
from fastokd.methods import get_method, list_methods
from fastokd.train.config import TrainConfig
from fastokd.train.loss import build_loss, check_method

A, B, X = Logits("a"), Logits("b"), External("x")
MIX = Mixture("mix", ("a", "b"), "w")
SOFTENED = ("reverse-kl", "symmetric-kl", "js", "dkd")


def pair(term: Any, *nodes: Any) -> Graph:
    return Graph("pair", (A, B, *nodes), (CrossEntropy("a"), term))


# --- formulas, by PyTorch's own functions


def two_rows(num_classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = 2 * torch.randn((2, 5, num_classes), generator=generator, dtype=torch.float64)
    return *rows.unbind(), torch.randint(num_classes, (5,), generator=generator)


def value_of(term: Any, impl: str = "auto") -> Tensor:
    """The value of a term between the teacher b and the student a, without its weight."""
    student, teacher, target = two_rows()
    _, terms = GraphLoss(pair(term), impl=impl)([student, teacher], target, return_terms=True)
    return terms[term.name]


def test_symmetric_kl_is_the_mean_of_both_directions() -> None:
    student, teacher, _ = two_rows()
    p, q = (row / 3 for row in (teacher, student))
    both = [
        F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean")
        for a, b in ((p, q), (q, p))
    ]
    expected = 9 * sum(both) / 2
    torch.testing.assert_close(value_of(KL("b", "a", 2.0, 3.0, direction="symmetric")), expected)


def test_jensen_shannon_is_made_of_two_kls_to_the_mixture() -> None:
    student, teacher, _ = two_rows()
    p, q = ((row / 2).softmax(1) for row in (teacher, student))
    m = 0.3 * p + 0.7 * q
    kls = [F.kl_div(m.log(), row, reduction="batchmean") for row in (p, q)]
    expected = 4 * (0.3 * kls[0] + 0.7 * kls[1])
    torch.testing.assert_close(value_of(JensenShannon("b", "a", 2.0, 2.0, 0.3)), expected)


def test_dkd_is_made_of_the_target_and_the_other_classes() -> None:
    student, teacher, target = two_rows()
    rest = ~F.one_hot(target, 7).bool()

    def parts(row: Tensor) -> tuple[Tensor, Tensor]:
        label = (row / 4).softmax(1).gather(1, target.unsqueeze(1))
        return torch.cat([label, 1 - label], 1), (row[rest].view(5, 6) / 4).log_softmax(1)

    (pair_p, rest_p), (pair_q, rest_q) = parts(teacher), parts(student)
    tckd = F.kl_div(pair_q.log(), pair_p, reduction="batchmean")
    nckd = F.kl_div(rest_q, rest_p, log_target=True, reduction="batchmean")
    expected = 16 * (2 * tckd + 5 * nckd)
    torch.testing.assert_close(value_of(DKD("b", "a", 2.0, 4.0, 2.0, 5.0)), expected)


def test_kl_is_the_sum_of_the_parts_of_dkd_with_the_papers_factor() -> None:
    """KL = TCKD + (1 - p_label) NCKD, for each sample."""
    student, teacher, target = two_rows()
    values = []
    for term in (KL("b", "a"), DKD("b", "a", beta=0.0), DKD("b", "a", alpha=0.0, beta=1.0)):
        graph = Graph("one", (A, B), (term,))
        values.append(GraphLoss(graph, reduction="none")([student, teacher], target))
    p_label = teacher.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(values[0], values[1] + (1 - p_label) * values[2])


def test_errors_are_means_over_the_classes() -> None:
    student, teacher, _ = two_rows()
    torch.testing.assert_close(value_of(MSE("b", "a", 2.0)), F.mse_loss(student, teacher))
    torch.testing.assert_close(value_of(L1("b", "a", 2.0)), F.l1_loss(student, teacher))


def test_equal_rows_have_no_divergence() -> None:
    student, _, target = two_rows()
    for term in (
        KL("b", "a", direction="symmetric"),
        JensenShannon("b", "a"),
        DKD("b", "a"),
        MSE("b", "a"),
        L1("b", "a"),
    ):
        rows = [student.clone().requires_grad_() for _ in range(2)]
        loss = GraphLoss(Graph("one", (A, B), (term,)))(rows, target)
        assert abs(loss.item()) < 1e-14
        for grad in torch.autograd.grad(loss, rows):
            assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("sure", ["teacher", "student", "both"])
def test_dkd_of_rows_that_are_sure_of_the_label(impl: str, sure: str) -> None:
    """The pair's KL divergence is accurate where a probability is 1 in floating point."""
    student, teacher, target = two_rows()
    column = F.one_hot(target, 7) * 60.0
    student = student + column * (sure != "teacher")
    teacher = teacher + column * (sure != "student")
    graph = Graph("one", (A, B), (DKD("b", "a", beta=0.0),))
    exact = GraphLoss(graph, "none", impl)([student, teacher], target)
    # -log(1 - p) and log odds from the other classes' logits, without forming 1 - p.
    odds = [
        row.gather(1, target[:, None])[:, 0]
        - row.masked_fill(F.one_hot(target, 7).bool(), -torch.inf).logsumexp(1)
        for row in (teacher, student)
    ]
    p = torch.sigmoid(odds[0])
    expected = p * (F.logsigmoid(odds[0]) - F.logsigmoid(odds[1]))
    expected += torch.sigmoid(-odds[0]) * (F.logsigmoid(-odds[0]) - F.logsigmoid(-odds[1]))
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-24)


# --- standardized logits

STANDARDIZED = {
    "branches": (
        (Standardized("za", "a"), Standardized("zb", "b")),
        (KL("zb", "za", 1.5, 2.0), DKD("zb", "za", 0.5, 2.0)),
    ),
    "mixture": (
        (MIX, Standardized("zm", "mix")),
        (KL("zm", "a", 1.0, 3.0), CrossEntropy("zm", 0.5), JensenShannon("b", "zm", 1.0, 2.0)),
    ),
    "probabilities": (
        (MIX, Standardized("zm", "mix"), ProbabilityMixture("h", ("zm", "b"), "v", 2.0)),
        (KL("h", "a", 1.0, 2.0), KL("zm", "b", 1.0, 2.0, detach=True)),
    ),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("graph", STANDARDIZED)
def test_standardized_rows_against_numpy(graph: str, impl: str) -> None:
    nodes, terms = STANDARDIZED[graph]
    built = Graph(graph, (A, B, *nodes), (CrossEntropy("a"), *terms))
    inputs = make_inputs(built, 4, 6, torch.float64)
    loss = GraphLoss(built, "none", impl)(
        inputs.logits, inputs.target, weights=inputs.weights, kd_weight=inputs.kd_weight
    )
    upstream = torch.linspace(-1, 2, 4, dtype=torch.float64)
    grads = torch.autograd.grad(loss, inputs.leaves(), upstream)
    arrays = (
        [row.detach().numpy() for row in inputs.logits],
        {name: weight.detach().numpy() for name, weight in inputs.weights.items()},
        {},
        inputs.target.numpy(),
        inputs.kd_weight,
    )
    expected, _ = graph_oracle.evaluate(built, *arrays)
    logits, weights = graph_oracle.gradients(built, *arrays, upstream.numpy())
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    for ours, truth in zip(grads, (*logits, *weights.values()), strict=True):
        np.testing.assert_allclose(ours.numpy(), truth, rtol=1e-8, atol=1e-8)


def test_a_constant_row_is_standardized_to_zeros() -> None:
    rows = [torch.full((2, 5), 0.3, requires_grad=True), torch.randn(2, 5, requires_grad=True)]
    graph = pair(KL("b", "za", 1.0, 2.0), Standardized("za", "a"))
    loss, terms = GraphLoss(graph)(rows, torch.tensor([0, 1]), return_terms=True)
    uniform = torch.full((2, 5), -math.log(5))
    expected = 4 * F.kl_div(uniform, (rows[1] / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(terms["kl/b->za"], expected.detach())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, rows))


def test_masked_classes_do_not_count_in_standardized_rows() -> None:
    rows = [torch.randn(3, 6, dtype=torch.float64) for _ in range(2)]
    target = torch.tensor([0, 1, 2])
    graph = pair(KL("zb", "za", 1.0, 2.0), Standardized("za", "a"), Standardized("zb", "b"))
    expected = GraphLoss(graph)([row[:, :5].contiguous() for row in rows], target)
    for row in rows:
        row[:, 5] = -torch.inf
    rows = [row.requires_grad_() for row in rows]
    loss = GraphLoss(graph)(rows, target)
    torch.testing.assert_close(loss, expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, rows))


def test_standardized_rows_compile_and_take_one_pass() -> None:
    inputs = make_inputs(Graph("g", (A, B), (CrossEntropy("a"), KL("b", "a", 1.0, 3.0))), 6, 9)
    criterion = AHBFLoss(2, standardize=True, divergence="js")
    scores = [torch.rand(6, 2).softmax(1)]
    expected = torch.autograd.grad(
        criterion(inputs.logits, inputs.target, scores=scores), inputs.logits
    )
    criterion.forward_backward(inputs.logits, inputs.target, scores=scores)
    for row, grad in zip(inputs.logits, expected, strict=True):
        torch.testing.assert_close(row.grad, grad)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    loss = compiled(inputs.logits, inputs.target, scores=scores)
    for ours, grad in zip(torch.autograd.grad(loss, inputs.logits), expected, strict=True):
        torch.testing.assert_close(ours, grad)


def test_named_logits_of_graphs_with_standardized_rows() -> None:
    rows = [torch.randn(3, 5) for _ in range(2)]
    scores = [torch.rand(3, 2).softmax(1)]
    plain, ours = (
        AHBFLoss(2, standardize=value).named_logits(rows, scores=scores) for value in (False, True)
    )
    assert plain.keys() <= ours.keys()
    for name, row in plain.items():
        torch.testing.assert_close(ours[name], row)


# --- composition


def test_replace_changes_terms_and_drops_nodes_without_one() -> None:
    graph = Graph(
        "g",
        (A, B, MIX, MinLogit("low", ("mix", "b"))),
        (CrossEntropy("a"), KL("low", "b", 1.0, 2.0, detach=True), KL("b", "a", 2.0, 4.0)),
    )
    removed = graph.replace(lambda term: None if term.name == "kl/low->b" else term)
    assert [node.name for node in removed.nodes] == ["a", "b"]
    assert removed.terms == (graph.terms[0], graph.terms[2])
    other = graph.replace(
        lambda term: KL("za", "b") if term.name == "kl/b->a" else term,
        [Standardized("za", "a")],
        name="other",
    )
    assert other.name == "other"
    assert [node.name for node in other.nodes] == ["a", "b", "mix", "low", "za"]
    with pytest.raises(GraphError, match="has no terms"):
        graph.replace(lambda _term: None)


def test_replace_drops_a_frozen_teacher_without_a_term() -> None:
    taught = pair(KL("b", "a")).with_teacher("a")
    assert taught.replace(lambda term: None if "teacher" in term.name else term) == pair(
        KL("b", "a")
    )
    standardized = with_divergence(taught, standardize=True)
    again = with_divergence(standardized, "js", standardize=True)
    assert (again.nodes, again.teacher) == (standardized.nodes, "teacher")


def test_other_divergence_keeps_weights_and_temperatures() -> None:
    graph = Graph(
        "g",
        (A, B, X),
        (
            CrossEntropy("a"),
            KL("b", "a", 2.0, 4.0, t2_scaling=False, scheduled=False),
            KL("x", "b", 0.5, 3.0, detach=True),
        ),
    )
    options = {"t2_scaling": False, "scheduled": False}
    assert with_divergence(graph, "js", beta=0.2).terms == (
        graph.terms[0],
        JensenShannon("b", "a", 2.0, 4.0, 0.2, **options),
        JensenShannon("x", "b", 0.5, 3.0, 0.2, detach=True),
    )
    assert with_divergence(graph, "symmetric-kl").terms[1:] == (
        KL("b", "a", 2.0, 4.0, direction="symmetric", **options),
        KL("x", "b", 0.5, 3.0, detach=True, direction="symmetric"),
    )
    assert with_divergence(graph) is graph


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("method", list_methods())
def test_methods_take_every_divergence_or_name_the_reason(
    method: str, divergence: str, standardize: bool
) -> None:
    loss_class = get_method(method).loss_class
    plain = loss_class()
    kinds = {type(plain.graph.by_name[t.teacher]) for t in plain.graph.terms if isinstance(t, KL)}
    needs_logits = standardize or divergence in ("dkd", "mse", "l1")
    refused = (
        (not kinds and (divergence != "kl" or standardize))
        or (needs_logits and kinds & {External, ProbabilityMixture, MinLogit, LowestCrossEntropy})
        or (standardize and divergence in ("mse", "l1"))
    )
    if refused:
        with pytest.raises(GraphError, match=r"no KL term|needs|standardize|depends"):
            loss_class(divergence=divergence, standardize=standardize)
        return
    loss = loss_class(divergence=divergence, standardize=standardize)
    ours, theirs = loss.graph, plain.graph
    assert [term.weight for term in ours.terms] == [term.weight for term in theirs.terms]
    assert [term.scheduled for term in ours.terms] == [term.scheduled for term in theirs.terms]
    assert (ours == theirs) == (divergence == "kl" and not standardize)
    # The gradients are those of the reference.
    inputs = make_inputs(theirs, 4, 6, torch.float64)
    results = []
    for impl in ("reference", "auto"):
        rows = GraphLoss(replace(ours, teacher=""), impl=impl)(
            inputs.logits, inputs.target, weights=inputs.weights, externals=inputs.externals
        )
        results.append((rows, *torch.autograd.grad(rows, inputs.leaves(), materialize_grads=True)))
    torch.testing.assert_close(*results)
    # The reported mixtures are those of the plain method.
    mixtures = [
        GraphLoss(replace(graph, teacher="")).mixtures(inputs.logits, inputs.weights)
        for graph in (ours, theirs)
    ]
    assert mixtures[0].keys() == mixtures[1].keys()
    torch.testing.assert_close(*mixtures)


@pytest.mark.parametrize("divergence", ["dkd", "js"])
def test_ahbf_trains_with_another_divergence(divergence: str, tmp_path: Path) -> None:
    options = {"divergence": divergence, "standardize": True}
    config = replace(SHORT_RUN, method_options=options, epochs=1, deterministic=False)
    trainer = make(config, tmp_path / "run", few_digits())
    trainer.run()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    names = json.loads(line)["train"].keys()
    assert any(name.startswith(f"{divergence}/") for name in names), names


def test_frozen_teacher_has_the_divergence_of_the_method() -> None:
    loss = AHBFLoss(2, divergence="dkd", divergence_beta=2.0, standardize=True)
    loss.add_teacher("branch1", 0.5, 4.0)
    for graph in (loss.graph, loss.premixed.graph):
        (taught,) = (term for term in graph.terms if "teacher" in term.name)
        pair_of_rows = ("standardized teacher", "standardized branch1")
        assert taught == DKD(*pair_of_rows, 0.5, 4.0, beta=2.0, detach=True, scheduled=False)
        assert not any(isinstance(term, KL) for term in graph.terms)
        assert graph.teacher == "teacher"
    rows = [torch.randn(3, 5, dtype=torch.float64) for _ in range(3)]
    inputs = {"scores": [torch.full((3, 2), 0.5, dtype=torch.float64)], "teacher": rows[2]}
    target = torch.tensor([0, 4, 2])
    _, terms = loss(rows[:2], target, return_terms=True, **inputs)
    standardized = [
        (row - row.mean(1, keepdim=True)) / row.std(1, correction=0, keepdim=True)
        for row in (rows[0], rows[2])
    ]
    alone = GraphLoss(pair(DKD("b", "a", 1.0, 4.0, beta=2.0)))
    _, expected = alone(standardized, target, return_terms=True)
    torch.testing.assert_close(terms[taught.name], expected["dkd/b->a"])


def test_ahbf_with_mixed_rows_has_the_same_divergence() -> None:
    rows = [torch.randn(3, 5, dtype=torch.float64) for _ in range(2)]
    scores = [torch.rand(3, 2, dtype=torch.float64).softmax(1)]
    mixed = scores[0][:, :1] * rows[1] + scores[0][:, 1:] * rows[0]
    target = torch.tensor([0, 1, 2])
    loss = AHBFLoss(2, divergence="dkd", divergence_beta=2.0, standardize=True)
    torch.testing.assert_close(
        loss(rows, target, scores=scores), loss(rows, target, ta_logits=[mixed])
    )


# --- drawings


def test_drawings_name_every_divergence() -> None:
    graph = Graph(
        "drawn",
        (A, B, Standardized("za", "a")),
        (
            CrossEntropy("a"),
            KL("b", "za", 1.0, 2.0, direction="symmetric"),
            JensenShannon("b", "a", 1.0, 2.0, 0.3),
            DKD("b", "a", 1.0, 2.0, 1.0, 8.0),
            MSE("b", "a", 0.5, detach=True),
            L1("b", "a", 0.5, scheduled=False),
        ),
    )
    text = draw_text(graph)
    for line in (
        "za  standardized  (a - mean) / standard deviation",
        "4 * kd_weight  KL(b || za)  teaches za; T=2, symmetric",
        "4 * kd_weight  JS(b, a)  teaches a; T=2, beta=0.3",
        "4 * kd_weight  DKD(b, a)  teaches a; T=2, alpha=1, beta=8",
        "0.5 * kd_weight  MSE(b, a)  teaches a; teacher detached",
        "0.5  L1(b, a)  teaches a",
    ):
        assert line in text, text
    mermaid = draw_mermaid(graph)
    assert '"DKD 4 * kd_weight, T=2, alpha=1, beta=8"' in mermaid
    assert '"L1 0.5"' in mermaid


# --- bad input


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (JensenShannon("b", "a", beta=0.0), "term 'js/b->a' has beta=0.0; it must be above 0"),
        (JensenShannon("b", "a", beta=1.0), "beta=1.0"),
        (JensenShannon("b", "a", beta=math.nan), "beta=nan"),
        (JensenShannon("b", "a", beta="x"), "beta='x'; it must be above 0 and below 1"),
        (DKD("b", "a", alpha="x"), "term 'dkd/b->a' has alpha='x'; it must be finite"),
        (JensenShannon("x", "a"), "external node 'x' is a constant; set detach=True"),
        (JensenShannon("b", "a", temperature=0.0), "temperature=0.0"),
        (DKD("b", "a", alpha=-1.0), "term 'dkd/b->a' has alpha=-1.0; it must be finite"),
        (DKD("b", "a", beta=math.inf), "beta=inf"),
        (DKD("b", "a", alpha=0.0, beta=0.0), "alpha=0 and beta=0"),
        (DKD("x", "a", detach=True), "needs a teacher of logits, but 'x' is of kind external"),
        (MSE("x", "a", detach=True), "needs a teacher of logits, but 'x' is of kind external"),
        (MSE("a", "a"), "'a' cannot teach itself"),
        (MSE("za", "b"), "term 'mse/za->b' depends on the mean of the logits"),
        (L1("b", "za"), "depends on the mean of the logits"),
        (L1("b", "a", weight=-1.0), "weights must be finite and not negative"),
        (KL("b", "a", eps=0.1, direction="symmetric"), "teacher-first direction only"),
        (KL("b", "a", direction="both"), "'teacher_first', 'student_first' or 'symmetric'"),
    ],
)
def test_bad_terms_are_named(term: Any, message: str) -> None:
    nodes = (A, B, X, Standardized("za", "a"))
    terms = (CrossEntropy("a"), KL("x", "b", detach=True), KL("b", "za"))
    with pytest.raises(GraphError) as error:
        Graph("bad", nodes, (*terms, term))
    assert message in str(error.value)


def test_standardized_nodes_take_logits_and_mixtures() -> None:
    with pytest.raises(GraphError, match="cannot take the external node 'x'"):
        pair(KL("zx", "a", detach=True), X, Standardized("zx", "x"))
    with pytest.raises(GraphError, match="mixture node 'm' cannot take the standardized node 'za'"):
        pair(KL("m", "b"), Standardized("za", "a"), Mixture("m", ("za", "b"), "w"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kd"}, "divergence='kd'; did you mean 'dkd'"),
        ({"divergence": "mse", "divergence_beta": 0.5}, "'mse' has no parameter beta"),
        ({"divergence_beta": 0.5}, "'kl' has no parameter beta"),
        ({"divergence": "dkd", "divergence_beta": "8"}, "beta='8'; it must be a number"),
        ({"divergence": "dkd", "teacher_eps": 1e-7}, "set it to 0 (teacher_eps=0)"),
        ({"standardize": 1}, "standardize=1; it must be True or False"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((GraphError, ValueError, TypeError)) as error:
        AHBFLoss(2, **options)
    assert message in str(error.value)


def test_class_probabilities_are_refused_where_labels_are_needed() -> None:
    rows = [torch.randn(3, 5) for _ in range(2)]
    loss = GraphLoss(pair(DKD("b", "a")))
    with pytest.raises(ValueError, match=r"class probabilities, but the graph's terms dkd/b->a"):
        loss(rows, torch.rand(3, 5).softmax(1))
    target = torch.tensor([0, 1, 2])
    weighted = GraphLoss(loss.graph, class_weight=torch.ones(5))
    torch.testing.assert_close(weighted(rows, target), loss(rows, target))
    smoothed = Graph("s", loss.graph.nodes, loss.graph.terms, label_smoothing=0.1)
    with pytest.raises(ValueError, match="decoupled distillation needs labels"):
        GraphLoss(smoothed, class_weight=torch.ones(5))(rows, target)


def test_a_run_with_mixup_cannot_decouple() -> None:
    options = {"method": "dml", "method_options": {"divergence": "dkd"}}
    config = TrainConfig(model="resnet20", mixup=0.2, **options)
    with pytest.raises(ConfigError, match=r"mixup makes class probabilities.*'dkd' needs labels"):
        check_method(config)
    check_method(TrainConfig(model="resnet20", **options))


def test_options_of_a_run_choose_the_divergence() -> None:
    options = {"divergence": "js", "divergence_beta": 0.3, "standardize": True}
    config = TrainConfig(model="resnet20", method="dml", method_options=options)
    loss = build_loss(config)
    (edge, *_) = [term for term in loss.graph.terms if not isinstance(term, CrossEntropy)]
    assert isinstance(edge, JensenShannon)
    assert edge.beta == 0.3
    assert isinstance(loss.graph.by_name[edge.student], Standardized)
    with pytest.raises(ConfigError, match="no KL term"):
        build_loss(TrainConfig(model="resnet20", method="baseline", method_options=options))


def test_ignored_rows_and_weights_apply_to_every_divergence() -> None:
    terms = (DKD("b", "a"), JensenShannon("b", "a"), MSE("b", "a"), L1("b", "a"))
    graph = Graph("g", (A, B), (CrossEntropy("a"), *terms))
    rows = [torch.randn(6, 5, dtype=torch.float64) for _ in range(2)]
    target = torch.tensor([0, 1, -100, 3, -100, 4])
    kept = target >= 0
    ours = GraphLoss(graph)(rows, target)
    torch.testing.assert_close(ours, GraphLoss(graph)([row[kept] for row in rows], target[kept]))
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0, 5.0, 3.0])
    each = GraphLoss(graph, "none")(rows, target.clamp_min(0))
    expected = (each * weights * kept).sum() / (weights * kept).sum()
    torch.testing.assert_close(GraphLoss(graph)(rows, target, sample_weight=weights), expected)


def test_dense_rows_take_every_divergence() -> None:
    graph = pair(DKD("b", "za", 1.0, 2.0), Standardized("za", "a"))
    rows = [torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(2)]
    target = torch.randint(5, (2, 3, 4))
    flat = [row.permute(0, 2, 3, 1).reshape(-1, 5) for row in rows]
    ours = GraphLoss(graph)(rows, target)
    torch.testing.assert_close(ours, GraphLoss(graph)(flat, target.reshape(-1)))


def test_plans_of_kl_graphs_have_no_more_parts() -> None:
    plan = lower(AHBFLoss(4).graph)
    assert [term.output for term in plan.terms] == list(range(plan.num_terms))
    assert not plan.needs_labels
    assert BaselineLoss().plan.label_terms == (True,)
