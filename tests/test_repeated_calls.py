"""A loss that is called again, with the same or with other arguments: state that it caches from
earlier calls must not change its results.
"""

import copy
import pickle
import textwrap
from pathlib import Path
from typing import Any

import opaque_executor
import pretend_cuda
import pytest
import torch
from torch import Tensor

from fastokd.losses import AHBFLoss
from fastokd.ops.executors import executor_states, load

STATE = executor_states()["cpu"]
needs_cpu = pytest.mark.skipif(STATE is not None, reason=f"the cpu executor cannot run: {STATE}")
IMPLS = ["reference", opaque_executor.register(), pytest.param("cpu", marks=needs_cpu)]


def batch(
    rows: int = 6, classes: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Logits, target and scores of three branches; all but the target require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, classes, generator=generator).to(dtype) for _ in range(3)]
    scores = [torch.rand(rows, 2, generator=generator).softmax(1) for _ in range(2)]
    for leaf in (*logits, *scores):
        leaf.requires_grad_()
    return logits, torch.arange(rows) % classes, scores


def run(criterion: AHBFLoss, arguments: Any, scale: float = 1.0, **keywords: Any) -> list[Tensor]:
    """The loss, and the gradients of ``scale`` times the loss."""
    logits, target, scores = arguments
    leaves = [leaf for leaf in (*logits, *scores) if leaf.requires_grad]
    loss = criterion(logits, target, scores=scores, **keywords)
    return [loss.detach(), *torch.autograd.grad(scale * loss.sum(), leaves)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for first, second in zip(found, wanted, strict=True):
        assert first.dtype == second.dtype
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def frozen(arguments: Any) -> Any:
    arguments[0][1].requires_grad_(False)
    arguments[2][0].requires_grad_(False)
    return arguments


def strided(arguments: Any) -> Any:
    logits, target, scores = arguments
    rows = [row.detach().repeat(1, 2)[:, ::2].requires_grad_() for row in logits]
    return rows, target, scores


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_with_changing_arguments_equals_new_loss(impl: str) -> None:
    criterion = AHBFLoss(3, impl=impl)
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (batch(), {}),
        (batch(seed=1), {}),
        (batch(4), {"kd_weight": 0.5}),
        (batch(4), {"kd_weight": 0.25}),
        (batch(classes=7), {"kd_weight": 0.25}),
        (batch(dtype=torch.bfloat16), {"kd_weight": 0.25}),
        (batch(dtype=torch.float64), {"kd_weight": 0.25}),
        (batch(), {"kd_weight": torch.tensor(0.25)}),
        (frozen(batch()), {}),
        (strided(batch()), {}),
        (batch(), {"scale": 3.0}),
        (batch(), {}),
    ]
    for arguments, keywords in kinds * 2:
        assert_equal(
            run(criterion, arguments, **keywords),
            run(AHBFLoss(3, impl=impl), arguments, **keywords),
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_any_multiple_match_reference(impl: str, reduction: Any) -> None:
    """The gradients that the forward pass computes in advance are those of the mean."""
    criterion = AHBFLoss(3, impl=impl, reduction=reduction)
    reference = AHBFLoss(3, impl="reference", reduction=reduction)
    for scale in (1.0, -2.0, 1.0, 0.0):
        found, wanted = (run(each, batch(), scale) for each in (criterion, reference))
        for first, second in zip(found, wanted, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_pass_repeats_the_first(impl: str) -> None:
    logits, target, scores = batch()
    loss = AHBFLoss(3, impl=impl)(logits, target, scores=scores)
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in (*logits, *scores) if leaf.grad is not None]
    loss.backward()
    second = [leaf.grad for leaf in (*logits, *scores) if leaf.grad is not None]
    assert len(first) == 5
    assert_equal(second, [2 * grad for grad in first])


@pytest.mark.parametrize("impl", IMPLS)
def test_input_changed_before_backward_is_refused(impl: str) -> None:
    """The reference works on copies: its gradients are those before the change."""
    logits, target, scores = batch()
    rows = [row * 1 for row in logits]
    loss = AHBFLoss(3, impl=impl)(rows, target, scores=scores)
    rows[0].add_(1)
    if impl == "reference":
        unchanged = AHBFLoss(3, impl=impl)(logits, target, scores=scores)
        for found, wanted in zip(
            torch.autograd.grad(loss, logits), torch.autograd.grad(unchanged, logits), strict=True
        ):
            assert torch.equal(found, wanted)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_arguments_after_right_ones_are_refused(impl: str) -> None:
    criterion = AHBFLoss(3, impl=impl)
    logits, target, scores = batch()
    for _ in range(2):
        criterion(logits, target, scores=scores)
        wrong = [
            ((logits[:2], target, scores), "holds 2 tensors"),
            (([logits[0], logits[1], logits[2][:5]], target, scores), r"branch_logits\[2\]"),
            (([*logits[:2], logits[2].double()], target, scores), r"branch_logits\[2\]"),
            ((logits, target[:5], scores), "target has the shape"),
            ((logits, target.int(), scores), "target is torch.int32"),
            ((logits, target + 1, scores), r"target\[4\] is 5"),
            ((logits, target, [scores[0], scores[1][:, :1]]), r"scores\[1\]"),
        ]
        for (rows, labels, weights), message in wrong:
            with pytest.raises((TypeError, ValueError), match=message):
                criterion(rows, labels, scores=weights)
    soft = torch.full((6, 5), 0.2)
    criterion(logits, soft, scores=scores)
    with pytest.raises(ValueError, match="target requires a gradient"):
        criterion(logits, soft.requires_grad_(), scores=scores)
    with pytest.raises(ValueError, match="must be finite"):
        criterion(logits, target, scores=scores, kd_weight=float("nan"))


@pytest.mark.parametrize("impl", IMPLS)
def test_training_after_inference_mode_works(impl: str) -> None:
    criterion = AHBFLoss(3, impl=impl)
    logits, target, scores = batch()
    with torch.inference_mode():
        criterion(logits, target, scores=scores)
    assert_equal(run(criterion, batch()), run(AHBFLoss(3, impl=impl), batch()))


@needs_cpu
def test_gradients_are_computed_early_again_after_a_scaled_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor, early = load("cpu"), []
    real = executor.forward_backward

    def counted(*arguments: Any) -> Any:
        early.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(executor, "forward_backward", counted)
    criterion = AHBFLoss(3, temperature=2.5, impl="cpu")  # a plan that no other test uses
    counts = []
    for scale in (1.0, 0.5, 0.5, 1.0, 1.0):
        run(criterion, batch(), scale)
        counts.append(len(early))
    # The second call was too early, the third and fourth were not early.
    assert counts == [1, 2, 2, 2, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copy_of_a_used_loss_equals_it(copied: Any) -> None:
    criterion = AHBFLoss(3)
    wanted = run(criterion, batch())
    assert_equal(run(copied(criterion), batch()), wanted)


@pytest.mark.usefixtures("pretend_device")
def test_repeated_launches_choose_kernels_by_type_and_alignment(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    code = """
        import torch
        from pretend_cuda import device
        from fastokd.losses import AHBFLoss

        def run(dtype=torch.float32, shift=0, frozen=False):
            # Tensors that begin ``shift`` elements after an aligned address.
            blocks = [torch.zeros(804, dtype=dtype, device="cuda") for _ in range(3)]
            rows = [block[shift : shift + 800].view(8, 100) for block in blocks]
            for row in rows[frozen:]:
                row.requires_grad_()
            scores = [torch.zeros(8, 2, device="cuda") for _ in range(2)]
            target = torch.zeros(8, dtype=torch.long, device="cuda")
            device.reset()
            criterion(rows, target, scores=scores).backward()
            work = device.record().work
            return sum(each.count for each in work if each.name.endswith("ward_kernel"))

        criterion = AHBFLoss(3, impl="triton").to("cuda")
        kinds = [{}, {"dtype": torch.bfloat16}, {"shift": 1}, {"frozen": True}]
        counts, numbers = [], []
        from fastokd.kernels.triton.kernels import KERNELS
        for _ in range(3):
            counts += [run(**kind) for kind in kinds]
            caches = [kernel.device_caches[0][0] for kernel in KERNELS.values()]
            numbers.append([len(cache) for cache in caches])
        device.finish([counts, numbers])
    """
    program.write_text(textwrap.dedent(code), encoding="utf-8")
    counts, numbers = pretend_cuda.run(program)
    assert counts == [2] * 12  # a forward and a backward kernel in each call
    # Triton compiled three forward and four backward kernels at first, and none after that.
    assert numbers == [[3, 4, 0]] * 3
