"""``fastokd bench step``: the speed-up of each optimization of the training step on a machine.

The first row is the step of published research code; each following row adds one optimization.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fastokd.data import Dataset
from fastokd.errors import ConfigError
from fastokd.experiments.research_step import ResearchStep
from fastokd.experiments.step_timer import WINDOWS, Clock, StepRow, StepTimer, TimedStep
from fastokd.experiments.timing import chrome_trace, processor
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.methods.modules import BranchOutput
from fastokd.storage import write_atomically
from fastokd.train.capture import WARM_UP_STEPS
from fastokd.train.config import TrainConfig, fields_with_role, override
from fastokd.train.fields import Role
from fastokd.train.precision import allow_tf32
from fastokd.train.randomness import be_deterministic
from fastokd.train.rules import check_config
from fastokd.train.run_folder import environment
from fastokd.train.runner import StepRunner
from fastokd.train.step import TrainStep

_PROFILED_STEPS = 5
SPENT = "the time was spent"
"""The reason of a row that was not measured because the benchmark was to stop before it."""
NEVER = ("needs a GPU", "there is no captured step to put it into")
"""The reasons of rows that cannot be measured on the device."""
_ALONE = "the student alone, with all optimizations"


@dataclasses.dataclass(frozen=True)
class Optimization:
    """The difference of a row from the rows before it.

    Attributes:
        name: the name of the row.
        changes: fields of the configuration.
        carried: whether the rows after it have it too; else it is an alternative.
        needs_gpu: whether it exists on a GPU only.
        gathers: whether batches are made inside the captured graph from here on.
    """

    name: str
    changes: Mapping[str, Any]
    carried: bool = True
    needs_gpu: bool = False
    gathers: bool = False


def optimizations(device: torch.device) -> list[Optimization]:
    """The rows after the first, in order."""
    # Many CPUs compute more slowly in bf16, so no run uses it there by default.
    bf16 = Optimization("bf16", {"precision": "bf16"}, carried=device.type == "cuda")
    return [
        Optimization("fused loss, metrics kept on the device, fused SGD", {"impl": "auto"}),
        Optimization("channels-last", {"channels_last": True}),
        bf16,
        Optimization("torch.compile of each part", {"compile": True}),
        Optimization("parameters in one tensor", {"flat": True}),
        Optimization("weights cast once per step", {"cast_once": True}, needs_gpu=True),
        Optimization("branches on CUDA streams", {"streams": True}, needs_gpu=True),
        Optimization("the step as one CUDA graph", {"cuda_graph": True}, needs_gpu=True),
        Optimization("augmentation inside the graph", {}, needs_gpu=True, gathers=True),
    ]


def first_row(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration without any optimization; on a GPU with TF32, PyTorch's default there."""
    switches: dict[str, Any] = dict.fromkeys(fields_with_role(Role.SWITCH), False)
    precision = "tf32" if device.type == "cuda" else "fp32"
    return dataclasses.replace(config, precision=precision, impl="reference", **switches)


class EngineStep(TimedStep):
    """The step of a run; with ``gathers`` a captured step gathers its batches itself."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, device: torch.device, gathers: bool
    ) -> None:
        super().__init__(config, dataset, device)
        self.step = TrainStep(config, self.model, device)
        self.precision, self.criterion = self.step.precision, self.step.criterion
        self.criterion.prepare(len(dataset.train), len(dataset.classes), device)
        self.captured = self.step.options.cuda_graph
        if self.captured:
            self.warm_up = WARM_UP_STEPS + 2
        # An iterator hides from the runner that the loader's batches can be gathered.
        epochs: Any = self.epochs() if gathers else map(iter, self.epochs())
        self._steps = itertools.chain.from_iterable(map(StepRunner(self.step).epoch, epochs))

    def advance(self, steps: int) -> None:
        allow_tf32(self.precision == "tf32")
        for _ in range(steps):
            self.step.set_schedule(self.config.lr, 1.0)
            next(self._steps)

    def loss(self) -> float:
        mean = self.step.sums.means()["loss"]
        self.step.sums.clear()
        return mean

    def loss_backward(self, output: BranchOutput, batch: MethodBatch) -> None:
        weight = self.step.kd_weight
        self.step.method.forward_backward(self.criterion, output, batch, kd_weight=weight)


class StepBenchmark:
    """The rows of one network and method.

    Args:
        config: model, method, branches and batch size; the rows set the optimizations.
        dataset: decoded images, see ``synthetic_images``.
        device: the device of the rows.
        seconds: time for all windows of a row; the windows of the first row take as long again.
        steps: steps of each window, instead of ``seconds``.
        clock: returns a time in seconds.

    Raises:
        ConfigError: the configuration cannot be trained, or its method needs a trained teacher.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        device: torch.device,
        *,
        seconds: float = 10.0,
        steps: int | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        if config.teacher:
            raise ConfigError("the step benchmark has no frozen teacher; omit --teacher")
        if get_method(config.method).needs_teacher:
            reason = "needs a trained teacher, which the step benchmark does not have"
            raise ConfigError(f"method '{config.method}' {reason}; choose another --method")
        if steps is not None and steps < 1:
            raise ConfigError(f"steps={steps}: must be at least 1")
        if not seconds > 0:
            raise ConfigError(f"seconds={seconds:g}: must be positive")
        check_config(config)
        self.config, self.dataset, self.device = config, dataset, device
        self.environment = environment(device)
        """Recorded at the start: a checkout may change during the benchmark."""
        baseline = first_row(config, device)
        self._timer = StepTimer(
            lambda: ResearchStep(baseline, dataset, device), dataset, device, seconds, steps, clock
        )
        self._best: tuple[TrainConfig, bool] | None = None

    def rows(
        self,
        stop: Callable[[], bool] = lambda: False,
        known: Mapping[str, StepRow] = MappingProxyType({}),
    ) -> Iterator[StepRow]:
        """Measure row after row.

        Args:
            stop: called before each row; once true, the remaining rows are not measured.
            known: rows measured earlier, by name, which are returned unchanged.
        """
        be_deterministic(False)
        config, gathers = first_row(self.config, self.device), False
        number = "TF32" if self.device.type == "cuda" else "fp32"
        name = f"research style: eager, {number}, NCHW, .item()"
        row = known.get(name) or self._timer.measure(name, "first")
        if row.reason:
            problem = f"the first row of the step benchmark cannot run: {row.reason}"
            raise ConfigError(f"{problem}; use a smaller --batch-size")
        yield row

        def measure(
            name: str, kind: str, config: TrainConfig, gathers: bool, reason: str = ""
        ) -> StepRow:
            if name in known:
                return known[name]
            if reason := SPENT if stop() else reason:
                return StepRow(name, kind, reason)
            make = functools.partial(EngineStep, config, self.dataset, self.device, gathers)
            return self._timer.measure(name, kind, make)

        for optimization in optimizations(self.device):
            name, kind = optimization.name, "lever" if optimization.carried else "alternative"
            candidate = dataclasses.replace(config, **optimization.changes)
            gathering, reason = gathers or optimization.gathers, ""
            if optimization.needs_gpu and self.device.type != "cuda":
                reason = NEVER[0]
            elif optimization.gathers and not config.cuda_graph:
                reason = NEVER[1]
            row = measure(name, kind, candidate, gathering, reason)
            if optimization.carried and not row.reason:
                config, gathers = candidate, gathering
            yield row
        self._best = config, gathers
        if config.num_branches() > 1:
            yield measure(_ALONE, "student", _student_alone(config), gathers)

    def profile(self, folder: Path) -> tuple[Path, str]:
        """Trace some steps with all optimizations, after ``rows`` has ended. Returns the file, for
        chrome://tracing and Perfetto, and a table of the top operations.
        """
        if self._best is None:
            raise RuntimeError("call rows() to its end before profile()")
        torch.compiler.reset()
        config, gathers = self._best
        running = EngineStep(config, self.dataset, self.device, gathers)
        running.model.train()
        running.advance(running.warm_up)
        gpu = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] * gpu
        self._timer.now()
        with torch.profiler.profile(activities=kinds) as profile:
            running.advance(_PROFILED_STEPS)
            self._timer.now()
        path = folder / "step-trace.json"
        text = json.dumps(chrome_trace(profile))
        write_atomically(path, lambda file: file.write(text.encode()))
        by = "self_device_time_total" if gpu else "self_cpu_time_total"
        averages = profile.key_averages()
        return path, averages.table(sort_by=by, row_limit=15, max_name_column_width=60)


def _student_alone(config: TrainConfig) -> TrainConfig:
    names = config.model_names()
    alone = {"method": "baseline", "branches": 1, "aux_blocks": 0, "compression": False}
    model = names[get_method(config.method).kept if len(names) > 1 else 0]
    return override(config, {**alone, "model": model, "streams": False})


def report(benchmark: StepBenchmark, rows: Sequence[StepRow]) -> dict[str, Any]:
    """The content of ``step-ladder.json``: the setting, the rows and the environment."""
    config, dataset = benchmark.config, benchmark.dataset
    best = [row for row in rows if row.kind in ("first", "lever") and not row.reason][-1]
    alone = next((row for row in rows if row.kind == "student"), None)
    costs = None  # the time per step relative to the student alone
    if alone and alone.times_first and best.times_first:
        costs = alone.times_first[0] / best.times_first[0]
    return {
        "model": config.model,
        "method": config.method,
        "branches": config.num_branches(),
        "aux_blocks": config.aux_blocks,
        "batch_size": config.batch_size,
        "image_size": list(dataset.image_size),
        "num_classes": len(dataset.classes),
        "data": dataset.name,
        "windows": WINDOWS,
        "rows": [dataclasses.asdict(row) for row in rows],
        "all_levers": best.name,
        "teaching_costs": costs,
        "processor": processor(),
        "environment": benchmark.environment,
    }
