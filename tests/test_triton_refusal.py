"""Messages of the Triton executor where it cannot run."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter it runs on CPU tensors", allow_module_level=True)

from fastokd.errors import ExecutorUnavailable
from fastokd.graph import KL, CrossEntropy, Graph, Logits, lower
from fastokd.losses import AHBFLoss
from fastokd.ops.executors import Case, load


def mutual(count: int) -> Graph:
    names = [f"z{k}" for k in range(count)]
    edges = [KL(one, two, 1.0, 3.0) for one in names for two in names if one != two]
    return Graph(
        "mutual", tuple(Logits(name) for name in names), (*map(CrossEntropy, names), *edges)
    )


def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(
        ExecutorUnavailable, match="runs on CUDA devices, and the logits are on 'cpu'"
    ):
        AHBFLoss(num_branches=2, impl="triton")(
            [torch.randn(3, 10)] * 2, torch.tensor([0, 1, 2]), scores=[torch.rand(3, 2)]
        )


@pytest.mark.parametrize(
    ("plan", "dtype", "reason"),
    [
        (None, torch.int32, "no arithmetic for torch.int32"),
        (lower(mutual(17)), torch.float32, "17 rows of inputs; a kernel takes 16"),
        (
            lower(mutual(8)),
            torch.float32,
            "80 running sums; a kernel's registers hold 72 next to 8 rows",
        ),
        (
            lower(mutual(9)),
            torch.float32,
            "99 running sums; a kernel's registers hold 60 next to 9 rows",
        ),
    ],
)
def test_unsupported_plan_reports_reason(
    monkeypatch: pytest.MonkeyPatch, plan: object, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    executor = load("triton")
    assert reason in executor.unsupported_reason(plan, Case("cuda", dtype))
    assert executor.unsupported_reason(lower(mutual(4)), Case("cuda", torch.bfloat16)) is None


def test_missing_gpu_reports_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in load("triton").unsupported_reason(None, Case("cuda", torch.float32))
