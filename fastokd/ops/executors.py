"""The executors and the choice among them.

An executor is a module with a constant ``EXECUTOR``. Its module is imported when it is first
considered, so that a machine without a GPU never imports Triton, and a missing native library costs
nothing.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastokd.errors import ExecutorUnavailable
from fastokd.graph.plan import Plan
from fastokd.ops.inputs import Inputs
from fastokd.registry import Registry


@dataclass(frozen=True)
class Case:
    """The device type and the dtype of the logits that an executor would run on."""

    device: str
    dtype: torch.dtype


class Executor(Protocol):
    """The interface of an executor. It never writes to its inputs."""

    name: str

    def unsupported_reason(self, plan: Plan | None, case: Case) -> str | None:
        """The reason why this executor cannot run the plan in this case; None if it can.

        Without a plan: the reason why it cannot run on this machine.
        """

    def num_stats(self, plan: Plan) -> int:
        """Number of values per row that the forward pass keeps for the backward pass."""

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B], the unweighted terms [T, B] and the statistics [num_stats, B]."""

    def backward(
        self, plan: Plan, grad_rows: Tensor, inputs: Inputs, stats: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of ``sum(grad_rows * rows)`` for the logits, then the weights; None where
        ``needs`` is False.
        """

    def forward_backward(
        self, plan: Plan, inputs: Inputs, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Rows, terms, and the gradients of the mean of the rows, in one pass over the logits."""


_executors: Registry[Executor] = Registry(
    "impl",
    "EXECUTOR",
    {
        "reference": "fastokd.ops.reference",
        "cpu": "fastokd.ops.cpu",
        "triton": "fastokd.ops.triton",
    },
    reserved=["auto"],
)
_preferred = {"cuda": ("triton",), "cpu": ("cpu",)}
_warned: set[str] = set()


def register_executor(name: str, module: str, devices: Sequence[str] = ()) -> None:
    """Add an executor: the module that holds its ``EXECUTOR``, and the device types on which
    ``auto`` tries it first.
    """
    _executors.register(name, module)
    for device in devices:
        _preferred[device] = (name, *_preferred.get(device, ()))


def check_impl(impl: str) -> None:
    """Raises a ConfigError with a suggestion if there is no executor of that name (and it is not
    ``auto``).
    """
    if impl != "auto":
        _executors.check(impl)


def load(name: str) -> Executor:
    """The executor of that name.

    Raises:
        ConfigError: there is no executor of that name.
        ExecutorUnavailable: its module cannot be imported here.
    """
    check_impl(name)
    try:
        return _executors.get(name)
    except ImportError as error:
        raise ExecutorUnavailable(f"impl='{name}' cannot be loaded: {error}") from error


def resolve(impl: str, plan: Plan | None, case: Case) -> str:
    """The name of the executor that will run: the explicit choice, or for ``auto`` the fastest that
    can.

    ``auto`` falls back to the reference with one warning per reason.

    Raises:
        ConfigError: unknown name.
        ExecutorUnavailable: the explicit choice cannot run this case; the message says why.
    """
    if impl != "auto":
        reason = load(impl).unsupported_reason(plan, case)
        if reason:
            raise ExecutorUnavailable(
                f"impl='{impl}' cannot run here: {reason}. Use impl='auto' or impl='reference'."
            )
        return impl
    for name in _preferred.get(case.device, ()):
        try:
            reason = load(name).unsupported_reason(plan, case)
        except ExecutorUnavailable as error:
            reason = str(error)
        if reason is None:
            return name
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"fastokd: the '{name}' executor is not used: {reason}. The reference runs"
                " instead.",
                stacklevel=2,
            )
    return "reference"


def executor_states() -> dict[str, str | None]:
    """For each executor None if it can run on this machine, else the reason why not."""
    states: dict[str, str | None] = {}
    for name in _executors:
        device = next((key for key, names in _preferred.items() if name in names), "cpu")
        try:
            states[name] = load(name).unsupported_reason(None, Case(device, torch.float32))
        except ExecutorUnavailable as error:
            states[name] = str(error)
    return states
