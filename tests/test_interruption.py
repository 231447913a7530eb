"""A run that is stopped anywhere and resumed ends bit-identical to an uninterrupted one; policies
for non-finite steps in a run.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import default_signals
from method_runs import few_digits, make
from PIL import Image
from safetensors.torch import load_file

from fastokd import storage
from fastokd.data import Batch
from fastokd.data.loader import get_loader_kind
from fastokd.errors import EXIT_PREEMPTED, CheckpointError, ConfigError, Preempted, StorageError
from fastokd.export import load_student, measure_accuracy
from fastokd.train import cadence
from fastokd.train import trainer as trainer_module
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run
from fastokd.train.session import resume_run
from fastokd.train.trainer import Interrupted, NonFiniteLoss, Trainer

CONFIG = TrainConfig(
    data="digits",
    model="resnet8",
    method="ahbf",
    branches=2,
    aux_blocks=0,
    epochs=2,
    batch_size=32,
    lr=0.01,
    optimizer="adamw",
    schedule="cosine",
    warmup_epochs=0.5,
    ema=0.9,
    mixup=0.2,
    clip_grad=5.0,
    deterministic=True,
    save_minutes=0.0,
)


@pytest.fixture(scope="module")
def digits():
    return few_digits(128)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Sixty-four training and eight test images of two classes."""
    root, generator = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 4)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
                    folder / f"{number}.png"
                )
    return root


def stop_at(trainer, step=None, evaluating=False, number=signal.SIGTERM):
    """Send this process a signal after a step counted over the whole run, or when an epoch's steps
    are done.
    """
    steps, report, begin = (
        len(trainer.train_loader),
        trainer.reporter.step,
        trainer.reporter.evaluating,
    )

    def after_step(done, progress=None):
        report(done, progress)
        if step is not None and trainer.epoch * steps + done == step:
            os.kill(os.getpid(), number)

    def before_evaluation():
        begin()
        if evaluating:
            os.kill(os.getpid(), number)

    trainer.reporter.step, trainer.reporter.evaluating = after_step, before_evaluation


def interrupted(config, folder, dataset, **stop):
    """The same run, stopped once and resumed."""
    first = make(config, folder, dataset)
    stop_at(first, **stop)
    with pytest.raises(
        Preempted,
        match=(
            r"stopped by SIGTERM; the last checkpoint has \d finished epochs? and \d+ steps of the"
            r" next; continue with"
        ),
    ):
        first.run()
    second = make(config, folder, dataset, resume=True)
    second.run()
    return second


def outcome(trainer):
    """All that a run leaves but times."""
    state = load_checkpoint(trainer.run_folder.last)
    records = trainer.run_folder.read_metrics()
    for record in records:
        for name in ("seconds", "images_per_second", "waiting_share"):
            del record[name]
    del state["seconds"]
    return {**state, "records": records, "student": load_file(trainer.run_folder.student)}


def assert_equal(one, other, where="run"):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def straight(tmp_path_factory, digits):
    trainer = make(CONFIG, tmp_path_factory.mktemp("runs") / "straight", digits)
    trainer.run()
    return outcome(trainer)


@pytest.mark.parametrize(
    "stop", [{"step": 1}, {"step": 4}, {"step": 6}, {"evaluating": True}], ids=str
)
def test_run_stopped_within_epoch_resumes_exactly(tmp_path, digits, straight, stop):
    assert_equal(outcome(interrupted(CONFIG, tmp_path / "run", digits, **stop)), straight)


@pytest.mark.parametrize("stop", [{"step": 1}, {"evaluating": True}], ids=str)
def test_ctrl_c_saves_and_resumes_exactly(tmp_path, digits, straight, stop):
    """In the first epoch: the run is kept, and the message has the command."""
    folder = tmp_path / "run"
    first = make(CONFIG, folder, digits)
    stop_at(first, number=signal.SIGINT, **stop)
    message = (
        r"stopped by Ctrl-C; the last checkpoint has 0 finished epochs and \d steps of the"
        rf" next; continue with 'fastokd train --resume {folder}'"
    )
    with default_signals(), pytest.raises(Interrupted, match=message):
        first.run()
    assert (folder / "log.txt").read_text().splitlines()[-1].endswith(f"--resume {folder}'")
    second = make(CONFIG, folder, digits, resume=True)
    second.run()
    assert_equal(outcome(second), straight)


def test_workers_ignore_ctrl_c(tmp_path, tree):
    """A terminal sends it to all processes; the run still needs its workers for this step."""
    options = {"workers": 1, "start_method": "fork"}
    config = dataclasses.replace(
        CONFIG, data=str(tree), image_size=16, batch_size=16, loader="torchvision", epochs=1
    )
    trainer = make(dataclasses.replace(config, loader_options=options), tmp_path / "run", None)
    report, workers = trainer.reporter.step, []

    def after_step(done, progress=None):
        report(done, progress)
        workers.extend(multiprocessing.active_children())
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)

    trainer.reporter.step = after_step
    trainer.run()
    assert workers


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "tsb", "branches": 2, "mixup": 0.0},  # what the loss remembers
        {
            "precision": "fp16",
            "impl": "reference",
            "flat": True,
            "device_batch": 16,
        },  # the loss scale, views, parts
    ],
    ids=lambda changes: changes.get("method") or changes.get("precision"),
)
def test_other_state_of_a_run_resumes_exactly(tmp_path, digits, changes):
    config = dataclasses.replace(CONFIG, **changes)
    whole = make(config, tmp_path / "straight", digits)
    whole.run()
    assert_equal(outcome(interrupted(config, tmp_path / "run", digits, step=2)), outcome(whole))


@pytest.mark.parametrize("loader", ["resident", "torchvision"])
def test_random_layers_resume_exactly(tmp_path, tree, loader):
    """VGG has dropout, so it needs the generator's state, and no loader may draw from it."""
    config = dataclasses.replace(
        CONFIG,
        data=str(tree),
        model="vgg13",
        image_size=32,
        batch_size=16,
        ema=0.0,
        mixup=0.0,
        epochs=1,
        loader=loader,
        loader_options={"workers": 0} if loader == "torchvision" else {},
    )
    whole = make(config, tmp_path / "straight", None)
    whole.run()
    assert_equal(outcome(interrupted(config, tmp_path / "run", None, step=2)), outcome(whole))


@pytest.mark.parametrize("loader", ["resident", "torchvision", "dali"])
def test_run_with_every_loader_resumes_exactly(tmp_path, tree, loader):
    if reason := get_loader_kind(loader).missing(torch.device("cpu")):
        pytest.skip(reason)
    config = dataclasses.replace(
        CONFIG,
        data=str(tree),
        loader=loader,
        batch_size=16,
        image_size=16,
        mixup=0.0,
        loader_options={"workers": 0} if loader == "torchvision" else {},
    )
    whole = make(config, tmp_path / "straight", None)
    whole.run()
    assert_equal(outcome(interrupted(config, tmp_path / "run", None, step=2)), outcome(whole))


def test_resume_with_other_step_options(tmp_path, digits, straight):
    """A run is resumed on another machine, where parameters are not flat."""
    first = make(CONFIG, tmp_path / "run", digits)
    stop_at(first, step=5)
    with pytest.raises(Preempted) as stopped:
        first.run()
    assert stopped.value.exit_code == EXIT_PREEMPTED == 75
    second = make(
        dataclasses.replace(CONFIG, flat=True, impl="reference", keep_checkpoints=1),
        tmp_path / "run",
        digits,
        resume=True,
    )
    second.run()
    assert [record["epoch"] for record in second.run_folder.read_metrics()] == [0, 1]
    found = outcome(second)["model"]
    assert all(value.shape == straight["model"][name].shape for name, value in found.items())
    assert not (tmp_path / "run" / "checkpoints" / "last-1.pt").exists()


def test_resume_with_changed_config_needs_the_flag(tmp_path, digits):
    first = make(CONFIG, tmp_path / "run", digits)
    stop_at(first, step=2)
    with pytest.raises(Preempted):
        first.run()
    other = dataclasses.replace(CONFIG, lr=0.02, ema=0.5)
    with pytest.raises(
        ConfigError,
        match=(
            r"\(old, new: lr: 0\.01, 0\.02; ema: 0\.9, 0\.5\): undo the change, pass"
            r" --allow-config-change, or start a new run"
        ),
    ):
        make(other, tmp_path / "run", digits, resume=True)
    state = load_checkpoint(first.run_folder.last)
    trainer = Trainer(other, first.run_folder, Reporter(quiet=True), digits)
    trainer.resume(state, allow_config_change=True)
    assert trainer.done == 3  # seen after the step that follows the signal's
    trainer.run()
    assert (tmp_path / "run" / "log.txt").read_text().count(
        "resuming with a changed configuration (old, new: lr: 0.01, 0.02; ema: 0.9, 0.5)"
    ) == 1


def test_resume_skips_damaged_checkpoint(tmp_path, digits):
    config = dataclasses.replace(CONFIG, epochs=3)
    first = make(config, tmp_path / "run", digits)
    first.run(until=2)
    first.run_folder.unlock()
    first.run_folder.last.write_bytes(first.run_folder.last.read_bytes()[:-500])
    second = resume_run(tmp_path / "run", first.reporter)
    assert second.epoch == 1
    assert "last.pt is damaged" in (tmp_path / "run" / "log.txt").read_text()
    for path in (tmp_path / "run" / "checkpoints").glob("last*.pt"):
        path.write_bytes(b"")
    second.run_folder.unlock()
    with pytest.raises(CheckpointError, match="all checkpoints of the run are damaged"):
        resume_run(tmp_path / "run", first.reporter)


def test_full_disk_is_reported_before_the_first_step(tmp_path, digits, monkeypatch):
    trainer = make(CONFIG, tmp_path / "run", digits)
    monkeypatch.setattr(
        storage.shutil,
        "disk_usage",
        lambda path: SimpleNamespace(total=10**9, used=10**9, free=10**5),
    )
    with pytest.raises(
        StorageError,
        match=r"4 checkpoints \(2 of the newest, the best, and one while it is written\)",
    ):
        trainer.run()
    assert int(trainer.step.number) == 0


class TestAveragedStudent:
    def test_ema_may_start_on_resume(self, tmp_path, digits):
        """The best epoch before belongs to another student."""
        config = dataclasses.replace(CONFIG, ema=0.0, epochs=3)
        first = make(config, tmp_path / "run", digits)
        stop_at(first, step=9)
        with pytest.raises(Preempted):
            first.run()
        other = dataclasses.replace(config, ema=0.5, method_options={"lambda_self": 1.0})
        second = Trainer(other, RunFolder.open(tmp_path / "run"), Reporter(quiet=True), digits)
        second.resume(load_checkpoint(first.run_folder.last), allow_config_change=True)
        assert second.best == {}
        summary = second.run()
        assert summary.best_epoch == 2
        assert "ema" in summary.best

    def test_ema_is_evaluated_and_exported(self, tmp_path, digits):
        trainer = make(dataclasses.replace(CONFIG, epochs=1), tmp_path / "run", digits)
        summary = trainer.run()
        assert trainer.student_name == "ema"
        assert summary.last["ema"] != summary.last["branch1"]
        student, record = load_student(tmp_path / "run")
        assert (
            record["accuracy"]["top1"]
            == summary.last["ema"]
            == measure_accuracy(student, trainer.eval_loader)
        )
        averaged = trainer.step.average.module.state_dict()
        assert all(
            torch.equal(value, averaged[name]) for name, value in student.state_dict().items()
        )
        loaded = load_run(tmp_path / "run")
        assert loaded.evaluator.evaluate(trainer.eval_loader) == summary.last
        assert (
            json.loads((tmp_path / "run" / "summary.json").read_text())["last"]["ema"]
            == summary.last["ema"]
        )


class Poisoned:
    """A loader one of whose batches, in every epoch, holds an image of infinities."""

    def __init__(self, loader, which):
        self.loader, self.which = loader, which

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for number, batch in enumerate(self.loader):
            images = (
                torch.full_like(batch.images, math.inf) if number in self.which else batch.images
            )
            yield Batch(images, batch.target, batch.index)


class TestNotFinite:
    def trainer(self, folder, digits, which, **changes):
        trainer = make(dataclasses.replace(CONFIG, epochs=1, ema=0.0, **changes), folder, digits)
        trainer.train_loader = Poisoned(trainer.train_loader, which)
        return trainer

    def said(self, folder):
        return (folder / "log.txt").read_text()

    def test_nonfinite_stop_ends_the_run(self, tmp_path, digits):
        trainer = self.trainer(tmp_path / "run", digits, {2})
        with pytest.raises(
            NonFiniteLoss,
            match=(
                r"epoch 1, step 3: non-finite loss, ce/branch1, .*; no epoch was saved, so there"
                r" is no checkpoint. Try a lower --lr"
            ),
        ):
            trainer.run()

    def test_nonfinite_skip_continues(self, tmp_path, digits):
        trainer = self.trainer(tmp_path / "run", digits, {2}, on_nonfinite="skip")
        summary = trainer.run()
        assert "skipped in epoch 1: step 3: non-finite loss, ce/branch1" in self.said(
            tmp_path / "run"
        )
        assert all(
            bool(value.isfinite().all())
            for value in load_student(tmp_path / "run")[0].state_dict().values()
        )
        assert math.isfinite(trainer.run_folder.read_metrics()[0]["train"]["loss"])
        assert summary.epochs == 1

    def test_nonfinite_rollback_uses_following_batches(self, tmp_path, digits, monkeypatch):
        monkeypatch.setattr(cadence, "CHECK_SECONDS", -1.0)  # look after every step
        trainer = self.trainer(tmp_path / "run", digits, {2}, on_nonfinite="rollback")
        trainer.run()
        assert (
            "rolled back in epoch 1 to the weights of step 0: step 3: non-finite loss"
            in self.said(tmp_path / "run")
        )
        clean = make(dataclasses.replace(CONFIG, epochs=1, ema=0.0), tmp_path / "clean", digits)
        state = clean.model.state_dict()
        fourth = [batch for number, batch in enumerate(clean.train_loader) if number == 3]
        clean.model.load_state_dict(state)
        clean.model.train()
        steps = len(clean.train_loader)
        clean.step.set_schedule(clean.config.lr_at(3 / steps), clean.config.kd_weight_at(0))
        clean.step(fourth[0])
        assert all(
            torch.equal(value, trainer.model.state_dict()[name])
            for name, value in clean.model.state_dict().items()
        )

    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            ("skip", "more than 2 steps were skipped"),
            ("rollback", "2 rollbacks in this epoch did not help"),
        ],
    )
    def test_nonfinite_policies_have_a_limit(self, tmp_path, digits, monkeypatch, policy, message):
        for name in ("MAX_SKIPPED", "MAX_ROLLBACKS"):
            monkeypatch.setattr(trainer_module, name, 2)
        if policy == "rollback":
            monkeypatch.setattr(cadence, "CHECK_SECONDS", -1.0)
        trainer = self.trainer(tmp_path / "run", digits, {0, 1, 2, 3}, on_nonfinite=policy)
        with pytest.raises(NonFiniteLoss, match=message):
            trainer.run()
