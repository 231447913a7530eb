"""The operators ``graph_forward`` and ``graph_backward``, and the functions that execute a plan.

The operators are defined with ``torch.library`` primitives and are opaque to tracing. They take the
plan as text, because converting lists of numbers in every call takes longer than launching a
kernel. Autograd is a ``torch.autograd.Function`` around them, which costs a third less per call
than ``torch.library.register_autograd``. The reference executor and ``forward_backward`` bypass
them.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastokd.graph.plan import Plan, decode_plan
from fastokd.ops.executors import Case, load, resolve
from fastokd.ops.inputs import Gradients, Inputs, Outputs, compute_dtype, is_transformed
from fastokd.ops.reference import term_values, weighted_rows

# Any, because torch does not annotate the methods of Library.
_library: Any = torch.library.Library("fastokd", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "graph_forward(Tensor[] logits, Tensor[] weights, Tensor[] externals, Tensor target, Tensor"
    " term_weights, str plan, str executor) -> (Tensor rows, Tensor terms, Tensor stats)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "graph_backward(Tensor grad_rows, Tensor[] logits, Tensor[] weights, Tensor[] externals, Tensor"
    " target, Tensor term_weights, Tensor stats, str plan, str executor, bool[] needs)"
    " -> Tensor[]",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@lru_cache(maxsize=512)
def plan_text(plan: Plan) -> str:
    """The plan as JSON, the operators' argument."""
    return json.dumps(plan.encode())


@lru_cache(maxsize=512)
def _plan(text: str) -> Plan:
    """The inverse of ``plan_text``."""
    ints, floats = json.loads(text)
    return decode_plan(tuple(ints), tuple(floats))


# torch passes the operator's arguments by position, in the order of its definition.
def _forward(*arguments: Any) -> Outputs:
    *tensors, text, executor = arguments
    return load(executor).forward(_plan(text), Inputs(*tensors))


def _forward_fake(*arguments: Any) -> Outputs:
    logits, *_, text, executor = arguments
    plan = _plan(text)
    batch, dtype = logits[0].shape[0], compute_dtype(logits[0])
    shapes = ((batch,), (plan.num_terms, batch), (load(executor).num_stats(plan), batch))
    rows, terms, stats = (logits[0].new_empty(shape, dtype=dtype) for shape in shapes)
    return rows, terms, stats


def _backward(grad_rows: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, stats, text, executor, needs = arguments
    inputs = Inputs(*tensors)
    grads = load(executor).backward(_plan(text), grad_rows, inputs, stats, needs)
    # A list of tensors cannot hold None: an empty tensor replaces a gradient that is not needed.
    # Gradients are contiguous, as in ``_backward_fake``.
    first = inputs.logits[0]
    return [first.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


def _backward_fake(
    grad_rows: Tensor, logits: list[Tensor], weights: list[Tensor], *arguments: Any
) -> list[Tensor]:
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if need
        else logits[0].new_empty(0)
        for tensor, need in zip((*logits, *weights), arguments[-1], strict=True)
    ]


for _key in ("CPU", "CUDA"):
    _library.impl("graph_forward", _forward, _key)
    _library.impl("graph_backward", _backward, _key)
torch.library.register_fake("fastokd::graph_forward", _forward_fake, lib=_library)
torch.library.register_fake("fastokd::graph_backward", _backward_fake, lib=_library)


def _constant_when_traced(function: Any) -> Any:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which is slow."""
    function._dynamo_marked_constant = True
    return function


# While torch.compile traces, these two functions run as plain Python, and their results become
# constants. Their arguments and results have types that tracing supports (not ``Case``).
@_constant_when_traced
def _text(plan: Plan) -> str:
    return plan_text(plan)


@_constant_when_traced
def _executor_for(impl: str, plan: Plan, device: str, dtype: torch.dtype) -> str:
    return resolve(impl, plan, Case(device, dtype))


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """True if an executor can be called directly instead of by the operator, in half of the time.

    Otherwise something replaces or observes calls of operators: a transformation, a dispatch mode,
    a subclass of tensors, or a negation that is not computed yet.
    """
    if is_transformed() or torch._C._len_torch_dispatch_stack():
        return False
    tensors = list(tensors)
    return _PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class _GraphFunction(torch.autograd.Function):
    """Autograd around an executor. ``tensors`` are logits, weights, external rows.

    ``torch.func`` cannot transform this form of a function, but it is called in a third of the
    time of ``_OperatorFunction``.

    ``mean`` announces that the mean of the rows will probably be differentiated. An executor on the
    CPU then computes the gradients in the forward pass, where it reads the logits only once. The
    backward pass uses them if its incoming gradient is that of the mean. Otherwise later calls with
    the same plan compute gradients in the backward pass only, until one receives that of the mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: bool,
        plan: Plan,
        executor: str,
        target: Tensor,
        term_weights: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs, chosen = Inputs(*_split(plan, tensors), target, term_weights), load(executor)
        needs = ctx.needs_input_grad[5 : 5 + len(inputs.differentiable)]
        stats: Tensor | None = None
        ctx.early = None
        ctx.may_be_early = mean and any(needs) and getattr(chosen, "computes_early", False)
        if ctx.may_be_early and plan not in _not_the_mean:
            rows, terms, ctx.early = chosen.forward_backward(plan, inputs, needs)
        else:
            rows, terms, stats = chosen.forward(plan, inputs)
        _save(ctx, (plan, executor, target, term_weights, *tensors), (rows, terms, stats))
        return rows, terms, stats

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, grad_rows, ctx.needs_input_grad[1:])


_not_the_mean: set[Plan] = set()
"""Plans whose last incoming gradient was not that of the mean."""


def _early_gradients(ctx: Any, grad_rows: Tensor) -> Gradients | None:
    """The gradients from the forward pass if ``grad_rows`` is the gradient of the mean, once."""
    batch = len(grad_rows)
    if not batch or not getattr(ctx, "may_be_early", False):
        return None
    early: Gradients | None
    early, ctx.early = ctx.early, None
    of_mean = torch.full((), 1 / batch, dtype=grad_rows.dtype)
    if grad_rows.stride(0) == 0 and bool(grad_rows[0] == of_mean):
        _not_the_mean.discard(ctx.plan)
        return early
    _not_the_mean.add(ctx.plan)
    return None


class _OperatorFunction(torch.autograd.Function):
    """Autograd around the operator, for traced, transformed and subclassed tensors."""

    @staticmethod
    def forward(
        plan: Plan, executor: str, target: Tensor, term_weights: Tensor, *tensors: Tensor
    ) -> Outputs:
        inputs = *_split(plan, tensors), target, term_weights
        outputs: Outputs = torch.ops.fastokd.graph_forward(*inputs, _text(plan), executor)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_rows, ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> None:
        raise NotImplementedError(_unsupported(arguments[1], "torch.vmap"))


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Keep what the backward pass needs."""
    plan, executor, target, term_weights, *tensors = inputs
    _, terms, stats = outputs
    ctx.plan, ctx.executor = plan, executor
    ctx.mark_non_differentiable(*[each for each in (terms, stats) if each is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target, term_weights, terms, stats, *tensors)


def _gradients(
    ctx: Any, grad_rows: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's arguments from the plan on, of which some are needed."""
    saved = ctx.saved_tensors
    target, term_weights, terms, stats, *tensors = saved
    if grad_rows is None:
        return (None,) * (4 + len(tensors))
    logits, weights, externals = _split(ctx.plan, tensors)
    needs = list(needed[4 : 4 + len(logits) + len(weights)])
    inputs = logits, weights, externals, target, term_weights
    with torch.no_grad():
        if early := _early_gradients(ctx, grad_rows):
            grads = early
        elif stats is None or is_plain((grad_rows, *saved)):
            executor = load(ctx.executor)
            if stats is None:
                stats = executor.forward(ctx.plan, Inputs(*inputs))[2]
            grads = executor.backward(ctx.plan, grad_rows, Inputs(*inputs), stats, needs)
        else:
            grads = torch.ops.fastokd.graph_backward(
                grad_rows, *inputs, stats, _text(ctx.plan), ctx.executor, needs
            )
            grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        grad_term_weights = None
        if needed[3]:
            grad_term_weights = terms * grad_rows
            grad_term_weights = (
                grad_term_weights.sum(1) if term_weights.dim() == 1 else grad_term_weights.t()
            )
    if torch.is_grad_enabled():  # create_graph=True: the gradients may be differentiated again
        once = partial(_NoSecondDerivative.apply, ctx.executor)
        grads = [None if grad is None else once(grad, grad_rows, *tensors) for grad in grads]
    return (None, None, None, grad_term_weights, *grads, *(None,) * len(externals))


class _NoSecondDerivative(torch.autograd.Function):
    """Return a gradient unchanged; differentiating it again raises an error."""

    @staticmethod
    def forward(executor: str, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.executor = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(_unsupported(ctx.executor, "second derivatives"))


def _unsupported(executor: str, feature: str) -> str:
    return f"impl='{executor}' does not support {feature}; use impl='reference' (plain PyTorch)"


def _split(
    plan: Plan, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    start, end = plan.num_logits, plan.num_logits + len(plan.weight_widths)  # of the weights
    return list(tensors[:start]), list(tensors[start:end]), list(tensors[end:])


def evaluate(
    plan: Plan,
    logits: Sequence[Tensor],
    weights: Sequence[Tensor],
    externals: Sequence[Tensor],
    target: Tensor,
    term_weights: Tensor,
    impl: str = "auto",
    *,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Execute a plan on the tensors of ``Inputs``; no gradient flows into target and externals.

    ``mean`` speeds up the backward pass of the mean of the rows on the CPU; it changes no result.

    Returns:
        The loss of each sample [B], and the unweighted value of each term [T, B], detached.

    Raises:
        ConfigError, ExecutorUnavailable: see ``resolve``.
    """
    executor = _executor_for(impl, plan, logits[0].device.type, logits[0].dtype)
    if executor == "reference":  # bypasses the operator: supports second derivatives
        terms = term_values(plan, Inputs(logits, weights, externals, target, term_weights))
        return weighted_rows(term_weights, terms), terms.detach()
    tensors = (*logits, *weights, *externals)
    arguments = plan, executor, target, term_weights, *tensors
    if is_plain(arguments[2:]):
        rows, terms, _ = _GraphFunction.apply(mean and torch.is_grad_enabled(), *arguments)
    else:
        rows, terms, _ = _OperatorFunction.apply(*arguments)
    return rows, terms


@torch.no_grad()
def forward_backward(
    plan: Plan,
    logits: Sequence[Tensor],
    weights: Sequence[Tensor],
    externals: Sequence[Tensor],
    target: Tensor,
    term_weights: Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Gradients]:
    """Execute a plan and differentiate the mean loss, in one pass over the logits.

    Returns:
        As ``evaluate``, and the gradients of logits and weights, None for tensors that do not
        require one. Nothing is recorded for autograd.

    Raises:
        ConfigError, ExecutorUnavailable: see ``resolve``.
    """
    executor = load(resolve(impl, plan, Case(logits[0].device.type, logits[0].dtype)))
    inputs = Inputs(logits, weights, externals, target, term_weights)
    needs = [tensor.requires_grad for tensor in inputs.differentiable]
    return executor.forward_backward(plan, inputs, needs)
