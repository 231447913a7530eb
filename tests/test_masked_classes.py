"""Classes at -inf in every row of the loss: as if they did not exist."""

import pytest
import torch

from fastokd.losses import AHBFLoss, DMLLoss, KDLoss, ONELoss

KEPT = [0, 1, 2, 4, 5, 6]


def logits(count, dtype=torch.float32, batch=6):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 7, generator=generator).to(dtype) for _ in range(count)]


LOSSES = {
    "dml": (lambda impl: DMLLoss(num_branches=2, impl=impl), 2, {}),
    "ahbf": (lambda impl: AHBFLoss(num_branches=3, impl=impl), 3, {"scores": 2}),
    "one": (lambda impl: ONELoss(num_branches=3, impl=impl), 3, {"scores": 1}),
    "kd": (lambda impl: KDLoss(impl=impl), 1, {"teacher": True}),
    "kd-eps": (lambda impl: KDLoss(impl=impl, teacher_eps=1e-7), 1, {"teacher": True}),
}


def arguments(further, rows):
    if "teacher" in further:
        return {"teacher": rows[-1]}
    if further.get("scores") == 2:
        return {"scores": [torch.full((6, 2), 0.5)] * 2}
    if further.get("scores") == 1:
        return {"scores": [torch.full((6, 3), 1 / 3)]}
    return {}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("soft", [False, True])
def test_masked_class_counts_as_absent(name, impl, soft):
    make, count, further = LOSSES[name]
    target = torch.tensor([0, 1, 2, 4, 5, 6])
    short_target = torch.tensor([0, 1, 2, 3, 4, 5])
    if soft:
        target = torch.nn.functional.one_hot(target, 7).float()
        short_target = torch.nn.functional.one_hot(short_target, 6).float()
    rows = logits(count + ("teacher" in further))
    short = [row[:, KEPT].clone().requires_grad_() for row in rows]
    for row in rows:
        row[:, 3] = -torch.inf
    rows = [row.requires_grad_() for row in rows]
    masked = make(impl)(rows[:count], target, **arguments(further, [r.detach() for r in rows]))
    want = make(impl)(
        short[:count], short_target, **arguments(further, [r.detach() for r in short])
    )
    assert masked.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-5)
    masked.backward()
    want.backward()
    for row, other in zip(rows[:count], short[:count], strict=True):
        assert row.grad[:, 3].abs().max() <= (1e-6 if name == "kd-eps" else 0.0)
        torch.testing.assert_close(row.grad[:, KEPT], other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_class_in_other_dtypes_is_finite(impl, dtype):
    rows = logits(2, dtype)
    for row in rows:
        row[:, 3] = -torch.inf
        row.requires_grad_()
    loss = DMLLoss(num_branches=2, impl=impl)(rows, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert all(row.grad.isfinite().all() for row in rows)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_masked_label_gives_infinity_as_cross_entropy(impl):
    (row,) = logits(1)
    target = torch.tensor([3, 0, 0, 0, 0, 0])
    row[:, 3] = -torch.inf
    assert torch.nn.functional.cross_entropy(row, target).isposinf()
    assert DMLLoss(num_branches=2, impl=impl)([row, row], target).isposinf()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_class_masked_in_the_student_alone_gives_infinity(impl):
    student, teacher = logits(2)
    student[:, 3] = -torch.inf
    loss = KDLoss(impl=impl)([student], torch.zeros(6, dtype=torch.long), teacher=teacher)
    assert loss.isposinf()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_in_a_row_stays_nan(impl):
    rows = logits(2)
    rows[0][0, 3] = torch.nan
    assert DMLLoss(num_branches=2, impl=impl)(rows, torch.zeros(6, dtype=torch.long)).isnan()
