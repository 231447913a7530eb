"""Separate augmented views for the branches of any method (``branch_views``)."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_runs import SHORT_RUN, few_digits, make
from test_interruption import assert_equal, interrupted, outcome

from fastokd.data import Batch
from fastokd.errors import ConfigError
from fastokd.methods.modules import BranchPass
from fastokd.models import create_model
from fastokd.train.build import build_model
from fastokd.train.compute import network_costs
from fastokd.train.config import TrainConfig, identity_fields
from fastokd.train.loss import build_loss
from fastokd.train.memory import estimate_memory
from fastokd.train.rules import check_config
from fastokd.train.step import TrainStep

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(SHORT_RUN, branch_views=True, pad=1, flip=True)


@pytest.fixture(scope="module")
def digits():
    return few_digits(64)


def views(count, batch=4, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, 3, size, size, generator=generator)


@pytest.mark.parametrize("method", ["ahbf", "one", "okddip", "cl_ilr", "dml", "tsb"])
def test_every_branch_sees_its_own_view(method):
    model = create_model("resnet8", method, 10, 3, 1).eval()
    images = views(3)
    result = model(images)
    for index, logits in enumerate(result.logits):
        torch.testing.assert_close(logits, model.student(index)(images[index]))
    alone = model(images[1])
    torch.testing.assert_close(alone.logits[1], result.logits[1])


def test_library_network_continues_each_branch_on_its_slice():
    model = create_model("timm:test_convnext", "ahbf", 10, 2, 1, at="stages.2").eval()
    images = views(2, batch=2, size=64)
    for index, logits in enumerate(model(images).logits):
        expected = model.student(index)(images[index])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_modules_and_teacher_get_the_students_images():
    teacher = create_model("resnet8", "baseline", 10).student()
    model = create_model("resnet8", "okddip", 10, 3, topology="branches", teacher=teacher).eval()
    images = views(3)
    assert model.kept == 2
    torch.testing.assert_close(model(images).extras["teacher"], teacher(images[2]))


@pytest.mark.parametrize("in_memory", ["one after the other", "apart", "channels last"])
def test_gradients_equal_a_loop_over_the_branches(in_memory):
    """The batch norms of the trunk see all views as one batch; gates see features of two views."""
    config = TrainConfig(model="resnet8", branches=3, aux_blocks=1)
    images, target = views(3, batch=8), torch.arange(8)
    if in_memory == "channels last":
        images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        images = images.unflatten(0, (3, 8))
    gradients = []
    for by_hand in (False, True):
        model, criterion = build_model(config, 10, CPU).train(), build_loss(config, "reference")
        if by_hand:
            maps = model.trunk(torch.cat([images[0], images[1], images[2]]))
            inputs = [maps[0:8], maps[8:16], maps[16:24]]
            features, logits = zip(
                *(branch(x) for branch, x in zip(model.branches, inputs, strict=True)), strict=True
            )
            branches = tuple(model.branches)
            seen = BranchPass(images[0], inputs[0], features, logits, branches, None)
            scores = model.companion(seen)["scores"]
        else:
            given = images
            if in_memory == "apart":  # as the parts of a batch whose gradients are accumulated
                given = torch.cat([images, images], 1)[:, :8]
            result = model(given)
            logits, scores = result.logits, result.scores
        criterion(logits, target, scores=scores, kd_weight=0.5).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_mutual_learning_compares_predictions_on_different_views():
    """DML: each cross-entropy and each KL by hand, in float64."""
    config = TrainConfig(model="resnet8", method="dml", branches=2, branch_views=True)
    model = build_model(config, 10, CPU).eval()
    images, target = views(2), torch.tensor([3, 1, 4, 1])
    rows = [model.student(index)(images[index]).double() for index in range(2)]
    one, other = (row.log_softmax(1) for row in rows)
    expected = sum(F.cross_entropy(row, target) for row in rows)
    expected += F.kl_div(one, other, log_target=True, reduction="batchmean")
    expected += F.kl_div(other, one, log_target=True, reduction="batchmean")
    loss = build_loss(config, "reference")(model(images).logits, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_run_trains_on_views_and_resumes_exactly(tmp_path, digits):
    straight = make(CONFIG, tmp_path / "straight", digits)
    images = next(iter(straight.train_loader)).images
    assert images.shape == (3, 32, 3, 8, 8)
    assert not torch.equal(images[0], images[2])
    assert next(iter(straight.eval_loader)).images.dim() == 4
    straight.run()
    resumed = interrupted(CONFIG, tmp_path / "other", digits, step=3)
    assert_equal(outcome(resumed), outcome(straight))
    log = (tmp_path / "straight" / "log.txt").read_text()
    assert "horizontal flips; 3 views of each image, one for each branch" in log


def test_late_teaching_starts_the_views_with_the_branches(tmp_path, digits):
    config = dataclasses.replace(CONFIG, epochs=3, teach_from=1)
    straight = make(config, tmp_path / "straight", digits)
    assert next(iter(straight.train_loader)).images.shape == (32, 3, 8, 8)
    straight.run()
    assert next(iter(straight.train_loader)).images.shape == (3, 32, 3, 8, 8)
    for step in (1, 3):  # in both phases
        resumed = interrupted(config, tmp_path / str(step), digits, step=step)
        assert_equal(outcome(resumed), outcome(straight))


def test_student_alone_before_the_teaching_is_that_without_views(tmp_path, digits):
    config = dataclasses.replace(CONFIG, teach_from=1)
    records = []
    for each in (config, dataclasses.replace(config, branch_views=False)):
        trainer = make(each, tmp_path / str(each.branch_views), digits)
        trainer.run(until=1)
        records.append(trainer.run_folder.read_metrics()[0]["eval"])
    assert records[0] == records[1]


def test_accumulated_gradients_equal_those_of_the_batch():
    """In evaluation mode, so that batch norm does not depend on the parts."""
    images, updates = views(3, batch=8), []
    for part in (8, 4):
        config = dataclasses.replace(CONFIG, batch_size=8, device_batch=part, aux_blocks=0)
        step = TrainStep(config, build_model(config, 10, CPU), CPU)
        step.set_schedule(0.1, 1.0)
        step.model.eval()
        step(Batch(images, torch.arange(8), torch.arange(8)))
        updates.append(step.model.state_dict())
    for name, value in updates[0].items():
        torch.testing.assert_close(updates[1][name], value, rtol=1e-4, atol=1e-5)


def test_equal_copies_start_without_noise_and_diverge(tmp_path, digits):
    make(
        dataclasses.replace(SHORT_RUN, method="baseline", branches=1, epochs=1),
        tmp_path / "a",
        digits,
    ).run()
    config = dataclasses.replace(
        CONFIG, method="cl_ilr", branches=2, epochs=1, weights=str(tmp_path / "a")
    )
    trainer = make(config, tmp_path / "b", digits)
    first, second = trainer.model.branches
    assert_equal(first.state_dict(), second.state_dict())
    (line,) = (line for line in trainer.step.notes if "start as copies" in line)
    assert line.endswith("without noise because their views of the images differ")
    trainer.run()
    weights = [branch.state_dict()["head.fc.weight"] for branch in (first, second)]
    assert (weights[0] - weights[1]).abs().max() > 1e-4
    other = make(dataclasses.replace(config, branch_views=False), tmp_path / "c", digits)
    heads = [branch.state_dict()["head.fc.weight"] for branch in other.model.branches]
    assert not torch.equal(*heads)


def test_training_flops_count_the_trunk_for_every_view():
    plain = dataclasses.replace(CONFIG, branch_views=False)
    model = create_model("resnet8", "ahbf", 10, 3, 1)
    trunk = 0

    def count(layer, _, output):
        nonlocal trunk
        trunk += 2 * layer.weight[0].numel() * output.numel()

    for layer in model.trunk.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    model.eval().trunk(torch.zeros(1, 3, 32, 32))
    once, three = (network_costs(each, 10, (32, 32)) for each in (plain, CONFIG))
    assert three.training.flops - once.training.flops == 2 * trunk
    assert three.student == once.student


def test_memory_estimate_grows_with_the_views(digits):
    estimates = [
        estimate_memory(dataclasses.replace(CONFIG, branch_views=each), digits, CPU, None)
        for each in (False, True)
    ]
    assert estimates[1].batches == 3 * estimates[0].batches
    assert estimates[1].passes > 1.2 * estimates[0].passes
    assert estimates[1].weights == estimates[0].weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "baseline", "branches": 1}, "branch_views=True and method 'baseline': there is")],
)
def test_impossible_views_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(dataclasses.replace(CONFIG, **changes))


def test_views_without_augmentation_are_refused(tmp_path, digits):
    config = dataclasses.replace(CONFIG, pad=0, flip=False)
    with pytest.raises(ConfigError, match="not augmented, so all views are equal; pass"):
        make(config, tmp_path / "run", digits)


def test_stored_teacher_rows_and_mixing_work_with_views(tmp_path, digits):
    rows = np.random.default_rng(0).normal(size=(64, 10)).astype("float32")
    rows[range(64), digits.train.targets[:64]] += 3  # rows no better than chance are refused
    np.save(tmp_path / "rows.npy", rows)
    config = dataclasses.replace(CONFIG, epochs=1, teacher=str(tmp_path / "rows.npy"))
    make(config, tmp_path / "rows", digits).run()
    make(dataclasses.replace(CONFIG, epochs=1, mixup=0.2), tmp_path / "mixup", digits).run()
    for name in ("rows", "mixup"):
        (record,) = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        assert np.isfinite(record["train"]["loss"])


def test_identity_of_runs_without_views_is_unchanged():
    assert "branch_views" not in dict(identity_fields(SHORT_RUN))
    assert dict(identity_fields(CONFIG))["branch_views"] is True
