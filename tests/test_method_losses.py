"""The public loss of every method, with its gates and attention, against formulas; user errors.

``worked_values`` holds the worked examples.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_state
from method_cases import CASES, FOR_TRITON, build_companion, check
from torch import Tensor, nn

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
def test_method_loss_and_gradients_match_formula(name: str) -> None:
    check(name, IMPLS)


@pytest.mark.skipif(INTERPRETER is not None, reason=str(INTERPRETER))
def test_method_loss_in_interpreter_matches_formula() -> None:
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


Z = [[1.0, 0.0, -1.0], [0.5, 1.0, -0.5], [2.0, -1.0, 0.5]]


def rows(*values: list[float]) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]


TARGET = torch.tensor([0])


# --- what is measured
# --------------------------------------------------------------------------------------------------


def test_named_logits_with_branches_hold_ensemble() -> None:
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
def test_okddip_ensemble_excludes_leader(mix) -> None:
    z = [torch.randn(4, 5) for _ in range(4)]
    scores = [torch.randn(4, 3).softmax(1) for _ in range(3)]
    found = OKDDipLoss(mix=mix).named_logits(z, scores=scores)
    torch.testing.assert_close(found["ensemble"], torch.stack(z[:3]).mean(0))
    assert list(found)[:4] == ["branch1", "branch2", "branch3", "leader"]


# --- modules
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 64, 132])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_at_any_width_keeps_shape(name, channels) -> None:
    x = torch.randn(2, channels, 5, 3)
    assert ATTENTIONS[name](channels)(x).shape == x.shape


def test_gates_without_attention_start_unchanged() -> None:
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


def test_nonlocal_attention_at_start_is_identity() -> None:
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(NonLocal(8)(x), x)


def test_okddip_with_detached_teacher_freezes_attention() -> None:
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
def test_loss_option_out_of_range_is_refused(method: str, name: str) -> None:
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
def test_loss_with_bad_argument_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("loss", [ONELoss, DMLLoss, CLILRLoss, OKDDipLoss])
def test_loss_switch_given_as_word_is_refused(loss) -> None:
    with pytest.raises(TypeError, match="detach_teacher='no'; it must be True or False"):
        loss(detach_teacher="no")
