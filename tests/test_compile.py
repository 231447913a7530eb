"""The losses inside torch.compile(fullgraph=True)."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import opaque_executor
import pytest
import torch
from graph_catalog import catalog, make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastokd.losses import AHBFLoss, GraphLoss
from fastokd.methods.tsb import tsb_graph
from fastokd.ops import operator

ROOT = Path(__file__).resolve().parent.parent
OPAQUE = opaque_executor.register()
# The formula traced through, the operator as an opaque call, and the choice between them made while
# tracing.
IMPLS = ["reference", OPAQUE, "auto"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(
    size: int = 6, num_classes: int = 10, num_branches: int = 3
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(size)
    logits = [
        torch.randn((size, num_classes), generator=g).requires_grad_() for _ in range(num_branches)
    ]
    scores = [
        torch.randn((size, 2), generator=g).softmax(1).requires_grad_()
        for _ in range(num_branches - 1)
    ]
    return logits, scores, torch.randint(num_classes, (size,), generator=g)


def assert_same(
    compiled: object,
    eager: object,
    size: int = 6,
    num_classes: int = 10,
    tolerance: float = 0.0,
    **options: object,
) -> None:
    logits, scores, target = batch(size, num_classes)
    got, want = (f(logits, target, scores=scores, **options) for f in (compiled, eager))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    got_grads, want_grads = (torch.autograd.grad(loss, [*logits, *scores]) for loss in (got, want))
    torch.testing.assert_close(got_grads, want_grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_aot_eager_equals_eager(impl: str) -> None:
    criterion = AHBFLoss.preset("code", 3, impl=impl)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        # Tracing through the plan would be slow and warn in every user's log; it must be taken as a
        # constant.
        warnings.filterwarnings("error", message="(?s).*lru_cache")
        assert_same(compiled, criterion, kd_weight=torch.tensor(0.5))
    logits, scores, target = batch()
    loss, terms = compiled(logits, target, scores=scores, kd_weight=0.5, return_terms=True)
    want_loss, want_terms = criterion(
        logits, target, scores=scores, kd_weight=0.5, return_terms=True
    )
    assert torch.equal(loss, want_loss)
    torch.testing.assert_close(terms, want_terms, rtol=0, atol=0)


def test_other_batches_and_class_counts() -> None:
    """A ragged last batch, a single row, another number of classes: shapes that become dynamic, or
    are compiled again.
    """
    criterion = AHBFLoss.preset("code", 3, impl=OPAQUE)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for size, num_classes in ((6, 10), (5, 10), (6, 11), (1, 10)):
        assert_same(compiled, criterion, size, num_classes, kd_weight=torch.tensor(0.5))


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 makes symbols of a plan's integers under dynamic=True",
)
@pytest.mark.parametrize("impl", IMPLS)
def test_dynamic_shapes_compile(impl: str) -> None:
    criterion = AHBFLoss(3, impl=impl)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same(compiled, criterion, kd_weight=torch.tensor(0.5))


@pytest.mark.parametrize("impl", IMPLS)
def test_tensor_ramp_up_does_not_recompile(impl: str) -> None:
    compilations = []

    def backend(module: torch.fx.GraphModule, _: list) -> object:
        compilations.append(module)
        return module.forward

    criterion = AHBFLoss(3, impl=impl)
    compiled = torch.compile(criterion, backend=backend, fullgraph=True)
    for value in (0.01, 0.5, 1.0):
        assert_same(compiled, criterion, kd_weight=torch.tensor(value))
    assert len(compilations) == 1


def test_compiled_operator_is_one_call() -> None:
    """The compiler must not split fused kernels."""
    calls: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list) -> object:
        for inner in module.modules():
            calls.extend(
                str(node.target)
                for node in getattr(inner, "graph", module.graph).nodes
                if node.op == "call_function"
            )
        return module.forward

    logits, scores, target = batch()
    torch.compile(AHBFLoss(3, impl=OPAQUE), backend=backend, fullgraph=True)(
        logits, target, scores=scores
    )
    assert sum("graph_forward" in call for call in calls) == 1
    assert not any("softmax" in call for call in calls)


@pytest.mark.parametrize(
    "name", ["kdcl_naive", "kdcl_minlogit", "okddip_probabilities", "tsb_student_first"]
)
def test_catalog_graphs_compile(name: str) -> None:
    graph = next(case.graph for case in catalog() if case.name == name)
    inputs = make_inputs(graph, 4, 6)
    for impl in ("reference", OPAQUE):
        criterion = GraphLoss(graph, impl=impl)
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        got, want = (
            f(inputs.logits, inputs.target, weights=inputs.weights, externals=inputs.externals)
            for f in (compiled, criterion)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        grads = [torch.autograd.grad(loss, inputs.leaves()) for loss in (got, want)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["auto", OPAQUE])
def test_inductor(impl: str) -> None:
    """Compiled as part of a step, with the layer that makes the logits; backward too. Float32 in
    another order.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 20)
    criterion = AHBFLoss(2, impl=impl)
    x, target = torch.randn(6, 5), batch()[2]

    def step(x: Tensor, kd_weight: Tensor) -> Tensor:
        first, second = layer(x).chunk(2, 1)
        return criterion(
            [first, second], target, scores=[second[:, :2].softmax(1)], kd_weight=kd_weight
        )

    weight = torch.tensor(0.5)
    got, want = torch.compile(step, fullgraph=True)(x, weight), step(x, weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got, layer.weight),
        torch.autograd.grad(want, layer.weight),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("impl", ["reference", OPAQUE])
def test_label_out_of_range_is_nan_in_compiled_code(impl: str) -> None:
    """Compiled code cannot raise for a value; the loss must then not look like one."""
    logits, scores, target = batch()
    target[2] = 10
    criterion = AHBFLoss(3, impl=impl)
    assert torch.compile(criterion, backend="aot_eager", fullgraph=True)(
        logits, target, scores=scores
    ).isnan()
    with pytest.raises(ValueError, match=r"target\[2\] is 10"):
        criterion(logits, target, scores=scores)


def test_bad_shapes_raise_while_tracing() -> None:
    logits, scores, target = batch()
    compiled = torch.compile(AHBFLoss(3), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"branch_logits\[1\] has the shape \(6, 9\)"):
        compiled([logits[0], logits[1][:, :9], logits[2]], target, scores=scores)


def test_loss_under_dispatch_mode_has_gradients() -> None:
    """A profiler of the dispatcher (a FLOP counter, a fake-tensor mode) calls operators below
    autograd.
    """
    logits, scores, target = batch()
    criterion = AHBFLoss(3, impl=OPAQUE)
    want = torch.autograd.grad(criterion(logits, target, scores=scores), logits)
    with FlopCounterMode(display=False):
        criterion(logits, target, scores=scores).backward()
    torch.testing.assert_close(tuple(z.grad for z in logits), want, rtol=0, atol=0)


def test_export_of_a_graph_with_external_rows() -> None:
    """torch.export traces the formula without running it: nothing may depend on a value."""

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = GraphLoss(tsb_graph(2), impl="reference")

        def forward(self, a: Tensor, b: Tensor, memory: Tensor, target: Tensor) -> Tensor:
            return self.criterion([a, b], target, externals={"memory1": memory, "memory2": memory})

    (a, b, _), _, target = batch()
    memory = torch.full((6, 10), 0.1)
    exported = torch.export.export(Step(), (a, b, memory, target)).module()
    torch.testing.assert_close(
        exported(a, b, memory, target), Step()(a, b, memory, target), rtol=1e-6, atol=1e-6
    )


def test_constant_functions_have_pytorch_mark():
    def function():
        return 0

    # Private, because the mark has no effect that a test could see without a GPU.
    assert vars(torch.compiler.assume_constant_result(function)) == vars(
        operator._constant_when_traced(lambda: 0)
    )


def test_losses_do_not_import_the_compiler():
    """It takes as long to import as torch itself."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, fastokd.losses; print('torch._dynamo' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout == "False\n", done.stderr
