"""Every mistake a user can make with a loss gets the right exception, with the argument's name and
value in it.
"""

import dataclasses
import sys
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastokd.errors import ConfigError, ExecutorUnavailable
from fastokd.graph import KL, Graph
from fastokd.losses import AHBFLoss, BaselineLoss, GraphLoss
from fastokd.methods import get_method
from fastokd.methods.dml import dml_graph
from fastokd.methods.ffsd import ffsd_graph
from fastokd.methods.kd import kd_graph
from fastokd.methods.kdcl import kdcl_graph
from fastokd.methods.okddip import okddip_graph
from fastokd.methods.one import one_graph
from fastokd.methods.tsb import tsb_graph
from fastokd.ops import executors, register_executor

NAN, INF = float("nan"), float("inf")

# --- constructors
# --------------------------------------------------------------------------------------------------


def replace_terms(graph: Graph, **changes) -> Graph:
    """The graph with changes to its KL terms."""
    terms = (
        dataclasses.replace(term, **changes) if isinstance(term, KL) else term
        for term in graph.terms
    )
    return dataclasses.replace(graph, terms=tuple(terms))


CONSTRUCTORS = {
    "one branch": (lambda: AHBFLoss(1), ["num_branches=1", "at least 2"]),
    "no branches": (lambda: AHBFLoss(num_branches=0), ["num_branches=0"]),
    "half a branch": (lambda: AHBFLoss(num_branches=2.5), ["num_branches=2.5"]),
    "temperature 0": (lambda: AHBFLoss(temperature=0), ["temperature=0", "positive"]),
    "temperature below 0": (lambda: AHBFLoss(temperature=-3.0), ["temperature=-3.0"]),
    "temperature nan": (lambda: AHBFLoss(temperature=NAN), ["temperature=nan"]),
    "temperature inf": (lambda: AHBFLoss(temperature=INF), ["temperature=inf"]),
    "lambda_ta below 0": (lambda: AHBFLoss(lambda_ta=-0.5), ["lambda_ta=-0.5", "at least 0"]),
    "lambda_branch below 0": (lambda: AHBFLoss(lambda_branch=-2), ["lambda_branch=-2"]),
    "lambda_self nan": (lambda: AHBFLoss(lambda_self=NAN), ["lambda_self=nan"]),
    "lambda_self inf": (lambda: AHBFLoss(lambda_self=INF), ["lambda_self=inf"]),
    "teacher_eps below 0": (lambda: AHBFLoss(teacher_eps=-1e-7), ["teacher_eps=-1e-07"]),
    "teacher_eps of 1": (lambda: AHBFLoss(teacher_eps=1.0), ["teacher_eps=1.0"]),
    "label_smoothing of 1": (lambda: AHBFLoss(label_smoothing=1.0), ["label_smoothing=1.0"]),
    "label_smoothing nan": (lambda: AHBFLoss(label_smoothing=NAN), ["label_smoothing=nan"]),
    "reduction": (
        lambda: AHBFLoss(reduction="batchmean"),
        ["reduction='batchmean'", "'mean'", "'none'"],
    ),
    "impl": (
        lambda: AHBFLoss(impl="referense"),
        ["unknown impl 'referense'", "did you mean 'reference'"],
    ),
    "preset": (
        lambda: AHBFLoss.preset("papr"),
        ["unknown preset 'papr'", "did you mean 'paper'", "code"],
    ),
    "preset override": (lambda: AHBFLoss.preset("paper", temperature=0.0), ["temperature=0.0"]),
    "baseline branches": (lambda: BaselineLoss(2), ["num_branches=2", "1"]),
    "baseline smoothing": (lambda: BaselineLoss(label_smoothing=-0.1), ["label_smoothing=-0.1"]),
    "one": (lambda: one_graph(1), ["num_branches=1", "at least 2"]),
    "okddip": (lambda: okddip_graph(2), ["num_branches=2", "at least 3"]),
    "okddip mix": (lambda: okddip_graph(mix="probs"), ["mix='probs'", "probabilities"]),
    "dml teacher": (lambda: dml_graph(teacher="median"), ["teacher='median'", "pairwise"]),
    "kd teacher": (lambda: kd_graph(teacher_rows="file"), ["teacher_rows='file'", "probabilities"]),
    "kdcl variant": (
        lambda: kdcl_graph("minilogit"),
        ["variant='minilogit'", "did you mean 'minlogit'"],
    ),
    "ffsd": (lambda: ffsd_graph(1), ["num_students=1", "at least 2"]),
    "graph temperature": (
        lambda: replace_terms(one_graph(), temperature=0.0),
        ["kl/ensemble->branch1", "temperature=0.0"],
    ),
    "branch count as text": (lambda: one_graph("3"), ["num_branches='3'"]),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_loss_constructor_with_bad_argument_is_refused(case: str) -> None:
    build, said = CONSTRUCTORS[case]
    with pytest.raises(ValueError) as caught:
        build()
    for part in said:
        assert part in str(caught.value)


def test_unknown_names_are_config_errors() -> None:
    """The command line gives these their own exit code; library users catch ValueError."""
    with pytest.raises(ConfigError):
        AHBFLoss(impl="fast")
    with pytest.raises(ConfigError, match="unknown method 'ahfb'; did you mean 'ahbf'"):
        get_method("ahfb")


@pytest.mark.parametrize(
    "name",
    ["temperature", "lambda_ta", "lambda_branch", "lambda_self", "teacher_eps", "label_smoothing"],
)
def test_constructor_with_text_for_number_is_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}='3'"):
        AHBFLoss(**{name: "3"})


def test_preset_of_an_unknown_option_names_it() -> None:
    with pytest.raises(TypeError, match="lambda_tas"):
        AHBFLoss.preset("paper", lambda_tas=1.0)


# --- calls
# --------------------------------------------------------------------------------------------------


def rows(
    count: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]


def call(**changed: object) -> Callable[[], object]:
    """A call of AHBFLoss(3) for 4 rows and 5 classes with some arguments replaced."""
    good = {
        "branch_logits": rows(3, 4, 5),
        "target": torch.zeros(4, dtype=torch.long),
        "scores": rows(2, 4, 2),
    }
    return lambda: AHBFLoss(3)(**{**good, **changed})


def at(values: list[Tensor], index: int, value: object) -> list:
    return [value if k == index else tensor for k, tensor in enumerate(values)]


LABELS = torch.zeros(4, dtype=torch.long)
CALLS = {
    # rows of logits
    "too few rows": (
        call(branch_logits=rows(2, 4, 5)),
        ValueError,
        ["branch_logits holds 2", "needs 3"],
    ),
    "too many rows": (
        call(branch_logits=rows(4, 4, 5)),
        ValueError,
        ["branch_logits holds 4", "needs 3"],
    ),
    "stack of too few": (
        call(branch_logits=torch.zeros(2, 4, 5)),
        ValueError,
        ["branch_logits holds 2", "needs 3"],
    ),
    "stack of two dimensions": (
        call(branch_logits=torch.zeros(4, 5)),
        ValueError,
        ["branch_logits", "(4, 5)", "three dimensions"],
    ),
    "rows in a dict": (call(branch_logits={"a": 1}), TypeError, ["branch_logits", "dict"]),
    "no tensor": (
        call(branch_logits=at(rows(3, 4, 5), 1, [1.0])),
        TypeError,
        ["branch_logits[1]", "list"],
    ),
    "no tensor first": (
        call(branch_logits=at(rows(3, 4, 5), 0, None)),
        TypeError,
        ["branch_logits[0]", "NoneType"],
    ),
    "one dimension": (
        call(branch_logits=rows(3, 5)),
        ValueError,
        ["branch_logits[0]", "(5,)", "[B, C]"],
    ),
    "no classes": (
        call(branch_logits=rows(3, 4, 0)),
        ValueError,
        ["branch_logits[0]", "(4, 0)", "no classes"],
    ),
    "other batch": (
        call(branch_logits=at(rows(3, 4, 5), 2, torch.zeros(3, 5))),
        ValueError,
        ["branch_logits[2]", "(3, 5)", "(4, 5)"],
    ),
    "other classes": (
        call(branch_logits=at(rows(3, 4, 5), 1, torch.zeros(4, 6))),
        ValueError,
        ["branch_logits[1]", "(4, 6)", "branch_logits[0]"],
    ),
    "other dtype": (
        call(branch_logits=at(rows(3, 4, 5), 1, torch.zeros(4, 5).half())),
        TypeError,
        ["branch_logits[1]", "float16", "float32"],
    ),
    "other device": (
        call(branch_logits=at(rows(3, 4, 5), 1, torch.zeros(4, 5, device="meta"))),
        ValueError,
        ["branch_logits[1]", "meta", "cpu"],
    ),
    "integer logits": (
        call(branch_logits=rows(3, 4, 5, dtype=torch.int64)),
        TypeError,
        ["branch_logits[0]", "int64", "bfloat16"],
    ),
    "complex logits": (
        call(branch_logits=rows(3, 4, 5, dtype=torch.complex64)),
        TypeError,
        ["branch_logits[0]", "complex64"],
    ),
    # scores and TAs
    "neither": (call(scores=None), ValueError, ["exactly one", "scores", "ta_logits"]),
    "both": (call(ta_logits=rows(2, 4, 5)), ValueError, ["exactly one", "scores", "ta_logits"]),
    "too few scores": (call(scores=rows(1, 4, 2)), ValueError, ["scores holds 1", "needs 2"]),
    "as many scores as branches": (
        call(scores=rows(3, 4, 2)),
        ValueError,
        ["scores holds 3", "needs 2"],
    ),
    "scores of three columns": (
        call(scores=at(rows(2, 4, 2), 1, torch.zeros(4, 3))),
        ValueError,
        ["scores[1]", "(4, 3)", "[4, 2]"],
    ),
    "scores of another batch": (
        call(scores=at(rows(2, 4, 2), 0, torch.zeros(3, 2))),
        ValueError,
        ["scores[0]", "(3, 2)", "[4, 2]"],
    ),
    "integer scores": (
        call(scores=rows(2, 4, 2, dtype=torch.int64)),
        TypeError,
        ["scores[0]", "int64"],
    ),
    "scores elsewhere": (
        call(scores=rows(2, 4, 2, device="meta")),
        ValueError,
        ["scores[0]", "meta", "cpu"],
    ),
    "a number as score": (call(scores=[0.5, 0.5]), TypeError, ["scores[0]", "float"]),
    "stacked scores of two dimensions": (
        call(scores=torch.zeros(2, 2)),
        ValueError,
        ["scores", "(2, 2)", "three dimensions"],
    ),
    "too many TAs": (
        call(scores=None, ta_logits=rows(3, 4, 5)),
        ValueError,
        ["ta_logits holds 3", "needs 2"],
    ),
    "TA of other classes": (
        call(scores=None, ta_logits=at(rows(2, 4, 5), 1, torch.zeros(4, 6))),
        ValueError,
        ["ta_logits[1]", "(4, 6)", "(4, 5)"],
    ),
    "TA of another dtype": (
        call(scores=None, ta_logits=rows(2, 4, 5, dtype=torch.float64)),
        TypeError,
        ["ta_logits[0]", "float64", "float32"],
    ),
    "TA elsewhere": (
        call(scores=None, ta_logits=rows(2, 4, 5, device="meta")),
        ValueError,
        ["ta_logits[0]", "meta", "cpu"],
    ),
    # targets
    "no target": (call(target=[0, 1, 2, 3]), TypeError, ["target", "list"]),
    "int32 labels": (call(target=LABELS.int()), TypeError, ["target", "int32", "target.long()"]),
    "boolean labels": (call(target=LABELS.bool()), TypeError, ["target", "bool"]),
    "too few labels": (call(target=LABELS[:3]), ValueError, ["target", "(3,)", "[4]"]),
    "labels in a column": (call(target=LABELS[:, None]), ValueError, ["target", "(4, 1)", "[4]"]),
    "float labels": (call(target=LABELS.float()), ValueError, ["target", "(4,)", "[4, 5]"]),
    "soft targets of other classes": (
        call(target=torch.zeros(4, 6)),
        ValueError,
        ["target", "(4, 6)", "[4, 5]"],
    ),
    "soft targets that learn": (
        call(target=torch.zeros(4, 5, requires_grad=True)),
        ValueError,
        ["target", "detach"],
    ),
    "target elsewhere": (call(target=LABELS.to("meta")), ValueError, ["target", "meta", "cpu"]),
    "label below 0": (
        call(target=torch.tensor([0, 1, -1, 2])),
        ValueError,
        ["target[2] is -1", "5 classes"],
    ),
    "label too large": (
        call(target=torch.tensor([0, 1, 2, 5])),
        ValueError,
        ["target[3] is 5", "0 to 4"],
    ),
    # the ramp-up value
    "kd_weight per row": (call(kd_weight=torch.ones(4)), ValueError, ["kd_weight", "(4,)"]),
    "kd_weight of one element": (call(kd_weight=torch.ones(1)), ValueError, ["kd_weight", "(1,)"]),
    "kd_weight elsewhere": (
        call(kd_weight=torch.ones((), device="meta")),
        ValueError,
        ["kd_weight", "meta", "cpu"],
    ),
    "kd_weight as text": (call(kd_weight="0.5"), TypeError, ["kd_weight", "'0.5'"]),
    "kd_weight missing": (call(kd_weight=None), TypeError, ["kd_weight", "None"]),
    "kd_weight nan": (call(kd_weight=NAN), ValueError, ["kd_weight", "nan"]),
    "kd_weight inf": (call(kd_weight=INF), ValueError, ["kd_weight", "inf"]),
}


@pytest.mark.parametrize("case", CALLS)
def test_loss_call_with_bad_argument_is_refused(case: str) -> None:
    run, error, said = CALLS[case]
    with pytest.raises(error) as caught:
        run()
    for part in said:
        assert part in str(caught.value)


def test_valid_call_is_accepted() -> None:
    """Valid calls, which the bad ones vary: without them, all might fail for one reason."""
    assert call()().isfinite()
    assert call(scores=None, ta_logits=rows(2, 4, 5))().isfinite()


GRAPH_CALLS = {
    "no weights": (one_graph(2), {}, ValueError, ["weights['gate']", "missing", "[B, 2]"]),
    "other weights": (
        one_graph(2),
        {"weights": {"gates": torch.zeros(4, 2)}},
        ValueError,
        ["weights['gate']", "missing"],
    ),
    "weights of other width": (
        one_graph(2),
        {"weights": {"gate": torch.zeros(4, 3)}},
        ValueError,
        ["weights['gate']", "(4, 3)"],
    ),
    "no externals": (tsb_graph(2), {}, ValueError, ["externals['memory1']", "missing"]),
    "externals of other classes": (
        tsb_graph(2),
        {"externals": {"memory1": torch.zeros(4, 6), "memory2": torch.zeros(4, 5)}},
        ValueError,
        ["externals['memory1']", "(4, 6)", "(4, 5)"],
    ),
    "integer externals": (
        tsb_graph(2),
        {"externals": {"memory1": torch.zeros(4, 5).long(), "memory2": torch.zeros(4, 5)}},
        TypeError,
        ["externals['memory1']", "int64"],
    ),
    "externals elsewhere": (
        tsb_graph(2),
        {"externals": {"memory1": torch.zeros(4, 5), "memory2": torch.zeros(4, 5, device="meta")}},
        ValueError,
        ["externals['memory2']", "meta"],
    ),
    "misspelt external next to a good one": (
        kd_graph(teacher_rows="probabilities"),
        {"externals": {"teachers": torch.zeros(4, 5)}},
        ValueError,
        ["teacher is missing: pass the teacher's probabilities"],
    ),
}


@pytest.mark.parametrize("case", GRAPH_CALLS)
def test_graph_loss_call_with_bad_argument_is_refused(case: str) -> None:
    graph, arguments, error, said = GRAPH_CALLS[case]
    with pytest.raises(error) as caught:
        GraphLoss(graph)(rows(len(graph.logits), 4, 5), LABELS, **arguments)
    for part in said:
        assert part in str(caught.value)


def test_graph_loss_with_wrong_tensor_count_is_refused() -> None:
    criterion = GraphLoss(one_graph(2))
    with pytest.raises(ValueError, match="logits holds 3 tensors; this loss needs 2"):
        criterion(rows(3, 4, 5), LABELS, weights={"gate": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="logits holds 3 tensors; this loss needs 2"):
        criterion(torch.zeros(3, 4, 5), LABELS, weights={"gate": torch.zeros(4, 2)})


def test_mixtures_with_bad_scores_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scores\[1\] has the shape \(4, 3\)"):
        AHBFLoss(3).mixtures(rows(3, 4, 5), scores=[torch.zeros(4, 2), torch.zeros(4, 3)])


class _Picky:
    """An executor that refuses everything."""

    def unsupported_reason(self, plan: object, case: object) -> str:
        return "it needs the moon to be full"


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    # Private, because a registered executor cannot be removed in a public way.
    monkeypatch.setattr(executors._executors, "targets", dict(executors._executors.targets))
    monkeypatch.setattr(executors, "_preferred", dict(executors._preferred))
    monkeypatch.setattr(executors, "_warned", set())
    # Tried first on the CPU; other executors registered for it are out of this test.
    monkeypatch.setitem(executors._preferred, "cpu", ())
    register_executor("picky", "picky_executor", ("cpu",))
    monkeypatch.setitem(sys.modules, "picky_executor", types.SimpleNamespace(EXECUTOR=_Picky()))
    logits, scores = rows(2, 4, 5), rows(1, 4, 2)
    with pytest.warns(UserWarning, match="'picky'.*moon.*reference"):
        loss = AHBFLoss(2)(logits, LABELS, scores=scores)
    assert torch.equal(loss, AHBFLoss(2, impl="reference")(logits, LABELS, scores=scores))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AHBFLoss(2)(logits, LABELS, scores=scores)
    with pytest.raises(
        ExecutorUnavailable, match="impl='picky' cannot run here: it needs the moon"
    ):
        AHBFLoss(2, impl="picky")(logits, LABELS, scores=scores)
    assert executors.executor_states()["picky"] == "it needs the moon to be full"


def test_explicit_unavailable_executor_reports_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    # Private, as above.
    monkeypatch.setattr(executors._executors, "targets", dict(executors._executors.targets))
    register_executor("absent", "fastokd_executor_that_is_not_installed")
    with pytest.raises(
        ExecutorUnavailable,
        match=r"impl='absent' cannot be loaded.*fastokd_executor_that_is_not_installed",
    ):
        AHBFLoss(2, impl="absent")(rows(2, 4, 5), LABELS, scores=rows(1, 4, 2))
