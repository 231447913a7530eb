"""Captures that break a rule, one for each that the pretend device checks: gives by the name of the
function below its violations and the error that ends the capture.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

import torch

from pretend_cuda import device

GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # cudaStreamCaptureMode
LIBRARY = device.LIBRARY
X = torch.zeros(4, device="cuda")
HOST = torch.zeros(4)
PINNED = torch.zeros(4, pin_memory=True)
STREAM, SIDE = torch.cuda.Stream(), torch.cuda.Stream()


def clean() -> None:
    fork()
    STREAM.wait_stream(SIDE)
    X.copy_(PINNED, non_blocking=True)
    PINNED.copy_(X, non_blocking=True)


def fork() -> None:
    """Work on another stream that is a part of the capture."""
    X.add_(1)
    SIDE.wait_stream(STREAM)
    with torch.cuda.stream(SIDE):
        X.add_(1)


def unjoined() -> None:
    fork()


def work_after_join() -> None:
    fork()
    STREAM.wait_stream(SIDE)
    with torch.cuda.stream(SIDE):
        X.add_(1)


def escaped() -> None:
    with torch.cuda.stream(SIDE):
        X.add_(1)


def isolation() -> None:
    STREAM.wait_stream(SIDE)


def legacy_stream() -> None:
    torch.cuda.default_stream().wait_stream(STREAM)


def merge() -> None:
    with capture(SIDE, THREAD_LOCAL):
        STREAM.wait_stream(SIDE)


def item() -> None:
    X[0].item()


def stream_query() -> None:
    STREAM.query()


def event_synchronize() -> None:
    STREAM.record_event().synchronize()


def event_query() -> None:
    STREAM.record_event().query()


def synchronize() -> None:
    torch.cuda.synchronize()


def allocation() -> None:
    LIBRARY.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(512))


def module_load() -> None:
    LIBRARY.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), None)


def allocation_of_another_thread() -> None:
    thread = threading.Thread(target=allocation)
    thread.start()
    thread.join()


def pageable_copy() -> None:
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (X, HOST)]
    stream = ctypes.c_void_p(STREAM.cuda_stream)
    LIBRARY.cudaMemcpyAsync(*addresses, ctypes.c_size_t(16), 1, stream)  # PyTorch refuses by itself


@contextlib.contextmanager
def capture(stream: torch.cuda.Stream, mode: int) -> Iterator[list[int]]:
    """Capture what is launched, without PyTorch's own checks; yields a list for the error."""
    errors: list[int] = []
    handle = ctypes.c_void_p(stream.cuda_stream)
    assert LIBRARY.cudaStreamBeginCapture(handle, mode) == 0
    try:
        with torch.cuda.stream(stream):
            yield errors
    finally:
        errors.append(LIBRARY.cudaStreamEndCapture(handle, ctypes.byref(ctypes.c_void_p())))
        LIBRARY.cudaGetLastError()


def result(function: Callable[[], None], mode: int) -> dict[str, object]:
    device.reset()
    with capture(STREAM, mode) as errors, contextlib.suppress(RuntimeError):
        function()
    return {"violations": device.record().violations, "error": errors[0]}


def main() -> None:
    X[0].item()  # allocates pinned memory, once
    cases = (
        clean, unjoined, work_after_join, escaped, isolation, legacy_stream, merge, item,
        stream_query, event_synchronize, event_query, synchronize, allocation, module_load,
        allocation_of_another_thread, pageable_copy,
    )  # fmt: skip
    results = {each.__name__: result(each, THREAD_LOCAL) for each in cases}
    results["allocation of another thread, global"] = result(allocation_of_another_thread, GLOBAL)
    results["allocation, relaxed"] = result(allocation, RELAXED)
    device.finish(results)


if __name__ == "__main__":
    main()
