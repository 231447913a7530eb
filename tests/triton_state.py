"""Triton's interpreter: whether it runs here, and a shortcut that makes it three times as fast."""

import importlib.metadata
import importlib.util
from pathlib import Path
from types import FunctionType, SimpleNamespace

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


def patch_language_once() -> None:
    """Let the interpreter patch ``triton.language`` once for each module of kernels.

    It patches the language again at every call of a device function, where everything is patched
    already. Looking for that took two thirds of the time. The language stays patched, so the
    process cannot compile kernels.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_new(function: FunctionType) -> SimpleNamespace:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_new
