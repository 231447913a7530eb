"""Run the CUDA path of a test program without a GPU.

The build makes a shared library that replaces the CUDA runtime and driver, cuBLAS and cuDNN. Device
memory is host memory, copies copy, and kernels do nothing, so a program's values are meaningless.
What a program asks of the device is real: PyTorch, Triton's and Inductor's launchers, autograd's
threads and the caching allocator run as on a GPU. The library checks the rules of stream capture
and counts kernels and synchronizations (``device.py`` reads the record within the program).
"""

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretend_cuda import stubs

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
CACHE = ROOT / "build" / "pretend_cuda"


class Unavailable(RuntimeError):
    """The library cannot be built here; the message has the reason."""


def run(program: Path, *arguments: str, timeout: float = 600) -> Any:
    """Run a Python program on the pretend device.

    Args:
        program: a script, whose imports find the modules in ``tests/`` and which ends with
            ``device.finish(result)``.
        arguments: its command line.
        timeout: in seconds.

    Returns:
        The result of the program.

    Raises:
        Unavailable: the library cannot be built here.
        RuntimeError: the program failed; the message has the end of its output.
    """
    folder = build()
    paths = [str(FOLDER.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(folder / "libpretend.so"),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        # Inductor's workers would need a device too; one process also keeps a test's load small.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "TRITON_CACHE_DIR": str(CACHE / "triton"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"):
        environment.pop(name, None)
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{program.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def build() -> Path:
    """The folder with the library, which is built once for a version of PyTorch and the sources.

    Raises:
        Unavailable: the library cannot be built here.
    """
    if missing := [tool for tool in ("g++", "nm") if shutil.which(tool) is None]:
        raise Unavailable(f"the pretend CUDA device is built with {' and '.join(missing)}")
    torch, triton, nvidia = _package("torch"), _package("triton"), _package("nvidia")
    libraries = sorted((torch / "lib").glob("*.so"))
    if not (torch / "lib" / "libtorch_cuda.so").is_file():
        raise Unavailable("PyTorch is built without CUDA")
    backend = triton / "backends" / "nvidia"
    # The runtime's headers include one of the compiler's, which only Triton's package has.
    includes = [nvidia / "cu13" / "include", backend / "include"]
    for path in (includes[0] / "cuda_runtime_api.h", includes[1] / "crt" / "host_defines.h"):
        if not path.is_file():
            raise Unavailable(f"{path} is missing: it needs PyTorch and Triton for CUDA 13")
    callers = sorted(backend.glob("*.c"))
    sources = sorted([*FOLDER.glob("*.[ch]pp"), FOLDER / "stubs.py"])
    state = hashlib.sha256()
    for path in sources:
        state.update(path.read_bytes())
    for path in (*libraries, *callers):
        state.update(f"{path} {path.stat().st_size} {path.stat().st_mtime}".encode())
    folder = CACHE / state.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
                unfinished = Path(temporary) / "library"
                unfinished.mkdir()
                _compile(unfinished, sources, includes)
                names = _call("nm", "--defined-only", "-g", *map(str, unfinished.glob("*.o")))
                _link(unfinished, stubs.source(libraries, callers, names.split()))
                unfinished.rename(folder)
    return folder


def _compile(folder: Path, sources: Iterable[Path], includes: Iterable[Path]) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", *(f"-I{path}" for path in includes)]
    for path in sources:
        if path.suffix == ".cpp":
            _call("g++", *flags, "-c", str(path), "-o", str(folder / f"{path.stem}.o"))


def _link(folder: Path, stubs_source: str) -> None:
    stub = folder / "stubs.c"
    stub.write_text(stubs_source, encoding="utf-8")
    _call("g++", "-x", "c", "-fPIC", "-c", str(stub), "-o", str(stub.with_suffix(".o")))
    library = folder / "libpretend.so"
    objects = map(str, sorted(folder.glob("*.o")))
    _call("g++", "-shared", *objects, "-o", str(library), "-ldl", "-lpthread")
    (folder / "libcuda.so.1").symlink_to(library.name)  # the driver, which programs load by name


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported: that would take seconds."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"{name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))
