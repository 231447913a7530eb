"""Property of every executor on any graph: an error from float64 of at most twice PyTorch's in the
same dtype.

Not a test file: ``test_executors.py`` calls this for the C++ executor, and in a separate process
for Triton's interpreter, which must be chosen before Triton is first imported.
"""

import warnings

import torch
import triton_state
from graph_catalog import Inputs, catalog, make_inputs
from graph_strategy import random_graphs
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from fastokd.graph import Graph
from fastokd.graph.plan import SQUARED_ERROR
from fastokd.ops import evaluate
from fastokd.ops.executors import Case, load

# One shape per regime that matters to a row's arithmetic: less than a vector, several vectors and a
# rest, more than a tile.
CATALOG_SHAPES = ((3, 10), (2, 100), (2, 1001))
# And those that only a compiled executor gets through in seconds: none and one row, a batch over
# several threads, the smallest and the largest published numbers of classes.
MORE_SHAPES = ((0, 10), (1, 2), (128, 10), (3, 1000), (1, 21841))
RANDOM_SHAPES = ((1, 2), (3, 10), (2, 37), (0, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = 8


def outcome(inputs: Inputs, impl: str, upstream: Tensor) -> list[Tensor | None]:
    """Rows, terms, then the gradients of logits and weights."""
    rows, terms = evaluate(inputs.plan, *inputs.arguments(), impl=impl)
    grads = torch.autograd.grad(rows, inputs.leaves(), upstream.to(rows.dtype), allow_unused=True)
    return [rows.detach(), terms, *grads]


def check(
    graph: Graph,
    executor: str,
    batch: int,
    num_classes: int,
    dtype: torch.dtype,
    number: int,
    soft: bool,
    device: str,
) -> None:
    """Compare an executor and PyTorch in ``dtype`` with PyTorch in float64, from the same
    numbers.
    """
    inputs = make_inputs(graph, batch, num_classes, dtype, number, soft_target=soft, device=device)
    reason = load(executor).unsupported_reason(inputs.plan, Case(device, dtype))
    assert reason is None, f"{graph.name}: {reason}"
    exact = Inputs(
        graph,
        inputs.plan,
        [row.detach().double().requires_grad_() for row in inputs.logits],
        {name: value.detach().double().requires_grad_() for name, value in inputs.weights.items()},
        {name: value.double() for name, value in inputs.externals.items()},
        inputs.target.double() if inputs.target.is_floating_point() else inputs.target,
        inputs.kd_weight,
    )
    upstream = torch.linspace(-1, 2, batch, dtype=torch.float64, device=device)
    truths, theirs, ours = (
        outcome(case, impl, upstream)
        for case, impl in ((exact, "reference"), (inputs, "reference"), (inputs, executor))
    )
    # Sizes of the numbers whose differences the results are. A KL's value is T times a difference
    # of logits, its gradient T times one of probabilities (for a teacher times such a difference);
    # a mixing weight's gradient is a gradient times a logit.
    largest = 1 + max(
        (float(row.detach().abs().max()) for row in inputs.logits if row.numel()), default=0.0
    )
    # An eps adds eps times a sum over all classes; a squared error is a product of two differences.
    sizes = [
        max(term.temperature, term.scale / term.temperature)
        * (1 + term.eps * num_classes)
        * (largest if term.kind == SQUARED_ERROR else 1)
        for term in inputs.plan.terms
    ]
    weights = inputs.term_weights.tolist()
    slope = sum(
        abs(weights[term.output]) * size
        for term, size in zip(inputs.plan.terms, sizes, strict=True)
    )
    steepest = max(sizes)
    scales = (
        [slope * largest, steepest * largest]
        + [2 * slope] * len(inputs.logits)
        + [2 * slope * largest] * len(inputs.weights)
    )
    for place, (truth, their, our, scale) in enumerate(
        zip(truths, theirs, ours, scales, strict=True)
    ):
        if truth is None or their is None:
            assert our is None or not our.any(), f"{graph}: output {place} must have no gradient"
            continue
        assert our is not None
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        if not our.numel():
            continue
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        own = torch.finfo(our.dtype).eps * float(
            truth.abs().max()
        )  # a result is rounded to its own dtype at the end
        allowed = 2 * float((their.double() - truth).abs().max()) + ROUNDINGS * wide * scale + own
        error = float((our.double() - truth).abs().max())
        assert error <= allowed, (
            f"{graph}: output {place} (rows, terms, gradients) is off by {error:.3g}, allowed"
            f" {allowed:.3g}"
        )


def check_catalog(
    executor: str,
    device: str = "cpu",
    shapes: tuple[tuple[int, int], ...] = CATALOG_SHAPES,
    part: int = 0,
    parts: int = 1,
    every_dtype: bool = True,
    every_shape: bool = True,
) -> int:
    """Every graph of the published methods and every kind of node, at one shape per regime; returns
    the number of cases.

    Of ``parts`` this is the one with every ``parts``-th graph from the ``part``-th on. With 100
    classes the graphs take each dtype, or without ``every_dtype`` one in turn. Without
    ``every_shape`` they take one shape in turn.
    """
    count = 0
    for number, case in enumerate(catalog()[part::parts]):
        for batch, num_classes in shapes if every_shape else [shapes[number % len(shapes)]]:
            dtypes = DTYPES if num_classes == 100 else DTYPES[:1]
            # In turn independently of the shapes.
            turn = number // len(shapes) % len(dtypes)
            for dtype in dtypes if every_dtype else [dtypes[turn]]:
                soft = count % 2 == 1
                check(case.graph, executor, batch, num_classes, dtype, count, soft, device)
                count += 1
    return count


def check_random(executor: str, wanted: int, device: str = "cpu", begin: int = 0) -> int:
    """Random graphs over all kinds of nodes and terms, drawn from ``begin``; returns how many
    different pairs of graph and shape there were, at most ``wanted``.
    """
    seen: set[tuple[Graph, tuple[int, int]]] = set()

    @settings(
        max_examples=wanted, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        random_graphs(),
        st.sampled_from(RANDOM_SHAPES),
        st.sampled_from((torch.float32, torch.bfloat16)),
        st.integers(0, 99),
        st.booleans(),
    )
    def run(
        graph: Graph, shape: tuple[int, int], dtype: torch.dtype, number: int, soft: bool
    ) -> None:
        if (graph, shape) not in seen and len(seen) < wanted:  # hypothesis repeats itself
            check(graph, executor, *shape, dtype, number, soft, device)
            seen.add((graph, shape))

    for more in range(4):
        if len(seen) < wanted:
            seed(begin + 1_000_000 * more)(run)()
    return len(seen)


def main(wanted: int, every_shape: bool) -> None:
    """Both of Triton's interpreter, printed as two counts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    triton_state.speed_up_interpreter()
    catalog_cases = check_catalog("triton", every_dtype=False, every_shape=every_shape)
    print(catalog_cases, check_random("triton", wanted))
