"""Triton's interpreter: whether it runs here, and shortcuts that make it several times as fast."""

import importlib.metadata
import importlib.util
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

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


def speed_up_interpreter() -> None:
    """Shorten work of Triton's interpreter that does not depend on values.

    The language stays patched, so the process cannot compile kernels.
    """
    from triton.runtime import interpreter

    _patch_language_once(interpreter)
    _remember_dtypes(interpreter)
    _reduce_by_halves(interpreter)
    _compare_shapes_first()


def _patch_language_once(interpreter: ModuleType) -> None:
    """Let the interpreter patch ``triton.language`` once for each module of kernels.

    It patches the language again at every call of a device function, where everything is patched
    already. Looking for that took two thirds of the time.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_new(function: FunctionType) -> SimpleNamespace:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_new


def _remember_dtypes(interpreter: ModuleType) -> None:
    """Look up NumPy's dtypes by name: the interpreter makes a table of all at every operation."""
    compute, dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype: Any) -> numpy.dtype:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = compute(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = get_np_dtype


def _reduce_by_halves(interpreter: ModuleType) -> None:
    """Combine the halves of a block in a reduction by a function, as a GPU's threads do, instead
    of one element after the other.
    """
    reduce_elements = interpreter.ReduceOps.generic_reduce

    def reduce_halves(self: Any, given: tuple[Any, ...]) -> list[Any]:
        if self.axis is None or self.keep_dims:
            return reduce_elements(self, given)
        dtypes = [block.dtype for block in given]
        arrays = [numpy.moveaxis(block.handle.data, self.axis, 0) for block in given]
        while (length := len(arrays[0])) > 1:
            halves = [
                self.to_tensor(array[start : start + length // 2], dtype)
                for start in (0, length // 2)
                for dtype, array in zip(dtypes, arrays, strict=True)
            ]
            combined = self.combine_fn.fn(*halves)
            combined = combined if isinstance(combined, (tuple, list)) else (combined,)
            arrays = [block.handle.data for block in combined]
        return [
            self.to_tensor(array[0], dtype) for array, dtype in zip(arrays, dtypes, strict=True)
        ]

    interpreter.ReduceOps.generic_reduce = reduce_halves


def _compare_shapes_first() -> None:
    """Let operations on blocks of one shape skip the search for their common shape."""
    from triton.language.semantic import TritonSemantic

    find_common = TritonSemantic.broadcast_impl_value

    def broadcast(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        blocks = left.type.is_block() and right.type.is_block()
        if blocks and left.handle.data.shape == right.handle.data.shape:
            return left, right
        return find_common(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast
