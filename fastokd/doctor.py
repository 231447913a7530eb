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

State = Literal["ok", "absent", "problem"]

_EXTRAS = {
    "dali": "nvidia.dali",
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
    software = _software()
    # Without torch, report the rest of the environment only.
    rest = (
        []
        if any(finding.name == "torch" and finding.state == "problem" for finding in software)
        else [*_hardware(), *_executors()]
    )
    return [*software, *rest, *_extras(), *_storage(folder)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _software() -> list[Finding]:
    from fastokd.version import __version__

    findings = [
        Finding("fastokd", "ok", f"{__version__} in {Path(__file__).resolve().parent}"),
        Finding("python", "ok", platform.python_version()),
    ]
    try:
        import torch
    except ImportError as error:
        return [
            *findings,
            Finding("torch", "problem", f"cannot be imported ({error}): pip install 'torch>=2.11'"),
        ]
    findings.append(
        Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    )
    try:
        import torchvision

        findings.append(Finding("torchvision", "ok", torchvision.__version__))
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails like this: "operator torchvision::nms does not
        # exist".
        findings.append(
            Finding(
                "torchvision",
                "problem",
                f"does not match torch ({first_line(error)}): pip install --force-reinstall torch"
                " torchvision",
            )
        )
    triton = _version("triton")
    findings.append(
        Finding(
            "triton",
            "ok" if triton else "absent",
            triton
            or "not installed: GPU losses run on the reference; on Linux 'pip install torch' from"
            " PyPI brings it",
        )
    )
    return findings


def _hardware() -> list[Finding]:
    import torch

    findings = [
        Finding(
            "cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
        )
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            findings.append(
                Finding(
                    f"cuda:{index}",
                    "ok",
                    f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB,"
                    f" sm_{properties.major}{properties.minor}",
                )
            )
    elif shutil.which("nvidia-smi"):
        findings.append(
            Finding(
                "cuda",
                "problem",
                f"an NVIDIA driver is installed, but torch {torch.__version__} sees no GPU: check"
                f" that the driver supports CUDA {torch.version.cuda}",
            )
        )
    else:
        findings.append(Finding("cuda", "absent", "no NVIDIA GPU: training runs on the CPU"))
    return findings


def _executors() -> list[Finding]:
    from fastokd.ops import executor_states
    from fastokd.ops.cpu import LibraryUnusable, build_info

    try:
        info = build_info() or {
            "status": "absent",
            "reason": "not built: pip install -e . builds it",
        }
        text = (
            f"{info['status']}: {info['reason']}"
            if info["reason"]
            else f"built with {info['compiler']}, ABI {info['abi']}"
        )
        findings = [
            Finding("native library", "ok" if info["status"] == "built" else "absent", text)
        ]
    except LibraryUnusable as error:
        findings = [Finding("native library", "problem", str(error))]
    findings += [
        Finding(f"executor {name}", "ok" if why is None else "absent", why or "can run here")
        for name, why in executor_states().items()
    ]
    return findings


def _extras() -> list[Finding]:
    findings = []
    for extra, module in _EXTRAS.items():
        try:
            installed = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            installed = False
        findings.append(
            Finding(
                f"extra {extra}",
                "ok" if installed else "absent",
                "installed" if installed else f"pip install 'fastokd[{extra}]'",
            )
        )
    return findings


def _storage(folder: Path) -> list[Finding]:
    folder = folder.resolve()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastokd-") as file:
            file.write(b"0" * 4096)
    except OSError as error:
        return [
            Finding(
                "writing",
                "problem",
                f"{folder}: {error.strerror}; runs go to ./runs, choose another folder with --out",
            )
        ]
    free = shutil.disk_usage(folder).free / 2**30
    if free < 1:
        return [
            Finding(
                "writing",
                "problem",
                f"{folder} has {free:.2f} GiB free: checkpoints of a large model need more",
            )
        ]
    return [Finding("writing", "ok", f"{folder}, {free:.0f} GiB free")]
