"""Every method's public loss together with its own modules, against float64 formulas: value and
every gradient.

Not a test file: ``test_method_losses.py`` calls ``check`` for the reference and the C++ executor,
and runs this file in a separate process for Triton's interpreter, which must be chosen before
Triton is first imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton_state
from oracles import gates
from oracles import methods as oracle
from oracles.rows import Array
from torch import Tensor, nn

from fastokd.losses import MethodLoss
from fastokd.methods import get_method
from fastokd.methods.modules import BranchPass, BranchSpec, MethodModules

BATCH, CLASSES, CHANNELS, SIZE, KD_WEIGHT = 4, 5, 4, 3, 0.6
# Two float64 computations of some hundred terms of size up to 1e2.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@dataclass(frozen=True)
class Case:
    """A method with options, and its formula: from rows of logits z, the trunk's map, feature maps,
    parameters, labels and the constants ``given`` to the loss of every sample.
    """

    method: str
    branches: int
    formula: Callable[..., Array]
    options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()


def _okddip(function: Callable[..., Array], **options: Any) -> Callable[..., Array]:
    return lambda z, shared, maps, p, y, given: function(
        z[:-1], z[-1], gates.okddip_attention(maps[:-1], p), y, KD_WEIGHT, **options
    )


def _one(**options: Any) -> Callable[..., Array]:
    return lambda z, shared, maps, p, y, given: oracle.one(
        z, gates.one_gate(shared, p), y, KD_WEIGHT, **options
    )


def _ahbf(attention: str = "none", **options: Any) -> Callable[..., Array]:
    return lambda z, shared, maps, p, y, given: oracle.ahbf(
        z, [s for s in gates.ahbf_gates(maps, p, attention)], y, KD_WEIGHT, **options
    )


def _rows(function: Callable[..., Array], *arguments: Any) -> Callable[..., Array]:
    return lambda z, shared, maps, p, y, given: function(z, y, *arguments)


CODE_AHBF = {"lambda_ta": 1.5, "lambda_branch": 3.0, "lambda_self": 1.5, "teacher_eps": 1e-7}
CASES = {
    "independent": Case("independent", 3, _rows(oracle.independent)),
    "dml": Case("dml", 3, _rows(oracle.dml, KD_WEIGHT, 1.0, True, True)),
    "dml joint": Case(
        "dml",
        3,
        _rows(oracle.dml, KD_WEIGHT, 2.0, True, False),
        {"temperature": 2.0, "detach_teacher": False},
    ),
    "dml code": Case(
        "dml", 4, _rows(oracle.dml, KD_WEIGHT, 3.0, False, False, 1e-7), {"preset": "code"}
    ),
    "dml mean, detached": Case(
        "dml",
        3,
        _rows(oracle.dml, KD_WEIGHT, 3.0, False, True),
        {"temperature": 3.0, "teacher": "mean"},
    ),
    "cl_ilr": Case(
        "cl_ilr", 3, _rows(oracle.cl_ilr, KD_WEIGHT, 3.0, 0.0, True), {"preset": "paper"}
    ),
    "cl_ilr code": Case(
        "cl_ilr", 3, _rows(oracle.cl_ilr, KD_WEIGHT, 3.0, 1e-7), {"preset": "code"}
    ),
    "cl_ilr convex": Case(
        "cl_ilr",
        2,
        _rows(oracle.cl_ilr, 0.7 * KD_WEIGHT, 2.0, 0.0, False, 0.3),
        {"temperature": 2.0, "lambda_ce": 0.3, "lambda_kd": 0.7},
    ),
    "one": Case("one", 3, _one()),
    "one code": Case("one", 3, _one(eps=1e-7), {"preset": "code"}),
    "one attached": Case("one", 4, _one(detach=False), {"detach_teacher": False}),
    "okddip": Case("okddip", 4, _okddip(oracle.okddip_slides), {"preset": "paper"}),
    "okddip detached": Case(
        "okddip",
        3,
        _okddip(oracle.okddip_slides, detach=True),
        {"preset": "paper", "detach_teacher": True},
    ),
    "okddip code": Case("okddip", 4, _okddip(oracle.okddip_code, eps=1e-7), {"preset": "code"}),
    "okddip code, detached": Case(
        "okddip", 3, _okddip(oracle.okddip_code, detach=True), {"detach_teacher": True}
    ),
    "kd": Case(
        "kd",
        1,
        lambda z, shared, maps, p, y, given: oracle.kd_logits(z[0], given["teacher"], y, KD_WEIGHT),
        given=("teacher",),
    ),
    "kd code": Case(
        "kd",
        1,
        lambda z, shared, maps, p, y, given: oracle.kd_logits(
            z[0], given["teacher"], y, KD_WEIGHT, eps=1e-7
        ),
        {"preset": "code"},
        given=("teacher",),
    ),
    "kd stored": Case(
        "kd",
        1,
        lambda z, shared, maps, p, y, given: oracle.kd_stored(z[0], given["teacher"], y, KD_WEIGHT),
        {"teacher_rows": "probabilities"},
        given=("teacher",),
    ),
    "ahbf": Case("ahbf", 3, _ahbf()),
    "ahbf detached": Case("ahbf", 3, _ahbf(detach=True), {"detach_teacher": True}),
    "ahbf code": Case("ahbf", 3, _ahbf(ta=1.5, branch=3.0, own=1.5, eps=1e-7), {"preset": "code"}),
    "ahbf se": Case("ahbf", 3, _ahbf("se"), model_options={"gate_attention": "se"}),
    "ahbf cbam": Case("ahbf", 3, _ahbf("cbam"), model_options={"gate_attention": "cbam"}),
    "ahbf nonlocal": Case(
        "ahbf", 3, _ahbf("nonlocal"), model_options={"gate_attention": "nonlocal"}
    ),
}
# The interpreter takes a second for each; the graphs differ in these, the modules do not.
FOR_TRITON = (
    "independent",
    "dml code",
    "cl_ilr",
    "one",
    "one attached",
    "okddip",
    "okddip code",
    "kd",
    "kd stored",
    "ahbf code",
)


def build_loss(case: Case, impl: str) -> MethodLoss:
    """The public loss; without a preset its own defaults."""
    options = dict(case.options)
    loss_class = get_method(case.method).loss_class
    preset = options.pop("preset", None)
    if preset is None:
        return loss_class(num_branches=case.branches, impl=impl, **options)
    return loss_class.preset(preset, case.branches, impl=impl, **options)


def build_companion(case: Case) -> MethodModules | None:
    """The method's modules in float64 with every parameter drawn, so that no normalisation starts
    at 0 or 1.
    """
    method = get_method(case.method)
    if method.build_companion is None:
        return None
    layout = BranchSpec(
        (CHANNELS,) * case.branches, CHANNELS, CLASSES, [nn.Identity()] * case.branches
    )
    companion = method.build_companion(layout, **case.model_options).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in companion.parameters():
        parameter.data = 0.7 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        ) + (0.4 if parameter.dim() == 1 else 0.0)
    return companion


def make_leaves(case: Case, companion: MethodModules | None) -> dict[str, Tensor]:
    """Everything that a gradient is taken for: rows of logits, the trunk's map, feature maps, the
    modules' parameters.
    """
    generator = torch.Generator().manual_seed(2)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (
            scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        ).requires_grad_()

    return {
        **{f"z{m}": leaf(BATCH, CLASSES, scale=2.0) for m in range(case.branches)},
        "shared": leaf(BATCH, CHANNELS, SIZE, SIZE),
        **{f"map{m}": leaf(BATCH, CHANNELS, SIZE, SIZE) for m in range(case.branches)},
        **(
            {}
            if companion is None
            else {f"p.{name}": value for name, value in companion.named_parameters()}
        ),
    }


def named(leaves: Mapping[str, Any], prefix: str) -> list[Any]:
    """The values whose names are this prefix and a number."""
    return [
        value
        for name, value in leaves.items()
        if name.startswith(prefix) and name[len(prefix) :].isdigit()
    ]


def constants(case: Case) -> dict[str, Tensor]:
    """A teacher's row: logits, or probabilities if the loss takes those."""
    row = 2 * torch.randn(
        (BATCH, CLASSES), generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    stored = case.options.get("teacher_rows") == "probabilities"
    return {name: (row / 3).softmax(1) if stored else row for name in case.given}


def loss_inputs(
    case: Case, companion: MethodModules | None, leaves: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Inputs of the loss besides logits and target."""
    given = constants(case)
    if companion is None:
        return given
    images = torch.zeros(BATCH, 3, 8, 8, dtype=torch.float64)
    z, maps = named(leaves, "z"), named(leaves, "map")
    return {
        **companion(
            BranchPass(images, companion.at_split(leaves["shared"]), tuple(maps), tuple(z), ())
        ),
        **given,
    }


def labels() -> Tensor:
    return torch.arange(BATCH) % CLASSES


def expected(case: Case, leaves: Mapping[str, Tensor]) -> tuple[float, dict[str, Array]]:
    """The mean loss and all its gradients from the formula."""
    arrays = {name: value.detach().numpy() for name, value in leaves.items()}
    given = {name: value.numpy() for name, value in constants(case).items()}

    def formula(values: Mapping[str, Array]) -> Array:
        p = {
            name.removeprefix("p."): value
            for name, value in values.items()
            if name.startswith("p.")
        }
        return case.formula(
            named(values, "z"), values["shared"], named(values, "map"), p, labels().numpy(), given
        ).mean()

    return float(np.real(formula(arrays))), gates.gradients(formula, arrays)


def check(name: str, impls: Sequence[str]) -> None:
    """Loss and every gradient of a case by each executor, in two passes and in one."""
    case = CASES[name]
    companion = build_companion(case)
    leaves = make_leaves(case, companion)
    value, want = expected(case, leaves)
    assert any(gradient.any() for gradient in want.values())
    for impl in impls:
        criterion = build_loss(case, impl)
        for fused in (False, True):
            for leaf in leaves.values():
                leaf.grad = None
            call = {"kd_weight": KD_WEIGHT, **loss_inputs(case, companion, leaves)}
            if fused:
                loss, _ = criterion.forward_backward(named(leaves, "z"), labels(), **call)
            else:
                loss = criterion(named(leaves, "z"), labels(), **call)
                loss.backward()
            np.testing.assert_allclose(loss.item(), value, **CLOSE, err_msg=f"{name}, {impl}")
            for leaf_name, leaf in leaves.items():
                got = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
                np.testing.assert_allclose(
                    got,
                    want[leaf_name],
                    **CLOSE,
                    err_msg=f"{name}, {impl}, fused={fused}: {leaf_name}",
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton_state.speed_up_interpreter()
    for case_name in FOR_TRITON:
        check(case_name, ["triton"])
    print(len(FOR_TRITON))
