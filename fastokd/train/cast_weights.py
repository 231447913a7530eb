"""Weights in bf16 or fp16, cast once per step instead of by autocast in every layer."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.models import BranchedModel
from fastokd.models.branched import one_by_one
from fastokd.train.optimizers import FlatParameters, Optimizers
from fastokd.train.precision import autocast, image_dtype


class CastWeights:
    """Copies of the weights that autocast would cast in every forward pass, in its dtype.

    One operation makes all copies, and the forward pass uses them instead of the weights.
    The results are bit-identical: only weights are replaced that the forward pass casts and does
    not use otherwise, and whose gradient is cast once (``cast_parameters``). State dicts, averages
    and evaluation use the weights themselves.

    Args:
        chosen: the weights to replace, see ``cast_parameters``.
        dtype: of the copies.
    """

    def __init__(
        self,
        model: BranchedModel,
        optimizers: Optimizers,
        chosen: Sequence[nn.Parameter],
        dtype: torch.dtype,
    ) -> None:
        self._groups = [group for group in optimizers.groups if isinstance(group, FlatParameters)]
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for group in self._groups:
            copies |= group.make_copies(set(chosen), dtype)
        frozen = [parameter for parameter in chosen if parameter not in copies]
        self._frozen_copies: list[Tensor] = []
        for parameter in frozen:
            copy = torch.empty_like(parameter, dtype=dtype)
            copies[parameter] = nn.Parameter(copy, requires_grad=False)
            self._frozen_copies.append(copies[parameter])
        self._frozen: list[Tensor] = [*frozen]
        self._places = [
            (module._parameters, name, parameter, copies[parameter])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter in copies
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Cast the weights, once before the forward passes of a step."""
        for group in self._groups:
            group.update_copies()
        if self._frozen:
            torch._foreach_copy_(self._frozen_copies, self._frozen)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Context of a forward pass with the copies."""
        try:
            for parameters, name, _, copy in self._places:
                parameters[name] = copy
            yield
        finally:
            for parameters, name, parameter, _ in self._places:
                parameters[name] = parameter


def cast_parameters(model: BranchedModel, images: Tensor, precision: str) -> list[nn.Parameter]:
    """The parameters that a forward pass for these images only casts to the dtype of autocast, and
    at most once where gradients are recorded. Nothing is computed and nothing changes.

    Args:
        images: a batch; its values are not used.
        precision: "bf16" or "fp16".

    Raises:
        Exception: the forward pass cannot run on fake tensors; operators may raise anything.
    """
    parameters = [each for each in model.parameters() if each.dtype == torch.float32]
    run_branches, model.run_branches = model.run_branches, one_by_one  # no streams
    eager = torch.compiler.set_stance("force_eager")
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
            _Uses(parameters, image_dtype(precision)) as uses,
            autocast(precision, images.device),
            eager,
        ):
            # Fake copies, because the forward pass updates batch-norm statistics.
            buffers: dict[str, Tensor] = {
                name: mode.from_tensor(buffer) for name, buffer in model.named_buffers()
            }
            output = torch.func.functional_call(model, buffers, (mode.from_tensor(images),))
    finally:
        model.run_branches = run_branches
    returned = {id(value) for value in tree_leaves(tuple(output))}
    return [
        parameter
        for parameter in parameters
        if uses.casts[id(parameter)] and not uses.others[id(parameter)]
        if uses.differentiable_casts[id(parameter)] <= 1 and id(parameter) not in returned
    ]


class _Uses(TorchDispatchMode):
    """Counts the uses of parameters by operations."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        super().__init__()
        self.casts = {id(parameter): 0 for parameter in parameters}
        self.differentiable_casts, self.others = dict(self.casts), dict(self.casts)
        self._dtype = dtype

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        casts = function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self._dtype
        for key in map(id, tree_leaves((args, kwargs))):
            if key in self.casts:
                self.casts[key] += casts
                self.differentiable_casts[key] += casts and torch.is_grad_enabled()
                self.others[key] += not casts
        return function(*args, **kwargs)
