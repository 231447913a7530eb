"""Execution of plans: the registered operator, its executors, and the choice among them."""

from typing import Any

from fastokd._moved import warn_renamed
from fastokd.ops.executors import (
    Case,
    Executor,
    check_impl,
    executor_states,
    register_executor,
    resolve,
)
from fastokd.ops.inputs import Inputs
from fastokd.ops.operator import evaluate, forward_backward

__all__ = [
    "Case",
    "Executor",
    "Inputs",
    "check_impl",
    "evaluate",
    "executor_states",
    "forward_backward",
    "register_executor",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name == "loss_and_grad":
        warn_renamed("fastokd.ops.loss_and_grad", "fastokd.ops.forward_backward")
        return forward_backward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
