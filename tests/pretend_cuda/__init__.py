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

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
CACHE = ROOT / "build" / "pretend_cuda"


class Unavailable(RuntimeError):
    """The library cannot be built here; the message has the reason."""


def run(program: Path, *arguments: str, timeout: float = 600) -> Any:
    """Run a Python program on the pretend device.

    Args:
        program: a script, whose imports find the modules in ``tests/``. It prints JSON as its last
            line.
        arguments: its command line.
        timeout: in seconds.

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
    environment.pop("TRITON_INTERPRET", None)
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
    includes, libraries = _headers(), _torch_libraries()
    sources = sorted([*FOLDER.glob("*.[ch]pp"), FOLDER / "stubs.py"])
    state = hashlib.sha256(repr(includes).encode())
    for path in sources:
        state.update(path.read_bytes())
    for library in libraries:
        state.update(f"{library} {library.stat().st_size} {library.stat().st_mtime}".encode())
    folder = CACHE / state.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
                _compile(Path(unfinished), sources, includes, libraries)
                shutil.copytree(unfinished, folder, symlinks=True)
    return folder


def _compile(
    folder: Path, sources: Iterable[Path], includes: list[Path], libraries: list[Path]
) -> None:
    from pretend_cuda import stubs

    objects = []
    flags = ["-O1", "-fPIC", "-Wall", "-Wextra", *(f"-I{path}" for path in includes)]
    for path in sources:
        if path.suffix == ".cpp":
            objects.append(folder / f"{path.stem}.o")
            _call("g++", "-std=c++17", *flags, "-c", str(path), "-o", str(objects[-1]))
    names = _call("nm", "--defined-only", "--extern-only", *map(str, objects)).split()
    (folder / "stubs.c").write_text(stubs.source(libraries, names), encoding="utf-8")
    stub = folder / "stubs.o"
    _call("g++", "-x", "c", "-O1", "-fPIC", "-c", str(folder / "stubs.c"), "-o", str(stub))
    library = folder / "libpretend.so"
    _call("g++", "-shared", *map(str, [*objects, stub]), "-o", str(library), "-ldl", "-lpthread")
    (folder / "libcuda.so.1").symlink_to(library.name)  # the driver, which programs load by name


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _headers() -> list[Path]:
    """The folders of the CUDA headers that PyTorch's and Triton's packages contain."""
    packages = {name: importlib.util.find_spec(name) for name in ("nvidia", "triton")}
    if missing := [name for name, found in packages.items() if found is None]:
        raise Unavailable(f"the CUDA headers are in {' and '.join(missing)}, which are missing")
    folders = [
        Path(location) / "cu13" / "include"
        for location in packages["nvidia"].submodule_search_locations
    ]
    # The runtime's headers include one of the compiler's, which only Triton's package has.
    triton = Path(packages["triton"].origin).parent / "backends" / "nvidia" / "include"
    folders = [path for path in (*folders, triton) if path.is_dir()]
    if not any((path / "cuda_runtime_api.h").is_file() for path in folders):
        raise Unavailable("nvidia-cuda-runtime and triton contain no cuda_runtime_api.h")
    return folders


def _torch_libraries() -> list[Path]:
    """The libraries of PyTorch that call CUDA."""
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    if not (folder / "libtorch_cuda.so").is_file():
        raise Unavailable("PyTorch is built without CUDA")
    return sorted(folder.glob("*.so"))
