"""The Triton kernels against float64, on CPU tensors through Triton's interpreter.

Not collected by itself: ``test_triton_interpreter.py`` runs it in a process of its own, because the interpreter must be
chosen before Triton is first imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

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
from fastokd.kernels.triton.columns import FLOOR
from fastokd.methods.ahbf import ahbf_graph
from fastokd.ops.reference import EXECUTOR as REFERENCE
from fastokd.ops.reference import PROBABILITY_FLOOR
from fastokd.ops.triton import EXECUTOR as TRITON
from fastokd.ops.triton import INTERPRETED

torch.set_num_threads(1)
assert INTERPRETED, "set TRITON_INTERPRET=1 before Python starts"


def logits(count: int) -> list[Logits]:
    return [Logits(f"z{k}") for k in range(count)]


def entropies(count: int) -> list[CrossEntropy]:
    return [CrossEntropy(f"z{k}") for k in range(count)]


def mutual(count: int, **options: object) -> Graph:
    edges = [KL(f"z{i}", f"z{j}", **options) for i in range(count) for j in range(count) if i != j]
    return Graph("mutual", tuple(logits(count)), (*entropies(count), *edges))


def minimum() -> Graph:
    nodes = (*logits(3), Mixture("u", ("z0", "z1"), "w"), MinLogit("m", ("z0", "u", "z2")))
    return Graph("minimum", nodes, (CrossEntropy("z0"), KL("m", "z1", 1.0, 2.0, detach=True),
                                    KL("m", "u", 1.0, 2.5, detach=True, direction="student_first")))


def selection() -> Graph:
    nodes = (*logits(3), LowestCrossEntropy("s", ("z0", "z1", "z2")))
    return Graph("selection", nodes, (*entropies(3), *(KL("s", f"z{k}", 1.0, 2.0, detach=True) for k in range(3))), 0.1)


def memory(direction: str = "teacher_first") -> Graph:
    nodes = (*logits(2), External("x0"), External("x1"), ProbabilityMixture("h", ("x0", "z0"), (0.7, 0.3), 4.0),
             ProbabilityMixture("p", ("z0", "z1"), (0.5, 0.5), 4.0))
    options = {"temperature": 4.0, "t2_scaling": False, "direction": direction}
    return Graph("memory", nodes, (*entropies(2), KL("h", "z1", 0.5, detach=True, **options), KL("p", "z0", 0.5, **options),
                                   KL("x1", "z0", 1.0, detach=True, **options)))


def mixed_probabilities() -> Graph:
    nodes = (*logits(3), ProbabilityMixture("t", ("z0", "z1", "z2"), "w", 3.0))
    return Graph("mixed probabilities", nodes, (CrossEntropy("z0"), *(KL("t", f"z{k}", 1.0, 3.0, eps=1e-3 * k) for k in range(3))))


def outside_eps() -> Graph:
    return Graph("outside eps", (Logits("z0"), External("x")), (CrossEntropy("z0"), KL("x", "z0", 1.0, 2.0, detach=True, eps=1e-3)))


def first_order() -> Graph:
    nodes = (*logits(3), Mixture("u", ("z0", "z1", "z2"), "w"), Mixture("v", ("u", "z1"), (0.25, 0.5)), MinLogit("m", ("z0", "z1")))
    eps = {"eps": 1e-3, "eps_mode": "first_order"}
    return Graph("first order", nodes, (CrossEntropy("u"), KL("u", "z0", 1.0, 3.0, **eps), KL("v", "z2", 1.0, 1.5, detach=True, **eps),
                                        KL("m", "z1", 1.0, 2.0, detach=True, **eps)), 0.1)


def shared_weights() -> Graph:
    nodes = (*logits(3), Mixture("u", ("z0", "z1"), "w"), Mixture("v", ("u", "z2"), "w"), ProbabilityMixture("h", ("v", "z0"), "w", 2.0))
    return Graph("shared weights", nodes, (CrossEntropy("v"), KL("h", "u", 1.0, 2.0), KL("u", "z0", 1.0, 1.0)))


GRAPHS: dict[str, Callable[[], Graph]] = {
    "cross-entropy alone": lambda: Graph("alone", tuple(logits(1)), tuple(entropies(1)), 0.1),
    "cascade": lambda: ahbf_graph(4, lambda_self=2.0),
    "cascade, detached": lambda: ahbf_graph(2, detach_teacher=True),
    "cascade, exact eps": lambda: ahbf_graph(3, lambda_self=1.0, teacher_eps=1e-3, label_smoothing=0.1),
    "cascade of eight": lambda: ahbf_graph(8),
    "mutual": lambda: mutual(3, temperature=3.0),
    "mutual, temperature 1": lambda: mutual(2, temperature=1.0),
    "mutual, odd temperature": lambda: mutual(2, temperature=1.7, t2_scaling=False),
    "mutual, student first": lambda: mutual(2, temperature=4.0, direction="student_first"),
    "minimum": minimum,
    "selection": selection,
    "memory": memory,
    "memory, student first": lambda: memory("student_first"),
    "mixed probabilities": mixed_probabilities,
    "outside eps": outside_eps,
    "first-order eps": first_order,
    "shared weights": shared_weights,
}


@dataclass
class Batch:
    """Inputs of one call, in the order of the executor's arguments."""

    plan: Plan
    logits: list[Tensor]
    weights: list[Tensor]
    externals: list[Tensor]
    target: Tensor
    term_weights: Tensor
    grad_rows: Tensor
    needs: list[bool] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        return [*self.logits, *self.weights, *self.externals, self.target, self.term_weights, self.grad_rows]

    def double(self) -> "Batch":
        def cast(values: Sequence[Tensor]) -> list[Tensor]:
            return [value.double() for value in values]
        target = self.target.double() if self.target.is_floating_point() else self.target
        return Batch(self.plan, cast(self.logits), cast(self.weights), cast(self.externals), target, self.term_weights.double(),
                     self.grad_rows.double(), self.needs)


def make(graph: Graph, batch: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, soft: bool = False,
         seed: int = 0) -> Batch:
    plan = lower(graph)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return Batch(
        plan,
        [(normal(batch, classes) * scale).to(dtype) for _ in range(plan.num_logits)],
        [normal(batch, width).softmax(1) for width in plan.weight_widths],
        [normal(batch, classes).softmax(1) for _ in range(plan.num_externals)],
        normal(batch, classes).softmax(1) if soft else torch.randint(classes, (batch,), generator=random),
        normal(plan.num_terms).abs().to(compute),
        normal(batch).abs().to(compute),
        [True] * (plan.num_logits + len(plan.weight_widths)))


def run(executor: object, inputs: Batch) -> list[Tensor | None]:
    """Rows, each term, each gradient."""
    arguments = (inputs.logits, inputs.weights, inputs.externals, inputs.target, inputs.term_weights)
    rows, terms, stats = executor.forward(inputs.plan, *arguments)
    grads = executor.backward(inputs.plan, inputs.grad_rows, *arguments, stats, inputs.needs)
    return [rows, *terms, *grads]


def check(inputs: Batch, slack: float = 32, huge: bool = False) -> None:
    """The kernels' error is at most twice the reference's in the same dtype, plus ``slack`` units of rounding.

    Units are those of float32 arithmetic at the size of the result, or of the logits for values: a KL is a difference
    of numbers of that size. So is, with an undetached teacher, the gradient of a logit, and that of a mixing weight is
    its product with logits: ``huge`` allows for that where it shows. The reference escapes it only where a softmax is
    exactly one-hot. A gradient is also rounded to its own dtype (half a unit; both executors do that).
    """
    before = [tensor.clone() for tensor in inputs.tensors()]
    found, plain, truth = run(TRITON, inputs), run(REFERENCE, inputs), run(REFERENCE, inputs.double())
    unit = torch.finfo(inputs.term_weights.dtype).eps
    size = max((float(row.abs().max()) for row in inputs.logits if row.numel()), default=0.0)
    values = 1 + inputs.plan.num_terms
    for number, (mine, theirs, exact) in enumerate(zip(found, plain, truth, strict=True)):
        if exact is None:
            assert mine is None
            continue
        assert mine.shape == exact.shape
        assert mine.dtype == theirs.dtype
        if not exact.numel():
            continue
        scale = float(exact.abs().max())
        if number < values or huge:
            scale = max(scale, size, size * size if number >= values + len(inputs.logits) else 0.0)
        own = torch.finfo(mine.dtype).eps * float(exact.abs().max()) if mine.dtype != inputs.term_weights.dtype else 0.0
        error, other = float((mine.double() - exact).abs().max()), float((theirs.double() - exact).abs().max())
        assert error <= 2 * other + slack * unit * scale + own, f"output {number}: error {error:.3g}, reference {other:.3g}, scale {scale:.3g}"
    for tensor, copy in zip(inputs.tensors(), before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kind_of_node_and_term(name: str, soft: bool) -> None:
    # 300 classes: one whole chunk of 256 and a rest, in the regime of one warp or more per row.
    check(make(GRAPHS[name](), 2, 300, soft=soft))


@pytest.mark.parametrize("name", ["cascade", "memory", "selection", "first-order eps"])
@pytest.mark.parametrize(("batch", "classes"), [
    (1, 2),      # the fewest classes: most lanes have none
    (17, 10),    # rows share a warp; the last program's rows are not all there
    (3, 32),     # the most classes of that regime
    (2, 100),    # a warp holds the row, columns are loaded one by one
    (2, 256),    # a warp holds the row as vectors
    (2, 1000),   # several warps, one chunk, 16-byte loads
    (2, 1001),   # rows not aligned for vectors
    (1, 4500),   # several chunks and a rest
])
def test_one_shape_per_regime(name: str, batch: int, classes: int) -> None:
    check(make(GRAPHS[name](), batch, classes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 1001])
def test_dtypes(dtype: torch.dtype, classes: int) -> None:
    check(make(GRAPHS["cascade"](), 2, classes, dtype))


@pytest.mark.parametrize("num_branches", [2, 3, 5, 8])
def test_numbers_of_branches(num_branches: int) -> None:
    check(make(ahbf_graph(num_branches), 3, 10))


def test_empty_batch() -> None:
    inputs = make(GRAPHS["cascade"](), 0, 10)
    check(inputs)
    rows, terms, grads = fused(inputs)
    assert rows.shape == (0,)
    assert terms.shape == (inputs.plan.num_terms, 0)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in (*inputs.logits, *inputs.weights)]


@pytest.mark.parametrize("name", ["cascade", "mixed probabilities", "mutual, student first", "minimum", "cascade, exact eps"])
@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_huge_and_tiny_logits(name: str, scale: float) -> None:
    check(make(GRAPHS[name](), 3, 100, scale=scale), huge=scale > 1)


@pytest.mark.parametrize("name", ["cascade", "mutual"])
def test_a_common_offset_costs_no_accuracy_in_the_gradient(name: str) -> None:
    inputs = make(GRAPHS[name](), 3, 100)
    inputs.logits = [row + 1000.0 for row in inputs.logits]
    check(inputs)


def test_opposed_branches_keep_their_mixtures_finite() -> None:
    # The mixture's maximum is far below the mixture of the maxima: its exponentials must not all vanish.
    inputs = make(GRAPHS["cascade"](), 2, 100)
    for m, row in enumerate(inputs.logits):
        row[:, m] = 2000.0
    check(inputs, huge=True)


def test_identical_rows() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    inputs.logits = [inputs.logits[0].clone() for _ in inputs.logits]
    check(inputs)


def test_one_hot_scores() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    for k, weight in enumerate(inputs.weights):
        weight.zero_()
        weight[:, k % 2] = 1.0
    check(inputs)


def test_weights_that_do_not_add_up_to_one() -> None:
    inputs = make(GRAPHS["cascade"](), 2, 1001)
    inputs.weights = [weight * 4 - 2 for weight in inputs.weights]
    check(inputs)


def test_strided_logits_and_expanded_weights() -> None:
    inputs = make(GRAPHS["shared weights"](), 3, 100)
    first, second, third = inputs.logits
    inputs.logits = [first.t().contiguous().t(), torch.stack([second, second], 2)[:, :, 0], torch.cat([third, third], 1)[:, 100:]]
    inputs.weights = [torch.tensor([0.25, 0.75]).expand(3, 2)]
    check(inputs)


def test_padded_rows_are_loaded_as_vectors() -> None:
    inputs = make(GRAPHS["cascade"](), 2, 1001, torch.bfloat16)
    inputs.logits = [torch.nn.functional.pad(row, (0, 7))[:, :1001] for row in inputs.logits]
    check(inputs)


def test_expanded_upstream_gradient() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 10)
    inputs.grad_rows = torch.tensor(0.125).expand(3)
    check(inputs)


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3), (4, 5, 6), (0, 1, 2, 3)])
def test_frozen_inputs(frozen: tuple[int, ...]) -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    inputs.needs = [k not in frozen for k in range(7)]
    check(inputs)


def test_labels_out_of_range_are_never_a_number() -> None:
    inputs = make(GRAPHS["cascade"](), 3, 100)
    inputs.target = torch.tensor([5, 100, -1])
    found, truth = run(TRITON, inputs), run(REFERENCE, inputs)
    for mine, theirs in zip(found, truth, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_zero_probabilities_from_outside() -> None:
    inputs = make(GRAPHS["memory"](), 2, 100)
    for row in inputs.externals:
        row[:, :50] = 0.0
    check(inputs)


def test_bits_repeat() -> None:
    inputs = make(GRAPHS["cascade"](), 2, 300)
    for one, two in zip(run(TRITON, inputs), run(TRITON, inputs), strict=True):
        assert torch.equal(one, two)


def fused(inputs: Batch) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    return TRITON.loss_and_grad(inputs.plan, inputs.logits, inputs.weights, inputs.externals, inputs.target, inputs.term_weights,
                                inputs.needs)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_fused_kernel_equals_the_two(name: str) -> None:
    inputs = make(GRAPHS[name](), 3, 40)
    inputs.grad_rows = torch.full((3,), 1 / 3)
    rows, terms, grads = fused(inputs)
    for mine, theirs in zip([rows, *terms, *grads], run(TRITON, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_floor_is_the_references() -> None:
    assert FLOOR.value == PROBABILITY_FLOOR
