"""Building the native library never breaks an install, and always leaves word of what happened."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastokd.graph.plan import PLAN_VERSION
from fastokd.ops import cpu
from fastokd.ops.reference import PROBABILITY_FLOOR

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "cpu"
needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout")


def build(folder: Path, mode: str, path: str) -> tuple[int, str, dict[str, str]]:
    """Run build_ext into ``folder`` where an older library lies; returns exit status, output and
    build_info.json.
    """
    pytest.importorskip("setuptools", minversion="77")
    native = folder / "lib" / "fastokd" / "_native"
    native.mkdir(parents=True)
    (native / "libfastokd_cpu.so").write_bytes(b"stale")
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            f"--build-lib={folder / 'lib'}",
            f"--build-temp={folder / 'tmp'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "FASTOKD_BUILD_NATIVE": mode, "PATH": path},
    )
    assert not (native / "libfastokd_cpu.so").exists()
    record = native / "build_info.json"
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(record.read_text()) if record.exists() else {},
    )


@needs_checkout
class TestBuild:
    def test_build_without_cmake_records_reason(self, tmp_path: Path) -> None:
        status, output, info = build(tmp_path, "auto", str(tmp_path))
        assert status == 0, output
        assert info["status"] == "failed"
        assert "pip install cmake" in info["reason"]
        with pytest.raises(cpu.LibraryUnusable, match="cmake not found"):
            cpu.open_library(tmp_path / "lib" / "fastokd" / "_native")

    def test_skipped_build_is_recorded(self, tmp_path: Path) -> None:
        status, output, info = build(tmp_path, "skip", os.environ["PATH"])
        assert status == 0, output
        assert info["status"] == "skipped"
        assert info["abi"] == cpu.ABI_VERSION

    def test_required_build_failure_reports_reason(self, tmp_path: Path) -> None:
        status, output, _ = build(tmp_path, "require", str(tmp_path))
        assert status != 0
        assert (
            "FASTOKD_BUILD_NATIVE=require, but the native library cannot be built: cmake not found"
            in output
        )

    def test_unknown_build_mode_lists_choices(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "FASTOKD_BUILD_NATIVE": "yes"},
        )
        assert done.returncode != 0
        assert "auto, require, skip" in done.stderr


@needs_checkout
class TestSources:
    """Numbers that Python and C++ both state."""

    @pytest.mark.parametrize(
        ("file", "pattern", "value"),
        [
            ("fastokd.h", r"FASTOKD_ABI_VERSION (\d+)", cpu.ABI_VERSION),
            ("plan.cpp", r"kPlanVersion = (\d+);", PLAN_VERSION),
            ("rows.hpp", r"kFloor = static_cast<Real>\(([0-9.e-]+)\)", PROBABILITY_FLOOR),
        ],
    )
    def test_constants_agree_between_sources(self, file: str, pattern: str, value: float) -> None:
        match = re.search(pattern, (SOURCES / file).read_text(encoding="utf-8"))
        assert match is not None
        assert float(match[1]) == value

    def test_cmake_uses_no_unsafe_compiler_flags(self) -> None:
        commands = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
        for flag in ("-ffast-math", "-Ofast", "-march=native", "-fopenmp"):
            assert flag not in commands
