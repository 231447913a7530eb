"""The distillation graph: valid nodes and terms, lowering, drawings."""

import pickle
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from graph_catalog import catalog
from graph_strategy import random_graphs
from hypothesis import given, settings

from fastokd.errors import GraphError
from fastokd.experiments.analysis.graph_svg import draw_svg
from fastokd.graph import (
    KL,
    CrossEntropy,
    External,
    Graph,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    Plan,
    ProbabilityMixture,
    decode_plan,
    draw_mermaid,
    draw_text,
    lower,
)
from fastokd.graph.plan import (
    MIXTURE,
    PROBABILITY_MIXTURE,
    SELECTION,
    STUDENT_FIRST,
    PlanNode,
    PlanTerm,
)
from fastokd.methods.ahbf import ahbf_graph

A, B = Logits("a"), Logits("b")
X = External("memory")
CE = CrossEntropy("a")
NAN = float("nan")
SVG = "{http://www.w3.org/2000/svg}"


def mixed(node: object, *more: object) -> tuple:
    """Nodes and terms of a graph that is valid if ``node`` is."""
    return (A, B, *more, node), (CE, CrossEntropy("b"))


# What is wrong, the nodes, the terms, and what the message must say.
INVALID = {
    "no name": ((Logits(""),), (CE,), ["logits", "no name", "''"]),
    "name twice": ((A, Logits("a")), (CE,), ["two nodes", "'a'"]),
    "no inputs": (*mixed(Mixture("u", (), ())), ["mixture", "'u'", "no inputs"]),
    "inputs in one string": (*mixed(Mixture("u", "ab", "w")), ["'u'", "'ab'", "tuple"]),
    "unknown input": (*mixed(Mixture("u", ("a", "bb"), "w")), ["'u'", "'bb'", "did you mean 'b'"]),
    "mixture of probabilities": (
        *mixed(Mixture("u", ("a", "memory"), "w"), X),
        ["'u'", "external", "'memory'", "logits or mixture"],
    ),
    "mixture of a minimum": (
        *mixed(Mixture("u", ("a", "low"), "w"), MinLogit("low", ("a", "b"))),
        ["'u'", "minimum", "'low'"],
    ),
    "minimum of probabilities": (
        *mixed(MinLogit("low", ("a", "memory")), X),
        ["'low'", "'memory'"],
    ),
    "selection of probabilities": (
        *mixed(LowestCrossEntropy("best", ("memory",)), X),
        ["'best'", "'memory'"],
    ),
    "probability mixture of a selection": (
        *mixed(ProbabilityMixture("h", ("best",), "w"), LowestCrossEntropy("best", ("a",))),
        ["'h'", "'best'"],
    ),
    "number of weights": (
        *mixed(Mixture("u", ("a", "b"), (1.0,))),
        ["'u'", "2 inputs", "1 weights"],
    ),
    "weight not a number": (*mixed(Mixture("u", ("a", "b"), (1.0, NAN))), ["'u'", "nan", "finite"]),
    "negative probability": (
        *mixed(ProbabilityMixture("h", ("a", "b"), (1.5, -0.5))),
        ["'h'", "-0.5", "negative"],
    ),
    "shared weights of two widths": (
        *mixed(Mixture("u", ("a", "b"), "w"), Mixture("v", ("a",), "w")),
        ["'u'", "'v'", "'w'", "1", "2"],
    ),
    "node temperature": (
        *mixed(ProbabilityMixture("h", ("a", "b"), "w", 0.0)),
        ["'h'", "temperature=0.0"],
    ),
    "cycle": (
        *mixed(Mixture("u", ("a", "v"), "w"), Mixture("v", ("a", "u"), "w")),
        ["cycle", "v <- u <- v"],
    ),
    "cycle of one": (*mixed(Mixture("u", ("a", "u"), "w")), ["cycle", "u <- u"]),
    "unknown node of a cross-entropy": (
        (A,),
        (CrossEntropy("aa"),),
        ["ce/aa", "'aa'", "did you mean 'a'"],
    ),
    "unknown teacher": ((A,), (CE, KL("c", "a")), ["kl/c->a", "'c'", "choices: a"]),
    "unknown student": ((A,), (CE, KL("a", "c")), ["kl/a->c", "'c'"]),
    "cross-entropy of probabilities": (
        (A, X),
        (CE, CrossEntropy("memory")),
        ["ce/memory", "external", "logits"],
    ),
    "term weight below 0": ((A,), (CrossEntropy("a", -1.0),), ["ce/a", "-1.0"]),
    "term weight not a number": ((A, B), (CE, KL("b", "a", NAN)), ["kl/b->a", "nan"]),
    "temperature 0": ((A, B), (CE, KL("b", "a", temperature=0)), ["kl/b->a", "temperature=0"]),
    "temperature below 0": (
        (A, B),
        (CE, KL("b", "a", temperature=-3.0)),
        ["kl/b->a", "temperature=-3.0"],
    ),
    "temperature nan": (
        (A, B),
        (CE, KL("b", "a", temperature=NAN)),
        ["kl/b->a", "temperature=nan"],
    ),
    "temperature inf": (
        (A, B),
        (CE, KL("b", "a", temperature=float("inf"))),
        ["kl/b->a", "temperature=inf"],
    ),
    "student of probabilities": (
        (A, X),
        (CE, KL("a", "memory")),
        ["kl/a->memory", "student", "external"],
    ),
    "own teacher": ((A,), (CE, KL("a", "a")), ["kl/a->a", "teach itself"]),
    "constant teacher attached": ((A, X), (CE, KL("memory", "a")), ["kl/memory->a", "detach=True"]),
    "eps below 0": ((A, B), (CE, KL("b", "a", eps=-1e-7)), ["kl/b->a", "eps=-1e-07"]),
    "eps of 1": ((A, B), (CE, KL("b", "a", eps=1.0)), ["kl/b->a", "eps=1.0"]),
    "eps mode": (
        (A, B),
        (CE, KL("b", "a", eps_mode="second")),
        ["kl/b->a", "'second'", "first_order"],
    ),
    "direction": ((A, B), (CE, KL("b", "a", direction="up")), ["kl/b->a", "'up'", "student_first"]),
    "eps with student first": (
        (A, B),
        (CE, KL("b", "a", eps=1e-7, direction="student_first")),
        ["kl/b->a", "eps=0"],
    ),
    "first-order eps of probabilities": (
        (A, X),
        (CE, KL("memory", "a", detach=True, eps=1e-7, eps_mode="first_order")),
        ["kl/memory->a", "'memory'", "exact"],
    ),
    "no logits": ((X,), (), ["no logits"]),
    "no terms": ((A,), (), ["no terms"]),
    "edge twice": (
        (A, B),
        (CE, KL("b", "a"), KL("b", "a", temperature=4.0)),
        ["two terms", "kl/b->a"],
    ),
    "node without use": ((A, B), (CE,), ["logits", "'b'", "reaches no term"]),
    "mixture without use": (
        (A, B, Mixture("u", ("a", "b"), "w")),
        (CE, CrossEntropy("b")),
        ["mixture", "'u'", "reaches no term"],
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_graph_names_broken_rule(case: str) -> None:
    nodes, terms, said = INVALID[case]
    with pytest.raises(GraphError) as caught:
        Graph("wrong", nodes, terms)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.0, NAN])
def test_label_smoothing_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(GraphError, match=f"'wrong' has label_smoothing={value}"):
        Graph("wrong", (A,), (CE,), value)


def test_graph_errors_are_value_errors() -> None:
    assert issubclass(GraphError, ValueError)


def test_ordered_puts_inputs_first_and_keeps_other_order() -> None:
    v, u = Mixture("v", ("u", "b"), "w2"), Mixture("u", ("a", "c"), "w1")
    graph = Graph("g", (v, u, Logits("c"), B, A), (CrossEntropy("v"), CrossEntropy("u")))
    assert [node.name for node in graph.ordered] == ["a", "c", "u", "b", "v"]
    # The caller passes logits in the order given, not in the sorted one; weights in the order of
    # first use.
    assert graph.logits == ("c", "b", "a")
    assert graph.weight_sources == {"w2": 2, "w1": 2}


def test_lowering_writes_out_every_field() -> None:
    graph = Graph(
        "g",
        (
            ProbabilityMixture("h", ("memory", "u"), "p", 2.5),
            Mixture("u", ("b", "a"), (0.25, 0.75)),
            A,
            X,
            B,
            LowestCrossEntropy("best", ("a", "u")),
        ),
        (
            CrossEntropy("u", 0.5),
            KL("h", "a", 2.0, 4.0, detach=True, eps=1e-3),
            KL("b", "u", 1.0, 3.0, t2_scaling=False, direction="student_first"),
            KL("best", "b", 1.0, 2, detach=True, eps=1e-7, eps_mode="first_order"),
        ),
        0.1,
    )
    # ids: a 0, b 1, memory 2, u 3, h 4, best 5
    assert lower(graph) == Plan(
        num_logits=2,
        num_externals=1,
        weight_widths=(2,),
        nodes=(
            PlanNode(MIXTURE, (1, 0), -1, (0.25, 0.75), 1.0),
            PlanNode(PROBABILITY_MIXTURE, (2, 3), 0, (), 2.5),
            PlanNode(SELECTION, (0, 3), -1, (), 1.0),
        ),
        terms=(
            PlanTerm(0, 3, -1, 1.0, 1.0, 0, 0, 0, 0.0, 0.0, 0),
            PlanTerm(1, 0, 4, 4.0, 16.0, 1, 0, 2, 1e-3, 0.0, 1),
            PlanTerm(1, 3, 1, 3.0, 1.0, 0, STUDENT_FIRST, 0, 0.0, 0.0, 2),
            PlanTerm(1, 1, 5, 2.0, 4.0, 1, 0, 1, 1e-7, 0.0, 3),
        ),
        label_smoothing=0.1,
    )


def test_term_weights_are_not_part_of_the_plan() -> None:
    assert lower(ahbf_graph(lambda_ta=4.0)) == lower(ahbf_graph(lambda_ta=0.5))


def test_plan_describes_its_nodes() -> None:
    graph = Graph(
        "g",
        (A, X, Mixture("u", ("a",), (1.0,)), ProbabilityMixture("h", ("u",), (1.0,))),
        (CrossEntropy("u"), KL("memory", "a", detach=True), KL("h", "a")),
    )
    plan = lower(graph)
    assert plan.first_derived == 2
    assert [plan.is_learning(k) for k in range(4)] == [True, False, True, False]
    assert [plan.is_probability(k) for k in range(4)] == [False, True, False, True]
    assert [plan.is_external(k) for k in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("case", catalog(), ids=lambda case: case.name)
def test_catalog_survives_encoding_and_pickling(case: object) -> None:
    plan = lower(case.graph)
    ints, floats = plan.encode()
    # A list of ints and floats is what comes back through the registered operator.
    assert (
        decode_plan.__wrapped__(tuple(int(v) for v in ints), tuple(float(v) for v in floats))
        == plan
    )
    assert pickle.loads(pickle.dumps(case.graph)) == case.graph
    assert hash(plan) == hash(lower(pickle.loads(pickle.dumps(case.graph))))


@settings(max_examples=100, deadline=None)
@given(random_graphs())
def test_any_graph_survives_encoding_in_topological_order(graph: Graph) -> None:
    plan = lower(graph)
    assert decode_plan(*plan.encode()) == plan
    for index, node in enumerate(plan.nodes):
        assert all(source < plan.first_derived + index for source in node.inputs)
    assert hash(graph) == hash(pickle.loads(pickle.dumps(graph)))
    assert draw_text(graph).count("\n") >= len(graph.nodes) + len(graph.terms) + 1
    draw_mermaid(graph)


def test_lists_give_the_same_hashable_graph_as_tuples() -> None:
    listed = Graph(
        "g",
        [A, B, Mixture("u", ["a", "b"], [0.5, 0.5]), MinLogit("low", ["a", "u"])],
        [CrossEntropy("u"), KL("low", "a", detach=True)],
    )
    tupled = Graph(
        "g",
        (A, B, Mixture("u", ("a", "b"), (0.5, 0.5)), MinLogit("low", ("a", "u"))),
        (CrossEntropy("u"), KL("low", "a", detach=True)),
    )
    assert listed == tupled
    assert hash(listed) == hash(tupled)


def test_damaged_encodings_are_refused() -> None:
    ints, floats = lower(ahbf_graph()).encode()
    with pytest.raises(ValueError, match="plan version 99"):
        decode_plan((99, *ints[1:]), floats)
    with pytest.raises(ValueError, match="plan version None"):
        decode_plan((), ())
    for cut in (1, 5, len(ints) - 1):
        with pytest.raises(ValueError, match="cut short"):
            decode_plan(ints[:cut], floats)
    with pytest.raises(ValueError, match="cut short"):
        decode_plan(ints, floats[:-1])
    with pytest.raises(ValueError, match="too long"):
        decode_plan((*ints, 0), floats)
    with pytest.raises(ValueError, match="too long"):
        decode_plan(ints, (*floats, 0.0))


def test_text_drawing_shows_definitions_and_coefficients() -> None:
    # lambda * T^2 multiplied out: 4 * 9 and 2 * 9.
    assert draw_text(ahbf_graph(2, label_smoothing=0.1)).splitlines() == [
        "graph ahbf: 3 nodes, 5 terms",
        "nodes",
        "  branch1  logits   given",
        "  branch2  logits   given",
        "  ta2      mixture  scores2[0]*branch2 + scores2[1]*branch1",
        "terms (coefficient of each per-sample value; T^2 and weights multiplied out)",
        "                 1  CE(branch1, target)",
        "                 1  CE(branch2, target)",
        "                 1  CE(ta2, target)",
        "    36 * kd_weight  KL(ta2 || branch1)  teaches branch1; T=3",
        "    18 * kd_weight  KL(branch2 || branch1)  teaches branch1; T=3",
        "label smoothing 0.1 in every cross-entropy",
    ]


def test_drawing_as_text_shows_every_kind_and_option() -> None:
    text = draw_text(
        Graph(
            "g",
            (
                A,
                B,
                X,
                MinLogit("low", ("a", "b")),
                LowestCrossEntropy("best", ("a", "b")),
                ProbabilityMixture("h", ("memory", "a"), (0.25, 0.75), 4.0),
            ),
            (
                CrossEntropy("a", 0.5, scheduled=True),
                KL("low", "a", 2.0, 2.0, detach=True, eps=1e-7, eps_mode="first_order"),
                KL("best", "b", 2.0, 2.0, t2_scaling=False, detach=True, eps=1e-3),
                KL("h", "a", 1.0, 1.5, direction="student_first", scheduled=False),
            ),
        )
    )
    for part in (
        "0.25*memory + 0.75*softmax(a/4)",
        "min over inputs shifted by their label's logit: a, b",
        "the input with the lowest cross-entropy: a, b",
        "0.5 * kd_weight  CE(a, target)",
        "8 * kd_weight  KL(low || a)  teaches a; T=2, teacher detached, eps=1e-07 first order",
        "2 * kd_weight  KL(best || b)  teaches b; T=2, teacher detached, eps=0.001",
        "2.25  KL(a || h)  teaches a; T=1.5, student first",
    ):
        assert part in text


def test_mermaid_drawing_shows_nodes_and_edges() -> None:
    lines = draw_mermaid(ahbf_graph(2)).splitlines()
    assert lines[0] == "flowchart LR"
    assert '  n0_branch1["branch1"]' in lines
    assert '  n2_ta2(["ta2"])' in lines
    assert '  n1_branch2 -->|"scores2[0]"| n2_ta2' in lines
    assert '  label -. "1" .-> n2_ta2' in lines
    assert '  n2_ta2 == "KL 36 * kd_weight, T=3" ==> n0_branch1' in lines


def boxes_of(picture: ElementTree.Element) -> list[tuple[float, ...]]:
    return [
        tuple(float(box.get(name)) for name in ("x", "y", "width", "height"))
        for box in picture.iter(f"{SVG}rect")
    ]


@given(random_graphs())
@settings(max_examples=50, deadline=None)
def test_svg_drawing_shows_every_node_and_edge(graph: Graph) -> None:
    picture = ElementTree.fromstring(draw_svg(graph))
    boxes = boxes_of(picture)
    assert len(boxes) == len(graph.nodes)
    left, top, wide, high = map(float, picture.get("viewBox").split())
    for x, y, width, height in boxes:
        assert left <= x <= x + width <= left + wide
        assert top <= y <= y + height <= top + high
    for index, (x, y, width, height) in enumerate(boxes):
        for x2, y2, width2, height2 in boxes[:index]:
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    arrows = [
        path.get("stroke-width") for path in picture.iter(f"{SVG}path") if path.get("marker-end")
    ]
    assert arrows.count("2") == sum(not isinstance(term, CrossEntropy) for term in graph.terms)
    assert arrows.count(None) == sum(len(node.inputs) for node in graph.nodes)
    words = "".join(picture.itertext())
    assert all(node.name in words for node in graph.nodes)


def test_svg_drawing_goes_from_inputs_to_derived_nodes() -> None:
    picture = ElementTree.fromstring(draw_svg(ahbf_graph(3)))
    titles = [text.text for text in picture.iter(f"{SVG}text") if text.get("font-weight")]
    column = dict(zip(titles, (x for x, *_ in boxes_of(picture)), strict=True))
    assert (
        column["branch1"] == column["branch2"] == column["branch3"] < column["ta2"] < column["ta3"]
    )
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts[-2:] == ["KL 36 * kd_weight, T=3", "KL 18 * kd_weight, T=3"]  # 4 * 9 and 2 * 9
    assert texts[texts.index("ta2") :][:4] == [
        "ta2",
        "scores2[0]*branch2",
        "+ scores2[1]*branch1",
        "CE 1",
    ]


def test_svg_drawing_takes_any_name() -> None:
    picture = ElementTree.fromstring(
        draw_svg(Graph('<"g"> & co', (Logits("<a> & b"),), (CrossEntropy("<a> & b"),)))
    )
    assert "<a> & b" in "".join(picture.itertext())


def test_mermaid_distinguishes_similar_names() -> None:
    graph = Graph(
        "g",
        (Logits("z-1"), Logits("z_1"), Logits("label"), Logits('a "b"')),
        tuple(CrossEntropy(name) for name in ("z-1", "z_1", "label", 'a "b"')),
    )
    drawn = draw_mermaid(graph)
    targets = {line.split(".-> ")[1] for line in drawn.splitlines() if ".->" in line}
    assert len(targets) == 4
    assert "label" not in targets
    assert "[\"a 'b'\"]" in drawn


def test_graph_package_does_not_import_torch() -> None:
    code = "import sys, fastokd.graph; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
