"""Execution of plans: the registered operator, its executors, and the choice among them."""

from fastokd._moved import moved_names
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


__getattr__ = moved_names(__name__, {"fastokd.ops": ("loss_and_grad=forward_backward",)})
