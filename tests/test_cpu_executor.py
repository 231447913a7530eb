"""The CPU executor computes what the reference computes, for every kind of node and term, dtype and
layout.

The budget of every comparison: its error against the float64 truth may be twice that of PyTorch in
the same dtype (the reference executor), plus 8 roundings of the result's dtype at the size of what
it is a sum or difference of (16 for the gradients of mixing weights, which are sums of products of
gradients).
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from graph_catalog import Case as GraphCase
from graph_catalog import catalog
from graph_strategy import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastokd.errors import ExecutorUnavailable
from fastokd.graph import (
    KL,
    CrossEntropy,
    External,
    Graph,
    Logits,
    LowestCrossEntropy,
    MinLogit,
    Mixture,
    ProbabilityMixture,
    lower,
)
from fastokd.graph.plan import Plan
from fastokd.methods.ahbf import PRESETS, ahbf_graph
from fastokd.ops import Inputs as OpInputs
from fastokd.ops import cpu, evaluate
from fastokd.ops.executors import Case, executor_states

STATE = executor_states()["cpu"]
needs_library = pytest.mark.skipif(
    STATE is not None, reason=f"the cpu executor cannot run: {STATE}"
)


def branches(count: int) -> tuple[Logits, ...]:
    return tuple(Logits(f"z{m}") for m in range(count))


def ces(count: int) -> tuple[CrossEntropy, ...]:
    return tuple(CrossEntropy(f"z{m}", 1.0 + 0.1 * m) for m in range(count))


PROBABILITIES = ProbabilityMixture("h", ("z0", "mix", "x"), "v", temperature=2.0)
MIX = Mixture("mix", ("z1", "z2"), "w")
GRAPHS = {
    "ahbf paper": ahbf_graph(4),
    "ahbf code, eps exact": ahbf_graph(
        3, **{**PRESETS["code"], "teacher_eps": 1e-3}, label_smoothing=0.1
    ),
    "ahbf, other temperature, detached": ahbf_graph(3, temperature=2.5, detach_teacher=True),
    "first-order eps": Graph(
        "g", branches(2), (*ces(2), KL("z0", "z1", 0.7, 3.0, eps=1e-3, eps_mode="first_order"))
    ),
    "one row": Graph("g", branches(1), ces(1), label_smoothing=0.2),
    "mutual, temperatures 1, 2 and 4": Graph(
        "g",
        branches(3),
        (
            *ces(3),
            KL("z0", "z1", 0.5, 1.0),
            KL("z1", "z2", 0.6, 2.0),
            KL("z2", "z0", 0.7, 4.0),
            KL("z0", "z2", 0.3, 4.0, t2_scaling=False),
        ),
    ),
    "student first": Graph(
        "g",
        (*branches(3), MIX),
        (
            *ces(3),
            KL("mix", "z0", 0.5, 3.0, direction="student_first"),
            KL("z1", "z2", 0.5, 1.0, detach=True, direction="student_first"),
        ),
    ),
    "constant and nested mixtures": Graph(
        "g",
        (
            *branches(3),
            Mixture("mean", ("z0", "z1", "z2"), (1 / 3, 1 / 3, 1 / 3)),
            Mixture("deep", ("mean", "z0"), "w"),
            Mixture("more", ("mean", "deep"), "w"),
        ),
        (
            *ces(3),
            CrossEntropy("more", 0.5),
            KL("deep", "z1", 1.0, 3.0),
            KL("more", "z2", 1.0, 3.0),
        ),
    ),
    "probability mixture": Graph(
        "g",
        (*branches(3), External("x"), MIX, PROBABILITIES),
        (*ces(3), KL("h", "z0", 1.5, 4.0), KL("h", "z1", 0.5, 4.0, t2_scaling=False)),
    ),
    "probability mixture, student first": Graph(
        "g",
        (*branches(3), External("x"), MIX, PROBABILITIES),
        (
            *ces(3),
            KL("h", "z0", 1.5, 2.0, direction="student_first"),
            KL("h", "z2", 1.0, 2.0, eps=1e-3),
        ),
    ),
    "external rows": Graph(
        "g",
        (*branches(2), External("x"), External("y")),
        (
            *ces(2),
            KL("x", "z0", 1.0, 4.0, detach=True),
            KL("y", "z1", 0.5, 2.0, detach=True, direction="student_first"),
            KL("y", "z0", 1.0, 1.0, detach=True, eps=1e-2),
        ),
    ),
    "minimum": Graph(
        "g",
        (*branches(3), MinLogit("low", ("z0", "z1", "z2"))),
        (*ces(3), *(KL("low", f"z{m}", 0.5, 3.0, detach=True) for m in range(3))),
    ),
    "minimum of mixtures, both directions, eps": Graph(
        "g",
        (*branches(3), MIX, MinLogit("low", ("z0", "mix"))),
        (
            CrossEntropy("z0"),
            KL("low", "z0", 0.5, 2.0, detach=True, direction="student_first"),
            KL("low", "z1", 0.5, 2.0, detach=True, eps=1e-3),
        ),
    ),
    "selection": Graph(
        "g",
        (*branches(3), MIX, LowestCrossEntropy("best", ("z0", "z1", "mix"))),
        (*ces(3), *(KL("best", f"z{m}", 0.5, 3.0, detach=True) for m in range(3))),
    ),
}


@dataclass
class Inputs:
    """What an executor takes, in one dtype."""

    plan: Plan
    logits: list[Tensor]
    weights: list[Tensor]
    externals: list[Tensor]
    target: Tensor
    term_weights: Tensor
    upstream: Tensor
    needs: list[bool]


def make(
    graph: Graph,
    batch: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    soft: bool = False,
    spread: float = 3.0,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    plan = lower(graph)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        plan,
        [(spread * normal(batch, classes)).to(dtype) for _ in range(plan.num_logits)],
        [normal(batch, width).softmax(1).to(dtype) for width in plan.weight_widths],
        [(2 * normal(batch, classes)).softmax(1).to(dtype) for _ in range(plan.num_externals)],
        (
            normal(batch, classes).softmax(1).to(wide)
            if soft
            else torch.randint(classes, (batch,), generator=generator)
        ),
        torch.tensor([term.weight for term in graph.terms], dtype=wide),
        normal(batch).to(wide),
        [True] * (plan.num_logits + len(plan.weight_widths)),
    )


def run(inputs: Inputs, impl: str, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Rows, terms, and the gradients of logits and weights; with ``dtype``, computed from the same
    values in it.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    leaves = [
        cast(tensor).detach().requires_grad_(need)
        for tensor, need in zip((*inputs.logits, *inputs.weights), inputs.needs, strict=True)
    ]
    count = len(inputs.logits)
    rows, terms = evaluate(
        inputs.plan,
        leaves[:count],
        leaves[count:],
        [cast(row) for row in inputs.externals],
        cast(inputs.target),
        cast(inputs.term_weights),
        impl,
    )
    if rows.requires_grad:
        rows.backward(cast(inputs.upstream))
    return [rows.detach(), terms, *(leaf.grad for leaf in leaves)]


def compare(inputs: Inputs, offset: float = 0.0) -> None:
    """``offset``: the size of values beyond probabilities and losses whose rounding the gradients
    show.
    """
    truth = run(inputs, "reference", torch.float64)
    theirs, ours = run(inputs, "reference"), run(inputs, "cpu")
    weight_grads = 2 + len(inputs.logits)
    # A gradient of logits is a difference of probabilities times this.
    largest = float(inputs.term_weights.max()) * max(
        (float(value) for value in inputs.upstream.abs()), default=1.0
    )
    # A weight's gradient is a sum over the classes of gradient times logit, which may nearly
    # cancel.
    sums = [
        float(grad.abs().sum(1).max())
        for grad in truth[2:weight_grads]
        if grad is not None and grad.numel()
    ]
    products = max(sums, default=1.0) * max(
        (float(row.abs().max()) for row in inputs.logits if row.numel()), default=1.0
    )
    for index, (true, their, our) in enumerate(zip(truth, theirs, ours, strict=True)):
        if true is None or their is None:
            # Nothing depends on it: autograd leaves the gradient away, the executor may give zeros.
            assert our is None or not our.any()
            continue
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        if not our.numel():
            continue
        assert our.isfinite().all(), f"result {index} is not finite"
        scale, roundings = max(float(true.abs().max()), 1.0 if index < 2 else largest), 8
        if index >= weight_grads:
            scale, roundings = max(scale, products), 16
        if our.dtype == torch.float64:
            # The truth has rounding errors of its own, and PyTorch in the same dtype is the truth
            roundings *= 4
        allowed = (
            2 * float((their.double() - true).abs().max())
            + roundings * torch.finfo(our.dtype).eps * scale
        )
        allowed += torch.finfo(our.dtype).eps * offset * largest
        assert float((our.double() - true).abs().max()) <= allowed, (
            f"result {index} (0 rows, 1 terms, then gradients)"
        )


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (
    (1, 2),  # the smallest
    (3, 10),  # less than a vector
    (5, 100),  # a few vectors and a rest
    (3, 1000),  # one tile of 32-bit, two of 64-bit values
    (2, 1100),  # two tiles
    (2, 1001),  # an odd last vector
    (2, 2048),  # whole tiles
)


@needs_library
class TestValues:
    @pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("name", GRAPHS)
    def test_shapes(self, name: str, shape: tuple[int, int], soft: bool) -> None:
        compare(make(GRAPHS[name], *shape, soft=soft))

    @pytest.mark.parametrize("case", catalog(), ids=lambda case: case.name)
    def test_catalogue(self, case: GraphCase) -> None:
        for seed in range(3):
            compare(make(case.graph, 5, 30, soft=seed == 2, seed=seed))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(graph=random_graphs(), classes=st.integers(1, 40), soft=st.booleans())
    def test_any_graph(self, graph: Graph, classes: int, soft: bool) -> None:
        # At temperatures below 1 a teacher's gradient multiplies probabilities by logarithms of
        # this size.
        compare(make(graph, 3, classes, soft=soft), offset=30.0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", GRAPHS)
    def test_dtypes(self, name: str, dtype: torch.dtype) -> None:
        compare(make(GRAPHS[name], 3, 77, dtype))
        compare(make(GRAPHS[name], 2, 1100, dtype, soft=True))

    @pytest.mark.parametrize("isa", cpu.available_isas(cpu.open_library()) if STATE is None else [])
    @pytest.mark.parametrize("name", GRAPHS)
    def test_instruction_sets(self, name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
        library = cpu.open_library()
        monkeypatch.setattr(
            cpu, "_compiled", lambda plan: cpu.CompiledPlan(library, *plan.encode(), isa)
        )
        for dtype in DTYPES:
            compare(make(GRAPHS[name], 3, 1103, dtype))
        compare(make(GRAPHS[name], 2, 39, soft=True))

    @pytest.mark.parametrize("branches", range(2, 9))
    def test_ahbf_depths(self, branches: int) -> None:
        compare(make(ahbf_graph(branches), 3, 1000))

    @pytest.mark.parametrize("name", GRAPHS)
    def test_large_logits(self, name: str) -> None:
        inputs = make(GRAPHS[name], 4, 1030)
        for row in inputs.logits:
            row[0].sign_().mul_(1e4)
            row[1] += 1e4
            row[2].fill_(-1e4)
        # Mixing rounds logits of that size.
        compare(inputs, offset=1e4)

    @pytest.mark.parametrize("classes", [1100, 5000])
    @pytest.mark.parametrize("name", GRAPHS)
    def test_rising_maxima(self, name: str, classes: int) -> None:
        # Each tile holds a new maximum, in one row by more than the exponential can express.
        inputs = make(GRAPHS[name], 2, classes, soft=True)
        for k, row in enumerate(inputs.logits):
            row[0] += torch.linspace(0, 20 + k, classes)
            row[1] += torch.linspace(0, 500 + 100 * k, classes)
        compare(inputs)

    @pytest.mark.parametrize("name", GRAPHS)
    def test_identical_rows(self, name: str) -> None:
        inputs = make(GRAPHS[name], 3, 100)
        compare(replace(inputs, logits=[inputs.logits[0]] * len(inputs.logits)))

    @pytest.mark.parametrize(
        "name", [name for name, graph in GRAPHS.items() if graph.weight_sources]
    )
    def test_one_hot_weights(self, name: str) -> None:
        inputs = make(GRAPHS[name], 4, 100)
        for weight in inputs.weights:
            weight.zero_()
            weight[:2, 0] = 1
            weight[2:, -1] = 1
        compare(inputs)

    def test_one_hot_weights_far_apart(self) -> None:
        # The unused input dominates: the reference cuts the mixture off at its floor, and the
        # gradient with it.
        inputs = make(
            Graph(
                "g",
                (*branches(3), ProbabilityMixture("h", ("z1", "z2"), "v")),
                (CrossEntropy("z0"), KL("h", "z0")),
            ),
            3,
            40,
            spread=60.0,
        )
        inputs.weights[0].zero_()[:, 0] = 1
        compare(inputs)

    def test_external_zeros_and_other_dtypes(self) -> None:
        inputs = make(GRAPHS["external rows"], 3, 50)
        inputs.externals[0][:, ::3] = 0
        inputs.externals = [inputs.externals[0].double(), inputs.externals[1].bfloat16()]
        compare(inputs)
        compare(
            replace(
                inputs,
                logits=[row.half() for row in inputs.logits],
                target=torch.full((3, 50), 0.02, dtype=torch.float64),
            )
        )

    @pytest.mark.parametrize("name", GRAPHS)
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches(self, name: str, batch: int) -> None:
        compare(make(GRAPHS[name], batch, 10))
        compare(make(GRAPHS[name], batch, 10, soft=True))


@needs_library
class TestArguments:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layouts(self, dtype: torch.dtype) -> None:
        inputs = make(GRAPHS["probability mixture"], 6, 40, dtype, soft=True)
        expected = run(inputs, "cpu")

        def transposed(tensor: Tensor) -> Tensor:
            return tensor.t().contiguous().t()

        def spaced(tensor: Tensor) -> Tensor:
            return torch.stack((tensor, tensor), 2)[:, :, 0]

        for layout in (transposed, spaced):
            strided = replace(
                inputs,
                logits=[layout(row) for row in inputs.logits],
                weights=[layout(row) for row in inputs.weights],
                externals=[layout(row) for row in inputs.externals],
                target=layout(inputs.target),
            )
            for ours, same in zip(run(strided, "cpu"), expected, strict=True):
                assert torch.equal(ours, same)

    def test_expanded_rows_and_upstream(self) -> None:
        inputs = make(GRAPHS["ahbf paper"], 4, 30)
        inputs.logits = [row[:1].expand(4, 30) for row in inputs.logits]
        inputs.weights = [row[:1].expand(4, 2) for row in inputs.weights]
        compare(replace(inputs, upstream=torch.ones(()).expand(4)))

    @pytest.mark.parametrize(
        "name",
        [
            "ahbf paper",
            "ahbf code, eps exact",
            "probability mixture",
            "constant and nested mixtures",
            "selection",
        ],
    )
    def test_frozen_inputs(self, name: str) -> None:
        inputs = make(GRAPHS[name], 3, 20)
        for index in range(len(inputs.needs)):
            compare(replace(inputs, needs=[index == other for other in range(len(inputs.needs))]))
            compare(replace(inputs, needs=[index != other for other in range(len(inputs.needs))]))
        compare(replace(inputs, needs=[False] * len(inputs.needs)))

    @pytest.mark.parametrize("name", GRAPHS)
    def test_inputs_are_not_written_to(self, name: str) -> None:
        inputs = make(GRAPHS[name], 3, 1100, soft=True)
        tensors = [
            *inputs.logits,
            *inputs.weights,
            *inputs.externals,
            inputs.target,
            inputs.term_weights,
            inputs.upstream,
        ]
        before = [tensor.clone() for tensor in tensors]
        run(inputs, "cpu")
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))

    def test_a_label_out_of_range_is_nan_in_its_row(self) -> None:
        for label in (-1, 10, 2**40):
            inputs = make(GRAPHS["ahbf paper"], 3, 10)
            inputs.target[1] = label
            rows, terms, *grads = run(inputs, "cpu")
            assert rows.isnan().tolist() == [False, True, False]
            assert terms.isnan().any(0).tolist() == [False, True, False]
            assert all(grad.isnan().any(1).tolist() == [False, True, False] for grad in grads)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_logits_that_are_not_finite_show(self, value: float) -> None:
        inputs = make(GRAPHS["ahbf paper"], 3, 1100)
        inputs.logits[1][2, 1055] = value
        rows, _, *grads = run(inputs, "cpu")
        assert rows.isfinite().tolist() == [True, True, False]
        assert not grads[1][2].isfinite().all()

    def test_second_backward_and_term_weight_gradient(self) -> None:
        inputs = make(GRAPHS["ahbf paper"], 3, 20)
        leaf = inputs.logits[0].clone().requires_grad_()
        weights = inputs.term_weights.clone().requires_grad_()
        rows, terms = evaluate(
            inputs.plan,
            [leaf, *inputs.logits[1:]],
            inputs.weights,
            [],
            inputs.target,
            weights,
            "cpu",
        )
        rows.sum().backward(retain_graph=True)
        first = leaf.grad.clone()
        rows.sum().backward()
        assert torch.equal(leaf.grad, 2 * first)
        torch.testing.assert_close(weights.grad, 2 * terms.sum(1))

    @pytest.mark.parametrize("name", GRAPHS)
    def test_forward_backward(self, name: str) -> None:
        inputs = make(GRAPHS[name], 4, 1100)
        inputs.upstream = torch.full((4,), 0.25)
        expected = run(inputs, "cpu")
        rows, terms, grads = cpu.EXECUTOR.forward_backward(
            inputs.plan,
            OpInputs(
                inputs.logits, inputs.weights, inputs.externals, inputs.target, inputs.term_weights
            ),
            inputs.needs,
        )
        assert all(
            torch.equal(ours, same)
            for ours, same in zip((rows, terms, *grads), expected, strict=True)
        )

    def test_operator_is_sound(self) -> None:
        inputs = make(GRAPHS["ahbf paper"], 2, 10)
        ints, floats = inputs.plan.encode()
        torch.library.opcheck(
            torch.ops.fastokd.graph_forward.default,
            (
                inputs.logits,
                inputs.weights,
                [],
                inputs.target,
                inputs.term_weights,
                ints,
                floats,
                "cpu",
            ),
        )


@needs_library
class TestThreads:
    @pytest.mark.parametrize("name", ["ahbf paper", "probability mixture", "selection"])
    def test_same_bits_for_any_number(self, name: str) -> None:
        inputs = make(GRAPHS[name], 64, 1000)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 1, 2, 7):
                torch.set_num_threads(threads)
                results.append(run(inputs, "cpu"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_callers_at_once(self) -> None:
        inputs = make(GRAPHS["ahbf paper"], 64, 1000)
        expected, results = run(inputs, "cpu"), []
        callers = [
            threading.Thread(target=lambda: results.append(run(inputs, "cpu"))) for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert len(results) == 4
        assert all(
            torch.equal(a, b) for result in results for a, b in zip(expected, result, strict=True)
        )

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_after_fork(self) -> None:
        script = (
            "import os, torch\nfrom fastokd.losses import AHBFLoss\ntorch.manual_seed(0);"
            " torch.set_num_threads(2)\nz, s, y = torch.randn(4, 64, 1000), torch.rand(3, 64, 2),"
            " torch.zeros(64, dtype=torch.long)\nloss = lambda: AHBFLoss(impl='cpu')(z, y,"
            " scores=s).item()\nfirst = loss()\npid = os.fork()\nif pid == 0:\n    os._exit(loss()"
            " != first)\nassert os.waitpid(pid, 0)[1] == 0 and loss() == first\n"
        )
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            check=True,
            timeout=120,
            env=environment(),
        )


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **extra}


@needs_library
class TestMath:
    # The bounds stated in kernels/cpu/simd.hpp.
    BOUNDS: ClassVar = {torch.float32: 9e-8, torch.float64: 1.7e-16}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("function", [0, 1], ids=["exp", "log"])
    def test_error_bounds(self, function: int, dtype: torch.dtype) -> None:
        library = cpu.open_library()
        generator = torch.Generator().manual_seed(1)
        uniform = torch.rand(200_000, generator=generator, dtype=torch.float64)
        if function == 0:
            lowest = -86.9 if dtype == torch.float32 else -707.0
            x = torch.cat((lowest * uniform, -(2.0 ** (-20 * uniform)), 80 * uniform[:1000])).to(
                dtype
            )
        else:
            x = torch.cat((torch.exp2(200 * uniform - 100), 0.5 + uniform, 1 + 1e-3 * uniform)).to(
                dtype
            )
        for isa in cpu.available_isas(library):
            out = torch.empty_like(x)
            assert (
                library.fastokd_math(
                    isa.encode(),
                    function,
                    cpu._DTYPES[dtype],
                    x.data_ptr(),
                    out.data_ptr(),
                    x.numel(),
                )
                == 0
            )
            error = relative_error(function, x, out)
            assert error <= self.BOUNDS[dtype], f"{isa}: {error:.3g}"

    def test_edges(self) -> None:
        library = cpu.open_library()
        for isa in cpu.available_isas(library):
            for dtype in (torch.float32, torch.float64):
                x = torch.tensor([0.0, -1e30, -float("inf"), float("nan")], dtype=dtype)
                out = torch.empty_like(x)
                library.fastokd_math(
                    isa.encode(), 0, cpu._DTYPES[dtype], x.data_ptr(), out.data_ptr(), 4
                )
                assert out[:3].tolist() == [1, 0, 0]
                assert out[3].isnan()
                x = torch.tensor([1.0, float("nan")], dtype=dtype)
                library.fastokd_math(
                    isa.encode(), 1, cpu._DTYPES[dtype], x.data_ptr(), out.data_ptr(), 2
                )
                assert out[0] == 0
                assert out[1].isnan()


def relative_error(function: int, x: Tensor, out: Tensor) -> float:
    """The largest relative error. float64 is measured against twice its precision: the true value
    as two float64.
    """
    if out.dtype == torch.float32:
        true = x.double().exp() if function == 0 else x.double().log()
        kept = true != 0
        return float(((out.double() - true) / true)[kept].abs().max())
    import numpy as np

    wide = x.numpy().astype(np.longdouble)
    true = np.exp(wide) if function == 0 else np.log(wide)
    kept = true != 0
    return float(
        np.max(np.abs((out.numpy().astype(np.longdouble)[kept] - true[kept]) / true[kept]))
    )


class TestLibrary:
    def test_no_library_and_no_record(self, tmp_path: Path) -> None:
        with pytest.raises(cpu.LibraryUnusable, match="pip install -e"):
            cpu.open_library(tmp_path)

    def test_the_recorded_reason_is_given(self, tmp_path: Path) -> None:
        (tmp_path / "build_info.json").write_text(
            json.dumps({"status": "failed", "reason": "cmake not found"})
        )
        with pytest.raises(cpu.LibraryUnusable, match=r"was not built \(failed\): cmake not found"):
            cpu.open_library(tmp_path)

    def test_a_damaged_record(self, tmp_path: Path) -> None:
        (tmp_path / "build_info.json").write_text("{")
        with pytest.raises(cpu.LibraryUnusable, match=r"build_info\.json cannot be read"):
            cpu.open_library(tmp_path)

    def test_a_library_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "libfastokd_cpu.so").write_bytes(b"not a library")
        with pytest.raises(cpu.LibraryUnusable, match="cannot be loaded"):
            cpu.open_library(tmp_path)

    @needs_library
    def test_another_abi_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "ABI_VERSION", 999)
        with pytest.raises(cpu.LibraryUnusable, match="ABI version 1, this fastokd needs 999"):
            cpu.open_library()

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "_library", lambda: "the reason")
        inputs = make(GRAPHS["one row"], 2, 3)
        with pytest.raises(ExecutorUnavailable, match="impl='cpu' cannot run here: the reason"):
            run(inputs, "cpu")
        assert "'cuda'" in str(cpu.EXECUTOR.unsupported_reason(None, Case("cuda", torch.float32)))

    @needs_library
    def test_an_unknown_instruction_set(self) -> None:
        script = (
            "from fastokd.ops.executors import executor_states; print(executor_states()['cpu'])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(FASTOKD_CPU_ISA="mmx"),
        )
        assert "FASTOKD_CPU_ISA=mmx is not one of" in done.stdout

    @needs_library
    def test_bad_plans_are_refused(self) -> None:
        library = cpu.open_library()
        ints, floats = lower(GRAPHS["probability mixture"]).encode()
        cases: Sequence[tuple[Sequence[int], Sequence[float], str]] = (
            ((99, *ints[1:]), floats, "another version"),
            (ints[:-1], floats, "cut short"),
            ((*ints, 0), floats, "cut short or too long"),
            (ints, (*floats[:-3], -1.0, *floats[-2:]), "temperature"),
        )
        for bad_ints, bad_floats, message in cases:
            with pytest.raises(ValueError, match=message):
                cpu.CompiledPlan(library, bad_ints, bad_floats)

    @needs_library
    def test_garbage_plans_do_no_harm(self) -> None:
        library = cpu.open_library()
        ints, floats = lower(GRAPHS["ahbf paper"]).encode()
        for at in range(len(ints)):
            for value in (-2, -1, 0, 1, 2, 5, 7, 10**12):
                handle = ctypes.c_void_p()
                changed = [*ints[:at], value, *ints[at + 1 :]]
                status = library.fastokd_plan_create(
                    (ctypes.c_int64 * len(ints))(*changed),
                    len(ints),
                    (ctypes.c_double * len(floats))(*floats),
                    len(floats),
                    None,
                    ctypes.byref(handle),
                )
                assert (status == 0) == bool(handle)
                library.fastokd_plan_destroy(handle)
