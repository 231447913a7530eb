"""The public loss of every method, with its gates and attention, against formulas; the worked
examples; what users get wrong.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_state
from method_cases import CASES, FOR_TRITON, build_companion, check
from torch import Tensor, nn

from fastokd.graph import KL
from fastokd.losses import (
    AHBFLoss,
    CLILRLoss,
    DMLLoss,
    IndependentLoss,
    KDLoss,
    OKDDipLoss,
    ONELoss,
)
from fastokd.methods import get_method, list_methods
from fastokd.methods.attention import ATTENTIONS, NonLocal
from fastokd.methods.modules import BranchSpec
from fastokd.ops.executors import executor_states

HERE = Path(__file__).resolve().parent
INTERPRETER = triton_state.interpreter_unavailable()
IMPLS = ["reference", *(["cpu"] if executor_states()["cpu"] is None else [])]


@pytest.mark.parametrize("name", CASES)
def test_value_and_every_gradient(name: str) -> None:
    check(name, IMPLS)


@pytest.mark.skipif(INTERPRETER is not None, reason=str(INTERPRETER))
def test_value_and_every_gradient_in_triton_s_interpreter() -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "method_cases.py")],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(len(FOR_TRITON))]


# --- worked examples, six decimals
# --------------------------------------------------------------------------------------

Z = [[1.0, 0.0, -1.0], [0.5, 1.0, -0.5], [2.0, -1.0, 0.5]]
PRINTED = 1.1e-6  # sums of numbers rounded to six decimals


def rows(*values: list[float]) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]


def near(got: Tensor, want: object) -> None:
    np.testing.assert_allclose(
        got.detach().numpy().reshape(-1), np.asarray(want).reshape(-1), rtol=0, atol=PRINTED
    )


TARGET = torch.tensor([0])


@pytest.mark.parametrize(
    ("preset", "options", "value", "grads", "scores"),
    [
        (
            "paper",
            {"detach_teacher": True},
            4.285215,
            [
                (-0.211609, 0.288253, -0.076643),
                (-1.515738, 1.463874, 0.051864),
                (-0.329034, 0.109383, 0.219651),
            ],
            [(0.881250, -1.295249), (-0.924506, -0.230439)],
        ),
        (
            "paper",
            {},
            4.285215,
            [
                (-0.293761, 0.310757, -0.016996),
                (-1.935302, 1.759042, 0.176260),
                (0.030955, -0.434477, 0.403522),
            ],
            [(0.760261, -1.649746), (-0.021102, -0.376563)],
        ),
        (
            "code",
            {},
            4.882989,
            [
                (-0.355319, 0.434495, -0.079176),
                (-2.144962, 2.058317, 0.086645),
                (0.249353, -0.761870, 0.512517),
            ],
            [(1.034656, -1.401557), (-1.376208, -0.157377)],
        ),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_worked_ahbf(impl, preset, options, value, grads, scores) -> None:
    z, s = rows(*Z), rows([0.6, 0.4], [0.3, 0.7])
    loss = AHBFLoss.preset(preset, 3, impl=impl, **options)(z, TARGET, scores=s, kd_weight=0.5)
    loss.backward()
    near(loss, value)
    for leaf, want in zip([*z, *s], [*grads, *scores], strict=True):
        near(leaf.grad, want)


@pytest.mark.parametrize(
    ("detach", "gate", "first"),
    [
        (True, (-0.560811, -0.026996, -0.990781), (-0.370900, 0.304808, 0.066092)),
        (False, (-0.652593, 0.010711, -1.247712), (-0.388437, 0.321527, 0.066910)),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_worked_one(impl, detach, gate, first) -> None:
    z, s = rows(*Z), rows([0.2, 0.5, 0.3])
    loss, terms = ONELoss(detach_teacher=detach, impl=impl)(
        z, TARGET, scores=s, kd_weight=0.5, return_terms=True
    )
    loss.backward()
    near(loss, 2.595284)
    near(terms["ce/ensemble"], 0.522747)
    for m, want in enumerate((0.034610, 0.174829, 0.429538), start=1):
        near(terms[f"kl/ensemble->branch{m}"], want)
    near(s[0].grad, gate)
    near(z[0].grad, first)
    near(ONELoss(impl=impl).named_logits(z, scores=s)["ensemble"], (1.05, 0.2, -0.3))


@pytest.mark.parametrize(
    ("mix", "values", "total"),
    [
        ("logits", (0.020030, 0.034841, 0.784857), 2.172911),
        ("probabilities", (0.019538, 0.035857, 0.787748), 2.174620),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_worked_okddip(impl, mix, values, total) -> None:
    z, s = rows(*Z), rows([0.7, 0.3], [0.4, 0.6])
    loss, terms = OKDDipLoss(3, mix=mix, impl=impl)(
        z, TARGET, scores=s, kd_weight=0.5, return_terms=True
    )
    near(loss, total)
    for name, want in zip(
        ("group1->branch1", "group2->branch2", "ensemble->leader"), values, strict=True
    ):
        near(terms[f"kl/{name}"], want)


@pytest.mark.parametrize(
    ("teacher", "temperature", "per_network"),
    [
        ("pairwise", 1.0, (0.618089, 1.542971, 0.935924)),
        ("mean", 3.0, (0.483713, 1.660695, 1.026168)),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_worked_dml(impl, teacher, temperature, per_network) -> None:
    criterion = DMLLoss(3, temperature, teacher=teacher, impl=impl)
    loss, terms = criterion(rows(*Z), TARGET, return_terms=True)
    near(loss, sum(per_network))
    for k, want in enumerate(per_network, start=1):
        student = f"branch{k}"
        mine = [
            term
            for term in criterion.graph.terms
            if isinstance(term, KL) and term.student == student
        ]
        near(terms[f"ce/{student}"] + sum(term.weight * terms[term.name] for term in mine), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_cross_entropies(impl) -> None:
    """The same rows: Ind, KD with z3 as the teacher of z1 (twice CL-ILR's terms of two heads),
    CL-ILR.
    """
    ce = (0.407606, 1.104131, 0.241311)
    near(IndependentLoss(3, impl=impl)(rows(*Z), TARGET), sum(ce))
    # Ensemble-first DML of three networks is CL-ILR's loss.
    near(CLILRLoss(3, impl=impl)(rows(*Z), TARGET), 0.483713 + 1.660695 + 1.026168)
    # z2 as the teacher of z1: AHBF's edge branch2 -> branch1, whose value is 0.218212.
    near(
        KDLoss(impl=impl)(rows(Z[0]), TARGET, teacher=rows(Z[1])[0], kd_weight=0.5),
        ce[0] + 0.5 * 0.218212,
    )
    stored = torch.tensor([[0.345078, 0.407662, 0.247260]], dtype=torch.float64)
    near(
        KDLoss(teacher_rows="probabilities", impl=impl)(
            rows(Z[0]), TARGET, teacher=stored, kd_weight=0.5
        ),
        ce[0] + 0.5 * 0.218212,
    )


# --- what is measured
# --------------------------------------------------------------------------------------------------


def test_every_method_with_branches_measures_its_ensemble() -> None:
    z = [torch.randn(4, 5) for _ in range(4)]
    mean = torch.stack(z).mean(0)
    assert torch.equal(IndependentLoss(4).named_logits(z)["ensemble"], mean)
    assert torch.equal(DMLLoss(4).named_logits(z)["ensemble"], mean)
    assert torch.equal(CLILRLoss(4).named_logits(z)["ensemble"], mean)
    scores = [torch.randn(4, 2).softmax(1) for _ in range(3)]
    found = AHBFLoss(4).named_logits(z, scores=scores)
    assert list(found) == [
        "branch1",
        "branch2",
        "branch3",
        "branch4",
        "ta2",
        "ta3",
        "ta4",
        "ensemble",
    ]
    assert torch.equal(found["ensemble"], mean)


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_okddip_s_ensemble_is_of_the_peers_alone(mix) -> None:
    z = [torch.randn(4, 5) for _ in range(4)]
    scores = [torch.randn(4, 3).softmax(1) for _ in range(3)]
    found = OKDDipLoss(mix=mix).named_logits(z, scores=scores)
    torch.testing.assert_close(found["ensemble"], torch.stack(z[:3]).mean(0))
    assert list(found)[:4] == ["branch1", "branch2", "branch3", "leader"]


# --- modules
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 64, 132])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_keeps_shape_at_any_width(name, channels) -> None:
    x = torch.randn(2, channels, 5, 3)
    assert ATTENTIONS[name](channels)(x).shape == x.shape


def test_without_attention_the_gates_start_as_they_always_did() -> None:
    torch.manual_seed(0)
    (gate,) = (
        get_method("ahbf")
        .build_companion(BranchSpec((8, 8), 8, 10, ()), gate_attention="none")
        .gates
    )
    torch.manual_seed(0)
    conv, fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert [name for name, _ in gate.named_parameters()] == [
        "conv.weight",
        "conv.bias",
        "bn.weight",
        "bn.bias",
        "fc.weight",
        "fc.bias",
        "score_bn.weight",
        "score_bn.bias",
    ]
    for mine, theirs in ((gate.conv, conv), (gate.fc, fc)):
        assert torch.equal(mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias)


def test_nonlocal_attention_starts_as_the_identity() -> None:
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(NonLocal(8)(x), x)


def test_an_okddip_attention_that_is_detached_learns_nothing() -> None:
    case = CASES["okddip code, detached"]
    assert {name for name, _ in build_companion(case).named_parameters()} == {
        "query.weight",
        "key.weight",
    }
    z, s = rows(*Z), rows([0.7, 0.3], [0.4, 0.6])
    OKDDipLoss(3, detach_teacher=True)(z, TARGET, scores=s).backward()
    assert all(not leaf.grad.any() for leaf in s)


# --- mistakes
# --------------------------------------------------------------------------------------------------

NUMBERS = [
    (method, name)
    for method in list_methods()
    for name in inspect.signature(get_method(method).loss_class).parameters
    if name in ("temperature", "teacher_eps", "label_smoothing") or name.startswith("lambda_")
]


@pytest.mark.parametrize(("method", "name"), NUMBERS)
def test_numbers_out_of_range_are_named(method: str, name: str) -> None:
    loss = get_method(method).loss_class
    with pytest.raises(ValueError, match=f"{name}=-0.5; it must be"):
        loss(**{name: -0.5})
    for value in ("3", True):
        with pytest.raises(TypeError, match=f"^{name}={value!r}; it must be a number"):
            loss(**{name: value})
    with pytest.raises(ValueError, match=f"{name}=nan"):
        loss(**{name: float("nan")})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IndependentLoss(1), "num_branches=1; it must be an integer of at least 2"),
        (lambda: DMLLoss(1), "num_branches=1"),
        (lambda: CLILRLoss(0), "num_branches=0"),
        (lambda: OKDDipLoss(2), "num_branches=2; it must be an integer of at least 3"),
        (lambda: KDLoss(2), "num_branches=2; it must be 1"),
        (
            lambda: OKDDipLoss(mix="logit"),
            r"mix='logit'; did you mean 'logits'\? \(choices: logits, probabilities\)",
        ),
        (lambda: DMLLoss(teacher="median"), r"teacher='median'.*choices: mean, pairwise"),
        (
            lambda: KDLoss(teacher_rows="file"),
            r"teacher_rows='file'.*choices: logits, probabilities",
        ),
        (lambda: ONELoss.preset("cod"), "unknown preset 'cod'; did you mean 'code'"),
        (lambda: IndependentLoss.preset("code"), "unknown preset 'code'"),
        (
            lambda: ONELoss()(rows(*Z), TARGET, scores=rows([0.5, 0.5])),
            r"scores\[0\] has the shape \(1, 2\); it must be \[1, 3\]",
        ),
        (
            lambda: ONELoss()(rows(*Z), TARGET, scores=rows([1.0], [1.0])),
            "scores holds 2 tensors; this loss needs 1",
        ),
        (
            lambda: OKDDipLoss(3)(rows(*Z), TARGET, scores=rows([0.7, 0.3])),
            "scores holds 1 tensors; this loss needs 2",
        ),
        (
            lambda: OKDDipLoss(3)(rows(*Z), TARGET, scores=rows([0.7, 0.3], [1.0])),
            r"scores\[1\] has the shape \(1, 1\)",
        ),
        (
            lambda: KDLoss()(rows(Z[0]), TARGET),
            r"teacher is missing: pass the teacher's logits \[B, C\]",
        ),
        (
            lambda: KDLoss()(rows(Z[0]), TARGET, teacher=torch.zeros(1, 4)),
            r"teacher has the shape \(1, 4\), branch_logits\[0\] has \(1, 3\)",
        ),
        (
            lambda: DMLLoss(3)(rows(*Z[:2]), TARGET),
            "branch_logits holds 2 tensors; this loss needs 3",
        ),
    ],
)
def test_mistakes(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("loss", [ONELoss, DMLLoss, CLILRLoss, OKDDipLoss])
def test_switches_are_no_words(loss) -> None:
    with pytest.raises(TypeError, match="detach_teacher='no'; it must be True or False"):
        loss(detach_teacher="no")
