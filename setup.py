"""The native CPU library is optional, and its absence explained: whatever happens here is recorded
in build_info.json.

``FASTOKD_BUILD_NATIVE`` is ``auto`` (build it if possible), ``require`` (fail if not) or ``skip``.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libfastokd_cpu.so", "libfastokd_cpu.dylib")
MODES = ("auto", "require", "skip")


class BuildFailed(Exception):
    """The reason, and what cmake and the compiler printed."""


def run(*command: str | Path) -> str:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode:
        if re.search(r"No CMAKE_\w+ could be found", result.stdout):
            raise BuildFailed(
                "no C++ compiler found; install g++ or clang, then fastokd again", result.stdout
            )
        error = re.search(r".*error: .*", result.stdout)
        raise BuildFailed(
            (
                error[0]
                if error
                else f"{Path(command[0]).name} exited with status {result.returncode}"
            ),
            result.stdout,
        )
    return result.stdout


def build_library(folder: Path) -> dict[str, str]:
    """Build the library into ``folder``; returns what the build says about itself."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BuildFailed(
            "cmake not found; run `pip install cmake ninja` or install it from your distribution,"
            " then fastokd again",
            "",
        )
    with tempfile.TemporaryDirectory() as build:
        run(
            cmake,
            "-S",
            ROOT,
            "-B",
            build,
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_TESTING=OFF",
            *(["-GNinja"] if shutil.which("ninja") else []),
        )
        log = run(cmake, "--build", build, "--parallel", str(os.cpu_count() or 1))
        library = next(Path(build, name) for name in LIBRARIES if Path(build, name).exists())
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, folder)
        facts = json.loads(Path(build, "compiler.json").read_text(encoding="utf-8"))
    return {"library": library.name, "log": log[-2000:], **facts}


class BuildNative(build_ext):
    """Puts one library and build_info.json into fastokd/_native: in the tree for an editable
    install, else in build_lib.
    """

    def run(self) -> None:
        mode = os.environ.get("FASTOKD_BUILD_NATIVE", "auto")
        if mode not in MODES:
            raise SystemExit(f"FASTOKD_BUILD_NATIVE={mode!r}; use one of {', '.join(MODES)}")
        folder = Path(ROOT if self.inplace else self.build_lib, "fastokd", "_native")
        for name in (*LIBRARIES, "build_info.json"):
            (folder / name).unlink(missing_ok=True)
        header = (ROOT / "kernels" / "cpu" / "fastokd.h").read_text(encoding="utf-8")
        info = {
            "status": "skipped",
            "reason": "FASTOKD_BUILD_NATIVE=skip",
            "abi": int(re.search(r"ABI_VERSION (\d+)", header)[1]),
        }
        if mode != "skip":
            try:
                info |= {"status": "built", "reason": "", **build_library(folder)}
            except BuildFailed as error:
                reason, log = error.args
                if mode == "require":
                    raise SystemExit(
                        "FASTOKD_BUILD_NATIVE=require, but the native library cannot be built:"
                        f" {reason}\n{log}"
                    ) from error
                info |= {"status": "failed", "reason": reason, "log": log[-2000:]}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib, "fastokd", "_native")
        return [
            str(folder / name)
            for name in (*LIBRARIES, "build_info.json")
            if (folder / name).exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """No CPython and no torch interface: a wheel with the library serves every Python of its
    platform.
    """

    def get_tag(self) -> tuple[str, str, str]:
        built = any(
            Path(self.bdist_dir or "", "fastokd", "_native", name).exists() for name in LIBRARIES
        )
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    packages=[*find_packages(include=["fastokd*"]), "fastokd.kernels", "fastokd.kernels.triton"],
    package_data={"fastokd": ["py.typed"]},
    exclude_package_data={"fastokd._native": [*LIBRARIES, "build_info.json"]},
    ext_modules=[Extension("fastokd._native._marker", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
