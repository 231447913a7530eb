"""What the results of a benchmark run say about the machine that ran it."""

import subprocess
from pathlib import Path
from typing import Any

import torch


def _commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Without the host's name; with processor, device, versions and commit."""
    from fastokd.ops.executors import executor_states
    from fastokd.train.ladder import processor

    machine_info.pop("node", None)
    machine_info["cpu"] = processor()
    machine_info.update(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        executors={name: reason or "runs" for name, reason in executor_states().items()},
        commit=_commit(),
    )


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Without the time of every single round: medians and quartiles are what is kept."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
