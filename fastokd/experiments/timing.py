"""Timing of calls, traces, and the name of the processor."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_TRACE_ENTRIES = ["schemaVersion", "deviceProperties", "displayTimeUnit", "baseTimeNanoseconds"]


def median_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the minimum and the maximum."""
    return statistics.median(values), min(values), max(values)


def sample_seconds(
    call: Callable[[], Any], device: torch.device, graph: bool, repeats: int = 25, inner: int = 20
) -> list[float]:
    """Seconds of a call, measured ``repeats`` times.

    On a GPU each is the mean of ``inner`` calls, timed by events; with ``graph`` these are captured
    in a CUDA graph, so that no launches are timed.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _sample_by_events(call, graph, repeats, inner)
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _sample_by_events(
    call: Callable[[], Any], graph: bool, repeats: int, inner: int
) -> list[float]:
    """``sample_seconds`` on the current GPU."""

    def repeated() -> None:
        for _ in range(inner):
            call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            call()
    torch.cuda.current_stream().wait_stream(side)
    run: Callable[[], None] = repeated
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            repeated()
        run = captured.replay
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / inner)
    return times


def chrome_trace(profile: torch.profiler.profile) -> dict[str, Any]:
    """A profile as a Chrome trace, without the host name that PyTorch writes into it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    return {
        name: entry for name, entry in trace.items() if name in (*_TRACE_ENTRIES, "traceEvents")
    }


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
