"""Training steps on the pretend device: ``steps.py JSON`` with a list of cases, each the name of a
function below and the fields of a configuration, gives a list of results.
"""

import contextlib
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from fastokd.data import Loader
from fastokd.data.resident import ResidentLoader
from fastokd.experiments.step_images import synthetic_images
from fastokd.methods import get_method
from fastokd.methods.method import Method
from fastokd.models import BranchedModel, create_student
from fastokd.train.build import build_model
from fastokd.train.capture import WARM_UP_STEPS
from fastokd.train.checkpoint import snapshot
from fastokd.train.config import TrainConfig
from fastokd.train.data import loader_for
from fastokd.train.late_teaching import build_step
from fastokd.train.optimizers import Optimizers
from fastokd.train.runner import StepRunner
from fastokd.train.step import TrainStep
from pretend_cuda import device

GPU = torch.device("cuda", 0)
SMALL = {"model": "resnet8", "batch_size": 32, "image_size": 8, "lr": 0.01}
CLASSES = 10
LATER_STEPS = 20
"""The steps after the capture, in which nothing may wait or grow."""

PHASES = (
    (ResidentLoader, "gather", "batch"),
    (BranchedModel, "forward", "forward"),
    (Method, "forward_backward", "loss"),
    (torch.autograd, "backward", "backward"),
    (Optimizers, "step", "optimizer"),
)
"""Functions of a step and the phase of their kernels. Kernels of a function that another one calls
are in the phase of the inner one.
"""
METRICS = "metrics"
"""The phase of ``TrainStep.sum_metrics``."""
REST = "bookkeeping"
"""The phase of all other kernels: sums of metrics, and the guard against non-finite values."""
ORDER = ("batch", "forward", "loss", "backward", METRICS, "optimizer", REST)


def capture(**config: Any) -> dict[str, Any]:
    """Capture a step, and replay it."""
    return _watch(*_step_and_loader(config))


def teach_late(**config: Any) -> dict[str, Any]:
    """Capture the step of the student alone, then that of the branches copied from it."""
    late = TrainConfig(**{**SMALL, "epochs": 2, "teach_from": 1.0, **config})
    images = synthetic_images(late, CLASSES)
    loader: Any = loader_for(late, images, images.train, True, GPU)
    loader.set_epoch(0)
    with device.comparisons_hold():
        step = build_step(late, images, GPU, None, alone=True)
    alone = _watch(step, loader)
    student = snapshot(step.state_dict())
    before = _active_bytes()
    del step
    gc.collect()
    freed = before - _active_bytes()
    loader.set_epoch(1)
    with device.comparisons_hold():
        step = build_step(late, images, GPU, None, student=student)
    return {"alone": alone, "taught": _watch(step, loader), "freed": freed}


def fail_to_capture(**config: Any) -> dict[str, Any]:
    """Run a step that cannot be captured, because it reads a value."""
    step, loader = _step_and_loader(config)
    update = step.optimizers.step
    step.optimizers.step = lambda *given: (float(step.number), update(*given))[1]
    # The configuration does not require a graph, so the run continues without it.
    step.options = dataclasses.replace(step.options, cuda_graph=True)
    return _watch(step, loader)


def count(**config: Any) -> dict[str, int]:
    """The kernels of a step by phase, which are those of its graph."""
    step, loader = _step_and_loader({**config, "cuda_graph": False, "streams": False})
    position = torch.zeros((), dtype=torch.int64, device=GPU)
    if step.options.compile:
        loader.compile()
    for _ in range(3):  # state is created, kernels are compiled
        step(loader.gather(position))
    with contextlib.ExitStack() as patches:
        for owner, name, phase in PHASES:
            inside = device.in_phase(phase, getattr(owner, name))
            patches.enter_context(patch.object(owner, name, inside))
        step.sum_metrics = device.in_phase(METRICS, step.sum_metrics)
        device.reset()
        with device.phase(REST):
            step(loader.gather(position))
    counts = device.record().phases()
    return {phase: counts.get(phase, 0) for phase in ORDER}


def _watch(step: TrainStep, loader: Loader) -> dict[str, Any]:
    runner = StepRunner(step)
    steps = iter(runner.epoch(loader))
    unordered: list[int] = []
    # Both read results of all streams.
    step.criterion.forward_backward = _noting(step.criterion.forward_backward, unordered)
    step.optimizers.step = _noting(step.optimizers.step, unordered)
    waits: dict[str, int] = {}
    violations: list[str] = []
    captures: list[list[int]] = []

    def advance(count: int, may_wait: bool) -> None:
        device.reset()
        for _ in range(count):
            next(steps)
        record = device.record()
        violations.extend(record.violations)
        captures.extend(record.captures)
        if not may_wait:
            for call, number in record.synchronizations.items():
                waits[call] = waits.get(call, 0) + number

    advance(4, may_wait=True)  # state is created, kernels are compiled
    advance(WARM_UP_STEPS - 4, may_wait=False)
    advance(2, may_wait=True)  # the capture
    before = _active_bytes()
    advance(LATER_STEPS, may_wait=False)
    return {
        "options": step.options.describe(),
        "reason": runner.reason_against_capture,
        "violations": violations,
        "captures": captures,
        "unordered": unordered,
        "waits": waits,
        "growth": _active_bytes() - before,
    }


def _noting(function: Callable[..., Any], unordered: list[int]) -> Callable[..., Any]:
    """The function, which when captured first notes the kernels that need not precede its own."""

    def note_and_call(*arguments: Any, **keywords: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            unordered.append(device.unordered_kernels())
        return function(*arguments, **keywords)

    return note_and_call


def _active_bytes() -> int:
    return torch.cuda.memory_stats(GPU)["active_bytes.all.current"]


def _step_and_loader(fields: dict[str, Any]) -> tuple[TrainStep, Any]:
    gc.collect()
    torch.compiler.reset()  # networks of other cases count against a limit
    config = TrainConfig(**{**SMALL, **fields})
    teacher = None
    if get_method(config.method).needs_teacher:
        teacher = create_student(config.model, CLASSES).to(GPU)
    model = build_model(config, CLASSES, GPU, teacher)
    images = synthetic_images(config, CLASSES)
    with device.comparisons_hold():
        step = TrainStep(config, model, GPU)
    step.set_schedule(0.01, 0.7)
    step.criterion.prepare(len(images.train), CLASSES, GPU)
    loader = loader_for(config, images, images.train, True, GPU)
    loader.set_epoch(0)
    return step, loader


FUNCTIONS = {each.__name__: each for each in (capture, teach_late, fail_to_capture, count)}

if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    device.finish([FUNCTIONS[name](**fields) for name, fields in cases])
