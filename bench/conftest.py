"""The machine and versions in the results of a benchmark run."""

import os
from pathlib import Path
from typing import Any

from bench.suite import DEVICE


def _settings() -> str:
    """The environment variables that the suites read, as they stand before a command; of a folder
    only its name.
    """
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("FASTOKD_BENCH_") or name == "OMP_NUM_THREADS"
    }
    return "".join(
        f"{name}={Path(value).name if '/' in value else value} " for name, value in found.items()
    )


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Without the host's name; with processor, device, versions, commit and command."""
    from fastokd.experiments.timing import processor
    from fastokd.ops.executors import executor_states
    from fastokd.train.run_folder import environment

    machine_info.pop("node", None)
    machine_info.update(
        environment(DEVICE),
        cpu=processor(),
        executors={name: reason or "runs" for name, reason in executor_states().items()},
    )
    machine_info["command"] = _settings() + machine_info["command"]


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Remove the time of every round; medians and quartiles stay."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
