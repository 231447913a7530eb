"""The training step on a GPU: options change nothing but speed, nothing waits for the device,
captured steps are the steps they were.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fastokd.data import Batch, make_loader, open_dataset
from fastokd.errors import ConfigError
from fastokd.train import capture
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig
from fastokd.train.runner import StepRunner
from fastokd.train.step import TrainStep

pytestmark = pytest.mark.gpu

OFF = {
    "impl": "reference",
    "channels_last": False,
    "flat": False,
    "compile": False,
    "cuda_graph": False,
    "streams": False,
    "precision": "fp32",
}
CONFIG = TrainConfig(
    data="digits",
    model="resnet8",
    method="ahbf",
    branches=3,
    aux_blocks=1,
    batch_size=32,
    lr=0.002,
    **OFF,
)
STEPS = 20
TOLERANCE = 1e-3
"""Of the way that the weights go in twenty steps; float32 on a GPU rounds otherwise in another
order, and kinks are taken out.
"""


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_of(**changes: object) -> TrainStep:
    config, device = dataclasses.replace(CONFIG, **changes), torch.device("cuda", 0)
    model = build_model(config, 10, device)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta=3.0))
    step = TrainStep(config, model, device)
    step.set_schedule(0.002, 0.7)
    return step


def batches(count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(32, 3, 8, 8, generator=generator).cuda(),
            torch.randint(10, (32,), generator=generator).cuda(),
            torch.arange(32).cuda(),
        )
        for _ in range(count)
    ]


def train(step: TrainStep, given: list[Batch]) -> TrainStep:
    numbers = list(StepRunner(step).epoch(given))  # type: ignore[arg-type]
    assert numbers == list(range(1, len(given) + 1))
    return step


def weights(step: TrainStep) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in step.model.parameters()])


def difference(step: TrainStep, other: TrainStep) -> float:
    start = weights(step_of())
    return float((weights(step) - weights(other)).norm() / (weights(other) - start).norm())


@pytest.fixture(scope="module")
def plain() -> TrainStep:
    return train(step_of(), batches())


LEVERS = [
    {"impl": "triton"},
    {"channels_last": True},
    {"flat": True},
    {"compile": True},
    {"streams": True},
    {"cuda_graph": True},
]


@pytest.mark.parametrize("option", LEVERS, ids=lambda option: next(iter(option)))
def test_each_option_preserves_result(plain: TrainStep, option: dict[str, object]) -> None:
    assert difference(train(step_of(**option), batches()), plain) < TOLERANCE


def test_all_options_preserve_result(plain: TrainStep) -> None:
    every = step_of(
        impl="auto", channels_last=True, flat=True, compile=True, streams=True, cuda_graph=True
    )
    assert difference(train(every, batches()), plain) < TOLERANCE


def test_default_options_train() -> None:
    settings = {name: getattr(TrainConfig(), name) for name in OFF}
    step = train(step_of(**settings), batches())
    assert (
        step.options.describe()
        == "bf16, channels-last, compiled, branches on separate streams, parameters in one"
        " tensor, one CUDA graph"
    )
    assert step.guard.read() is None
    assert math.isfinite(step.sums.means()["loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flat": True, "clip_grad": 1.0, "ema": 0.9, "streams": True},
        {"optimizer": "adamw", "on_nonfinite": "skip"},
        {"optimizer": "adamw", "device_batch": 16},
        {"precision": "fp16"},
        {"precision": "bf16", "impl": "triton"},
        {"cuda_graph": True, "flat": True, "impl": "triton", "ema": 0.9},
    ],
    ids=str,
)
def test_step_has_no_host_synchronization(changes: dict[str, object]) -> None:
    step, given = step_of(**changes), batches(capture.WARM_UP_STEPS + 4)
    runner = StepRunner(step)
    taken = runner.epoch(given)  # type: ignore[arg-type]
    for _ in range(capture.WARM_UP_STEPS + 1):  # what is made once, and the capture, may wait
        next(taken)
    with no_waiting():
        for done in taken:
            step.set_schedule(0.1 / done, 0.5)
    assert step.guard.read() is None


def test_captured_step_counts_once_and_reads_schedule(plain: TrainStep) -> None:
    captured, eager = step_of(cuda_graph=True), step_of()
    for step in (captured, eager):
        runner = StepRunner(step)
        for done in runner.epoch(batches(STEPS)):  # type: ignore[arg-type]
            step.set_schedule(
                0.002 if done < 15 else 0.0, 0.7
            )  # without a learning rate nothing moves any more
    assert int(captured.number) == int(eager.number) == STEPS
    assert captured.sums.state_dict()["values"][-1] == 32 * STEPS
    assert captured.sums.means()["loss"] == pytest.approx(eager.sums.means()["loss"], rel=1e-4)
    assert difference(captured, eager) < TOLERANCE


def test_batches_gathered_in_graph_equal_loader() -> None:
    """Two epochs over a resident set, with a captured graph for each size; the loader's place goes
    along.
    """
    dataset = open_dataset("digits")

    def loader() -> object:
        return make_loader(
            dataset,
            dataset.train.select(torch.arange(640)),
            32,
            device="cuda",
            seed=0,
            train=True,
            memory_format=torch.contiguous_format,
        )

    steps = []
    for changes in ({"cuda_graph": True}, {}):
        step, given = step_of(**changes), loader()
        runner = StepRunner(step)
        for epoch, size in enumerate((None, 6, None)):
            given.set_size(size)
            given.set_epoch(epoch)
            assert list(runner.epoch(given)) == list(range(1, 21))
            assert given.state_dict()["position"] == 640
        steps.append(step)
    assert difference(*steps) < TOLERANCE


def test_nonfinite_step_in_graph_is_skipped() -> None:
    good = batches(16)
    bad = Batch(torch.full_like(good[0].images, math.inf), good[0].target, good[0].index)
    step = train(step_of(cuda_graph=True, on_nonfinite="skip"), [*good[:14], bad, *good[14:]])
    clean = train(step_of(cuda_graph=True, on_nonfinite="skip"), good)
    found = step.guard.read()
    assert (found.count, found.step) == (1, 14)
    assert difference(step, clean) < TOLERANCE


def test_uncapturable_step_runs_without_graph(plain: TrainStep) -> None:
    """A step that reads a value on the host: nothing is lost and nothing runs twice, and who asked
    for a graph is told.
    """

    def reads(step: TrainStep) -> TrainStep:
        update = step.optimizers.step
        step.optimizers.step = lambda *given: (float(step.number), update(*given))[1]
        return step

    step = reads(step_of())
    step.options = dataclasses.replace(step.options, cuda_graph=True)
    runner = StepRunner(step)
    assert len(list(runner.epoch(batches()))) == STEPS  # type: ignore[arg-type]
    assert runner.reason_against_capture
    assert not runner.captures
    assert int(step.number) == STEPS
    assert difference(step, plain) < TOLERANCE
    with pytest.raises(ConfigError, match="cuda_graph=True: the step cannot be captured"):
        train(reads(step_of(cuda_graph=True)), batches())


def test_deterministic_runs_are_bit_identical() -> None:
    from fastokd.train.randomness import be_deterministic

    be_deterministic(True)
    try:
        first, second = (
            weights(
                train(
                    step_of(
                        channels_last=True, flat=True, impl="triton", streams=True, cuda_graph=True
                    ),
                    batches(),
                )
            )
            for _ in range(2)
        )
    finally:
        be_deterministic(False)
    assert torch.equal(first, second)
