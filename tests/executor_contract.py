"""The contract of every executor, as named checks ``CHECKS[name](executor, device)``.

Not a test file. ``test_executor_contract.py`` runs the checks for the reference, the operator, the
C++ executor, and Triton's kernels on a GPU; ``triton_numerics.py`` runs them for Triton's
interpreter. ``test_ptx.py`` compares some graphs by ``Subject.compare``.

The expected values come from PyTorch in float64. PyTorch's own (``reference``, and ``opaque``, the
reference behind the registered operator) are compared with the graphs interpreted in NumPy.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_catalog import Inputs, catalog, make_inputs
from graph_strategy import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import graphs as graph_oracle
from torch import Tensor

from fastokd.graph import (
    KL,
    CrossEntropy,
    External,
    Graph,
    Logits,
    MinLogit,
    Mixture,
    ProbabilityMixture,
)
from fastokd.losses import AHBFLoss, BaselineLoss
from fastokd.methods.ahbf import ahbf_graph
from fastokd.ops import evaluate, forward_backward
from fastokd.ops.operator import plan_text
from tests import triton_graphs

CHECKS: dict[str, Callable[..., None]] = {}
"""Every check by its name: of a function, and of a graph where a function is run for each."""
NOT_FOR_TRITON: set[str] = set()
"""Checks that need not be repeated where a graph takes seconds to compile or to interpret."""
ONLY_IN_GRID: set[str] = set()
"""Checks that ``make test`` omits in Triton's interpreter: others cover their paths."""


def names(executor: str) -> list[str]:
    """The checks of an executor."""
    return [name for name in CHECKS if executor != "triton" or name not in NOT_FOR_TRITON]


def check(function: Callable[["Subject"], None]) -> Callable[["Subject"], None]:
    """Register a check by the name of its function."""
    CHECKS[function.__name__] = lambda *subject: function(Subject(*subject))
    return function


def check_each(
    values: Iterable[str],
    triton: Iterable[str] | None = None,
    interpreter: Iterable[str] | None = None,
) -> Callable[..., Any]:
    """Register a check ``function(subject, value)`` for each of some values, most often graphs.

    Args:
        values: for the reference, the operator and the C++ executor.
        triton: the values for Triton, by default all.
        interpreter: the values for Triton's interpreter in ``make test``, by default all of Triton.
    """

    def register(function: Callable[["Subject", str], None]) -> Callable[["Subject", str], None]:
        chosen, quick = (None if few is None else set(few) for few in (triton, interpreter))
        for value in values:
            name = f"{function.__name__}, {value}"
            CHECKS[name] = lambda *subject, value=value: function(Subject(*subject), value)
            if chosen is not None and value not in chosen:
                NOT_FOR_TRITON.add(name)
            if quick is not None and value not in quick:
                ONLY_IN_GRID.add(name)
        return function

    return register


Z = tuple(Logits(f"z{m}") for m in range(3))
CES = tuple(CrossEntropy(f"z{m}", 1 + 0.1 * m) for m in range(3))
MIX = Mixture("mix", ("z1", "z2"), "w")
GRAPHS = {name: make() for name, make in triton_graphs.GRAPHS.items()} | {
    "temperatures 1, 2 and 4": Graph(
        "temperatures",
        Z,
        (
            *CES,
            KL("z0", "z1", 0.5, 1.0),
            KL("z1", "z2", 0.6, 2.0),
            KL("z2", "z0", 0.7, 4.0),
            KL("z0", "z2", 0.3, 4.0, t2_scaling=False),
        ),
    ),
    "mixture, student first": Graph(
        "mixture",
        (*Z, MIX),
        (
            *CES,
            KL("mix", "z0", 0.5, 3.0, direction="student_first"),
            KL("z1", "z2", 0.5, 1.0, detach=True, direction="student_first"),
        ),
    ),
    "nested mixtures": Graph(
        "nested",
        (
            *Z,
            Mixture("mean", ("z0", "z1", "z2"), (1 / 3, 1 / 3, 1 / 3)),
            Mixture("deep", ("mean", "z0"), "w"),
            Mixture("more", ("mean", "deep"), "w"),
        ),
        (*CES, CrossEntropy("more", 0.5), KL("deep", "z1", 1.0, 3.0), KL("more", "z2", 1.0, 3.0)),
    ),
    "mixed probabilities with memory": Graph(
        "probabilities",
        (*Z, External("x"), MIX, ProbabilityMixture("h", ("z0", "mix", "x"), "v", temperature=2.0)),
        (
            *CES,
            KL("h", "z0", 1.5, 2.0, direction="student_first"),
            KL("h", "z1", 0.5, 4.0, t2_scaling=False),
            KL("h", "z2", 1.0, 2.0, eps=1e-3),
        ),
    ),
    "externals": Graph(
        "externals",
        (*Z[:2], External("x"), External("y")),
        (
            *CES[:2],
            KL("x", "z0", 1.0, 4.0, detach=True),
            KL("y", "z1", 0.5, 2.0, detach=True, direction="student_first"),
            KL("y", "z0", 1.0, 1.0, detach=True, eps=1e-2),
        ),
    ),
    "minimum with eps": Graph(
        "minimum",
        (*Z, MIX, MinLogit("low", ("z0", "mix"))),
        (
            CrossEntropy("z0"),
            KL("low", "z0", 0.5, 2.0, detach=True, direction="student_first"),
            KL("low", "z1", 0.5, 2.0, detach=True, eps=1e-3),
        ),
    ),
}
FEW = ("cascade", "memory", "selection", "first-order eps")
EXTREME = (
    "cascade",
    "mixed probabilities",
    "mutual, student first",
    "minimum",
    "cascade, exact eps",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The shapes that matter to each implementation. Reference and operator are compared with NumPy,
# whose gradients take an evaluation for every class.
SHAPES = {
    "numpy": ((5, 7), (1, 2)),
    "cpu": (
        (1, 2),  # the smallest
        (3, 10),  # less than a vector
        (5, 100),  # a few vectors and a rest
        (3, 1000),  # one tile of 32-bit, two of 64-bit values
        (2, 1100),  # two tiles
        (2, 1001),  # an odd last vector
        (2, 2048),  # whole tiles
    ),
    "interpreter": (
        (1, 2),  # the fewest classes: most lanes have none
        (17, 10),  # rows share a warp; the last program's rows are not all there
        (3, 32),  # the most classes of that regime
        (2, 100),  # a warp holds the row, columns are loaded one by one
        (2, 256),  # a warp holds the row as vectors
        (2, 1000),  # several warps, one chunk, 16-byte loads
        (2, 1001),  # rows not aligned for vectors
        (1, 4500),  # several chunks and a rest
    ),
    "gpu": (
        (1, 2),
        (17, 10),
        (128, 10),
        (128, 32),
        (128, 100),
        (96, 1000),
        (1024, 1000),
        (1500, 1001),
        (300, 4096),
        (40, 21841),
        (3, 100003),
    ),
}
# The shape of checks of other things.
SHAPE = {"numpy": (4, 6), "cpu": (4, 100), "interpreter": (3, 100), "gpu": (33, 1000)}


# --- the comparison


def with_different_weights(graph: Graph) -> Graph:
    """The graph with terms of different weights, so that no term can take the place of another."""
    terms = enumerate(graph.terms)
    return replace(
        graph, terms=tuple(replace(term, weight=term.weight * (1 + k / 16)) for k, term in terms)
    )


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor], target: bool = True) -> Inputs:
    """The inputs with every tensor changed; leaves require a gradient where they did."""

    def leaf(tensor: Tensor) -> Tensor:
        return change(tensor.detach()).requires_grad_(tensor.requires_grad)

    return replace(
        inputs,
        logits=[leaf(row) for row in inputs.logits],
        weights={name: leaf(weight) for name, weight in inputs.weights.items()},
        externals={name: change(row) for name, row in inputs.externals.items()},
        target=change(inputs.target) if target else inputs.target,
    )


def with_logits(inputs: Inputs, logits: Iterable[Tensor]) -> Inputs:
    return replace(inputs, logits=[row.detach().requires_grad_() for row in logits])


def same_bits(results: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    for mine, theirs in zip(results, expected, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def evaluated(inputs: Inputs, impl: str, upstream: Tensor | None = None) -> list[Tensor | None]:
    """Rows, terms, then the gradients of logits and weights; None where none is required.

    ``upstream`` is the gradient of the rows, by default ones.
    """
    rows, terms = evaluate(inputs.plan, *inputs.arguments(), impl=impl)
    leaves = [leaf for leaf in inputs.leaves() if leaf.requires_grad]
    assert not terms.requires_grad
    assert rows.requires_grad == bool(leaves)
    grads: Iterable[Tensor | None] = ()
    if leaves:
        upstream = torch.ones_like(rows) if upstream is None else upstream.to(rows.dtype)
        grads = torch.autograd.grad(rows, leaves, upstream, allow_unused=True)
    grads = iter(grads)
    of_leaves = [next(grads) if leaf.requires_grad else None for leaf in inputs.leaves()]
    return [rows.detach(), terms, *of_leaves]


def interpreted(inputs: Inputs, upstream: Tensor) -> list[Tensor | None]:
    """The same from the graph interpreted in NumPy."""
    arrays = (
        [z.detach().numpy() for z in inputs.logits],
        {name: w.detach().numpy() for name, w in inputs.weights.items()},
        {name: x.clamp_min(1e-30).numpy() for name, x in inputs.externals.items()},
        inputs.target.numpy(),
        inputs.kd_weight,
    )
    rows, terms = graph_oracle.evaluate(inputs.graph, *arrays)
    logits, weights = graph_oracle.gradients(inputs.graph, *arrays, upstream.numpy())
    return [torch.from_numpy(array) for array in (rows, terms, *logits, *weights.values())]


@dataclass(frozen=True)
class Subject:
    """The executor under test, and where it runs; in the grid with every case of a check."""

    executor: str
    device: str
    grid: bool = False

    @property
    def is_triton(self) -> bool:
        return self.executor in ("triton", "ptx")

    @property
    def kind(self) -> str:
        """The implementation: numpy (reference and operator), cpu, interpreter (of Triton or of its
        PTX), or gpu.
        """
        if self.is_triton:
            return "gpu" if self.device.startswith("cuda") else "interpreter"
        return "cpu" if self.executor == "cpu" else "numpy"

    def pick(self, numpy: Any, cpu: Any, interpreter: Any, gpu: Any) -> Any:
        """The value for this implementation."""
        choices = {"numpy": numpy, "cpu": cpu, "interpreter": interpreter, "gpu": gpu}
        return choices[self.kind]

    def few(self, cases: Sequence[Any], chosen: Sequence[Any]) -> Sequence[Any]:
        """All cases, or in Triton's interpreter the chosen ones, except in the grid."""
        return chosen if self.kind == "interpreter" and not self.grid else cases

    def make(
        self, graph: str | Graph, shape: tuple[int, int] | None = None, **options: Any
    ) -> Inputs:
        """Inputs of a graph in the usual shape, or another; float64 to compare with NumPy."""
        graph = GRAPHS[graph] if isinstance(graph, str) else graph
        graph = with_different_weights(graph) if self.is_triton else graph
        options.setdefault("dtype", torch.float64 if self.kind == "numpy" else torch.float32)
        return make_inputs(graph, *(shape or SHAPE[self.kind]), device=self.device, **options)

    def run(self, inputs: Inputs, upstream: Tensor | None = None) -> list[Tensor | None]:
        return evaluated(inputs, self.executor, upstream)

    def compare(
        self,
        inputs: Inputs,
        upstream: Tensor | None = None,
        huge: bool = False,
        offset: float = 0.0,
        product: float = 0.0,
    ) -> None:
        """Require an error from float64 of at most twice PyTorch's in the same dtype, plus
        roundings.

        Args:
            inputs: of any dtype; not written to, which is checked.
            upstream: the gradient of the rows [B]; by default from -1 to 2.
            huge: logits are so large that a gradient's factors show their rounding.
            offset: the size of values beyond probabilities and losses, whose rounding gradients
                show.
            product: the same for products of such values, in gradients of mixing weights.
        """
        batch, compute = len(inputs.target), inputs.term_weights.dtype
        if upstream is None:
            upstream = torch.linspace(-1, 2, batch, dtype=compute, device=inputs.target.device)
        tensors = [*inputs.leaves(), *inputs.externals.values(), inputs.target, upstream]
        before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
        ours = self.run(inputs, upstream)
        for tensor, (copy, version) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, copy), "an input was written to"
            assert tensor._version == version, "an input was written to"
        exact = mapped(inputs, lambda x: x.double() if x.is_floating_point() else x)
        if self.kind == "numpy" and batch and not huge:
            theirs, truths = ours, interpreted(exact, upstream.double())
        else:
            theirs = evaluated(inputs, "reference", upstream)
            truths = evaluated(exact, "reference", upstream)
        if self.is_triton:  # whose bound is for each term, and for the C++ executor for all terms
            ours, theirs, truths = map(each_term, (ours, theirs, truths))
        values = len(ours) - len(inputs.leaves())  # rows and terms; gradients follow
        dtypes = [compute] * values + [leaf.dtype for leaf in inputs.leaves()]
        needed = [True] * values + [leaf.requires_grad for leaf in inputs.leaves()]
        for number, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
            if not needed[number]:
                assert our is None
                continue
            if truth is None or their is None:  # nothing depends on it
                assert not any(x is not None and x.any() for x in (our, truth))
                continue
            assert our is not None
            assert our.dtype == dtypes[number]
            assert our.shape == truth.shape
            if not our.numel():
                continue
            assert our.isfinite().all(), f"output {number} is non-finite"
            if self.kind == "numpy":
                if not huge:  # NumPy's formula is not made for that
                    close_to_formula(our, truth, is_gradient=number >= values)
                continue
            error, other = (float((x.double() - truth).abs().max()) for x in (our, their))
            size = offset + (product if number >= values + len(inputs.logits) else 0.0)
            allowed = self.roundings(inputs, upstream, truths, number, huge, size)
            assert error <= 2 * other + allowed, (
                f"{inputs.graph.name}, output {number} (rows, terms, gradients): error"
                f" {error:.3g}, PyTorch's {other:.3g}, roundings {allowed:.3g}"
            )

    def roundings(
        self,
        inputs: Inputs,
        upstream: Tensor,
        truths: list[Tensor | None],
        number: int,
        huge: bool,
        offset: float,
    ) -> float:
        """The error that an executor may have beyond twice PyTorch's.

        Roundings of the arithmetic's dtype, at the size of the values whose sums and differences
        the result is; for a gradient also one of the gradient's dtype. Triton's kernels add in
        another order than PyTorch, and keep the bound that they were measured with on a GPU.
        """
        truth = truths[number]
        assert truth is not None
        first_gradient = len(truths) - len(inputs.leaves())
        first_weight = first_gradient + len(inputs.logits)
        is_value, is_weight = number < first_gradient, number >= first_weight
        unit, scale = torch.finfo(inputs.term_weights.dtype).eps, float(truth.abs().max())
        dtype = inputs.term_weights.dtype
        if not is_value:
            dtype = inputs.leaves()[number - first_gradient].dtype
        of_result = torch.finfo(dtype).eps * scale if dtype != inputs.term_weights.dtype else 0.0
        size = max(float(row.detach().abs().max()) for row in inputs.logits)
        weights = [float(weight) for weight in inputs.term_weights]
        # A weight's gradient is a sum over the classes of gradient times logit, which may nearly
        # cancel.
        gradients = [grad for grad in truths[first_gradient:first_weight] if grad is not None]
        largest_sum = max((float(grad.abs().sum(1).max()) for grad in gradients), default=1.0)
        if self.is_triton:
            if is_value or huge:
                scale = max(scale, size, size * size if is_weight else 0.0)
            if not is_value:
                slopes = [
                    weights[term.output] * term.scale / term.temperature
                    for term in inputs.plan.terms
                ]
                scale = max(scale, max(slopes) * float(upstream.abs().max()))
            # PyTorch's own error of such sums can be small by chance, depending on the CPU.
            products = 4 * unit * largest_sum * size if is_weight else 0.0
            return 32 * unit * scale + products + of_result
        largest = max(weights) * float(upstream.abs().max())
        if is_weight:
            scale = max(scale, largest, largest_sum * size)
        else:
            scale = max(scale, 1.0 if is_value else largest)
        # In float64 the expected values have rounding errors too.
        count = (16 if is_weight else 8) * (4 if unit < 1e-10 else 1)
        return count * unit * scale + unit * offset * largest + of_result


def each_term(results: list[Tensor | None]) -> list[Tensor | None]:
    """The results with one entry for each term instead of one for all [T, B]."""
    rows, terms, *grads = results
    assert terms is not None
    return [rows, *terms, *grads]


def close_to_formula(our: Tensor, truth: Tensor, is_gradient: bool) -> None:
    """The reference against NumPy: two float64 computations of sums up to 1e3; of lower dtypes
    float32 arithmetic, and a gradient's own last rounding.
    """
    rtol, atol = {
        torch.float64: (1e-10, 1e-11),
        torch.float32: (1e-5 if is_gradient else 2e-6, 1e-5),
        torch.bfloat16: (2**-8, 1e-5),
        torch.float16: (2**-10, 1e-5),
    }[our.dtype]
    np.testing.assert_allclose(our.double().numpy(), truth.numpy(), rtol=rtol, atol=atol)


# --- values


@check_each(GRAPHS)
def node_and_term_kinds(on: Subject, graph: str) -> None:
    for shape in on.pick(SHAPES["numpy"], SHAPES["cpu"], [(2, 300)], [(37, 1000)]):
        is_odd = list(GRAPHS).index(graph) % 2 == 1
        for soft in on.few((False, True), (is_odd,)):
            on.compare(on.make(graph, shape, soft_target=soft))


# In the interpreter ``executor_properties`` goes through the shapes of other graphs.
@check_each(FEW, interpreter=("cascade",))
def shapes(on: Subject, graph: str) -> None:
    # On a GPU ``dtypes`` goes through them all: here it would compile for minutes.
    for shape in SHAPES[on.kind] if on.kind != "gpu" else ((128, 32), (300, 4096)):
        on.compare(on.make(graph, shape))


@check_each(GRAPHS, triton=("cascade",))
def dtypes(on: Subject, graph: str) -> None:
    """Low precision is a rounding of inputs and gradients: the arithmetic is float32."""
    # PyTorch rounds the gradient of a weight at each of its uses.
    several_uses = on.kind == "numpy" and graph in ("shared weights", "nested mixtures")
    few = on.few([(2, 10), (2, 1000), (2, 1001)], [(2, 10), (2, 1000)])
    shapes = on.pick([(8, 6)], [(3, 77), (2, 1100)], few, SHAPES["gpu"])
    for dtype in DTYPES[::3] if several_uses else DTYPES:
        for shape in shapes:
            soft = on.kind == "cpu" and shape == (2, 1100)
            on.compare(on.make(graph, shape, dtype=dtype, soft_target=soft))


CATALOG = {case.name: case.graph for case in catalog()}


# For Triton ``executor_properties`` goes through the catalog and random graphs, on a GPU in several
# processes.
@check_each(CATALOG, triton=())
def catalog_graphs(on: Subject, graph: str) -> None:
    shape = on.pick((5, 7), (5, 30), None, None)
    for seed in range(3):
        on.compare(on.make(CATALOG[graph], shape, seed=seed, soft_target=seed == 2))
    if graph == "four_deep":
        for dtype in DTYPES:
            on.compare(on.make(CATALOG[graph], shape, dtype=dtype))


@check_each(("labels", "soft"), triton=())
def any_graph(on: Subject, target: str) -> None:
    examples, most = on.pick((30, 5), (75, 40), None, None)

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(random_graphs(), st.integers(1, most))
    def run(graph: Graph, classes: int) -> None:
        # At temperatures below 1 a teacher's gradient multiplies probabilities by logarithms of
        # this size.
        on.compare(on.make(graph, (3, classes), soft_target=target == "soft"), offset=30.0)

    run()


@check
def numbers_of_branches(on: Subject) -> None:
    for count in range(2, 9) if on.kind in ("numpy", "cpu") else (2, 3, 5, 8):
        on.compare(on.make(ahbf_graph(count), on.pick((3, 4), (3, 1000), (3, 10), (3, 10))))


@check
def fifteen_rows_of_logits(on: Subject) -> None:
    for classes in (4,) if on.kind == "numpy" else (10, 300):
        on.compare(on.make(ahbf_graph(8, mix=False), (3, classes)))


@check
def one_class(on: Subject) -> None:
    """With a single class every probability is 1: nothing to learn, nothing to teach."""
    rows, _, *grads = on.run(on.make(ahbf_graph(3), (1, 1), dtype=torch.float64))
    assert abs(rows.item()) <= (1e-12 if on.is_triton else 0.0)
    assert not any(grad.any() for grad in grads[:3])


@check_each(GRAPHS)
def empty_batch(on: Subject, graph: str) -> None:
    for soft in (False, True):
        inputs = on.make(graph, (0, 10), soft_target=soft)
        on.compare(inputs)
        rows, terms, grads = forward_backward(inputs.plan, *inputs.arguments(), impl=on.executor)
        assert rows.shape == (0,)
        assert terms.shape == (inputs.plan.num_terms, 0)
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in inputs.leaves()]


# --- extreme values


@check_each(EXTREME)
def huge_logits(on: Subject, graph: str) -> None:
    on.compare(on.make(graph, scale=1e4), huge=True, offset=4e4, product=4e4**2)


@check_each(EXTREME)
def tiny_logits(on: Subject, graph: str) -> None:
    on.compare(on.make(graph, scale=1e-6))


@check_each(GRAPHS, triton=("cascade",))
def rows_of_huge_logits(on: Subject, graph: str) -> None:
    """One row of 1e4 and -1e4, one that is 1e4 higher, one that is constant."""
    inputs = on.make(graph, on.pick((4, 6), (4, 1030), (4, 100), (4, 1000)))
    with torch.no_grad():
        for row in inputs.logits:
            row[0].sign_().mul_(1e4)
            row[1] += 1e4
            row[2].fill_(-1e4)
    on.compare(inputs, huge=True, offset=1e4)  # mixing rounds logits of that size


@check
def logits_beyond_all_accuracy(on: Subject) -> None:
    """They come to an end."""
    inputs = on.make("cascade", (2, 1300), scale=1e12)
    rows, _ = evaluate(inputs.plan, *inputs.arguments(), impl=on.executor)
    assert rows.shape == (2,)


@check_each(("cascade", "mutual"))
def common_offset(on: Subject, graph: str) -> None:
    """It costs no accuracy in the gradient."""
    inputs = on.make(graph)
    on.compare(with_logits(inputs, [row + 1000 for row in inputs.logits]))


@check
def opposed_branches(on: Subject) -> None:
    """The mixture's maximum is far below the mixture of the maxima: its exponentials must not all
    vanish.
    """
    inputs = on.make("cascade")
    with torch.no_grad():
        for m, row in enumerate(inputs.logits):
            row[:, m] = 2000.0
    on.compare(inputs, huge=True, offset=2000.0, product=2000.0**2)


@check_each(("cascade", "selection", "mixed probabilities"))
def outlying_maxima(on: Subject, graph: str) -> None:
    """A logit far above its row, in columns that an estimate of the maximum may not look at."""
    shapes = on.pick(
        [(7, torch.float64)],
        [(1300, torch.float32)],
        [(1300, torch.float32)],
        [(1000, torch.bfloat16), (1300, torch.float32), (100003, torch.float32)],
    )
    heights = on.few((15.0, 60.0, 90.0, 1e4), (15.0, 90.0))
    for height in heights if graph == "cascade" or on.kind != "interpreter" else (90.0,):
        for classes, dtype in shapes:
            inputs = on.make(graph, (3, classes), dtype=dtype)
            with torch.no_grad():
                for m, row in enumerate(inputs.logits):
                    columns = torch.tensor([1, 700 + m, classes - 1]) % classes
                    row[torch.arange(3), columns] += height * (1 + m / 8)
            inputs.target = torch.tensor([1, 3, classes - 1], device=on.device)
            on.compare(inputs, huge=height > 20, offset=height if height > 20 else 0.0)


@check_each(GRAPHS, triton=("cascade",))
def rising_maxima(on: Subject, graph: str) -> None:
    """Each tile holds a new maximum, in one row by more than the exponential can express."""
    for classes in on.pick((8,), (1100, 5000), (1300,), (1300,)):
        inputs = on.make(graph, (2, classes), soft_target=True)
        with torch.no_grad():
            for k, row in enumerate(inputs.logits):
                row[0] += torch.linspace(0, 20 + k, classes, device=on.device)
                row[1] += torch.linspace(0, 500 + 100 * k, classes, device=on.device)
        # At temperature 1 gradients show the rounding of logarithms of that size.
        offset = 600.0 if graph == "mutual, temperature 1" else 0.0
        on.compare(inputs, huge=True, offset=offset)


# --- special inputs


@check_each(GRAPHS, triton=("cascade",))
def identical_rows(on: Subject, graph: str) -> None:
    inputs = on.make(graph)
    on.compare(with_logits(inputs, [inputs.logits[0].clone() for _ in inputs.logits]))


@check
def identical_rows_teach_nothing(on: Subject) -> None:
    graph = ahbf_graph(3, lambda_self=1.0)
    inputs = make_inputs(graph, 4, 10, torch.float64, device=on.device)
    row = inputs.logits[0].detach()
    inputs = with_logits(inputs, [row.clone() for _ in range(3)])
    _, terms, *grads = on.run(inputs)
    kl_terms = [
        value for term, value in zip(inputs.graph.terms, terms, strict=True) if isinstance(term, KL)
    ]
    assert torch.stack(kl_terms).abs().max() < 1e-13
    hard = row.softmax(1) - F.one_hot(inputs.target, 10)
    # Branch 3 gets its own cross-entropy and its share of ta3's.
    share = 1 + inputs.weights["scores3"][:, :1].detach()
    torch.testing.assert_close(grads[2], hard * share, rtol=1e-12, atol=1e-13)


@check_each((name for name, graph in GRAPHS.items() if graph.weight_sources), triton=("cascade",))
def one_hot_weights(on: Subject, graph: str) -> None:
    inputs = on.make(graph)
    with torch.no_grad():
        for k, weight in enumerate(inputs.weights.values()):
            weight.zero_()
            weight[:2, k % 2] = 1
            weight[2:, -1 - k % 2] = 1
    on.compare(inputs)


@check_each(("one graph",), triton=())
def one_hot_weights_of_distant_rows(on: Subject, _: str) -> None:
    """The unused input dominates: the reference cuts the mixture off at its floor, and the gradient
    with it.
    """
    nodes = (*Z, ProbabilityMixture("h", ("z1", "z2"), "v"))
    graph = Graph("distant", nodes, (CrossEntropy("z0"), KL("h", "z0")))
    inputs = on.make(graph, (3, 40), scale=60.0)
    with torch.no_grad():
        inputs.weights["v"].zero_()[:, 0] = 1
    on.compare(inputs, huge=on.kind == "numpy")


@check
def unnormalized_weights(on: Subject) -> None:
    inputs = on.make("cascade", (2, 6) if on.kind == "numpy" else (2, 1001))
    inputs.weights = {
        name: (4 * weight.detach() - 2).requires_grad_() for name, weight in inputs.weights.items()
    }
    on.compare(inputs)


@check_each(
    ("memory", "memory, student first", "externals", "mixed probabilities with memory"),
    triton=("memory", "externals"),
)
def zero_external_probabilities(on: Subject, graph: str) -> None:
    """Their logarithm is floored, in both directions of an edge."""
    inputs = on.make(graph)
    for row in inputs.externals.values():
        row[:, ::2] = 0.0
    on.compare(inputs)


@check
def mixed_dtypes(on: Subject) -> None:
    """Externals, weights and target of other dtypes than the logits."""
    shape = SHAPE[on.kind]
    inputs = on.make("externals", shape, dtype=torch.float32)
    inputs.externals = {"x": inputs.externals["x"].double(), "y": inputs.externals["y"].bfloat16()}
    on.compare(inputs)
    target = torch.full(shape, 1 / shape[1], dtype=torch.float64, device=on.device)
    inputs = replace(inputs, target=target)
    on.compare(with_logits(inputs, [row.half() for row in inputs.logits]))
    inputs = on.make("cascade", shape, dtype=torch.float32)
    on.compare(with_logits(inputs, [row.bfloat16() for row in inputs.logits]))


@check
def labels_out_of_range(on: Subject) -> None:
    """NaN in their rows alone: wrong numbers must not look right."""
    for label in (-1, 10, -100, 2**40):
        inputs = on.make("cascade", (3, 10))
        inputs.target[1] = label
        rows, terms, *grads = on.run(inputs)
        wrong = [False, True, False]
        assert rows.isnan().tolist() == wrong
        assert terms.isnan().any(0).tolist() == wrong
        theirs = evaluated(inputs, "reference")
        for grad, other in zip((terms, *grads), theirs[1:], strict=True):
            assert grad.isnan().any(0 if grad is terms else 1).tolist() == wrong
            assert torch.equal(grad.isnan(), other.isnan())


@check
def nonfinite_logits(on: Subject) -> None:
    """They show in their row alone."""
    for value in (float("nan"), float("inf")):
        inputs = on.make("cascade", (3, 1100))
        with torch.no_grad():
            inputs.logits[1][2, 1055] = value
        rows, _, *grads = on.run(inputs)
        assert rows.isfinite().tolist() == [True, True, False]
        assert not grads[1][2].isfinite().all()
        assert all(grad[:2].isfinite().all() for grad in grads)


# --- layouts

LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: tensor.t().contiguous().t(),
    lambda tensor: torch.stack((tensor, tensor), 2)[:, :, 0],
    lambda tensor: F.pad(tensor, (1, 0))[:, 1:],
    lambda tensor: F.pad(tensor, (0, 7))[:, : tensor.shape[1]],
)


@check_each(("float32", "bfloat16", "float16", "float64"), triton=("float32", "bfloat16"))
def strided_inputs(on: Subject, dtype: str) -> None:
    """Columns apart, rows apart, and both displaced, each tensor in another way; the C++ executor
    gives the same bits.
    """
    shape = on.pick((6, 8), (6, 40), (3, 101), (64, 1001))
    options = {"dtype": getattr(torch, dtype), "soft_target": True}
    inputs = on.make("mixed probabilities with memory", shape, **options)
    for first in range(len(LAYOUTS)) if on.executor != "triton" else (0,):
        layouts = itertools.cycle((*LAYOUTS[first:], *LAYOUTS[:first]))
        strided = mapped(inputs, lambda tensor, layouts=layouts: next(layouts)(tensor))
        assert not any(row.is_contiguous() for row in strided.logits)
        on.compare(strided)
        if on.executor == "cpu":
            same_bits(on.run(strided), on.run(inputs))


@check
def padded_rows(on: Subject) -> None:
    """Triton loads them as vectors."""
    shape = on.pick((2, 9), (2, 1001), (2, 1001), (64, 1001))
    inputs = on.make("cascade", shape, dtype=torch.bfloat16)
    on.compare(with_logits(inputs, [LAYOUTS[-1](row) for row in inputs.logits]))


@check_each(("cascade", "shared weights"))
def expanded_inputs(on: Subject, graph: str) -> None:
    """Rows and a gradient of the rows that lie in one place (stride 0)."""
    inputs = on.make(graph)
    batch = len(inputs.target)
    expanded = mapped(inputs, lambda tensor: tensor[:1].expand(batch, -1), target=False)
    upstream = torch.tensor(0.125, device=on.device, dtype=inputs.term_weights.dtype).expand(batch)
    assert expanded.logits[0].stride() == (0, 1)
    on.compare(expanded, upstream)
    on.compare(replace(expanded, logits=inputs.logits), upstream)


@check
def same_tensor_twice(on: Subject) -> None:
    """One tensor in several places gets the sum of their gradients."""
    inputs = on.make("cascade", dtype=torch.float64)
    leaf = inputs.logits[0]
    separate = with_logits(inputs, [leaf.detach().clone() for _ in inputs.logits])
    expected = sum(evaluated(separate, "reference")[2 : 2 + len(inputs.logits)])
    rows, _ = evaluate(
        inputs.plan, [leaf] * len(inputs.logits), *inputs.arguments()[1:], impl=on.executor
    )
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12)


# --- autograd


@check_each(
    ("cascade", "cascade, exact eps", "mixed probabilities", "nested mixtures", "selection"),
    triton=("cascade",),
)
def frozen_inputs(on: Subject, graph: str) -> None:
    """They get no gradient and change no other: all, each alone, and all but one."""
    inputs = on.make(graph)
    leaves = range(len(inputs.leaves()))
    each = [*([k] for k in leaves), *([k for k in leaves if k != one] for one in leaves)]
    few = [[0], [1, 2, 3], [4, 5, 6], [0, 1, 2, 3]]
    for frozen in [leaves, *on.pick(each, each, few, few)]:
        for k, leaf in enumerate(inputs.leaves()):
            leaf.requires_grad_(k not in frozen)
        on.compare(inputs)
        _, _, grads = forward_backward(inputs.plan, *inputs.arguments(), impl=on.executor)
        assert [grad is None for grad in grads] == [k in frozen for k in leaves]


@check
def without_autograd(on: Subject) -> None:
    """The same bits under no_grad and inference_mode."""
    inputs = on.make("cascade")
    expected = evaluate(inputs.plan, *inputs.arguments(), impl=on.executor)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = evaluate(inputs.plan, *inputs.arguments(), impl=on.executor)
        assert not found[0].requires_grad
        same_bits(found, [expected[0].detach(), expected[1]])


@check
def upstream_gradients(on: Subject) -> None:
    """Zero, negative, and as large as a gradient scaler makes them."""
    inputs = on.make("cascade", (7, 9))
    values = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 1e-3, 100.0], device=on.device)
    values = values.to(inputs.term_weights.dtype)
    on.compare(inputs, values)
    on.compare(inputs, torch.full_like(values, 65536 / 7))
    zero = on.run(inputs, values)
    assert not any(grad[0].any() for grad in zero[2:])


@check
def second_backward(on: Subject) -> None:
    """With retain_graph the same bits again, and then autograd's error."""
    inputs = on.make("cascade")
    rows, _ = evaluate(inputs.plan, *inputs.arguments(), impl=on.executor)
    first = torch.autograd.grad(rows.sum(), inputs.leaves(), retain_graph=True)
    same_bits(torch.autograd.grad(rows.sum(), inputs.leaves()), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(rows.sum(), inputs.leaves())


@check
def term_weight_gradient(on: Subject) -> None:
    """The gradient for a term's weight is the term's value: how a learned ramp-up would train."""
    inputs = on.make("cascade", (4, 6), dtype=torch.float64)
    *arguments, term_weights = inputs.arguments()
    term_weights.requires_grad_()
    rows, terms = evaluate(inputs.plan, *arguments, term_weights, impl=on.executor)
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64, device=on.device)
    (grad,) = torch.autograd.grad(rows, term_weights, upstream)
    torch.testing.assert_close(grad, terms @ upstream, rtol=1e-13, atol=1e-13)


@check_each(("cascade", "nested mixtures", "memory", "mixed probabilities"), triton=("cascade",))
def separate_weights_of_terms(on: Subject, graph: str) -> None:
    """Term weights [B, T] give the sum over the terms of what one term with the weight 1 gives."""
    for shape in on.pick([(4, 6)], [(4, 6), (3, 1100)], [(3, 6)], [(37, 10), (2, 40000)]):
        inputs = on.make(graph, shape, dtype=torch.float64)
        *arguments, shared = inputs.arguments()
        batch, count = shape[0], len(shared)
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand((batch, count), generator=generator, dtype=torch.float64)
        weights[1] = 0
        weights[2, 0] = 0
        weights = weights.to(on.device).requires_grad_()
        upstream = torch.full((batch,), 1 / batch, dtype=torch.float64, device=on.device)
        leaves = inputs.leaves()
        rows, terms = evaluate(inputs.plan, *arguments, weights, impl=on.executor)
        *grads, of_weights = torch.autograd.grad(rows, [*leaves, weights], upstream)
        expected = [torch.zeros_like(rows), *map(torch.zeros_like, leaves)]
        for t, one in enumerate(torch.eye(count, dtype=torch.float64, device=on.device)):
            value, _ = evaluate(inputs.plan, *arguments, one, impl=on.executor)
            column = weights[:, t].detach()
            parts = torch.autograd.grad(value, leaves, upstream * column, materialize_grads=True)
            expected = [
                total + part for total, part in zip(expected, (value * column, *parts), strict=True)
            ]
        close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
        for ours, truth in zip((rows, *grads), expected, strict=True):
            close(ours.detach(), truth.detach())
        close(of_weights, (terms * upstream).t())
        found = forward_backward(inputs.plan, *arguments, weights.detach(), impl=on.executor)
        close(found[0], rows.detach())
        for ours, truth in zip(found[2], grads, strict=True):
            close(ours, truth)


@check
def nonfinite_term_without_weight(on: Subject) -> None:
    """A row whose terms have the weight 0 adds 0 to the loss, even if a term is infinite."""
    inputs = on.make("cross-entropy alone", (3, 6), dtype=torch.float64)
    *arguments, shared = inputs.arguments()
    logits = [row.detach().clone() for row in arguments[0]]
    logits[0][1, inputs.target[1]] = float("-inf")
    weights = torch.ones((3, len(shared)), dtype=torch.float64, device=on.device)
    arguments = [[row.requires_grad_() for row in logits], *arguments[1:]]
    rows, _ = evaluate(inputs.plan, *arguments, weights, impl=on.executor)
    assert rows.isfinite().tolist() == [True, False, True]
    weights[1] = 0
    rows, _ = evaluate(inputs.plan, *arguments, weights, impl=on.executor)
    assert rows[1] == 0
    (grad,) = torch.autograd.grad(rows.sum(), arguments[0][:1])
    assert grad.isfinite().all()
    assert not grad[1].any()


@check
def operator_registration(on: Subject) -> None:
    """The operator behaves as its registration declares."""
    inputs = on.make("shared weights", (3, 10))
    detached = mapped(inputs, lambda tensor: tensor)
    for leaf in detached.leaves():
        leaf.requires_grad_(False)
    arguments = (*detached.arguments(), plan_text(inputs.plan), on.executor)
    torch.library.opcheck(torch.ops.fastokd.graph_forward.default, arguments)
    if on.executor == "cpu":
        return  # its gradients share one block of memory, which the check takes for aliases
    rows, _, stats = torch.ops.fastokd.graph_forward(*arguments)
    needs = [k % 3 != 1 for k in range(len(inputs.leaves()))]
    backward = (torch.ones_like(rows), *arguments[:5], stats, *arguments[5:], needs)
    torch.library.opcheck(torch.ops.fastokd.graph_backward.default, backward)


@check
def second_derivatives(on: Subject) -> None:
    """The reference has them, the other executors refuse them; first derivatives are equal."""
    _, logits, scores, target = loss_leaves(on.device, dtype=torch.float64)
    firsts = []
    for impl in ("reference", on.executor):
        loss = AHBFLoss(3, impl=impl)(logits, target, scores=scores)
        firsts.append(torch.autograd.grad(loss, logits, create_graph=True))
    torch.testing.assert_close(firsts[0], firsts[1], rtol=1e-12, atol=1e-14)
    if on.executor == "reference":
        assert torch.autograd.grad(firsts[1][0].square().sum(), logits[0])[0].any()
        return
    message = f"impl='{on.executor}' does not support second derivatives; use impl='reference'"
    with pytest.raises(NotImplementedError, match=message):
        firsts[1][0].sum().backward()


@check
def functional_gradient(on: Subject) -> None:
    """torch.func.grad gives autograd's gradient."""
    _, logits, scores, target = loss_leaves(on.device, dtype=torch.float64)

    def loss(logits: Tensor, impl: str) -> Tensor:
        return AHBFLoss(3, impl=impl)(logits, target, scores=scores)

    stacked = torch.stack(logits).detach()
    found = torch.func.grad(loss)(stacked, on.executor)
    (expected,) = torch.autograd.grad(loss(stacked.requires_grad_(), "reference"), stacked)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@check
def vmap(on: Subject) -> None:
    """All but the reference refuse it."""
    if on.executor == "reference":
        return
    _, logits, scores, target = loss_leaves(on.device)
    criterion = AHBFLoss(3, impl=on.executor)
    message = f"impl='{on.executor}' does not support torch.vmap; use impl='reference'"
    with pytest.raises(NotImplementedError, match=message.replace(".", r"\.")):
        torch.func.vmap(lambda logits: criterion(logits, target, scores=scores))(
            torch.stack([torch.stack(logits)] * 3)
        )


# --- repeated and combined passes


@check
def bits_repeat(on: Subject) -> None:
    large = [(200, classes) for classes in (10, 100, 1000, 21841)]
    for shape in on.pick([None], [None], [(2, 300)], large):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = on.make("cascade", shape, dtype=dtype)
            same_bits(on.run(inputs), on.run(inputs))


@check_each(GRAPHS)
def forward_backward_in_one_pass(on: Subject, graph: str) -> None:
    """Equal to forward and backward after each other, with the C++ executor in every bit: for rows
    of one chunk, which it evaluates once, and of two.
    """
    for shape in on.pick([(4, 6)], [(4, 100), (4, 1100)], [(3, 40)], [(48, 1000)]):
        for soft_target in on.pick([False], [False, True], [False], [False]):
            _check_one_pass(on, graph, shape, soft_target)


def _check_one_pass(on: Subject, graph: str, shape: tuple[int, int], soft_target: bool) -> None:
    inputs = on.make(graph, shape, soft_target=soft_target)
    upstream = torch.full_like(inputs.logits[0][:, 0], 1 / len(inputs.target)).detach()
    expected = on.run(inputs, upstream)
    rows, terms, grads = forward_backward(inputs.plan, *inputs.arguments(), impl=on.executor)
    assert not rows.requires_grad
    # Of eight branches that kernel takes fewer columns at once, and adds float32 in another order.
    interpreter = (1e-5, 1e-6) if graph == "cascade of eight" else (1e-6, 1e-7)
    rtol, atol = on.pick((1e-12, 1e-13), (0.0, 0.0), interpreter, (1e-5, 1e-6))
    for mine, theirs in zip((rows, terms, *grads), expected, strict=True):
        if theirs is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


# --- a public loss


def loss_leaves(
    device: str, batch: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Leaves, and the logits and scores of three branches that come out of them, so that gradients
    must travel on.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    weight, gate = drawn(3, 5, 7).requires_grad_(), drawn(2, 5, 2).requires_grad_()
    images = drawn(batch, 5)
    target = torch.randint(7, (batch,), generator=generator).to(device)
    logits = [images @ part for part in weight]
    return [weight, gate], logits, [(images @ part).softmax(1) for part in gate], target


@check_each(("float32", "float64"))
def loss_in_one_and_two_passes(on: Subject, dtype: str) -> None:
    """A loss by an executor, in both ways, is the loss by the reference, and writes to no input."""
    results = []
    options = {"dtype": getattr(torch, dtype)}
    for impl in ("reference", on.executor):
        criterion = AHBFLoss.preset("code", 3, impl=impl)
        for one_pass in (False, True):
            leaves, logits, scores, target = loss_leaves(on.device, **options)
            kd_weight = torch.tensor(0.3, device=on.device)
            given = [*logits, *scores, target, kd_weight]
            before = [(tensor.detach().clone(), tensor._version) for tensor in given]
            call = {"scores": scores, "kd_weight": kd_weight}
            if one_pass:
                loss, terms = criterion.forward_backward(logits, target, **call)
                assert not loss.requires_grad
            else:
                loss, terms = criterion(logits, target, **call, return_terms=True)
                loss.backward()
            for tensor, (value, version) in zip(given, before, strict=True):
                assert torch.equal(tensor, value)
                assert tensor._version == version
            results.append((loss.detach(), terms, [leaf.grad for leaf in leaves]))
    for loss, terms, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(terms, results[0][1])
        torch.testing.assert_close(grads, results[0][2])


@check
def loss_with_frozen_branches_accumulates(on: Subject) -> None:
    """Mixed by the model, a branch and a mixture frozen; gradients add up, as with backward()."""
    grads = []
    criterion = AHBFLoss(3, impl=on.executor)
    for one_pass in (False, True):
        (weight, _), logits, _, target = loss_leaves(on.device)
        tas = [0.5 * (logits[0] + logits[1]), logits[2].detach()]
        logits[1] = logits[1].detach()
        if one_pass:
            weight.grad = grads[0].clone()
            criterion.forward_backward(logits, target, ta_logits=tas)
        else:
            criterion(logits, target, ta_logits=tas).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])


@check_each(("mean", "sum", "none"))
def loss_of_an_empty_batch(on: Subject, reduction: str) -> None:
    leaves, logits, scores, target = loss_leaves(on.device, batch=0)
    criterion = AHBFLoss(3, reduction=reduction, impl=on.executor)
    loss, terms = criterion(logits, target, scores=scores, return_terms=True)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum().item() == 0
    assert not any(value.item() for value in terms.values())
    loss.sum().backward()
    assert not any(leaf.grad.any() for leaf in leaves)
    if reduction == "mean":
        leaves, logits, scores, target = loss_leaves(on.device, batch=0)
        loss, _ = criterion.forward_backward(logits, target, scores=scores)
        assert loss.item() == 0
        assert not any(leaf.grad.any() for leaf in leaves)


@check
def loss_without_gradients(on: Subject) -> None:
    _, logits, _, target = loss_leaves(on.device)
    row = logits[0].detach()
    loss, _ = BaselineLoss(impl=on.executor).forward_backward([row], target)
    torch.testing.assert_close(loss, F.cross_entropy(row, target))


@check
def loss_under_autocast(on: Subject) -> None:
    """A linear layer under autocast gives bfloat16 logits; the loss is computed in float32, and the
    gradient is the same inside the region and after it.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 9).to(on.device)
    images, target = torch.randn(7, 6).to(on.device), torch.arange(7, device=on.device)
    scores = torch.rand(7, 2).softmax(1).to(on.device)
    with torch.autocast(on.device, torch.bfloat16):
        logits = layer(images)
        assert logits.dtype == torch.bfloat16
        loss, terms = AHBFLoss(2, impl=on.executor)(
            [logits, logits], target, scores=[scores], return_terms=True
        )
        (inside,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in terms.values())
    exact = logits.detach().double()
    expected = AHBFLoss(2, impl="reference")([exact, exact], target, scores=[scores.double()])
    # Some 25 roundings of float32.
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    assert torch.equal(torch.autograd.grad(loss, layer.weight)[0], inside)
