"""The losses alone: the graphs of AHBF at seven sizes, single losses of other libraries, every
divergence and every method's graph at one size.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.environment import copy_bandwidth
from bench.gpu.part import Context, Part, Row
from bench.gpu.results import Results
from bench.suite import SIZES
from fastokd.errors import first_line
from fastokd.graph import DIVERGENCES, KL, CrossEntropy, Graph, Logits, lower, with_divergence
from fastokd.graph.plan import Plan
from fastokd.methods import get_method, list_methods
from fastokd.ops import evaluate, forward_backward
from fastokd.train.config import TrainConfig

LARGE_SIZE = (16384, 1000)
"""131 MB of bfloat16 logits, which exceed the L2 cache (50 MB on an H200)."""
SINGLE_SIZES = ((4096, 1000), (4096, 32_000), (1024, 100_000))
CODE_SIZES = ((128, 100), (96, 1000), (1024, 1000), (1024, 21841))
FLOAT_SIZES = ((128, 100), (1024, 1000), (1024, 21841))
METHOD_SIZE = (1024, 1000)
NUM_BRANCHES = 4
TEMPERATURE = 3.0
_MANY_BYTES = 2**27
"""A row with more bytes of logits takes longer."""
SINGLES = {
    "cross-entropy": Graph("cross_entropy", (Logits("student"),), (CrossEntropy("student"),)),
    "KL": Graph(
        "kl",
        (Logits("student"), Logits("teacher")),
        (KL("teacher", "student", 1.0, TEMPERATURE, detach=True),),
    ),
}
"""A loss that other libraries have too; the teacher of the KL is a constant, as they have it."""

PASSES = ("forward", "both")
"""The loss alone, and with its gradients."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a graph: the arguments of ``evaluate`` after the plan, and what
    gradients are taken for.
    """

    logits: list[Tensor]
    weights: list[Tensor]
    externals: list[Tensor]
    target: Tensor
    term_weights: Tensor

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        return self.logits, self.weights, self.externals, self.target, self.term_weights

    def leaves(self) -> list[Tensor]:
        return [value for value in (*self.logits, *self.weights) if value.requires_grad]

    def least_bytes(self) -> tuple[int, int]:
        """The bytes to move: for the forward pass every row read once, with gradients these
        written once too.
        """
        read = sum(value.nbytes for value in (*self.logits, *self.externals))
        return read, read + sum(value.nbytes for value in self.logits if value.requires_grad)


def make_inputs(
    graph: Graph, batch: int, num_classes: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Random logits of standard deviation 3, mixing weights on the simplex, external probabilities,
    and labels.

    Rows that only teach as constants need no gradient, as those of a frozen teacher.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    constant = {
        term.teacher for term in graph.terms if not isinstance(term, CrossEntropy) and term.detach
    }
    learning = {
        name
        for term in graph.terms
        for name in ((term.node,) if isinstance(term, CrossEntropy) else (term.student,))
    }
    mixed = {name for node in graph.nodes for name in node.inputs}
    logits = [
        normal(batch, num_classes)
        .mul_(3)
        .to(dtype)
        .requires_grad_(name in learning | mixed or name not in constant)
        for name in graph.logits
    ]
    weights = [
        normal(batch, width).softmax(1).requires_grad_() for width in graph.weight_sources.values()
    ]
    externals = [normal(batch, num_classes).softmax(1).to(dtype) for _ in graph.externals]
    target = torch.randint(0, num_classes, (batch,), generator=generator, device=device)
    return Inputs(
        logits,
        weights,
        externals,
        target,
        torch.tensor([term.weight for term in graph.terms], device=device),
    )


Cases = dict[str, tuple[Callable[[], Any], bool]]
"""The measured calls by name, and whether each is in a CUDA graph."""


def _graph_cases(context: Context, graph: Graph, inputs: Inputs, passes: Sequence[str]) -> Cases:
    """The executors, with PyTorch's own operations as the plain one."""
    plan, fused = lower(graph), _fused(context)

    def forward(impl: str) -> Tensor:
        return evaluate(plan, *inputs.arguments(), impl)[0].mean()

    cases = _in_modes(
        passes,
        inputs.leaves(),
        {
            "eager": (partial(forward, "reference"), (False, True)),
            "compiled": (_compiled(lambda: forward("reference")), (True,)),
            "fused": (partial(forward, fused), (False, True)),
        },
    )
    return cases | _kernel_cases(plan, inputs, fused)


def _kernel_cases(plan: Plan, inputs: Inputs, fused: str) -> Cases:
    """The computation of a step (loss and gradients in one pass, and the mean) and the kernels
    alone.
    """

    def at_once() -> Any:
        rows, _, gradients = forward_backward(plan, *inputs.arguments(), fused)
        return rows.mean(), gradients

    def forward() -> Tensor:
        with torch.no_grad():
            return evaluate(plan, *inputs.arguments(), fused)[0]

    return {
        "one kernel graph/both": (at_once, True),
        "kernel alone graph/forward": (forward, True),
        "kernel alone graph/both": (
            lambda: forward_backward(plan, *inputs.arguments(), fused),
            True,
        ),
    }


def _in_modes(
    passes: Sequence[str], leaves: list[Tensor], providers: dict[str, tuple[Call, tuple[bool, ...]]]
) -> Cases:
    """Each provider's passes, by itself or in a CUDA graph as it says."""
    make = {"forward": _without_gradients, "both": partial(_with_gradients, leaves=leaves)}
    return {
        f"{name} graph/{which}" if graph else f"{name}/{which}": (partial(make[which], call), graph)
        for name, (call, modes) in providers.items()
        for graph in modes
        for which in passes
    }


def _without_gradients(call: Call) -> Tensor:
    with torch.no_grad():
        return call()


def _with_gradients(call: Call, leaves: list[Tensor]) -> Any:
    return torch.autograd.grad(call(), leaves)


def _fused(context: Context) -> str:
    return "triton" if context.device.type == "cuda" else "cpu"


def _compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def _single_cases(context: Context, name: str, inputs: Inputs) -> tuple[Cases, dict[str, str]]:
    """As ``_graph_cases``, with PyTorch's own functions as the plain ones, and other libraries; why
    one of these is not there.
    """
    student, teacher, target = inputs.logits[0], inputs.logits[-1], inputs.target

    def divergence(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        own, other = (F.log_softmax(row / TEMPERATURE, 1) for row in (student, teacher))
        return loss(own, other) * TEMPERATURE**2

    kl_div = partial(F.kl_div, reduction="batchmean", log_target=True)
    plain: Call = {
        "cross-entropy": lambda: F.cross_entropy(student, target),
        "KL": lambda: divergence(kl_div),
    }[name]
    plan, fused = lower(SINGLES[name]), _fused(context)
    leaves, both = inputs.leaves(), (False, True)
    cases = _in_modes(
        PASSES,
        leaves,
        {
            "eager": (plain, both),
            "compiled": (_compiled(plain), (True,)),
            "fused": (lambda: evaluate(plan, *inputs.arguments(), fused)[0].mean(), both),
        },
    )
    cases |= _kernel_cases(plan, inputs, fused)
    reasons = {}
    liger = _import("liger_kernel", "liger_kernel.transformers")
    quack = _import("quack", "quack.cross_entropy")
    if isinstance(liger, str):
        reasons["liger"] = liger
    elif name == "KL":
        kl_loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
        cases |= _in_modes(PASSES, leaves, {"liger": (partial(divergence, kl_loss), both)})
    else:
        # It overwrites the logits with their gradient, so it gets separate logits and is timed on
        # the result of its last call.
        loss, own = liger.LigerCrossEntropyLoss(), student.detach().clone().requires_grad_()
        cases |= _in_modes(PASSES, [own], {"liger": (lambda: loss(own, target), both)})
    if isinstance(quack, str) or name == "KL":
        reasons["quack"] = quack if isinstance(quack, str) else "no such loss"
    else:
        cases |= _in_modes(
            PASSES,
            leaves,
            {"quack": (lambda: quack.cross_entropy(student, target, reduction="mean"), both)},
        )
    return cases, reasons


def _import(package: str, module: str) -> Any:
    """A module of an optional package, or why it is not there."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that cannot be loaded here must not lose the row
        return f"cannot be imported: {first_line(error)}"


def _measure(
    context: Context,
    graph: Graph,
    single: str | None,
    batch: int,
    num_classes: int,
    dtype: torch.dtype,
    passes: Sequence[str],
) -> dict[str, Any]:
    inputs = make_inputs(graph, batch, num_classes, dtype, context.device)
    cases, reasons = (
        _single_cases(context, single, inputs)
        if single
        else (_graph_cases(context, graph, inputs, passes), {})
    )
    forward, both = inputs.least_bytes()
    found: dict[str, Any] = {
        "batch": batch,
        "num_classes": num_classes,
        "dtype": str(dtype).removeprefix("torch."),
        "fused": _fused(context),
        "nodes": len(graph.nodes),
        "terms": len(graph.terms),
        "bytes_forward": forward,
        "bytes_both": both,
    }
    spreads = {}
    for name, (call, in_graph) in cases.items():
        try:
            with context.not_compiled():
                found[name], *spreads[name] = context.seconds(call, in_graph)
        except Exception as error:  # one case that cannot run must not lose the others
            found[name], reasons[name] = None, first_line(error)
    return found | {"spread": spreads, "reasons": reasons}


def _cases(
    context: Context,
) -> Iterator[tuple[dict[str, str], Graph, tuple[int, int], torch.dtype, Sequence[str]]]:
    """Every row in the order of its worth: what it is of, its graph, (B, C), dtype and passes.

    Most of a row's time goes into compiling PyTorch's operations, once for each pass.
    """
    half, full = torch.bfloat16, torch.float32
    tiny = ((8, 10), (4, 100))

    def of_method(name: str, preset: str = "paper") -> tuple[dict[str, str], Graph]:
        config = TrainConfig(
            method=name, preset=preset, branches=NUM_BRANCHES if name == "ahbf" else None
        )
        loss = get_method(name).loss_class(
            num_branches=config.num_branches(), **config.loss_options()
        )
        return {"loss": name, "preset": preset}, loss.graph

    def of_term(divergence: str) -> tuple[dict[str, str], Graph]:
        graph = SINGLES["cross-entropy"].with_teacher("student", temperature=TEMPERATURE)
        return {"loss": divergence, "preset": "frozen teacher"}, with_divergence(graph, divergence)

    def of_single(name: str) -> tuple[dict[str, str], Graph]:
        return {"loss": name}, SINGLES[name]

    for size in tiny if context.dry else (*SIZES, LARGE_SIZE):
        yield *of_method("ahbf"), size, half, PASSES
    for size in tiny[:1] if context.dry else SINGLE_SIZES:
        for name in SINGLES:
            yield *of_single(name), size, half, PASSES
    for size in tiny[:1] if context.dry else CODE_SIZES:
        yield *of_method("ahbf", "code"), size, half, PASSES[1:]
    for size in tiny[:1] if context.dry else FLOAT_SIZES:
        yield *of_method("ahbf"), size, full, PASSES[1:]
    for size in () if context.dry else SINGLE_SIZES[:2]:
        for name in SINGLES:
            yield *of_single(name), size, full, PASSES
    for divergence in DIVERGENCES:
        size = tiny[0] if context.dry else METHOD_SIZE
        yield *of_term(divergence), size, half, PASSES[1:]
    for name in list_methods():
        if name != "ahbf":
            yield *of_method(name), tiny[0] if context.dry else METHOD_SIZE, half, PASSES[1:]


def _rows(context: Context, results: Results) -> Iterator[Row]:
    if "copy_bandwidth_gb_s" not in results.values:
        results.head(copy_bandwidth_gb_s=copy_bandwidth(context)[0] / 1e9)
    for about, graph, (batch, num_classes), dtype, passes in _cases(context):
        words = [*about.values(), f"{batch} x {num_classes}", str(dtype).removeprefix("torch.")]

        def measure(
            about: dict[str, str] = about,
            graph: Graph = graph,
            batch: int = batch,
            num_classes: int = num_classes,
            dtype: torch.dtype = dtype,
            passes: Sequence[str] = passes,
        ) -> dict[str, Any]:
            return about | _measure(
                context,
                graph,
                None if "preset" in about else about["loss"],
                batch,
                num_classes,
                dtype,
                passes,
            )

        large = len(graph.logits) * batch * num_classes * dtype.itemsize > _MANY_BYTES
        yield Row(", ".join(words), context.needs(1.0 if large else 0.6), measure)


def _line(row: dict[str, Any]) -> str:
    def us(name: str) -> str:
        return "-" if row.get(name) is None else f"{1e6 * row[name]:.1f}"

    return (
        f"forward and gradients, us: eager {us('eager/both')}, in a graph {us('eager graph/both')},"
        f" compiled {us('compiled graph/both')}, fused {us('fused graph/both')}, one kernel"
        f" {us('one kernel graph/both')}"
        + "".join(f"; {name}: {reason}" for name, reason in row["reasons"].items())
    )


PART = Part("kernels", 0.6, _rows, _line, sources=("bench/gpu/environment.py", "bench/suite.py"))
