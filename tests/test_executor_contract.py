"""The contract of every executor: the checks of ``executor_contract``, of each executor."""

import masked_rows  # noqa: F401  # registers its checks
import opaque_executor
import pytest
import worked_values  # noqa: F401  # registers its checks
from executor_contract import CHECKS

from fastokd.ops.executors import executor_states

STATE = executor_states()["cpu"]
EXECUTORS = [
    "reference",
    opaque_executor.register(),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(STATE is not None, reason=f"the cpu executor cannot run: {STATE}"),
    ),
]


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_executor_on_cpu_keeps_contract(executor: str, name: str) -> None:
    CHECKS[name](executor, "cpu")
