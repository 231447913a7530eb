"""The time of a step with every optimization: a trace for Perfetto, and a table of the
kernels.
"""

import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.gpu.part import Context, Part, Row
from bench.gpu.results import Results
from bench.gpu.step import CIFAR, IMAGENET, TINY, Step
from bench.loaders import synchronize
from fastokd.experiments.step_benchmark import EngineStep
from fastokd.experiments.step_images import synthetic_images
from fastokd.experiments.timing import chrome_trace
from fastokd.storage import write_atomically
from fastokd.train.randomness import be_deterministic

STEPS = 5
"""Traced, after the warm-up."""
TIMED_STEPS = 50
MAX_TRACE_BYTES = 16 * 2**20
TOP = 30
ON_GPU, ON_CPU = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)
"""The categories of a trace's events that are work."""
_NAME = 160


def kernel_summary(
    events: Sequence[dict[str, Any]], steps: int, categories: Sequence[str] = ON_GPU
) -> dict[str, Any]:
    """Device times of a trace.

    Args:
        events: those of a Chrome trace, times in microseconds.
        steps: that were traced.
        categories: of the events that count.

    Returns:
        ``span_ms``: from the first event's start to the last one's end, per step; ``busy_share``:
            the part of it in which at least
        one ran; ``overlap``: the sum of their times over the time in which any ran, above 1 where
        streams run side by side;
        ``calls``: per step; ``gaps``: between two of them, per step, and the longest in
            microseconds; ``kernels``: by name, the
        ``TOP`` that take most: calls per step, microseconds per step, share of the sum of all.
    """
    work = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in categories
    )
    if not work:
        return {"calls": 0.0, "kernels": []}
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy, gaps, longest, end = 0.0, 0, 0.0, work[0][0]
    for begin, stop, name in work:
        totals[name][0] += 1
        totals[name][1] += stop - begin
        if begin > end:
            gaps, longest = gaps + 1, max(longest, begin - end)
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    span, total = end - work[0][0], sum(time for _, time in totals.values())
    ranked = sorted(totals.items(), key=lambda item: -item[1][1])
    return {
        "span_ms": span / steps / 1000,
        "busy_share": busy / span if span else 1.0,
        "overlap": total / busy if busy else 1.0,
        "calls": len(work) / steps,
        "gaps": gaps / steps,
        "longest_gap_us": longest,
        "kernels": [
            {
                "name": name[:_NAME],
                "calls": count / steps,
                "us": time / steps,
                "share": time / total if total else 0.0,
            }
            for name, (count, time) in ranked[:TOP]
        ],
    }


def _measure(context: Context, step: Step) -> dict[str, Any]:
    device, config = context.device, step.config()
    be_deterministic(False)  # as in a run: convolutions by the fastest algorithms
    with context.not_compiled():
        images = synthetic_images(config, step.num_classes)
        running = EngineStep(config, images, device, gathers=True)
        running.model.train()
        running.advance(running.warm_up)
        timed = 1 if context.dry else TIMED_STEPS
        synchronize(device)
        started = time.perf_counter()
        running.advance(timed)
        synchronize(device)
        step_ms = 1000 * (time.perf_counter() - started) / timed
        # The traced steps follow the first of an epoch, in which the host draws its random choices,
        # and end before the next.
        running.advance(-(running.warm_up + timed) % (len(images.train) // step.batch) + 1)
        synchronize(device)
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
            device.type == "cuda"
        )
        with torch.profiler.profile(activities=kinds) as found:
            running.advance(STEPS)
            synchronize(device)
    traced = chrome_trace(found)
    trace = context.out / f"trace-{step.model}-{step.batch}-{context.label}.json.gz"
    packed = gzip.compress(json.dumps(traced).encode(), mtime=0)
    if fits := len(packed) <= MAX_TRACE_BYTES:
        write_atomically(trace, lambda file: file.write(packed))
    return {
        "levers": running.step.options.describe(),
        "precision": running.step.precision,
        "batch": step.batch,
        "step_ms": step_ms,
        "trace": (
            trace.name
            if fits
            else f"not kept: {len(packed) / 2**20:.0f} MiB are more than {MAX_TRACE_BYTES >> 20}"
        ),
        **kernel_summary(traced["traceEvents"], STEPS, ON_GPU if device.type == "cuda" else ON_CPU),
    }


def _rows(context: Context, results: Results) -> Iterator[Row]:
    for step in (TINY,) if context.dry else (CIFAR, IMAGENET):
        yield Row(step.name, context.needs(2.0), lambda step=step: _measure(context, step))


def _line(row: dict[str, Any]) -> str:
    top = "; ".join(f"{kernel['share']:.0%} {kernel['name'][:60]}" for kernel in row["kernels"][:4])
    return (
        f"{row['step_ms']:.2f} ms a step, {row['calls']:.0f} kernels, busy"
        f" {row.get('busy_share', 0):.0%}; {top}"
    )


PART = Part("profile", 2.0, _rows, _line, sources=("bench/gpu/step.py",))
