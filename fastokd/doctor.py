"""Environment report with a fix for each problem."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastokd.errors import first_line
from fastokd.version import __version__

State = Literal["ok", "absent", "problem"]

_EXTRAS = {
    "dali": "nvidia.dali",
    "parquet": "pyarrow",
    "timm": "timm",
    "plots": "matplotlib",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "export": "onnx",
    "test": "pytest",
    "bench": "pytest_benchmark",
    "docs": "mkdocs",
    "dev": "ruff",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. "absent" is an optional part; "problem" needs a fix."""

    name: str
    state: State
    text: str


def examine(folder: Path = Path()) -> list[Finding]:
    """The findings of ``fastokd doctor``; ``folder`` is where runs would be written."""
    package = Path(__file__).resolve().parent
    findings = [
        Finding("fastokd", "ok", f"{__version__} in {package}"),
        Finding("python", "ok", platform.python_version()),
    ]
    try:
        import torch
    except ImportError as error:
        text = f"cannot be imported ({error}): pip install 'torch>=2.11'"
        findings.append(Finding("torch", "problem", text))
    else:
        text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
        findings.append(Finding("torch", "ok", text))
        findings += [_torchvision(), _triton(), *_hardware(), *_executors()]
    return [*findings, *map(_extra, _EXTRAS), _storage(folder)]


def _torchvision() -> Finding:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        text = (
            f"does not match torch ({first_line(error)}): pip install --force-reinstall torch"
            " torchvision"
        )
        return Finding("torchvision", "problem", text)
    return Finding("torchvision", "ok", torchvision.__version__)


def _triton() -> Finding:
    try:
        return Finding("triton", "ok", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        text = (
            "not installed: GPU losses run on the reference; on Linux 'pip install torch' from"
            " PyPI brings it"
        )
        return Finding("triton", "absent", text)


def _hardware() -> list[Finding]:
    import torch

    from fastokd.models.layout import has_avx512

    text = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if has_avx512():
        text += (
            "; AVX-512: training leaves channels-last off for networks with strided 1 x 1"
            " convolutions of fewer than 16 input channels, which crash with it"
        )
    findings = [Finding("cpu", "ok", text)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            findings.append(Finding(f"cuda:{index}", "ok", text))
    elif shutil.which("nvidia-smi"):
        text = (
            f"an NVIDIA driver is installed, but torch {torch.__version__} sees no GPU: check that"
            f" the driver supports CUDA {torch.version.cuda}"
        )
        findings.append(Finding("cuda", "problem", text))
    else:
        findings.append(Finding("cuda", "absent", "no NVIDIA GPU: training runs on the CPU"))
    return findings


def _executors() -> list[Finding]:
    from fastokd.ops import executor_states

    return [
        _native_library(),
        *(
            Finding(f"executor {name}", "absent" if reason else "ok", reason or "can run here")
            for name, reason in executor_states().items()
        ),
    ]


def _native_library() -> Finding:
    from fastokd.ops.cpu import LibraryUnusable, build_info

    try:
        info = build_info()
    except LibraryUnusable as error:
        return Finding("native library", "problem", str(error))
    if not info:
        return Finding("native library", "absent", "not built: pip install -e . builds it")
    if info["reason"]:
        text = f"{info['status']}: {info['reason']}"
    else:
        text = f"built with {info['compiler']}, ABI {info['abi']}"
    return Finding("native library", "ok" if info["status"] == "built" else "absent", text)


def _extra(name: str) -> Finding:
    try:
        installed = importlib.util.find_spec(_EXTRAS[name]) is not None
    except ModuleNotFoundError:
        installed = False
    if installed:
        return Finding(f"extra {name}", "ok", "installed")
    return Finding(f"extra {name}", "absent", f"pip install -e '.[{name}]'")


def _storage(folder: Path) -> Finding:
    folder = folder.resolve()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastokd-") as file:
            file.write(b"0" * 4096)
    except OSError as error:
        text = f"{folder}: {error.strerror}; runs go to ./runs, choose another folder with --out"
        return Finding("writing", "problem", text)
    free = shutil.disk_usage(folder).free / 2**30
    if free < 1:
        text = f"{folder} has {free:.2f} GiB free: checkpoints of a large model need more"
        return Finding("writing", "problem", text)
    return Finding("writing", "ok", f"{folder}, {free:.0f} GiB free")
