"""The step benchmark: its rows, the difference of each row from the one before, timing, and the
files that are written.
"""

import dataclasses
import gc
import json
import re
import socket

import pytest
import torch
from PIL import Image

import fastokd.experiments.step_benchmark
from fastokd.data import list_files
from fastokd.errors import ConfigError, MissingExtra
from fastokd.experiments.research_step import ResearchStep
from fastokd.experiments.step_benchmark import (
    EngineStep,
    StepBenchmark,
    first_row,
    optimizations,
    report,
)
from fastokd.experiments.step_images import decoded_images, synthetic_images
from fastokd.experiments.step_timer import StepRow
from fastokd.train.config import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(model="resnet8", branches=2, aux_blocks=0, batch_size=8, lr=0.01)
ON_A_CPU = [
    "research style: eager, fp32, NCHW, .item()",
    "fused loss, metrics kept on the device, fused SGD",
    "channels-last",
    "bf16",
    "torch.compile of each part",
    "parameters in one tensor",
    "weights cast once per step",
    "branches on CUDA streams",
    "the step as one CUDA graph",
    "augmentation inside the graph",
    "the student alone, with all optimizations",
]
BENCH = [
    "bench",
    "step",
    "--model",
    "resnet8",
    "--branches",
    "2",
    "--aux-blocks",
    "0",
    "--batch-size",
    "8",
    "--steps",
    "1",
    "--device",
    "cpu",
]


def main(arguments):
    """The command line. Its packages are imported by the tests that call it: those for a GPU need
    none of them.
    """
    from fastokd.cli import main as command_line

    return command_line(arguments)


@pytest.fixture(autouse=True)
def _frozen_objects():
    """Before every row garbage is collected, which must not look at all that other tests left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def images():
    return synthetic_images(CONFIG)


@pytest.fixture
def not_compiled():
    """Compiling takes a minute; everything else of that row runs."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def made(monkeypatch):
    """The configurations of the rows that were made with the engine."""
    configs = []

    class Noted(EngineStep):
        def __init__(self, config, dataset, device, gathers):
            configs.append(config)
            super().__init__(config, dataset, device, gathers)

    monkeypatch.setattr(fastokd.experiments.step_benchmark, "EngineStep", Noted)
    return configs


def changed(one, other):
    return {
        item.name: getattr(other, item.name)
        for item in dataclasses.fields(one)
        if getattr(one, item.name) != getattr(other, item.name)
    }


def test_rows_add_one_optimization_with_same_training(images, made, not_compiled):
    benchmark = StepBenchmark(CONFIG, images, CPU, steps=1)
    rows = list(benchmark.rows())
    assert [row.name for row in rows] == ON_A_CPU
    assert [row.name for row in rows if row.reason == "needs a GPU"] == ON_A_CPU[6:10]
    assert [row.kind for row in rows if not row.reason] == [
        "first",
        "lever",
        "lever",
        "alternative",
        "lever",
        "lever",
        "student",
    ]
    assert [
        changed(one, other)
        for one, other in zip([first_row(CONFIG, CPU), *made], made, strict=False)
    ] == [
        {"impl": "auto"},
        {"channels_last": True},
        {"precision": "bf16"},
        {"precision": "fp32", "compile": True},  # bf16 is not kept on a CPU
        {"flat": True},
        {"method": "baseline", "branches": 1},
    ]
    first, *others = [row for row in rows if row.first_loss is not None and row.kind != "student"]
    for row in others:
        assert row.first_loss == pytest.approx(
            first.first_loss, rel=2e-2 if row.name == "bf16" else 1e-5
        ), row
    for row in rows:
        if not row.reason:
            assert row.images_per_second[1] <= row.images_per_second[0] <= row.images_per_second[2]
            assert row.milliseconds == pytest.approx(
                1000 * CONFIG.batch_size / row.images_per_second[0]
            )
            assert 0 < row.loss_share < 1
            assert row.peak_bytes is None
    found = report(benchmark, rows)
    assert found["all_levers"] == "parameters in one tensor"
    assert found["environment"]["torch"] == torch.__version__


def test_all_optimizations_are_retained_on_gpu():
    rows = optimizations(torch.device("cuda"))
    assert all(row.carried for row in rows)
    assert [row.name for row in rows if row.gathers] == ["augmentation inside the graph"]
    everything = CONFIG
    for row in rows:
        everything = dataclasses.replace(everything, **(row.changes if row.carried else {}))
    assert (
        everything.precision,
        everything.compile,
        everything.flat,
        everything.cast_once,
        everything.streams,
        everything.cuda_graph,
    ) == ("bf16", True, True, True, True, True)
    assert (
        first_row(CONFIG, torch.device("cuda")).precision == "tf32"
    )  # what PyTorch does with float32 convolutions there


def test_research_step_trains_like_engine_step(images, monkeypatch):
    research = ResearchStep(first_row(CONFIG, CPU), images, CPU)
    engine = EngineStep(
        dataclasses.replace(first_row(CONFIG, CPU), impl="auto"), images, CPU, False
    )
    before = {name: value.clone() for name, value in research.model.state_dict().items()}
    read = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(1) or real(self))
    research.advance(2)
    assert len(read) == 2 * (1 + len(["branch1", "branch2", "ta2", "ensemble"]))
    engine.advance(2)
    assert research.loss() == pytest.approx(engine.loss(), rel=1e-4)
    for name, value in research.model.named_parameters():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(value, engine.model.get_parameter(name), rtol=1e-3, atol=1e-5)


class FakeMachine:
    """A clock, and steps that take their time on it; the machine gets slower with every step."""

    def __init__(self):
        self.now, self.slower = 0.0, 1.0

    def __call__(self):
        return self.now

    def step(self, seconds):
        machine = self

        class Step:
            captured, warm_up, model, config = False, 3, torch.nn.Identity(), CONFIG

            def advance(self, steps):
                for _ in range(steps):
                    machine.now += seconds * machine.slower
                machine.slower *= 1.0014

            def loss(self):
                return 1.0

        return Step()


def test_ratios_compare_adjacent_windows(images, monkeypatch):
    machine = FakeMachine()
    monkeypatch.setattr(
        fastokd.experiments.step_benchmark,
        "ResearchStep",
        lambda config, dataset, device: machine.step(0.5),
    )
    monkeypatch.setattr(
        fastokd.experiments.step_benchmark,
        "EngineStep",
        lambda config, dataset, device, gathers: machine.step(
            0.5 if config.method == "baseline" else 0.125 if config.flat else 0.25
        ),
    )
    monkeypatch.setattr("fastokd.experiments.step_timer.loss_seconds", lambda *given: 0.01)
    benchmark = StepBenchmark(CONFIG, images, CPU, seconds=10, clock=machine)
    rows = {row.name: row for row in benchmark.rows() if not row.reason}
    first, fused, flat, alone = (
        rows[name] for name in (ON_A_CPU[0], ON_A_CPU[1], "parameters in one tensor", ON_A_CPU[-1])
    )
    assert first.times_first == (1.0, 1.0, 1.0)
    # By the last row the machine has become slower by a tenth, which the ratio must not show.
    assert machine.slower > 1.1
    for row, ratio in ((fused, 2), (flat, 4), (alone, 1)):
        assert row.times_first[0] == pytest.approx(ratio, rel=0.005)
    assert fused.images_per_second[0] == pytest.approx(8 / 0.25, rel=0.05)
    assert flat.images_per_second[0] < 0.97 * 8 / 0.125
    assert flat.loss_share == pytest.approx(0.01 / 0.125, rel=0.1)
    assert report(benchmark, list(rows.values()))["teaching_costs"] == pytest.approx(
        1 / 4, rel=0.01
    )
    # Ten seconds in five windows of half-second steps.
    assert 10 * 0.9 < sum(8 * 4 / row.images_per_second[0] for row in [first] * 5) < 10 * 1.1


def test_failed_optimization_is_reported_and_dropped(images, made, monkeypatch, not_compiled):
    class Failing(fastokd.experiments.step_benchmark.EngineStep):
        def __init__(self, config, *rest):
            if config.compile:
                raise TypeError("no compiler here\nand more lines")
            if config.channels_last:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(config, *rest)

    monkeypatch.setattr(fastokd.experiments.step_benchmark, "EngineStep", Failing)
    rows = {row.name: row for row in StepBenchmark(CONFIG, images, CPU, steps=1).rows()}
    assert (rows["torch.compile of each part"].reason, rows["channels-last"].reason) == (
        "no compiler here",
        "out of memory",
    )
    assert rows["parameters in one tensor"].images_per_second
    assert not any(config.compile or config.channels_last for config in made)


def test_failed_first_row_ends_benchmark(images, monkeypatch):
    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fastokd.experiments.step_benchmark, "ResearchStep", refuse)
    with pytest.raises(
        ConfigError, match=r"first row .* cannot run: out of memory; use a smaller --batch-size"
    ):
        next(StepBenchmark(CONFIG, images, CPU).rows())


def test_rows_after_stop_are_not_measured(images):
    rows = list(StepBenchmark(CONFIG, images, CPU, steps=1).rows(stop=lambda: True))
    assert rows[0].images_per_second
    assert {row.reason for row in rows[1:]} == {"the time was spent"}


def test_images_are_decoded_once(tmp_path):
    for split in ("train", "val"):
        for label, color in (("red", (255, 0, 0)), ("blue", (3, 7, 250))):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (90, 80), color).save(tmp_path / split / label / f"{number}.png")
    config = dataclasses.replace(CONFIG, batch_size=8)
    found = decoded_images(config, list_files(str(tmp_path), image_size=72))
    assert found.train.images.shape == (40, 3, 72, 72)
    assert found.classes == ("blue", "red")
    for image, label in zip(found.train.images, found.train.targets.tolist(), strict=True):
        assert (
            image.flatten(1).amin(1).tolist()
            == image.flatten(1).amax(1).tolist()
            == [[3, 7, 250], [255, 0, 0]][label]
        )


def test_command_writes_table_figure_and_trace(tmp_path, capsys, not_compiled):
    assert main([*BENCH, "--out", str(tmp_path), "--profile"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "step-ladder.json").read_text())
    assert [row["name"] for row in found["rows"]] == ON_A_CPU
    assert (found["model"], found["batch_size"], found["image_size"], found["num_classes"]) == (
        "resnet8",
        8,
        [32, 32],
        10,
    )
    assert set(found["rows"][0]) == {item.name for item in dataclasses.fields(StepRow)}
    assert "+ branches on CUDA streams: needs a GPU" in out
    assert re.search(r"^or bf16 +\d", out, re.MULTILINE)
    assert "teaching costs: a step with all optimizations takes" in out
    assert (tmp_path / "step-ladder.svg").read_text().lstrip().startswith("<?xml")
    trace = (tmp_path / "step-trace.json").read_text()
    assert json.loads(trace)["traceEvents"]
    assert socket.gethostname() not in trace
    assert "convolution" in out


def test_missing_matplotlib_writes_only_table(tmp_path, capsys, monkeypatch, not_compiled):
    def missing():
        raise MissingExtra("drawing needs matplotlib: pip install -e '.[plots]'")

    monkeypatch.setattr("fastokd.experiments.analysis.step_figure.require_matplotlib", missing)
    assert (
        main(
            [
                *BENCH,
                "--method",
                "baseline",
                "--branches",
                "1",
                "--data",
                "digits",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "no plot: drawing needs matplotlib: pip install -e '.[plots]'" in out
    assert [path.name for path in tmp_path.iterdir()] == ["step-ladder.json"]
    assert "student alone" not in out  # it is what the ladder is of
    assert json.loads((tmp_path / "step-ladder.json").read_text())["teaching_costs"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet9"], r"resnet9.*did you mean"),
        (["--method", "ahfb"], "did you mean 'ahbf'"),
        (["--method", "tskd"], "unknown method"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--seconds", "0"], "seconds=0: must be positive"),
        (["--data", "digits", "--num-classes", "5"], "--num-classes 5: it is for synthetic images"),
        (["--num-classes", "1"], "--num-classes 1: it must be at least 2"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_invalid_arguments_are_one_line(arguments, said, capsys, tmp_path):
    given = [item for item in BENCH if "--steps" not in arguments or item not in ("--steps", "1")]
    assert main([*given, *arguments, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
    assert not list(tmp_path.iterdir())


def test_method_with_trained_teacher_is_refused(images):
    with pytest.raises(ConfigError, match="needs a trained teacher, which the step benchmark"):
        StepBenchmark(dataclasses.replace(CONFIG, method="kd"), images, CPU)


@pytest.mark.gpu
def test_gpu_rows_all_run_with_same_training(images):
    rows = list(StepBenchmark(CONFIG, images, torch.device("cuda", 0), steps=3).rows())
    assert not [(row.name, row.reason) for row in rows if row.reason]
    first, *others = [row for row in rows if row.kind != "student"]
    for row in others:
        assert row.first_loss == pytest.approx(first.first_loss, rel=2e-2), row
    assert all(row.peak_bytes > 2**20 for row in rows)
    assert all(row.loss_share is not None for row in rows)
