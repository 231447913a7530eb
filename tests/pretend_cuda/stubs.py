"""C source of the CUDA functions that a training step needs but that neither compute nor check.

Their names are the undefined symbols of PyTorch's libraries. Each function returns 0, success. The
calling convention lets a function ignore arguments, so the declarations are short.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

NAMES = re.compile(r"(__)?cuda[A-Z]\w+|cu[A-Z]\w+|(cublas|cudnn)(?!\w*(Version|Property))\w+")
"""Of the runtime, the driver, cuBLAS and cuDNN; questions for their versions go to the real ones,
as do the calls of other libraries.
"""

CONTEXT = "(void*)0x1000"
DESCRIPTOR = "malloc(64)"
ANSWERS = {
    "cudaGetDeviceCount": (0, "int", "1"),
    "cudaGetDevice": (0, "int", "0"),
    "cudaDeviceCanAccessPeer": (0, "int", "0"),
    "cudaDriverGetVersion": (0, "int", "13000"),
    "cudaRuntimeGetVersion": (0, "int", "13000"),
    "cudaDeviceGetStreamPriorityRange": (1, "int", "-5"),  # the least is 0, as memory is
    "cudaStreamGetPriority": (1, "int", "0"),
    "cudaEventElapsedTime": (0, "float", "1"),
    "cudaGetSymbolAddress": (0, "void*", "malloc(1 << 16)"),
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor": (0, "int", "4"),
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags": (0, "int", "4"),
    "cuDriverGetVersion": (0, "int", "13000"),
    "cuGetErrorString": (1, "const char*", '"error of the pretend driver"'),
    "cuDeviceGet": (0, "int", "0"),
    "cuCtxGetCurrent": (0, "void*", CONTEXT),
    "cuCtxGetDevice": (0, "int", "0"),
    "cuDevicePrimaryCtxRetain": (0, "void*", CONTEXT),
    "cuDevicePrimaryCtxGetState": (2, "int", "1"),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (0, "int", "4"),
    "cuOccupancyMaxActiveClusters": (0, "int", "1"),
    "cublasGetMathMode": (1, "int", "0"),
    "cublasGetPointerMode_v2": (1, "int", "0"),
    "cublasLtMatmulDescCreate": (0, "void*", DESCRIPTOR),
    "cublasLtMatmulPreferenceCreate": (0, "void*", DESCRIPTOR),
    "cublasLtMatrixLayoutCreate": (0, "void*", DESCRIPTOR),
    "cudnnCreateTensorDescriptor": (0, "void*", DESCRIPTOR),
    "cudnnCreateActivationDescriptor": (0, "void*", DESCRIPTOR),
    "cudnnGetStream": (1, "void*", "*(void**)a0"),  # the first member of a handle
    "cudnnBackendCreateDescriptor": (1, "void*", DESCRIPTOR),
    "cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize": (8, "size_t", "0"),
    "cudnnGetBatchNormalizationBackwardExWorkspaceSize": (10, "size_t", "0"),
    "cudnnGetBatchNormalizationTrainingExReserveSpaceSize": (5, "size_t", "0"),
}
"""Functions that write a constant: the position of the argument that they write to, its type, and
the value."""

IGNORED = re.compile(
    r"__cuda(RegisterFatBinary|RegisterFatBinaryEnd|UnregisterFatBinary|RegisterVar|InitModule)"
    r"|cuda(SetDevice|StreamDestroy|EventDestroy|GraphDestroy|GraphExecDestroy|FuncSetAttribute)"
    r"|cudaProfiler\w+|cu(Init|CtxSetCurrent|ModuleUnload|FuncSetAttribute|FuncSetCacheConfig)"
    r"|cublas(Lt\w*)?(Set|Destroy)\w+|cublasLt\w+(SetAttribute|Destroy)"
    r"|cudnn(Set|Destroy)\w+|cudnnBackend(DestroyDescriptor|SetAttribute|Finalize)"
)
"""Functions that do nothing."""

COUNTED = re.compile(
    r"cublas(?!Lt|Get|Set|Create|Destroy)\w+|cudnn(?!Get|Set|Create|Destroy|Backend|Find)\w+"
)
"""Functions that compute, with a handle as the first argument: each call is one kernel."""

HEADER = """\
#include <stdio.h>
#include <stdlib.h>
void pretend_library_call(void* handle, const char* name);
static int refuse(const char* name) {
  fprintf(stderr, "the pretend CUDA device has no %s; add it in tests/pretend_cuda\\n", name);
  abort();
}
"""


def source(libraries: Iterable[Path], callers: Iterable[Path], defined: Iterable[str]) -> str:
    """C source of the functions that libraries and C source files need, without those that are
    ``defined``.
    """
    needed = {"cuInit", *ANSWERS}
    for library in libraries:
        needed |= undefined_symbols(library)
    for caller in callers:
        needed |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", caller.read_text(encoding="utf-8")))
    functions = [name for name in sorted(needed - set(defined)) if NAMES.fullmatch(name)]
    return HEADER + "\n".join(map(_function, functions)) + "\n"


def undefined_symbols(library: Path) -> set[str]:
    """The names that a shared library takes from others, without their versions."""
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line}


def _function(name: str) -> str:
    if name in ANSWERS:
        position, kind, value = ANSWERS[name]
        before = "".join(f"void* a{index}, " for index in range(position))
        return f"int {name}({before}{kind}* answer) {{ if (answer) *answer = {value}; return 0; }}"
    if IGNORED.fullmatch(name):
        return f"int {name}(void) {{ return 0; }}"
    if COUNTED.fullmatch(name):
        return f'int {name}(void* handle) {{ pretend_library_call(handle, "{name}"); return 0; }}'
    return f'int {name}(void) {{ return refuse("{name}"); }}'
