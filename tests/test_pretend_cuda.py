"""The pretend CUDA device: each rule of stream capture is checked, and its record is right."""

import shutil
import textwrap
from pathlib import Path
from typing import Any

import pretend_cuda
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("pretend_device")

# The functions of pretend_cuda/rules.py, and the rule that each breaks.
BROKEN_RULES = {
    "unjoined": "unjoined",
    "work_after_join": "unjoined",
    "isolation": "isolation",
    "legacy_stream": "legacy stream",
    "merge": "merge",
    "item": "captured stream",
    "stream_query": "captured stream",
    "event_synchronize": "captured event",
    "event_query": "captured event",
    "synchronize": "unsafe call",
    "allocation": "unsafe call",
    "module_load": "unsafe call",
    "allocation of another thread, global": "unsafe call",
}
# CUDA captures these, but a replay would not do what the step did.
WRONG_GRAPHS = {"escaped": "escaped", "pageable_copy": "pageable copy"}
PERMITTED = ("clean", "allocation_of_another_thread", "allocation, relaxed")


@pytest.fixture(scope="module")
def captures() -> dict[str, Any]:
    return pretend_cuda.run(pretend_cuda.FOLDER / "rules.py")


def test_every_capture_has_an_expectation(captures: dict[str, Any]) -> None:
    assert set(captures) == {*BROKEN_RULES, *WRONG_GRAPHS, *PERMITTED}


@pytest.mark.parametrize(("name", "rule"), BROKEN_RULES.items())
def test_broken_rule_is_reported_and_ends_capture(
    captures: dict[str, Any], name: str, rule: str
) -> None:
    (violation,) = captures[name]["violations"]
    assert violation.startswith(f"{rule}: ")
    assert captures[name]["error"] != 0


@pytest.mark.parametrize(("name", "rule"), WRONG_GRAPHS.items())
def test_wrong_graph_is_reported(captures: dict[str, Any], name: str, rule: str) -> None:
    (violation,) = captures[name]["violations"]
    assert violation.startswith(f"{rule}: ")


@pytest.mark.parametrize("name", PERMITTED)
def test_permitted_capture_breaks_no_rule(captures: dict[str, Any], name: str) -> None:
    assert captures[name] == {"violations": [], "error": 0}


def run(folder: Path, code: str) -> Any:
    program = folder / "program.py"
    setup = "import torch\nfrom pretend_cuda import device\n"
    program.write_text(setup + textwrap.dedent(code), encoding="utf-8")
    return pretend_cuda.run(program)


def test_record_has_kernels_by_phase_and_synchronizations(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        """
        x, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
        total = torch.zeros((), device="cuda", requires_grad=True)
        device.reset()
        with device.phase("outer"):
            x.add_(1)
            with device.phase("inner"):
                x.mul_(2).mul_(2)
            x.add_(1)
        with device.phase("backward"):  # launched by a thread of autograd
            (total * 3).backward()
        with torch.cuda.graph(graph):
            x.sub_(1)
        for _ in range(3):
            graph.replay()
        x.cpu()
        record = device.record()
        phases = record.phases()
        device.reset()
        device.finish({
            "phases": phases,
            "work": [[each.captured, each.count, each.name] for each in record.work],
            "captures": record.captures,
            "synchronizations": record.synchronizations,
            "after reset": device.record(),
        })
        """,
    )
    assert result["phases"]["outer"] == 2
    assert result["phases"]["inner"] == 2
    assert result["phases"]["backward"] >= 2  # the product and its gradient
    assert result["captures"] == [[1]]
    counts = {(captured, name): count for captured, count, name in result["work"]}
    assert counts[False, "graph launch"] == 3
    assert [count for (captured, _), count in counts.items() if captured] == [1]
    assert result["synchronizations"]["memcpy DtoH pageable"] == 1
    assert result["after reset"] == [[], [], [], {}]


def test_memory_is_that_of_the_host_and_is_limited(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        """
        pinned = torch.arange(8.0).pin_memory()
        copied = torch.equal(pinned.cuda(non_blocking=True).cpu(), pinned)
        total = torch.cuda.mem_get_info()[1]
        try:
            torch.empty(2 * total, dtype=torch.uint8, device="cuda")
            refused = False
        except torch.cuda.OutOfMemoryError:
            refused = True
        used = total - torch.cuda.mem_get_info()[0]
        device.finish([copied, refused, used == torch.cuda.memory_reserved()])
        """,
    )
    assert result == [True, True, True]


def test_unknown_function_ends_the_program(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the pretend CUDA device has no cudaMallocAsync"):
        run(tmp_path, "device.LIBRARY.cudaMallocAsync()")


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "g++" else tool)
    with pytest.raises(pretend_cuda.Unavailable, match=r"built with g\+\+"):
        pretend_cuda.build.__wrapped__()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pretend_cuda.Unavailable, match="torch is not installed"):
        pretend_cuda.build.__wrapped__()


def test_library_is_built_once() -> None:
    folder = pretend_cuda.build()
    before = (folder / "libpretend.so").stat().st_mtime_ns
    assert pretend_cuda.build.__wrapped__() == folder
    assert (folder / "libpretend.so").stat().st_mtime_ns == before


def test_package_does_not_use_the_pretend_device() -> None:
    sources = [*(ROOT / "fastokd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert not [path for path in sources if "pretend_cuda" in path.read_text(encoding="utf-8")]
