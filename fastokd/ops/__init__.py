"""How a plan is executed: the registered operator, its executors, and the choice among them."""

from fastokd.ops.executors import Executor, check_impl, executor_states, register_executor, resolve
from fastokd.ops.operator import evaluate, loss_and_grad

__all__ = [
    "Executor",
    "check_impl",
    "evaluate",
    "executor_states",
    "loss_and_grad",
    "register_executor",
    "resolve",
]
