"""What each lever of the step is worth on a machine: the step as published research code does it,
then one lever more a row.
"""

import dataclasses
import gc
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastokd.data import Augment, Batch, Dataset, Loader, Split, make_loader
from fastokd.errors import ConfigError, first_line
from fastokd.losses.method_loss import MethodLoss
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.methods.modules import BranchOutput
from fastokd.models import BranchedModel
from fastokd.storage import write_atomically
from fastokd.train.build import build_model
from fastokd.train.capture import WARM_UP_STEPS
from fastokd.train.config import TrainConfig, check_config, fields_with_role, override
from fastokd.train.data import AnyDataset, loader_for
from fastokd.train.fields import Role
from fastokd.train.memory import is_out_of_memory
from fastokd.train.precision import allow_tf32, autocast, choose_precision
from fastokd.train.randomness import be_deterministic
from fastokd.train.run_folder import environment
from fastokd.train.runner import StepRunner
from fastokd.train.step import TrainStep

WINDOWS = 5
"""Times that a row is measured; before each, the first row is measured again, so that a machine
that slows down changes no ratio.
"""
_BATCHES, _BYTES = (8, 64), 2**28
"""The fewest and the most batches of the images that the ladder trains on, and their size where
that lies between.
"""
_SMALL = 64
"""The largest side of images that are augmented as CIFAR is, by shifting them."""
_PROFILED_STEPS = 5
SPENT = "the time was spent"
"""The reason of a row that was not measured because it was to be stopped before it."""

_REMOVED = "merged first convolutions"
"""A row of earlier versions."""
NEVER = ("needs a GPU", "there is no captured step to put it into")
"""The reasons of rows that there cannot be here."""

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Lever:
    """One row's difference from the rows before it.

    Attributes:
        name: as the table says it.
        changes: fields of the configuration.
        carried: whether the rows after it have it too; else it is an alternative.
        needs_gpu: whether it is only there on a GPU.
        gathers: batches are made inside the captured graph, from here on.
    """

    name: str
    changes: Mapping[str, Any]
    carried: bool = True
    needs_gpu: bool = False
    gathers: bool = False


def levers(device: torch.device) -> list[Lever]:
    """The rows after the first, in their order."""
    gpu = device.type == "cuda"
    return [
        Lever("fused loss, metrics kept on the device, fused SGD", {"impl": "auto"}),
        Lever("channels-last", {"channels_last": True}),
        Lever(
            "bf16", {"precision": "bf16"}, carried=gpu
        ),  # many CPUs compute in it more slowly, so that no run takes it there unasked
        Lever("torch.compile of each part", {"compile": True}),
        Lever("parameters in one tensor", {"flat": True}),
        Lever("branches on CUDA streams", {"streams": True}, needs_gpu=True),
        Lever("the step as one CUDA graph", {"cuda_graph": True}, needs_gpu=True),
        Lever("augmentation inside the graph", {}, needs_gpu=True, gathers=True),
    ]


def first_row(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration of the first row: every lever off. On a GPU convolutions run on TF32 units,
    which is PyTorch's default.
    """
    return dataclasses.replace(
        config,
        precision="tf32" if device.type == "cuda" else "fp32",
        impl="reference",
        **dict.fromkeys(fields_with_role(Role.SWITCH), False),
    )


class Stepping(Protocol):
    """A training that can be advanced."""

    model: BranchedModel
    criterion: MethodLoss
    captured: bool
    warm_up: int

    def advance(self, steps: int) -> None:
        """Run this many steps more; the device may still be at work afterwards."""

    def loss(self) -> float:
        """The mean loss of the steps since this was last asked."""

    def loss_backward(self, output: BranchOutput, batch: MethodBatch) -> None:
        """The loss and its gradients, as a step computes them from the network's output."""


class ResearchStep:
    """The step as the published code of these methods does it: a plain loss, autograd through each
    of its operations, PyTorch's own SGD, and the loss and every branch's and mixture's accuracy
    read by ``.item()`` in every step.

    Its batches are made on the device like those of all rows: how research code reads its images is
    not measured.
    """

    captured, warm_up = False, 3

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        self.method = get_method(config.method)
        self.model = build_model(config, len(dataset.classes), device)
        self.criterion = self.method.loss_class(
            num_branches=config.num_branches(), **config.loss_options()
        ).to(device)
        self.criterion.prepare(len(dataset.train), len(dataset.classes), device)
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self._batches = _endless(loader_for(config, dataset, dataset.train, True, device))
        self._losses: list[float] = []
        self._accuracies: dict[str, float] = {}

    def advance(self, steps: int) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (
            False,
            True,
        )  # PyTorch's defaults
        for batch in itertools.islice(self._batches, steps):
            result = self.model(batch.images)
            loss = self.method.loss(self.criterion, result, MethodBatch(batch.target, batch.index))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._losses.append(loss.item())
            rows = self.method.named_logits(self.criterion, result)
            self._accuracies = {name: _top1(row, batch.target).item() for name, row in rows.items()}

    def loss(self) -> float:
        mean = statistics.fmean(self._losses)
        self._losses.clear()
        return mean

    def loss_backward(self, output: BranchOutput, batch: MethodBatch) -> None:
        self.method.loss(self.criterion, output, batch).backward()


def _top1(row: Tensor, target: Tensor) -> Tensor:
    """The accuracy of logits [B, C], by way of the five largest, as research code has it."""
    top = row.topk(min(5, row.shape[1]), 1).indices
    return (top[:, 0] == target).float().mean()


class EngineStep:
    """The step as a run of this configuration has it.

    Args:
        config: the run's.
        dataset: decoded images.
        device: where it runs.
        gathers: whether a captured step makes its batches itself.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, device: torch.device, gathers: bool
    ) -> None:
        self.model = build_model(config, len(dataset.classes), device)
        self.step = TrainStep(config, self.model, device)
        self.criterion = self.step.criterion
        self.criterion.prepare(len(dataset.train), len(dataset.classes), device)
        self.captured = self.step.options.cuda_graph
        self.warm_up = WARM_UP_STEPS + 2 if self.captured else 3
        self._lr = config.lr
        self._runner = StepRunner(self.step)
        loader = loader_for(config, dataset, dataset.train, True, device)
        self._steps = self._endless(loader, loader if gathers else _Made(loader))

    def _endless(self, loader: Loader, batches: Any) -> Iterator[int]:
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from self._runner.epoch(batches)

    def advance(self, steps: int) -> None:
        allow_tf32(self.step.precision == "tf32")
        for _ in range(steps):
            self.step.set_schedule(self._lr, 1.0)
            next(self._steps)

    def loss(self) -> float:
        mean = self.step.sums.means()["loss"]
        self.step.sums.clear()
        return mean

    def loss_backward(self, output: BranchOutput, batch: MethodBatch) -> None:
        self.step.method.forward_backward(
            self.criterion, output, batch, kd_weight=self.step.kd_weight
        )


class _Made:
    """A loader's batches, without what would let a captured step make them itself."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the ladder. What could not be measured is None, and ``reason`` says why.

    Attributes:
        name: what the row has that the rows before it have not.
        kind: "first", "lever" (the rows after it have it too), "alternative" (they do not), or
            "student" (it alone).
        reason: why it was not measured; empty if it was.
        images_per_second: median, slowest and fastest window.
        milliseconds: of a step, in the median window.
        times_first: how often faster it is than the first row: each window against one of the first
            row right before it; the median of these, the lowest and the highest.
        peak_bytes: the most GPU memory that was allocated for it; None on a CPU.
        loss_share: the fraction of a step's time that the loss and its gradients take, measured
            alone on the same logits.
        start_seconds: of the first steps, with compilation and capture.
        first_loss: the loss of the first step; all rows begin with the same weights and images.
    """

    name: str
    kind: str
    reason: str = ""
    images_per_second: tuple[float, float, float] | None = None
    milliseconds: float | None = None
    times_first: tuple[float, float, float] | None = None
    peak_bytes: int | None = None
    loss_share: float | None = None
    start_seconds: float | None = None
    first_loss: float | None = None


class Ladder:
    """Measures the rows of one network and method.

    Args:
        config: model, method, its layout, and the batch size; what the levers are about is set by
            the rows.
        dataset: decoded images, see ``ladder_images``.
        device: where the rows run.
        seconds: how long each row is measured, in all its windows; the first row beside it takes as
            long again.
        steps: steps of each window instead.
        clock: seconds that pass.

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
        if get_method(config.method).needs_teacher:
            raise ConfigError(
                f"method '{config.method}' needs a trained teacher, which the ladder has none of;"
                " choose another --method"
            )
        if steps is not None and steps < 1:
            raise ConfigError(f"steps={steps}: each window has at least 1")
        if not seconds > 0:
            raise ConfigError(f"seconds={seconds:g}: it must be positive")
        check_config(config)
        self.config, self.dataset, self.device = config, dataset, device
        self._seconds, self._steps, self._clock = seconds, steps, clock
        self.environment = environment(device)
        """Of the code that is measured: a checkout may change while it runs."""
        self._first: Stepping | None = None
        self._best: tuple[TrainConfig, bool] | None = None

    def rows(
        self,
        stop: Callable[[], bool] = lambda: False,
        known: Mapping[str, Row] = MappingProxyType({}),
    ) -> Iterator[Row]:
        """Measure row after row.

        Args:
            stop: asked before each row; the rows after it said so are not measured.
            known: rows that were measured before, by name, which are given again as they are.

        Raises:
            ConfigError: the first row cannot run.
        """
        be_deterministic(False)
        config, gathers, gpu = (
            first_row(self.config, self.device),
            False,
            self.device.type == "cuda",
        )
        number = "TF32" if gpu else "fp32"
        name = f"research style: eager, {number}, NCHW, .item()"
        row = known.get(name) or self._measured(name, "first", self._research_step)
        if row.reason:
            raise ConfigError(
                f"the first row of the ladder cannot run: {row.reason}; use a smaller --batch-size"
            )
        yield row
        for lever in levers(self.device):
            kind = "lever" if lever.carried else "alternative"
            candidate, inside = (
                dataclasses.replace(config, **lever.changes),
                gathers or lever.gathers,
            )
            if lever.name not in known and stop():
                yield Row(lever.name, kind, SPENT)
            elif lever.needs_gpu and not gpu:
                yield Row(lever.name, kind, NEVER[0])
            elif lever.gathers and not config.cuda_graph:
                yield Row(lever.name, kind, NEVER[1])
            else:
                row = known.get(lever.name) or self._measured(
                    lever.name,
                    kind,
                    lambda config=candidate, inside=inside: EngineStep(
                        config, self.dataset, self.device, inside
                    ),
                )
                if lever.carried and not row.reason:
                    config, gathers = candidate, inside
                yield row
        self._best = config, gathers
        if config.num_branches() == 1:
            return
        names = config.model_names()
        kept = names[get_method(config.method).kept if len(names) > 1 else 0]
        alone = override(
            config,
            {
                "method": "baseline",
                "branches": 1,
                "aux_blocks": 0,
                "compression": False,
                "model": kept,
                "streams": False,
            },
        )
        title = "the student alone, with every lever"
        if title in known:
            yield known[title]
        elif stop():
            yield Row(title, "student", SPENT)
        else:
            yield self._measured(
                title, "student", lambda: EngineStep(alone, self.dataset, self.device, gathers)
            )

    def _research_step(self) -> Stepping:
        return ResearchStep(first_row(self.config, self.device), self.dataset, self.device)

    def _measured(self, name: str, kind: str, make: Callable[[], Stepping]) -> Row:
        """A row, or why there is none; a row that cannot run must not lose the others."""
        try:
            return self._measure(name, kind, make)
        except Exception as error:  # compilers' errors have no class in common
            return Row(
                name, kind, "out of memory" if is_out_of_memory(error) else first_line(error)
            )
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, name: str, kind: str, make: Callable[[], Stepping]) -> Row:
        # Each row compiles networks of its own; what is left of others' counts against a limit
        torch.compiler.reset()
        gpu = self.device.type == "cuda"
        if kind != "first" and self._first is None:  # its own row is known from before
            self._first = self._research_step()
            self._first.model.train()
            self._first.advance(self._first.warm_up)
        before = torch.cuda.memory_allocated(self.device) if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        running = make()
        running.model.train()
        started = self._now()
        running.advance(1)
        first_loss = running.loss()
        running.advance(running.warm_up - 1)
        start_seconds = self._now() - started
        # Now, because what a captured step holds is not counted any more when it is replayed, and
        # other rows' is.
        peak = torch.cuda.max_memory_allocated(self.device) - before if gpu else None
        if kind == "first":
            self._first = running
        beside = None if kind == "first" else self._first
        mine, others = [], []
        counts = [self._window_steps(each) for each in (running, beside) if each is not None]
        for _ in range(WINDOWS):
            if beside is not None:
                others.append(self._speed(beside, counts[-1]))
            mine.append(self._speed(running, counts[0]))
        step_seconds = self.config.batch_size / statistics.median(mine)
        loss_seconds = self._loss_seconds(running)
        ratios = [own / other for own, other in zip(mine, others or mine, strict=True)]
        return Row(
            name,
            kind,
            "",
            spread(mine),
            1000 * step_seconds,
            spread(ratios),
            peak,
            None if loss_seconds is None else loss_seconds / step_seconds,
            start_seconds,
            first_loss,
        )

    def _window_steps(self, running: Stepping) -> int:
        if self._steps is not None:
            return self._steps
        started = self._now()
        running.advance(2)
        return max(1, round(self._seconds / WINDOWS / max((self._now() - started) / 2, 1e-9)))

    def _speed(self, running: Stepping, steps: int) -> float:
        """Images per second of a window."""
        started = self._now()
        running.advance(steps)
        return self.config.batch_size * steps / max(self._now() - started, 1e-9)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def _loss_seconds(self, running: Stepping) -> float | None:
        """The time of the loss alone: from a batch's logits to their gradients, and to those of
        what else the loss takes.

        Captured like the step where the step is; on a GPU by its own events.
        """
        step = running.step if isinstance(running, EngineStep) else None
        config = first_row(self.config, self.device) if step is None else step.config
        batch = next(iter(loader_for(config, self.dataset, self.dataset.train, True, self.device)))
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            autocast(choose_precision(config, self.device) if step else "fp32", self.device),
        ):
            result = running.model(batch.images)
        output = tree_map(_leaf, result._replace(features=()))
        leaves = [
            value
            for value in tree_leaves(output)
            if isinstance(value, Tensor) and value.requires_grad
        ]
        seen = MethodBatch(batch.target, batch.index)

        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            running.loss_backward(output, seen)

        try:
            return statistics.median(
                sample_seconds(
                    call,
                    self.device,
                    running.captured,
                    *((25, 20) if self._steps is None else (3, 1)),
                )
            )
        except RuntimeError:
            # It cannot be captured by itself, and launched by itself takes longer than in the step.
            return None

    def profile(self, folder: Path) -> tuple[Path, str]:
        """Trace some steps of the last row that the others build on, after ``rows`` has ended.

        Returns:
            The file, for chrome://tracing and Perfetto, and a table of what took most of the time.

        Raises:
            StorageError: the disk refused.
        """
        assert self._best is not None
        torch.compiler.reset()
        running = EngineStep(self._best[0], self.dataset, self.device, self._best[1])
        running.model.train()
        running.advance(running.warm_up)
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
            self.device.type == "cuda"
        )
        self._now()
        with torch.profiler.profile(activities=kinds) as found:
            running.advance(_PROFILED_STEPS)
            self._now()
        path = folder / "step-trace.json"
        text = json.dumps(chrome_trace(found))
        write_atomically(path, lambda file: file.write(text.encode()))
        sort = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        return path, found.key_averages().table(
            sort_by=sort, row_limit=15, max_name_column_width=60
        )


_KEPT = (
    "schemaVersion",
    "deviceProperties",
    "displayTimeUnit",
    "baseTimeNanoseconds",
    "traceEvents",
)


def chrome_trace(found: torch.profiler.profile) -> dict[str, Any]:
    """A profile as a Chrome trace, without the machine's name that PyTorch writes into it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        traced = json.loads(path.read_bytes())
    return {name: traced[name] for name in _KEPT if name in traced}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the lowest and the highest."""
    return statistics.median(values), min(values), max(values)


def all_levers(rows: Sequence[Row]) -> Row:
    """The last row that was measured and has the levers of all before it."""
    return [row for row in rows if row.kind in ("first", "lever") and not row.reason][-1]


def report(ladder: Ladder, rows: Sequence[Row]) -> dict[str, Any]:
    """What ``step-ladder.json`` holds: the setting, the rows, and the machine with versions, commit
    and command.
    """
    config = ladder.config
    best = all_levers(rows)
    alone = next((row for row in rows if row.kind == "student"), None)
    height, width = ladder.dataset.image_size
    return {
        "model": config.model,
        "method": config.method,
        "branches": config.num_branches(),
        "aux_blocks": config.aux_blocks,
        "batch_size": config.batch_size,
        "image_size": [height, width],
        "num_classes": len(ladder.dataset.classes),
        "data": ladder.dataset.name,
        "windows": WINDOWS,
        "rows": [dataclasses.asdict(row) for row in rows],
        "all_levers": best.name,
        "teaching_costs": (
            alone.times_first[0] / best.times_first[0]
            if alone and alone.times_first and best.times_first
            else None
        ),
        "processor": processor(),
        "environment": ladder.environment,
    }


def current_rows(found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``report`` gives for an earlier result, without rows that no longer exist."""
    rows = [row for row in found["rows"] if not row["name"].startswith(_REMOVED)]
    if len(rows) == len(found["rows"]):
        return dict(found)
    best = [row for row in rows if row["kind"] in ("first", "lever") and not row["reason"]][-1]
    alone = next((row for row in rows if row["kind"] == "student"), None)
    costs = alone and alone["times_first"] and alone["times_first"][0] / best["times_first"][0]
    return {**found, "rows": rows, "all_levers": best["name"], "teaching_costs": costs}


def ladder_images(config: TrainConfig, num_classes: int = 10) -> Dataset:
    """The images that a ladder trains on where no data is given: random ones, of the
    configuration's ``image_size`` or 32.
    """
    side = config.image_size or 32
    count = config.batch_size * _num_batches(config.batch_size * 3 * side**2)
    generator = torch.Generator().manual_seed(config.seed)
    split = Split(
        "train",
        torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        torch.arange(count) % num_classes,
    )
    return Dataset(
        name="random images",
        classes=tuple(map(str, range(num_classes))),
        train=split,
        test=split,
        mean=(0.5, 0.5, 0.5),
        std=(0.29, 0.29, 0.29),
        augment=Augment(pad=4 if side <= _SMALL else 0, flip=True),
        fingerprint="",
    )


def decoded_images(config: TrainConfig, dataset: AnyDataset) -> Dataset:
    """A dataset as the ladder takes it; of one whose images are decoded while training some are
    decoded and cropped, once.
    """
    if isinstance(dataset, Dataset):
        return dataset
    height, width = dataset.image_size
    cropped = dataclasses.replace(dataset.augment, pad=0, flip=False)
    pixels = make_loader(
        dataclasses.replace(dataset, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        "train",
        config.batch_size,
        train=True,
        augment=cropped,
    )
    images, targets = zip(
        *(
            (batch.images.mul(255).round().byte().clone(), batch.target.clone())
            for batch in itertools.islice(
                pixels, _num_batches(config.batch_size * 3 * height * width)
            )
        ),
        strict=True,
    )
    split = Split("train", torch.cat(images), torch.cat(targets))
    return Dataset(
        name=dataset.name,
        classes=dataset.classes,
        train=split,
        test=split,
        mean=dataset.mean,
        std=dataset.std,
        augment=dataclasses.replace(dataset.augment, crop_scale=None),
        fingerprint="",
    )


def _num_batches(batch_bytes: int) -> int:
    fewest, most = _BATCHES
    return max(fewest, min(most, _BYTES // batch_bytes))


def sample_seconds(
    call: Callable[[], Any], device: torch.device, graph: bool, repeats: int = 25, inner: int = 20
) -> list[float]:
    """The times of a call, measured ``repeats`` times.

    On a GPU each is the mean of ``inner`` calls, by events; with ``graph`` they are captured, so
    that no launch is timed.
    """
    if device.type != "cuda":
        call()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return times
    with torch.cuda.device(device):
        return _sample_by_events(call, graph, repeats, inner)


def _sample_by_events(
    call: Callable[[], Any], graph: bool, repeats: int, inner: int
) -> list[float]:
    """``sample_seconds`` on the current GPU."""

    def some() -> None:
        for _ in range(inner):
            call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            call()
    torch.cuda.current_stream().wait_stream(side)
    run = some
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            some()
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


def _leaf(value: Any) -> Any:
    return (
        value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
