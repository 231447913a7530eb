"""The executors and the choice among them.

An executor is a module with a constant ``EXECUTOR``, imported when it is first considered: a
machine without a GPU never imports Triton.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastokd.errors import ExecutorUnavailable
from fastokd.graph.plan import Plan
from fastokd.ops.inputs import Gradients, Inputs, Needs, Outputs
from fastokd.registry import Registry


@dataclass(frozen=True)
class Case:
    """The device type and the dtype of the logits that an executor would run on."""

    device: str
    dtype: torch.dtype


class Executor(Protocol):
    """The interface of an executor. It never writes to its inputs.

    An attribute ``computes_early = True`` permits that gradients are computed in the forward pass,
    by ``forward_backward``: the host must be able to read a gradient without waiting.
    """

    name: str

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        """The reason why it cannot run the plan (None: any plan) in this case; None if it can."""

    def num_stats(self, plan: Plan) -> int:
        """Number of values per row that the forward pass keeps for the backward pass."""

    def forward(self, plan: Plan, inputs: Inputs) -> Outputs:
        """Rows, terms and statistics."""

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Needs
    ) -> Gradients:
        """The gradients of ``sum(grad_rows * rows)``."""

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Needs
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Rows, terms, and the gradients of the mean of the rows, in one pass over the logits."""


_executors: Registry[Executor] = Registry(
    "impl",
    "EXECUTOR",
    {name: f"fastokd.ops.{name}" for name in ("reference", "cpu", "triton")},
    reserved=["auto"],
)
_preferred = {"cuda": ("triton",), "cpu": ("cpu",)}
_warned: set[str] = set()


def register_executor(name: str, module: str, devices: Sequence[str] = ()) -> None:
    """Add the ``EXECUTOR`` of a module; ``auto`` tries it first on these device types."""
    _executors.register(name, module)
    for device in devices:
        _preferred[device] = (name, *_preferred.get(device, ()))


def check_impl(impl: str) -> None:
    """Raise a ConfigError if ``impl`` is neither an executor's name nor "auto"."""
    if impl != "auto":
        _executors.check(impl)


def load(name: str) -> Executor:
    """The executor of that name; an ExecutorUnavailable if its module cannot be imported here."""
    check_impl(name)
    try:
        return _executors.get(name)
    except ImportError as error:
        raise ExecutorUnavailable(f"impl='{name}' cannot be loaded: {error}") from error


def resolve(impl: str, plan: Plan | None, case: Case) -> str:
    """The name of the executor that will run: the explicit choice, or the fastest for ``auto``.

    ``auto`` falls back to the reference with one warning per reason.

    Raises:
        ConfigError: the name is unknown.
        ExecutorUnavailable: the explicit choice cannot run this case; the message says why.
    """
    if impl != "auto":
        if reason := load(impl).unsupported_reason(plan, case):
            raise ExecutorUnavailable(
                f"impl='{impl}' cannot run here: {reason}. Use impl='auto' or impl='reference'."
            )
        return impl
    for name in _preferred.get(case.device, ()):
        reason = _unsupported_reason(name, plan, case)
        if reason is None:
            return name
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"fastokd: the '{name}' executor is not used: {reason}; the reference runs instead",
                stacklevel=2,
            )
    return "reference"


def executor_states() -> dict[str, str | None]:
    """For each executor None if it can run on this machine, else the reason why not."""
    states = {}
    for name in _executors:
        device = next((key for key, names in _preferred.items() if name in names), "cpu")
        states[name] = _unsupported_reason(name, None, Case(device, torch.float32))
    return states


def _unsupported_reason(name: str, plan: Plan | None, case: Case) -> str | None:
    try:
        return load(name).unsupported_reason(plan, case)
    except ExecutorUnavailable as error:
        return str(error)
