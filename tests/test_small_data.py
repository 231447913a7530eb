"""Small datasets: the chosen batch size, and the first lines of a run."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd.cli import main
from fastokd.data import open_dataset
from fastokd.data.images import default_workers, workers_per_process
from fastokd.methods import get_method
from fastokd.train.batches import choose_batch, describe_batches, small_data_defaults
from fastokd.train.config import TrainConfig
from fastokd.train.describe import describe_loss, describe_run
from fastokd.train.distributed import BatchShare
from fastokd.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def six_hundred(tmp_path_factory):
    """Digits as files: 60 training and 10 test images of each."""
    root, digits = tmp_path_factory.mktemp("six") / "hundred", open_dataset("digits")
    for split, images, count in (("train", digits.train, 60), ("val", digits.evaluation, 10)):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            found = np.flatnonzero(images.targets.numpy() == label)[:count]
            for number in found:
                pixels = images.images[number].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("images", "size", "lr"),
    [
        (600, 16, 0.0125),
        (1280, 64, 0.05),
        (2559, 64, 0.05),
        (2560, 128, 0.1),
        (20, 16, 0.0125),
        (12, 12, 0.009375),
    ],
)
def test_small_data_defaults_keep_twenty_steps(images, size, lr):
    config, reason = small_data_defaults(TrainConfig(), images)
    assert (config.batch_size, config.lr) == (size, pytest.approx(lr))
    assert bool(reason) == (size != 128)
    same = dataclasses.replace(config, batch_size=128, lr=0.1)
    assert same == TrainConfig()


@pytest.mark.parametrize(("images", "size"), [(128, 128), (127, 16), (60, 16), (12, 12)])
def test_given_learning_rate_is_kept_with_a_batch_that_fits(images, size):
    dataset = SimpleNamespace(train=range(images))
    config, line = choose_batch(TrainConfig(lr=0.3), dataset, torch.device("cpu"), None, "split")
    assert (config.batch_size, config.lr) == (size, 0.3)
    few = f"few images: the default batch size is {size} instead of 128"
    assert line == (few if size < 128 else "")


def test_defaults_train_six_hundred_images(six_hundred, tmp_path, capsys):
    """Far above chance, a tenth, in few epochs; resuming keeps the chosen values."""
    out = tmp_path / "run"
    train = ["train", "--data", str(six_hundred), "--model", "resnet8", "--branches", "2"]
    train += ["--aux-blocks", "0", "--out", str(out), "--device", "cpu", "--resume", "auto"]
    assert main([*train, "--epochs", "6"]) == 0
    output = capsys.readouterr().out
    few = "few images: the default batch size is 16 and the default learning rate 0.0125 instead of"
    assert f"{few} 128 and 0.1" in output
    assert "batch 16; 37 steps per epoch; each epoch drops 8 of 600 images, drawn at" in output
    assert "advice" not in output
    config = RunFolder(out).load_config()
    assert (config.batch_size, config.lr) == (16, 0.0125)
    assert RunFolder(out).read_metrics()[-1]["eval"]["branch1"] > 0.5
    assert main([*train, "--epochs", "6"]) == 0
    assert "already finished 6 of 6" in capsys.readouterr().out
    chosen = ["--batch-size", "128", "--epochs", "1", "--out", str(tmp_path / "other")]
    assert main([*train[:7], "--aux-blocks", "0", *chosen]) == 0
    output = capsys.readouterr().out
    assert "batch 128; 4 steps per epoch" in output
    assert "fewer than 20 steps; try --batch-size 16 --lr 0.0125, and more --epochs" in output
    assert "kd_weight only reaches 0.0067 in 1 epoch, so" in output


def test_sweep_has_the_defaults_of_small_data(six_hundred, tmp_path, capsys, monkeypatch):
    sweep = ["sweep", "--data", str(six_hundred), "--set", "model=resnet8", "--dry-run"]
    few = "few images: the default batch size is 16 and the default learning rate 0.0125"
    planned = []
    monkeypatch.setattr("fastokd.cli.sweeps._run", lambda plan, *_: planned.append(plan) or 0)
    for settings, size in ((), 16), (("--set", "lr=0.1"), 128), (("--set", "batch_size=64,32"), 64):
        assert main([*sweep, *settings, "--out", str(tmp_path / f"sweep-{size}")]) == 0
        assert (few in capsys.readouterr().out) == (size == 16)
        config = planned[-1].points[0].config
        assert (config.batch_size, config.lr) == (size, 0.0125 if size == 16 else 0.1)
        assert planned[-1].base.lr == config.lr


def lines(share, steps=100, **settings):
    config = TrainConfig(batch_size=share.batch_size, **settings)
    return list(describe_batches(config, steps * share.batch_size, steps, share))


def test_learning_rate_of_fresh_weights_is_reported_for_trained_ones():
    share = BatchShare(128, 1, 1, 128)
    (_, advice) = lines(share, weights="a.pth", lr=0.1)
    assert "advice: lr 0.1 suits fresh weights;" in advice
    assert "--lr 0.01 (docs/fine-tuning.md)" in advice
    assert len(lines(share, pretrained=True, lr=0.1)) == 2
    for settings in ({"lr": 0.1}, {"weights": "a.pth", "lr": 0.01}):
        assert len(lines(share, **settings)) == 1
    assert len(lines(share, weights="a.pth", lr=0.1, optimizer="adamw")) == 1


def test_few_images_per_normalization_are_reported():
    few = BatchShare(96, 32, 1, 3)
    found = lines(few)
    assert found[0] == "100 steps per epoch"
    assert re.search(r"each process normalizes over 3 images, .* --sync-bn True, or", found[1])
    assert len(lines(few, sync_bn=True)) == 1
    assert len(lines(BatchShare(512, 32, 1, 16))) == 1
    (_, advice) = lines(BatchShare(64, 1, 8, 8))
    assert "use a larger --device-batch" in advice


def test_ramp_up_that_barely_starts_is_reported():
    share = BatchShare(128, 1, 1, 128)
    assert "kd_weight only reaches" in lines(share, epochs=1)[1]
    for settings in ({"epochs": 30}, {"epochs": 1, "ramp_epochs": 0}, {"method": "baseline"}):
        assert len(lines(share, **settings)) == 1


def test_decoders_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr("fastokd.data.images.default_workers", lambda: 64)
    assert workers_per_process() == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers_per_process() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert workers_per_process() == 1
    assert default_workers() >= 1


def test_first_lines_name_preset_and_ramp_up_only_where_they_exist():
    assert "method ahbf (paper), 4 branches" in describe_run(TrainConfig())
    assert "method baseline, 1 branch" in describe_run(TrainConfig(method="baseline"))
    for method, ending in (
        ("ahbf", "; kd_weight is 0.00674 in epoch 1, 0.287 in epoch 2"),
        ("dml", "*kd_weight kl/branch1->branch2; kd_weight is 1 (no ramp-up)"),
        ("baseline", "1 ce/branch1"),
    ):
        config = TrainConfig(method=method, epochs=2)
        criterion = get_method(method).loss_class(num_branches=config.num_branches())
        assert describe_loss(criterion, config).endswith(ending)
