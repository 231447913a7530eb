"""The memory estimate against what torch's allocator really holds, the batch size that is chosen by
it, and the messages when nothing fits.
"""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import fastokd.train.memory
from fastokd.data import Augment, Batch, Dataset, Split
from fastokd.errors import ConfigError
from fastokd.storage import format_bytes
from fastokd.train.build import build_model
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import read_config
from fastokd.train.distributed import Ranks
from fastokd.train.memory import FILL, batch_sizes, describe_memory, estimate_memory, fit_batch_size
from fastokd.train.step import TrainStep

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
"""Estimates for one need none."""
SMALL = TrainConfig(model="resnet8", branches=2, aux_blocks=0, batch_size=16)
TRAIN = [
    "train",
    "--data",
    "digits",
    "--model",
    "resnet8",
    "--branches",
    "2",
    "--aux-blocks",
    "0",
    "--device",
    "cpu",
    "--epochs",
    "1",
]
TOLERANCE = 0.15
"""Of the peak of a pass: convolutions of the CPU's library allocate scratch memory that does not
follow from the shapes.
"""


def main(arguments):
    """The command line. Its packages are imported by the tests that call it: those for a GPU need
    none of them.
    """
    from fastokd.cli import main as command_line

    return command_line(arguments)


def made_up(count, side=32):
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    split = Split("train", images, torch.arange(count) % 10)
    return Dataset(
        name="made up",
        classes=tuple("0123456789"),
        train=split,
        test=split,
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        augment=Augment(),
        fingerprint="",
    )


@pytest.fixture(scope="module")
def images():
    return made_up(1000)


def has_free(monkeypatch, num_bytes):
    monkeypatch.setattr(fastokd.train.memory, "free_memory", lambda device: num_bytes)


def held_at_most(step, batch):
    """The most that torch's allocator held at once within a step beyond what it held before, by its
    profiler. Scratch memory that a convolution both allocates and frees is not counted: it depends
    on the instructions for which oneDNN has kernels.
    """
    step.optimizers.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batch)
    events = list(allocations(profiled.profiler.kineto_results.experimental_event_tree()))
    events.sort(key=lambda event: event.start_time_ns)
    sizes = [event.extra_fields.alloc_size for event in events]
    # The operators that allocate and free; only a call has its name and its start.
    calls = [event.parent and (event.parent.name, event.parent.start_time_ns) for event in events]
    allocated = {}
    for index, event in enumerate(events):
        if sizes[index] > 0:
            allocated[event.extra_fields.ptr] = index
            continue
        first = allocated.pop(event.extra_fields.ptr, index)
        call = calls[index]
        if first < index and call and call == calls[first] and "convolution" in call[0]:
            sizes[first] = sizes[index] = 0
    return max(itertools.accumulate(sizes))


def allocations(events):
    """The profiler's events of the allocator, of all levels of its tree."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from allocations(event.children)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "resnet8", "branches": 2, "aux_blocks": 0},
        {"model": "resnet8", "branches": 3, "aux_blocks": 1, "precision": "bf16"},
        {"model": "resnet8", "branches": 2, "aux_blocks": 0, "device_batch": 4},
        {
            "model": "vgg13",
            "branches": 2,
            "aux_blocks": 0,
            "batch_size": 4,
        },  # its gradients weigh more than its activations
        {"model": "mobilenetv2_x0_5", "method": "baseline", "branches": 1},
        {"model": "resnet8", "method": "ffm", "branches": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_estimate_of_a_pass_matches_allocator(settings, images):
    config = dataclasses.replace(TrainConfig(batch_size=16), **settings)
    step = TrainStep(config, build_model(config, 10, CPU), CPU)
    pixels = torch.randn(config.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batch = Batch(pixels, torch.arange(config.batch_size) % 10, torch.arange(config.batch_size))
    step(batch)
    estimate = estimate_memory(config, images, CPU)
    assert estimate.passes == pytest.approx(held_at_most(step, batch), rel=TOLERANCE)
    assert estimate.batches == pixels.nbytes // (2 if config.precision == "bf16" else 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "momentum": 0.0},
        {"optimizer": "adamw", "flat": True},
        {"optimizer": "adamw", "ema": 0.99},
        {"method": "ffm", "branches": 3, "flat": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "sgd",
)
def test_estimate_of_state_is_exact(settings, images):
    config = dataclasses.replace(SMALL, **settings)
    model = build_model(config, 10, CPU)
    step = TrainStep(config, model, CPU)
    estimate = estimate_memory(config, images, CPU)
    assert estimate.weights == sum(value.nbytes for value in model.state_dict().values())
    remembered = sum(
        value.nbytes
        for state in step.optimizers.state_dict().values()
        for value in state.values()
        if value.dim()
    )
    gradients = sum(parameter.nbytes for parameter in model.parameters()) if config.flat else 0
    assert estimate.optimizer == remembered + gradients
    assert estimate.average == (
        sum(value.nbytes for value in step.average.module.state_dict().values())
        if config.ema
        else 0
    )
    assert (
        estimate.total
        == estimate.weights
        + estimate.optimizer
        + estimate.average
        + estimate.batches
        + estimate.passes
    )


def test_estimate_allocates_nothing(images):
    before = torch.get_rng_state()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        estimate = estimate_memory(dataclasses.replace(SMALL, batch_size=100_000), images, CPU)
    assert estimate.passes > 60 * 2**30
    assert (
        sum(
            max(event.nbytes(), 0)
            for event in found.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        < 2**20
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_estimate_for_gpu_includes_images_and_gradients(images):
    here, there = estimate_memory(SMALL, images, CPU), estimate_memory(SMALL, images, GPU)
    assert (here.images, there.images) == (0, 2 * 1000 * 3 * 32 * 32)
    assert there.passes < 0.6 * here.passes  # bf16
    assert there.optimizer - here.optimizer == sum(
        parameter.nbytes for parameter in build_model(SMALL, 10, CPU).parameters()
    )


def test_estimate_for_processes_includes_buckets(images, monkeypatch):
    alone = estimate_memory(SMALL, images, CPU)
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(0, 2))
    shared = estimate_memory(dataclasses.replace(SMALL, batch_size=32), images, CPU)
    assert shared.passes == alone.passes + sum(
        parameter.nbytes for parameter in build_model(SMALL, 10, CPU).parameters()
    )


def test_describe_memory_reports_and_warns(images, monkeypatch):
    has_free(monkeypatch, 3 * 2**20)
    estimate, warning = describe_memory(SMALL, images, CPU)
    assert re.fullmatch(
        r"memory: about 1\d MiB: weights \d+ KiB, optimizer \d+ KiB, batches 192 KiB, activations"
        r" and gradients 1\d MiB; 3\.0 MiB free",
        estimate,
    )
    assert re.fullmatch(
        r"memory: the first step takes 1\d MiB more, and 3\.0 MiB are free: it will probably not"
        r" fit; --batch-size auto finds one that fits, "
        r"--device-batch 8 accumulates gradients over smaller parts",
        warning,
    )
    has_free(monkeypatch, 2**37)
    (line,) = describe_memory(SMALL, images, CPU)
    assert line.endswith("; 128 GiB free")


def test_value_dependent_network_has_no_estimate(images, monkeypatch):
    real = fastokd.train.build.create_model

    def looking(*arguments, **options):
        model = real(*arguments, **options)
        model.trunk.register_forward_hook(
            lambda module, given, result: result if float(result.detach().sum()) > 0 else -result
        )
        return model

    monkeypatch.setattr(fastokd.train.build, "create_model", looking)
    (line,) = describe_memory(SMALL, images, CPU)
    assert re.fullmatch(
        r"memory: the memory of a step cannot be estimated \(.+\); pass a number as --batch-size",
        line,
    )
    has_free(monkeypatch, 2**40)
    with pytest.raises(ConfigError, match="cannot be estimated"):
        fit_batch_size(SMALL, images, CPU)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(fastokd.train.memory, "available_memory", lambda: 12_000)
    assert fastokd.train.memory.free_memory(CPU) == 12_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert (
        fastokd.train.memory.free_memory(CPU) == 12_000
    )  # left in the environment by something else
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(0, 6))
    assert fastokd.train.memory.free_memory(CPU) == 4_000


def test_batch_sizes():
    assert batch_sizes(1024) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert batch_sizes(100) == [8, 12, 16, 24, 32, 48, 64, 96]
    assert batch_sizes(3) == [8]


@pytest.fixture
def large():
    """Enough images for any batch."""
    return made_up(50_000, 4)


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_fit_batch_size_returns_the_largest(device, large, monkeypatch):
    monkeypatch.setattr(fastokd.train.memory, "one_step_fits", lambda *arguments: True)
    takes = {
        count: estimate_memory(dataclasses.replace(SMALL, batch_size=count), large, device).total
        for count in batch_sizes(1024)
    }
    assert list(takes.values()) == sorted(takes.values())
    monkeypatch.setattr(
        fastokd.train.memory,
        "estimate_memory",
        lambda config, *_: SimpleNamespace(total=takes[config.batch_size]),
    )
    for count in (8, 48, 512):
        has_free(monkeypatch, int(takes[count] / FILL) + 1)
        found, reason = fit_batch_size(SMALL, large, device)
        assert found == count
        following = batch_sizes(1024)[batch_sizes(1024).index(count) + 1]
        assert f"{following} per process take about {format_bytes(takes[following])}, and" in reason
    has_free(monkeypatch, int(takes[8] / FILL) - 10)
    with pytest.raises(
        ConfigError, match=r"not even 8 images fit into the .* free on c.*; use a smaller --model"
    ):
        fit_batch_size(SMALL, large, device)


def test_fit_batch_size_respects_limits(large, monkeypatch):
    has_free(monkeypatch, 2**50)
    assert fit_batch_size(SMALL, large, CPU) == (
        1024,
        (
            "batch 1024, chosen by memory: larger than 1024 only on request, as auto:N; lr is"
            " unchanged (--lr-scaling linear or sqrt scales it)"
        ),
    )
    assert fit_batch_size(SMALL, large, CPU, largest=2500)[0] == 2048
    chosen, reason = fit_batch_size(
        dataclasses.replace(SMALL, lr_scaling="sqrt"), made_up(2000, 4), CPU
    )
    assert (chosen, reason) == (
        96,
        "batch 96, chosen by memory: an epoch keeps 20 steps; lr is scaled by --lr-scaling sqrt",
    )
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(0, 2))
    chosen, reason = fit_batch_size(SMALL, made_up(2000, 4), CPU)
    assert (chosen, reason.split(",")[0]) == (96, "batch 96 = 2 processes x 48")
    with pytest.raises(ConfigError, match="batch_size auto and device_batch=8"):
        fit_batch_size(dataclasses.replace(SMALL, device_batch=8), large, CPU)


def test_fit_batch_size_shrinks_when_a_step_fails(large, monkeypatch):
    tried = []
    has_free(monkeypatch, 2**50)
    monkeypatch.setattr(
        fastokd.train.memory,
        "one_step_fits",
        lambda config, *rest: tried.append(config.batch_size) or config.batch_size <= 512,
    )
    found, reason = fit_batch_size(SMALL, large, GPU)
    assert (found, tried) == (512, [1024, 768, 512])
    assert "chosen by memory and tried with one step: 768 per process" in reason


def test_one_step_fits(images, monkeypatch):
    tries = fastokd.train.memory.one_step_fits
    assert tries(SMALL, images, CPU, None)
    assert tries(
        dataclasses.replace(SMALL, method="tsb", model="resnet8", branches=2, topology=None),
        images,
        CPU,
        None,
    )
    real = TrainStep.__call__

    def fail(error):
        def step(self, batch):
            real(self, batch)
            raise error

        monkeypatch.setattr(TrainStep, "__call__", step)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not tries(SMALL, images, CPU, None)
    fail(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        tries(SMALL, images, CPU, None)


def test_batch_size_auto_is_written_to_the_config(tmp_path, monkeypatch, capsys):
    has_free(
        monkeypatch,
        int(
            estimate_memory(dataclasses.replace(SMALL, batch_size=24), made_up(10, 8), CPU).total
            / FILL
        )
        + 1,
    )
    assert (
        main(
            [
                *TRAIN,
                "--batch-size",
                "auto",
                "--lr-scaling",
                "linear",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "batch 24, chosen by memory: 32 per process take about" in out
    assert "; lr is scaled by --lr-scaling linear" in out
    assert re.search(r"^memory: about .* free$", out, re.MULTILINE)
    assert "batch 24, chosen by memory" in (tmp_path / "run" / "log.txt").read_text()
    assert read_config(tmp_path / "run" / "config.yaml").batch_size == 24
    # A run that is there keeps its own, whatever is free now.
    has_free(monkeypatch, 2**50)
    assert (
        main(
            [
                *TRAIN,
                "--batch-size",
                "auto",
                "--lr-scaling",
                "linear",
                "--out",
                str(tmp_path / "run"),
                "--resume",
                "auto",
                "--epochs",
                "2",
            ]
        )
        == 0
    )
    assert read_config(tmp_path / "run" / "config.yaml").batch_size == 24


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-size", "many"], "--batch-size many: it must be a whole number, auto, or auto:N"),
        (["--batch-size", "auto:4"], "--batch-size auto:4: .* at least 8"),
        (["--batch-size", "auto", "--device-batch", "8"], "batch_size auto and device_batch=8"),
        (["--batch-size", "1"], "batch_size=1: it must be at least 2"),
        (["--batch-size", "auto", "--resume", "run"], "omit --batch-size auto"),
    ],
)
def test_user_errors_are_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 400000000000 bytes."
        ),
    ],
)
def test_out_of_memory_reports_a_fix(error, tmp_path, monkeypatch, capsys):
    def step(self, batch):
        raise error

    monkeypatch.setattr(TrainStep, "__call__", step)
    assert main([*TRAIN, "--batch-size", "64", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        line
        == "fastokd: out of memory on cpu: batch 64 does not fit; --batch-size auto finds one that"
        " fits, --device-batch 32 accumulates gradients over smaller parts"
    )


@pytest.mark.gpu
def test_estimate_matches_gpu_allocator():
    config = TrainConfig(
        model="resnet20",
        branches=3,
        batch_size=256,
        precision="fp32",
        compile=False,
        cuda_graph=False,
        streams=False,
    )
    step = TrainStep(config, build_model(config, 10, GPU), GPU)
    pixels = torch.randn(256, 3, 32, 32, device=GPU).contiguous(memory_format=torch.channels_last)
    places = torch.arange(256, device=GPU)
    step(Batch(pixels, places % 10, places))  # cuDNN has tried its algorithms
    step.optimizers.zero_grad()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    step(Batch(pixels, places % 10, places))
    torch.cuda.synchronize()
    assert estimate_memory(config, made_up(1000), GPU).passes == pytest.approx(
        torch.cuda.max_memory_allocated(GPU) - before, rel=0.25
    )


@pytest.mark.gpu
def test_fit_batch_size_on_limited_gpu_runs():
    config = TrainConfig(model="resnet32", branches=4)
    images = made_up(50_000, 32)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        2**30 / torch.cuda.get_device_properties(GPU).total_memory, GPU
    )
    try:
        found, reason = fit_batch_size(config, images, GPU)
        assert 16 <= found < 1024
        assert "tried with one step" in reason
        assert fastokd.train.memory.one_step_fits(
            dataclasses.replace(config, batch_size=found), images, GPU, None
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
