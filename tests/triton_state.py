"""Whether Triton's interpreter runs here."""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy


def interpreter_unavailable() -> str | None:
    """The reason why Triton's interpreter cannot run, or None. Does not import Triton.

    Older versions, 3.6 among them, convert one-element arrays of one dimension to integers, as in
    the bounds of ``range``. numpy 2.5 refuses that.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed"
    source = (Path(spec.origin).parent / "runtime" / "interpreter.py").read_text(encoding="utf-8")
    release = tuple(map(int, numpy.__version__.split(".")[:2]))
    if release >= (2, 5) and "int(self.handle.data)" in source:
        version = importlib.metadata.version("triton")
        return f"the interpreter of Triton {version} fails with numpy {numpy.__version__}"
    return None
