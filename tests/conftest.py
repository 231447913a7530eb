"""Makes the helpers next to the tests importable by name (graph_catalog, graph_strategy, oracles)
in every import mode, and skips GPU tests without one.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault(
    "FASTOKD_CACHE", "off"
)  # no test leaves decoded images behind, but those of the cache

# Where the CPU has bf16 arithmetic, it would be the default precision, with other numbers.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

_here = str(Path(__file__).resolve().parent)
if _here not in sys.path:
    sys.path.insert(0, _here)


@pytest.fixture(scope="session")
def sample_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of ``sample_runs.make_runs``, for reading alone."""
    from sample_runs import make_runs

    return make_runs(tmp_path_factory.mktemp("sample") / "runs")


LONGEST = (
    "test_capture_rules.py",
    "test_triton_interpreter.py",
    "test_compile.py",
    "test_export.py",
    "test_docs.py",
    "test_executors.py",
    "test_kernel_counts.py",
)
"""Files that take half a minute or more of a process; the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that none is left for one process at the end."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def pretend_device() -> Path:
    """The folder of the pretend CUDA device, built once; skips where it cannot be built."""
    import pretend_cuda

    try:
        return pretend_cuda.build()
    except pretend_cuda.Unavailable as error:
        pytest.skip(str(error))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
