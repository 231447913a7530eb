"""The C++ executor: instruction sets, threads, error bounds of its functions, and its library.

``test_executor_contract.py`` checks its results.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from executor_contract import DTYPES, GRAPHS, Subject, same_bits
from torch import Tensor

from fastokd.errors import ExecutorUnavailable
from fastokd.graph import lower
from fastokd.ops import cpu
from fastokd.ops.executors import Case, executor_states

STATE = executor_states()["cpu"]
needs_library = pytest.mark.skipif(
    STATE is not None, reason=f"the cpu executor cannot run: {STATE}"
)


CPU = Subject("cpu", "cpu")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1}
"""Of the C interface."""


@needs_library
@pytest.mark.parametrize("isa", cpu.available_isas(cpu.open_library()) if STATE is None else [])
@pytest.mark.parametrize("name", GRAPHS)
def test_instruction_set_matches_float64(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu.open_library()
    # Private, because the instruction set is chosen once per process in a public way.
    monkeypatch.setattr(
        cpu, "_compiled", lambda plan: cpu.CompiledPlan(library, *plan.encode(), isa)
    )
    for dtype in DTYPES:
        CPU.compare(CPU.make(name, (3, 1103), dtype=dtype))
    CPU.compare(CPU.make(name, (2, 39), soft_target=True))


@needs_library
class TestThreads:
    @pytest.mark.parametrize("name", ["cascade", "mixed probabilities with memory", "selection"])
    def test_any_number_of_threads_gives_same_bits(self, name: str) -> None:
        inputs = CPU.make(name, (64, 1000))
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 1, 2, 7):
                torch.set_num_threads(threads)
                results.append(CPU.run(inputs))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            same_bits(other, results[0])

    def test_concurrent_callers_get_same_bits(self) -> None:
        inputs = CPU.make("cascade", (64, 1000))
        expected, results = CPU.run(inputs), []
        callers = [
            threading.Thread(target=lambda: results.append(CPU.run(inputs))) for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert len(results) == 4
        for result in results:
            same_bits(result, expected)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_loss_after_fork_is_equal(self) -> None:
        script = (
            "import os, torch\nfrom fastokd.losses import AHBFLoss\ntorch.manual_seed(0);"
            " torch.set_num_threads(2)\nz, s, y = torch.randn(4, 64, 1000), torch.rand(3, 64, 2),"
            " torch.zeros(64, dtype=torch.long)\nloss = lambda: AHBFLoss(impl='cpu')(z, y,"
            " scores=s).item()\nfirst = loss()\npid = os.fork()\nif pid == 0:\n    os._exit(loss()"
            " != first)\nassert os.waitpid(pid, 0)[1] == 0 and loss() == first\n"
        )
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            check=True,
            timeout=120,
            env=environment(),
        )


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **extra}


@needs_library
class TestMath:
    # The bounds stated in kernels/cpu/simd.hpp.
    BOUNDS: ClassVar = {torch.float32: 9e-8, torch.float64: 1.7e-16}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("function", [0, 1], ids=["exp", "log"])
    def test_function_errors_are_within_bounds(self, function: int, dtype: torch.dtype) -> None:
        library = cpu.open_library()
        generator = torch.Generator().manual_seed(1)
        uniform = torch.rand(200_000, generator=generator, dtype=torch.float64)
        if function == 0:
            lowest = -86.9 if dtype == torch.float32 else -707.0
            x = torch.cat((lowest * uniform, -(2.0 ** (-20 * uniform)), 80 * uniform[:1000])).to(
                dtype
            )
        else:
            x = torch.cat((torch.exp2(200 * uniform - 100), 0.5 + uniform, 1 + 1e-3 * uniform)).to(
                dtype
            )
        for isa in cpu.available_isas(library):
            out = torch.empty_like(x)
            assert (
                library.fastokd_math(
                    isa.encode(),
                    function,
                    DTYPE_CODES[dtype],
                    x.data_ptr(),
                    out.data_ptr(),
                    x.numel(),
                )
                == 0
            )
            error = relative_error(function, x, out)
            assert error <= self.BOUNDS[dtype], f"{isa}: {error:.3g}"

    def test_function_edge_cases_are_exact(self) -> None:
        library = cpu.open_library()
        for isa in cpu.available_isas(library):
            for dtype in (torch.float32, torch.float64):
                x = torch.tensor([0.0, -1e30, -float("inf"), float("nan")], dtype=dtype)
                out = torch.empty_like(x)
                library.fastokd_math(
                    isa.encode(), 0, DTYPE_CODES[dtype], x.data_ptr(), out.data_ptr(), 4
                )
                assert out[:3].tolist() == [1, 0, 0]
                assert out[3].isnan()
                x = torch.tensor([1.0, float("nan")], dtype=dtype)
                library.fastokd_math(
                    isa.encode(), 1, DTYPE_CODES[dtype], x.data_ptr(), out.data_ptr(), 2
                )
                assert out[0] == 0
                assert out[1].isnan()


def relative_error(function: int, x: Tensor, out: Tensor) -> float:
    """The largest relative error. float64 is measured against twice its precision: the true value
    as two float64.
    """
    if out.dtype == torch.float32:
        true = x.double().exp() if function == 0 else x.double().log()
        kept = true != 0
        return float(((out.double() - true) / true)[kept].abs().max())
    import numpy as np

    wide = x.numpy().astype(np.longdouble)
    true = np.exp(wide) if function == 0 else np.log(wide)
    kept = true != 0
    return float(
        np.max(np.abs((out.numpy().astype(np.longdouble)[kept] - true[kept]) / true[kept]))
    )


class TestLibrary:
    def test_missing_library_names_command(self, tmp_path: Path) -> None:
        with pytest.raises(cpu.LibraryUnusable, match="pip install -e"):
            cpu.open_library(tmp_path)

    def test_failed_build_gives_recorded_reason(self, tmp_path: Path) -> None:
        (tmp_path / "build_info.json").write_text(
            json.dumps({"status": "failed", "reason": "cmake not found"})
        )
        with pytest.raises(cpu.LibraryUnusable, match=r"was not built \(failed\): cmake not found"):
            cpu.open_library(tmp_path)

    def test_damaged_build_record_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "build_info.json").write_text("{")
        with pytest.raises(cpu.LibraryUnusable, match=r"build_info\.json cannot be read"):
            cpu.open_library(tmp_path)

    def test_invalid_library_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "libfastokd_cpu.so").write_bytes(b"not a library")
        with pytest.raises(cpu.LibraryUnusable, match="cannot be loaded"):
            cpu.open_library(tmp_path)

    @needs_library
    def test_other_abi_version_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "ABI_VERSION", 999)
        with pytest.raises(cpu.LibraryUnusable, match="ABI version 2, this fastokd needs 999"):
            cpu.open_library()

    def test_unusable_library_is_refused_with_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Private, because the library is loaded once per process.
        monkeypatch.setattr(cpu, "_library", lambda: "the reason")
        inputs = CPU.make("cross-entropy alone", (2, 3))
        with pytest.raises(ExecutorUnavailable, match="impl='cpu' cannot run here: the reason"):
            CPU.run(inputs)
        assert "'cuda'" in str(cpu.EXECUTOR.unsupported_reason(None, Case("cuda", torch.float32)))

    @needs_library
    def test_unknown_instruction_set_is_refused(self) -> None:
        script = (
            "from fastokd.ops.executors import executor_states; print(executor_states()['cpu'])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(FASTOKD_CPU_ISA="mmx"),
        )
        assert "FASTOKD_CPU_ISA=mmx is not one of" in done.stdout

    @needs_library
    def test_malformed_plan_is_refused(self) -> None:
        library = cpu.open_library()
        ints, floats = lower(GRAPHS["mixed probabilities with memory"]).encode()
        cases: Sequence[tuple[Sequence[int], Sequence[float], str]] = (
            ((99, *ints[1:]), floats, "another version"),
            (ints[:-1], floats, "cut short"),
            ((*ints, 0), floats, "cut short or too long"),
            (ints, (*floats[:-4], -1.0, *floats[-3:]), "temperature"),
        )
        for bad_ints, bad_floats, message in cases:
            with pytest.raises(ValueError, match=message):
                cpu.CompiledPlan(library, bad_ints, bad_floats)

    @needs_library
    def test_garbage_plan_gives_no_handle(self) -> None:
        library = cpu.open_library()
        ints, floats = lower(GRAPHS["cascade"]).encode()
        for at in range(len(ints)):
            for value in (-2, -1, 0, 1, 2, 5, 7, 10**12):
                handle = ctypes.c_void_p()
                changed = [*ints[:at], value, *ints[at + 1 :]]
                status = library.fastokd_plan_create(
                    (ctypes.c_int64 * len(ints))(*changed),
                    len(ints),
                    (ctypes.c_double * len(floats))(*floats),
                    len(floats),
                    None,
                    ctypes.byref(handle),
                )
                assert (status == 0) == bool(handle)
                library.fastokd_plan_destroy(handle)
