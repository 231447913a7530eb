"""The kernels of a training step by phase, counted without a GPU, and their budgets:
``python -m tests.kernel_counts --write``.

``kernel_counts.json`` has the counts that ``test_kernel_counts.py`` allows. A call of cuBLAS or
cuDNN counts as one kernel, though on a GPU it may be several.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:
    sys.path.insert(0, str(FOLDER))  # of the modules that the tests import by name

import pretend_cuda  # noqa: E402

PATH = FOLDER / "kernel_counts.json"
COMMAND = "python -m tests.kernel_counts --write"
METHODS: dict[str, dict[str, Any]] = {
    "ahbf": {"method": "ahbf"},
    "one": {"method": "one"},
    "okddip": {"method": "okddip"},
    "cl_ilr": {"method": "cl_ilr"},
    "dml": {"method": "dml"},
    "kdcl naive": {"method": "kdcl", "method_options": {"variant": "naive"}},
    "kdcl minlogit": {"method": "kdcl", "method_options": {"variant": "minlogit"}},
    "kdcl linear": {"method": "kdcl", "method_options": {"variant": "linear"}},
    "kdcl general": {"method": "kdcl", "method_options": {"variant": "general"}},
    "ffm": {"method": "ffm"},
    "tsb on the device": {"method": "tsb", "method_options": {"memory": "device"}},
    "tsb on the host": {"method": "tsb", "method_options": {"memory": "host"}},
    "ffsd": {"method": "ffsd"},
    "afid": {"method": "afid"},
    "independent": {"method": "independent"},
    "kd": {"method": "kd"},
    "baseline": {"method": "baseline"},
}
"""Fields of a configuration, for the small network of ``pretend_cuda/steps.py``."""

# As their recipes.
CIFAR = {"model": "resnet32", "batch_size": 128, "image_size": 32, "aux_blocks": 4}
IMAGENET = {"model": "resnet18_imagenet", "batch_size": 64, "image_size": 224, "aux_blocks": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet32, ahbf": {"method": "ahbf", "branches": 4, **CIFAR},
    "resnet18, ahbf": {"method": "ahbf", "branches": 4, **IMAGENET},
    **{f"resnet8, {name}": fields for name, fields in METHODS.items()},
}
CASES = {
    f"{name}, {how}": {**fields, "compile": how == "compiled"}
    for name, fields in NETWORKS.items()
    for how in ("eager", "compiled")
}
QUICK = tuple(name for name in CASES if name.endswith("eager") and not name.startswith("resnet18"))
"""The cases that take about a second each."""


def measure(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """The number of kernels in each phase of a step, by case.

    Raises:
        pretend_cuda.Unavailable: the pretend CUDA device cannot be built here.
    """
    cases = [("count", CASES[name]) for name in names]
    counts = pretend_cuda.run(
        pretend_cuda.FOLDER / "steps.py", json.dumps(cases), timeout=900 * len(names)
    )
    return dict(zip(names, counts, strict=True))


def versions() -> dict[str, str]:
    """The packages that the counts depend on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "triton")}


def main(arguments: Sequence[str]) -> int:
    """Measure cases, and print or write them. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel_counts", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE", help="the start of a case's name")
    parser.add_argument("--write", action="store_true", help=f"into {PATH.name}")
    chosen = parser.parse_args(arguments)
    names = [name for name in CASES if name.startswith(tuple(chosen.names) or "")]
    record = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
    if record.get("versions") != versions():
        if record and chosen.write and len(names) < len(CASES):
            parser.error(f"{PATH.name} is of other versions: write all cases")
        record = {}
    cases = record.get("cases", {})
    for name in names:
        cases |= measure([name])
        print(f"{name}: {sum(cases[name].values())} kernels, {cases[name]}", flush=True)
        if chosen.write:  # after every case: all take half an hour
            ordered = {case: cases[case] for case in CASES if case in cases}
            record = {"command": COMMAND, "versions": versions(), "cases": ordered}
            PATH.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
