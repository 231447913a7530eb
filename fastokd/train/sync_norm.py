"""Batch norm over the images of all processes, for any class of norm and on any device.

``torch.nn.SyncBatchNorm`` needs other modules, runs only on GPUs, and waits in every layer.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastokd.ranks import gather_rows, rank_and_size, sum_over_ranks


def synchronized_batch_norm() -> contextlib.AbstractContextManager[Any]:
    """A context in which ``F.batch_norm`` in training uses mean and variance over the batches of
    all processes, which must have one size and run the same layers in the same order. Gradients are
    those of the sum of the processes' losses.
    """
    return _Synchronized() if rank_and_size()[1] > 1 else contextlib.nullcontext()


class _Synchronized(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` over all processes."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    channels, size = input.shape[1], rank_and_size()[1]
    count = input.numel() // channels * size
    with torch.no_grad():
        own = torch.stack(
            torch.var_mean(_at_least_float32(input), [0, *range(2, input.dim())], correction=0)
        )
        variances, means = gather_rows(own[None]).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    weight = mean.new_ones(channels) if weight is None else weight
    bias = mean.new_zeros(channels) if bias is None else bias
    return _Normalise.apply(input, weight, bias, mean, var, eps, count)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """``F.batch_norm`` with the mean and variance of ``count`` values over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: int,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, var)
        ctx.eps, ctx.count = eps, count
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        # Treat mean and variance as constants first; the gradients of weight and bias are the sums
        # that their part needs.
        direct, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grad, input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack((to_bias, to_weight)).to(mean.dtype)
        by_mean, by_var = sum_over_ranks(sums).div_(ctx.count).unbind(0)
        inverse = (var + ctx.eps).rsqrt()
        scale = inverse * weight
        slope = scale * inverse * by_var
        offset = slope * mean - scale * by_mean
        shape = (1, -1, *[1] * (input.dim() - 2))
        to_input = torch.addcmul(
            _at_least_float32(direct) + offset.view(shape),
            _at_least_float32(input),
            slope.view(shape),
            value=-1,
        )
        return to_input.to(input.dtype), to_weight, to_bias, None, None, None, None
