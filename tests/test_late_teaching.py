"""Late teaching: the student alone, then branches that start as its copies (``teach_from``)."""

import dataclasses
import math
import os
import signal
import weakref

import pytest
import torch
from method_runs import SHORT_RUN, few_digits, make
from safetensors.torch import load_file
from test_interruption import Poisoned, assert_equal, interrupted, outcome, stop_at

from fastokd.errors import ConfigError, Preempted
from fastokd.experiments.analysis.compare import compare
from fastokd.experiments.analysis.runs import read_runs
from fastokd.experiments.sweep.grid import grid_points, parse_values
from fastokd.export import load_student
from fastokd.models import create_model
from fastokd.models.summary import forward_flops
from fastokd.train import cadence
from fastokd.train.build import before_teaching, build_model
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.compute import epoch_costs, training_flops
from fastokd.train.config import identity_fields
from fastokd.train.export_run import export_run
from fastokd.train.late_teaching import copy_student
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run
from fastokd.train.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(
    SHORT_RUN, epochs=4, teach_from=0.5, schedule="cosine", keep_checkpoints=9
)
"""Two steps in each epoch: steps 1 to 4 train the student alone."""
ADAMW = dataclasses.replace(CONFIG, optimizer="adamw", ema=0.9, mixup=0.2, clip_grad=5.0)


@pytest.fixture(scope="module")
def digits():
    return few_digits(64)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, digits):
    """The uninterrupted run, and its checkpoints."""
    trainer = make(ADAMW, tmp_path_factory.mktemp("runs") / "straight", digits)
    trainer.run()
    return trainer


def trained_student(config, image_size):
    """The model of the student alone with weights and statistics that are not initial ones."""
    model = build_model(before_teaching(config), 10, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 * spread + 0.01))
        for _ in range(3):
            model(torch.randn(8, 3, image_size, image_size, generator=generator))
    return model.eval()


def copied(config, image_size):
    """A trained student, and the branched model that starts from it, in evaluation mode."""
    student = trained_student(config, image_size)
    model = build_model(config, 10, CPU)
    copy_student(model, student.state_dict(), (image_size, image_size), config.seed)
    return student, model.eval()


def logits_of(student, model, image_size):
    images = torch.randn(5, 3, image_size, image_size, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return student(images).logits[0], model(images).logits


# --- the copy


@pytest.mark.parametrize(
    ("name", "at", "image_size"),
    [
        ("resnet8", None, 16),
        ("resnet110", None, 8),
        ("wrn16_2", None, 16),
        ("resnet18_imagenet", None, 32),
        ("mobilenetv2_x0_5", None, 32),
        ("xception", None, 32),
        ("timm:test_resnet", "layer4", 32),
        ("torchvision:mobilenet_v3_small", "features.8", 32),
    ],
)
def test_every_deeper_branch_computes_the_student(name, at, image_size):
    config = dataclasses.replace(CONFIG, model=name, at=at)
    student, model = copied(config, image_size)
    expected, logits = logits_of(student, model, image_size)
    sizes = [sum(value.numel() for value in branch.parameters()) for branch in model.branches]
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(torch.equal(row, expected) for row in logits)


def test_branch_with_more_dense_layers_computes_the_student():
    """The last norm and the classifier of the deeper branch have more input channels."""
    student, model = copied(dataclasses.replace(CONFIG, model="densenet40_12"), 32)
    expected, logits = logits_of(student, model, 32)
    assert model.branches[2].channels > model.branches[0].channels
    for row in logits:
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize(("name", "block"), [("vgg13", 6), ("shufflenetv2_x1_0", 4)])
def test_block_that_cannot_be_the_identity_stays_fresh(name, block):
    config = dataclasses.replace(CONFIG, model=name, branches=2)
    student, model = copied(config, 32)
    fresh = build_model(config, 10, CPU)
    values = student.state_dict()
    new = 0
    for path, value in model.branches[1].state_dict().items():
        original = values.get(f"branches.0.{path}")
        if original is not None and original.shape == value.shape:
            assert torch.equal(value, original), path
        else:
            new += 1
            assert torch.equal(value, fresh.branches[1].state_dict()[path]), path
            assert path.startswith(
                (f"body.stage5.{block}", "body.stage5.7", f"body.stage4.{block}")
            )
    assert new


@pytest.mark.parametrize("method", ["one", "okddip", "ffm", "ahbf"])
def test_branches_of_equal_depth_differ_in_the_head(method):
    config = dataclasses.replace(CONFIG, method=method, branches=3, aux_blocks=0)
    student, model = copied(config, 16)
    expected, logits = logits_of(student, model, 16)
    assert torch.equal(logits[model.kept], expected)
    values = student.branches[0].state_dict()
    for index, branch in enumerate(model.branches):
        for path, value in branch.state_dict().items():
            noisy = index != model.kept and path == "head.fc.weight"
            assert torch.equal(value, values[path]) != noisy, path
    noise = [
        (model.branches[index].head.fc.weight - values["head.fc.weight"]).detach()
        for index in range(3)
        if index != model.kept
    ]
    assert not torch.equal(*noise)
    for each in noise:
        assert float(each.std() / values["head.fc.weight"].std()) == pytest.approx(0.1, rel=0.15)
    again = copied(config, 16)[1].state_dict()
    assert all(torch.equal(value, again[path]) for path, value in model.state_dict().items())


@pytest.mark.parametrize("aux_blocks", [0, 1])
def test_branches_separate_in_training(tmp_path, digits, aux_blocks):
    config = dataclasses.replace(CONFIG, aux_blocks=aux_blocks)
    trainer = make(config, tmp_path / "run", digits)
    trainer.run(until=3)
    first = [branch.state_dict()["body.layer3.0.conv1.weight"] for branch in trainer.model.branches]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


# --- the run


def test_epochs_before_teaching_equal_baseline_run(tmp_path, digits):
    late = make(dataclasses.replace(CONFIG, method="okddip"), tmp_path / "late", digits)
    late.run(until=2)
    baseline = dataclasses.replace(CONFIG, method="baseline", branches=None, teach_from=0.0)
    alone = make(baseline, tmp_path / "alone", digits)
    alone.run(until=2)
    assert late.model.num_branches == 1  # no branch is computed
    assert_equal(late.step.state_dict(), alone.step.state_dict())
    records = [trainer.run_folder.read_metrics() for trainer in (late, alone)]
    for mine, theirs in zip(*records, strict=True):
        assert mine["eval"] == {"leader": theirs["eval"]["branch1"]}
        assert mine["train"]["ce/leader"] == theirs["train"]["ce/branch1"]
        assert (mine["lr"], mine["kd_weight"], theirs["kd_weight"]) == (theirs["lr"], 0.0, 1.0)


def test_label_smoothing_holds_in_all_epochs(tmp_path, digits):
    options = {"label_smoothing": 0.1}
    trainer = make(dataclasses.replace(CONFIG, method_options=options), tmp_path / "run", digits)
    assert trainer.step.criterion.graph.label_smoothing == 0.1


def test_student_trains_on_at_the_start_of_teaching(tmp_path, digits):
    """Weights, statistics, momentum and the schedule of the student stay."""
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=2)
    before = load_checkpoint(trainer.run_folder.last)
    trainer.start_teaching()
    after = trainer.step.state_dict()
    assert after["step"] == before["step"] == 4
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name], value), name
    for name, state in after["optimizer"].items():
        momentum = state["momentum_buffer"]
        if name in before["optimizer"]:
            assert torch.equal(momentum, before["optimizer"][name]["momentum_buffer"]), name
            assert momentum.any(), name
        else:
            assert not momentum.any(), name
    trainer.run()
    rates = [record["lr"] for record in trainer.run_folder.read_metrics()]
    cosine = [0.01 * (1 + math.cos(math.pi * (epoch + 0.5) / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(cosine)


def test_average_and_loss_scale_carry_over(tmp_path, digits):
    config = dataclasses.replace(ADAMW, precision="fp16", impl="reference", flat=True)
    trainer = make(config, tmp_path / "run", digits)
    trainer.run(until=2)
    before = load_checkpoint(trainer.run_folder.last)
    trainer.start_teaching()
    after = trainer.step.state_dict()
    assert before["scaler"]
    for part in ("ema", "scaler"):
        assert_equal(after[part], before[part])
    steps = {name: float(state["step"]) for name, state in after["optimizer"].items()}
    assert {steps[name] for name in before["optimizer"]} == {4.0}
    assert {steps[name] for name in steps.keys() - before["optimizer"].keys()} == {0.0}
    trainer.run()
    assert trainer.epoch == 4


def test_ramp_up_covers_the_taught_epochs():
    config = dataclasses.replace(CONFIG, epochs=300, teach_from=0.6)
    assert config.teach_epoch() == 180
    assert config.ramp_length() == 120  # of AHBF: the whole run
    weights = [config.kd_weight_at(epoch) for epoch in (0, 179, 180, 240, 270)]
    expected = [0, 0, math.exp(-5), math.exp(-5 * 0.5**2), math.exp(-5 * 0.25**2)]
    assert weights == pytest.approx(expected)
    fixed = dataclasses.replace(config, ramp_epochs=10)
    assert fixed.kd_weight_at(185) == pytest.approx(math.exp(-5 * 0.5**2))


@pytest.mark.parametrize(
    ("teach_from", "epochs", "first"),
    [(0.5, 4, 2), (0.7, 20, 14), (0.85, 20, 17), (0.33, 4, 1), (1.0, 4, 1), (3.0, 4, 3)],
)
def test_teach_epoch_of_fractions_and_epochs(teach_from, epochs, first):
    config = dataclasses.replace(CONFIG, teach_from=teach_from, epochs=epochs)
    check_config(config)
    assert config.teach_epoch() == first


def test_costs_of_epochs_are_those_of_both_phases():
    config = dataclasses.replace(CONFIG, freeze_epochs=0)
    alone = dataclasses.replace(config, method="baseline", branches=None, teach_from=0.0)
    taught = dataclasses.replace(config, teach_from=0.0)
    low, high = (training_flops(each, 10, (32, 32)) for each in (alone, taught))
    assert epoch_costs(config, 10, (32, 32)) == [low, low, high, high]
    assert high > 2 * low
    assert epoch_costs(taught, 10, (32, 32)) == []  # all alike


def test_identity_without_late_teaching_is_unchanged():
    names = [name for name, _ in identity_fields(dataclasses.replace(CONFIG, teach_from=0.0))]
    assert "teach_from" not in names
    assert ("teach_from", 0.5) in identity_fields(CONFIG)


def test_step_is_built_again_at_the_start_of_teaching(tmp_path, digits, monkeypatch):
    """All networks are compiled, and no captured graph of the student alone is left."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    trainer = make(dataclasses.replace(CONFIG, compile=True), tmp_path / "run", digits)
    alone, runner = trainer.model, trainer.runner
    assert compiled == [alone.trunk, alone.branches[0]]
    runner.reason_against_capture = "another step"
    trainer.run(until=2)
    del alone, runner
    compiled.clear()
    first = weakref.ref(trainer.step), weakref.ref(trainer.model)
    trainer.start_teaching()
    assert [each() for each in first] == [None, None]  # their memory is free
    model = trainer.model
    assert compiled == [model.trunk, model.companion, *model.branches]
    assert trainer.runner.step is trainer.step
    assert trainer.runner.reason_against_capture == ""
    assert trainer.step.options.compile


# --- stops and resuming


@pytest.mark.parametrize(
    "stop", [{"step": 1}, {"step": 3}, {"step": 5}, {"step": 7}, {"evaluating": True}], ids=str
)
def test_run_stopped_in_either_phase_resumes_exactly(tmp_path, digits, straight, stop):
    resumed = interrupted(ADAMW, tmp_path / "run", digits, **stop)
    assert_equal(outcome(resumed), outcome(straight))


def test_run_stopped_in_the_last_evaluation_before_teaching_resumes_exactly(
    tmp_path, digits, straight
):
    first = make(ADAMW, tmp_path / "run", digits)
    first.run(until=1)
    stop_at(first, evaluating=True)
    with pytest.raises(Preempted):
        first.run()
    assert load_checkpoint(first.run_folder.last)["epoch"] == 1
    second = make(ADAMW, tmp_path / "run", digits, resume=True)
    second.run()
    assert_equal(outcome(second), outcome(straight))


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_run_resumed_from_a_finished_epoch_is_exact(tmp_path, digits, straight, epoch):
    """After two epochs the checkpoint holds the student alone, and teaching starts next."""
    first = make(ADAMW, tmp_path / "run", digits)
    first.run(until=epoch)
    first.run_folder.unlock()
    second = make(ADAMW, tmp_path / "run", digits, resume=True)
    assert second.model.num_branches == (1 if epoch <= 2 else 3)
    second.run()
    assert_equal(outcome(second), outcome(straight))


def test_signal_at_the_first_taught_step_saves_all_branches(tmp_path, digits, straight):
    first = make(ADAMW, tmp_path / "run", digits)
    first.run(until=2)
    report = first.reporter.start_epoch

    def stop(*arguments):
        report(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    first.reporter.start_epoch = stop
    with pytest.raises(Preempted, match="2 finished epochs and 1 steps of the next"):
        first.run()
    state = load_checkpoint(first.run_folder.last)
    assert any(name.startswith("branches.2.") for name in state["model"])
    second = make(ADAMW, tmp_path / "run", digits, resume=True)
    second.run()
    assert_equal(outcome(second), outcome(straight))


def test_rollback_at_the_start_of_teaching(tmp_path, digits, monkeypatch):
    """Earlier checkpoints have no branches, so one is written before the first taught step."""
    monkeypatch.setattr(cadence, "CHECK_SECONDS", -1.0)
    config = dataclasses.replace(CONFIG, epochs=3, teach_from=2.0, on_nonfinite="rollback")
    trainer = make(config, tmp_path / "run", digits)
    trainer.run(until=2)
    trainer.train_loader = Poisoned(trainer.train_loader, {0})
    trainer.run()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "rolled back in epoch 3 to the weights of step 4: step 5" in log
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last-1.pt")
    assert (state["epoch"], state["loader"]["position"]) == (2, 0)


def resumed_with(trainer, **changes):
    config = dataclasses.replace(trainer.config, **changes)
    run = RunFolder.open(trainer.run_folder.path)
    other = Trainer(config, run, Reporter(quiet=True), trainer.dataset)
    other.resume(load_checkpoint(run.last), allow_config_change=True)
    return other


def test_changed_start_of_teaching_is_refused_if_it_crosses_the_checkpoint(tmp_path, digits):
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=2)
    trainer.run_folder.unlock()
    with pytest.raises(
        ConfigError,
        match=(
            r"epochs=4 with teach_from=1: teaching would now start in epoch 2, but the run has"
            r" trained only the student in its 2 epochs .* --teach-from 2 --allow-config-change"
        ),
    ):
        resumed_with(trainer, teach_from=1.0)
    assert resumed_with(trainer, epochs=8).config.teach_epoch() == 4
    assert resumed_with(trainer, teach_from=3.0).model.num_branches == 1


def test_finished_run_continues_to_teach_with_more_epochs(tmp_path, digits):
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run()
    with pytest.raises(
        ConfigError, match=r"would now start in epoch 5, but the run has already started"
    ):
        resumed_with(trainer, epochs=8)
    assert resumed_with(trainer, epochs=5).model.num_branches == 3
    other = resumed_with(trainer, epochs=8, teach_from=2.0)
    other.run(until=5)
    assert len(other.run_folder.read_metrics()[-1]["eval"]) > 3


# --- reading a run


@pytest.mark.parametrize(("epochs", "branches"), [(2, 1), (3, 3)])
def test_run_stopped_in_either_phase_is_evaluated_and_exported(
    tmp_path, digits, epochs, branches, monkeypatch
):
    monkeypatch.setattr("fastokd.train.runs.open_data", lambda *_: digits)
    config = dataclasses.replace(CONFIG, method="okddip")
    trainer = make(config, tmp_path / "run", digits)
    trainer.run(until=epochs)
    loaded = load_run(tmp_path / "run")
    assert loaded.evaluator.model.num_branches == branches
    assert loaded.evaluator.reported == "leader"
    assert loaded.evaluator.evaluate(loaded.loader) == trainer.last
    exported = export_run(tmp_path / "run", "safetensors", tmp_path / "export")
    expected = trainer.model.student().state_dict()
    weights = load_file(exported.path)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    record = load_student(tmp_path / "run")[1]
    assert record["accuracy"]["top1"] == trainer.last["leader"]
    assert record["provenance"]["teach_from"] == 0.5
    if branches == 1:
        with pytest.raises(ConfigError, match=r"branch 'branch2': the last checkpoint .* omit"):
            export_run(tmp_path / "run", branch="branch2", out=tmp_path / "other")


def test_best_checkpoint_of_the_student_alone_is_read(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("fastokd.train.runs.open_data", lambda *_: digits)
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=2)
    trainer.best = {"branch1": 1.0}  # no later epoch is better
    trainer.run()
    assert load_run(tmp_path / "run", "best").evaluator.model.num_branches == 1
    assert load_run(tmp_path / "run", "last").evaluator.model.num_branches == 3


def test_checkpoint_of_the_student_alone_is_a_teacher(tmp_path, digits):
    trainer = make(CONFIG, tmp_path / "run", digits)
    trainer.run(until=1)
    config = dataclasses.replace(
        CONFIG, method="kd", branches=None, method_options={"teacher": str(trainer.run_folder.last)}
    )
    distilled = make(config, tmp_path / "kd", digits)
    assert distilled.teacher.network is not None
    distilled.run()
    kinds = [set(record["train"]) for record in distilled.run_folder.read_metrics()]
    term = "kl/teacher->branch1"
    assert [term in names for names in kinds] == [False, False, True, True]
    resumed = interrupted(config, tmp_path / "stopped", digits, step=5)
    assert_equal(outcome(resumed), outcome(distilled))


# --- costs, sweeps and comparisons


def test_training_flops_are_the_mean_over_the_epochs(tmp_path, digits):
    size = (3, 16, 16)
    alone = forward_flops(create_model("resnet8", "baseline", 10), size)
    taught = forward_flops(create_model("resnet8", "ahbf", 10, 3, 1), size)
    config = dataclasses.replace(CONFIG, epochs=20, teach_from=0.85)
    mean = training_flops(config, 10, (16, 16))
    assert mean == pytest.approx(0.85 * alone + 0.15 * taught)
    whole = dataclasses.replace(config, teach_from=0.0)
    assert training_flops(whole, 10, (16, 16)) == taught


def test_compare_weighs_both_phases(straight):
    for record in (records := straight.run_folder.read_metrics()):
        record["images_per_second"] = 300.0 if record["epoch"] < 2 else 100.0
    group = read_runs([straight.run_folder.path])[0]
    assert group.label == "resnet8 ahbf, teach_from 0.5"
    run = dataclasses.replace(group.runs[0], records=tuple(records))
    row = compare([dataclasses.replace(group, runs=(run,))], latency=False).rows[0]
    assert row.images_per_second == pytest.approx(4 / (2 / 300 + 2 / 100))
    size = group.runs[0].data["image_size"]
    assert row.compute.flops == pytest.approx(training_flops(ADAMW, 10, size))
    assert row.costs.student.flops < row.compute.flops < row.costs.training.flops


def test_sweep_takes_several_starts():
    points = grid_points(CONFIG, parse_values(["teach_from=0.5,0.75,3"]))
    assert [point.name for point in points] == ["teach_from-0.5", "teach_from-0.75", "teach_from-3"]


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teach_from": -0.5}, "teach_from=-0.5: it must be at least 0"),
        ({"teach_from": math.nan}, "teach_from=nan: it must be at least 0"),
        ({"teach_from": 1.5}, "teach_from=1.5: neither a fraction below 1 nor a whole number"),
        (
            {"teach_from": 0.1},
            "teach_from=0.1 with epochs=4: no epoch is left for the student alone",
        ),
        ({"teach_from": 0.9}, "teach_from=0.9 with epochs=4: no epoch is left for teaching"),
        ({"teach_from": 4.0}, "teach_from=4 with epochs=4: no epoch is left for teaching"),
        ({"method": "baseline", "branches": None}, "method 'baseline': no branch could teach"),
        ({"method": "dml", "branches": None}, "use a method with branches, e.g. ahbf"),
        ({"method": "okddip", "topology": "peers"}, "use --topology branches"),
        ({"compression": True, "aux_blocks": 0}, "compression=True: branches with fewer blocks"),
    ],
    ids=str,
)
def test_late_teaching_refuses(changes, message):
    with pytest.raises(ConfigError) as error:
        check_config(dataclasses.replace(CONFIG, **changes))
    assert message in str(error.value)


def test_step_option_of_the_taught_epochs_is_checked_first(tmp_path, digits):
    with pytest.raises(ConfigError, match="streams=True: not available on cpu"):
        make(dataclasses.replace(CONFIG, streams=True), tmp_path / "run", digits)
