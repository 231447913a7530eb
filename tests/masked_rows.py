"""Classes at -inf in every row of logits, as checks of every executor.

The expected values are those of the inputs without the masked classes, in float64.
"""

from dataclasses import replace

import torch
from executor_contract import GRAPHS, Subject, check, check_each, evaluated, mapped
from graph_catalog import Inputs
from torch import Tensor

EPS = 1e-7
MASKED_GRAPHS = {
    name: replace(
        GRAPHS[name],
        label_smoothing=0.0,
        terms=tuple(
            replace(term, eps=EPS) if getattr(term, "eps", 0.0) else term
            for term in GRAPHS[name].terms
        ),
    )
    for name in (
        "cascade",
        "cascade, exact eps",
        "mutual, student first",
        "minimum",
        "selection",
        "memory",
        "memory, student first",
        "mixed probabilities",
        "outside eps",
        "first-order eps",
        "shared weights",
    )
}
"""Without label smoothing, which makes a masked class's loss infinite as in PyTorch, and with an
eps that is negligible in the sum over the masked classes.
"""


def with_absent(inputs: Inputs, masked: Tensor, value: float) -> tuple[Inputs, Inputs]:
    """The inputs with masked classes at ``value``, and without these classes, in float64."""
    exists = ~masked
    externals = {
        name: torch.where(exists, row, 0.0) / row[:, exists].sum(1, keepdim=True)
        for name, row in inputs.externals.items()
    }
    target = inputs.target
    if target.is_floating_point():
        target = torch.where(exists, target, 0.0)
        short_target = target[:, exists].double()
    else:
        target = exists.nonzero().squeeze(1)[target % int(exists.sum())]
        short_target = exists.cumsum(0)[target] - 1
    rows = [torch.where(exists, row.detach(), value).requires_grad_() for row in inputs.logits]
    full = replace(inputs, logits=rows, externals=externals, target=target)
    short = replace(
        mapped(inputs, lambda x: x.double() if x.is_floating_point() else x),
        logits=[row.detach()[:, exists].double().requires_grad_() for row in rows],
        externals={name: row[:, exists].double() for name, row in externals.items()},
        target=short_target,
    )
    return full, short


def compare_with_absent(on: Subject, inputs: Inputs, masked: Tensor) -> None:
    full, short = with_absent(inputs, masked.to(inputs.target.device), -torch.inf)
    expected = evaluated(short, "reference")
    ours = on.run(full)
    count = len(inputs.logits)
    for number, (our, truth) in enumerate(zip(ours, expected, strict=True)):
        if our is None or truth is None:  # nothing depends on it
            assert not any(x is not None and x.any() for x in (our, truth))
            continue
        if 2 <= number < 2 + count:
            of_masked = our[:, masked.to(our.device)]
            assert of_masked.abs().max() <= 100 * EPS, f"{inputs.graph.name}, output {number}"
            our = our[:, ~masked.to(our.device)]
        size = max(1.0, float(truth.abs().max()))
        # The sum of eps in gradients has the masked classes too.
        has_eps = any(getattr(term, "eps", 0.0) for term in inputs.graph.terms)
        of_eps = 10 * EPS * len(masked) if has_eps else 0.0
        bound = max(2e-5, 2 * torch.finfo(our.dtype).eps)
        torch.testing.assert_close(our.double(), truth, rtol=bound, atol=(bound + of_eps) * size)


@check_each(
    MASKED_GRAPHS,
    interpreter=("cascade, exact eps", "memory", "mixed probabilities", "outside eps", "minimum"),
)
def masked_classes(on: Subject, graph: str) -> None:
    """As if they did not exist: some of few classes, and the start of a long row."""
    for classes, soft in on.few(((9, False), (9, True), (3000, False)), ((9, False), (9, True))):
        masked = torch.arange(classes) % 4 == 2
        if classes > 9:
            masked |= torch.arange(classes) < 2100
        inputs = on.make(MASKED_GRAPHS[graph], (3, classes), soft_target=soft, scale=1.0)
        compare_with_absent(on, inputs, masked)


@check
def masked_start_of_a_row(on: Subject) -> None:
    """No part of a chunk, or of a row that several programs share, has a class that exists."""
    shape = on.pick((2, 600), (2, 3000), (2, 600), (2, 40000))
    masked = torch.arange(shape[1]) < shape[1] * 7 // 8
    for dtype in (torch.float32, torch.bfloat16):
        inputs = on.make("cascade", shape, dtype=dtype, scale=1.0)
        full, short = with_absent(inputs, masked.to(inputs.target.device), -torch.inf)
        rows = on.run(full)[0]
        torch.testing.assert_close(
            rows.double(), evaluated(short, "reference")[0], rtol=1e-4, atol=0
        )


@check
def masked_classes_of_the_teacher_alone(on: Subject) -> None:
    """They have no share in the divergence, whose other direction is infinite."""
    classes = on.pick(8, 3000, 8, 3000)
    masked = torch.arange(classes) < classes // 2
    inputs = on.make("mutual, temperature 1", (3, classes), scale=1.0)
    logits = [row.detach().clone() for row in inputs.logits]
    logits[0][:, masked] = -torch.inf
    inputs = replace(
        inputs,
        logits=[row.requires_grad_() for row in logits],
        target=torch.full_like(inputs.target, classes - 1),
    )
    names = [
        f"{term.teacher}->{term.student}" for term in inputs.graph.terms if hasattr(term, "teacher")
    ]
    terms = on.run(inputs)[1][-len(names) :]
    log_p, log_q = (row.detach().double().log_softmax(1) for row in logits)
    p = log_p.exp()
    expected = torch.where(p > 0, p * (log_p.clamp_min(-1e4) - log_q), 0.0).sum(1)
    torch.testing.assert_close(
        terms[names.index("z0->z1")].double(), expected, rtol=1e-5, atol=1e-6
    )
    assert terms[names.index("z1->z0")].isposinf().all()


@check
def masked_label(on: Subject) -> None:
    """Infinity, as PyTorch's cross-entropy gives; the gradients of other rows are finite."""
    inputs = on.make("cross-entropy alone", (3, 6), dtype=torch.float32)
    logits = [row.detach().clone() for row in inputs.logits]
    logits[0][1, inputs.target[1]] = -torch.inf
    inputs = replace(inputs, logits=[row.requires_grad_() for row in logits])
    rows, _, grad = on.run(inputs)
    assert rows.isfinite().tolist() == [True, False, True]
    assert rows[1].isposinf()
    assert grad[[0, 2]].isfinite().all()
