"""The trainer and its data: the loader chosen and said, mixed and resized images, and runs that
resume with all of it.
"""

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd import cli
from fastokd.data import Dataset
from fastokd.errors import ConfigError, DataError
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import load_config
from fastokd.train.data import explain_loader, loader_name, open_data
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runs import load_run
from fastokd.train.session import resume_run
from fastokd.train.trainer import Trainer

CONFIG = TrainConfig(
    data="digits",
    model="resnet8",
    method="ahbf",
    branches=2,
    aux_blocks=1,
    epochs=3,
    batch_size=96,
    lr=0.05,
    lr_decay_at=(),
    ramp_epochs=3,
    mixup=0.4,
    cutmix=1.0,
    padding="reflect",
    resize_schedule={1: 6, 2: 8},
)


def run(config, folder, **changes) -> Trainer:
    trainer = Trainer(
        dataclasses.replace(config, **changes), RunFolder.create(folder), Reporter(quiet=True)
    )
    trainer.start()
    return trainer


def test_images_follow_resize_schedule_and_targets_are_mixed(tmp_path, monkeypatch):
    trainer = run(CONFIG, tmp_path / "run")
    seen, evaluated = [], []
    step, measure = trainer.step.__class__.__call__, trainer.step.measure

    def record(self, batch):
        seen.append((trainer.epoch, tuple(batch.images.shape[2:])))
        assert batch.target.shape == (96, 10)
        torch.testing.assert_close(batch.target.sum(1), torch.ones(96))
        return step(self, batch)

    monkeypatch.setattr(trainer.step.__class__, "__call__", record)

    def look(batches):
        kept = list(batches)
        evaluated.append({batch.images.shape[2:] for batch in kept})
        return measure(kept)

    monkeypatch.setattr(trainer.step, "measure", look)
    trainer.run()
    assert set(seen) == {(0, (8, 8)), (1, (6, 6)), (2, (8, 8))}
    assert evaluated == [{(8, 8)}] * 3
    assert all(
        0 < record["train"]["accuracy/branch1"] < 1 for record in trainer.run_folder.read_metrics()
    )


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2, resize_schedule={0: 6, 1: 7}, ramp_epochs=2)
    straight = run(config, tmp_path / "straight")
    straight.run()
    begun = run(config, tmp_path / "begun")
    begun.run(until=1)
    begun.run_folder.unlock()
    resumed = resume_run(tmp_path / "begun", Reporter(quiet=True))
    resumed.run()
    left, right = (
        load_checkpoint(trainer.run_folder.last)["model"] for trainer in (straight, resumed)
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_loader_choice_reports_reason(tmp_path, capsys):
    code = cli.main(
        [
            "train",
            "--data",
            "digits",
            "--model",
            "resnet8",
            "--method",
            "baseline",
            "--epochs",
            "1",
            "--batch-size",
            "256",
            "--out",
            str(tmp_path / "run"),
            "--resize-schedule",
            "0:6",
            "--mixup",
            "0.2",
        ]
    )
    assert code == 0
    assert "loader resident: the dataset is already decoded; kept on cpu" in capsys.readouterr().out
    assert load_config(
        (tmp_path / "run" / "config.yaml").read_text(), "config"
    ).resize_schedule == {0: 6}


def make_tree(root, size=(8, 8), count=4):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(
                    np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
                ).save(root / split / name / f"{i}.png")
    return root


class TestChoice:
    def choose(self, root, **changes):
        config = TrainConfig(data=str(root), **changes)
        dataset = open_data(config, torch.device("cpu"))
        return (
            loader_name(config, dataset, torch.device("cpu")),
            dataset,
            explain_loader(config, dataset, torch.device("cpu")),
        )

    def test_small_images_use_resident_loader(self, tmp_path):
        name, dataset, line = self.choose(make_tree(tmp_path))
        assert (name, dataset.image_size) == ("resident", (8, 8))
        assert line == "loader resident: the images are small and fit in memory; kept on cpu"

    @pytest.mark.parametrize(("size", "free"), [((8, 8), 3000), ((200, 300), 2**40)])
    def test_large_images_use_streaming_loader(self, tmp_path, monkeypatch, size, free):
        monkeypatch.setattr("fastokd.train.data.available_memory", lambda: free)
        name, dataset, line = self.choose(make_tree(tmp_path, size))
        assert name in ("dali", "torchvision")
        assert dataset.image_size == ((8, 8) if size == (8, 8) else (224, 224))
        assert line.startswith(f"loader {name}: the images are large or too many for memory")

    @pytest.mark.parametrize("size", [(8, 8), (200, 300)])
    def test_open_data_lists_files_once(self, tmp_path, monkeypatch, size):
        make_tree(tmp_path, size)
        listed, real_scan = [], os.scandir
        monkeypatch.setattr(
            os,
            "scandir",
            lambda path: listed.append(os.path.relpath(path, tmp_path)) or real_scan(path),
        )
        open_data(TrainConfig(data=str(tmp_path)), torch.device("cpu"))
        assert sorted(name for name in listed if name.count("/") == 1) == [
            "train/cat",
            "train/dog",
            "val/cat",
            "val/dog",
        ]

    def test_unavailable_faster_loaders_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        name, _, line = self.choose(make_tree(tmp_path, (200, 300)))
        assert name == "torchvision"
        assert "decoded while training; dali cannot run (DALI cannot be imported (" in line

    def test_loaded_run_keeps_loader_choice(self, tmp_path, monkeypatch):
        config = dataclasses.replace(
            CONFIG,
            data=str(make_tree(tmp_path / "tree")),
            batch_size=8,
            epochs=1,
            resize_schedule={},
            method="baseline",
            branches=None,
        )
        run(config, tmp_path / "run").run()
        monkeypatch.setattr(
            "fastokd.train.data.list_source", lambda *_: pytest.fail("the loader was chosen again")
        )
        loaded = load_run(tmp_path / "run")
        assert isinstance(loaded.dataset, Dataset)
        assert loaded.dataset.image_size == (8, 8)


def test_corrupt_images_stop_or_are_replaced_as_configured(tmp_path, capsys):
    make_tree(tmp_path / "tree")
    (tmp_path / "tree" / "train" / "cat" / "1.png").write_bytes(b"")
    arguments = [
        "train",
        "--data",
        str(tmp_path / "tree"),
        "--model",
        "resnet8",
        "--method",
        "baseline",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(arguments) == DataError.exit_code
    assert "train/cat/1.png (not an image, or empty)" in capsys.readouterr().err
    with pytest.warns(
        UserWarning, match="1 of 8 training images cannot be decoded and were replaced"
    ):
        assert cli.main([*arguments, "--bad-images", "replace"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loader": "dalli"}, "unknown loader 'dalli'"),
        ({"bad_images": "skip"}, "unknown bad_images 'skip'"),
        ({"mixup": -1.0}, "mixup=-1.0: it must be at least 0"),
        ({"cutmix": float("nan")}, "cutmix=nan"),
        ({"padding": "black"}, r"unknown padding 'black' \(choices: reflect, zero\)"),
        ({"resize_schedule": {3: 8}}, "of epochs from 0 to 2"),
        ({"resize_schedule": {-1: 8}}, "of epochs from 0 to 2"),
        ({"resize_schedule": {0: 2}}, "sizes of at least 4 pixels"),
    ],
)
def test_incompatible_settings_are_refused_with_reason(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(dataclasses.replace(CONFIG, **changes))


def test_per_image_state_with_mixing_is_refused():
    tsb = dataclasses.replace(CONFIG, method="tsb", branches=None)
    with pytest.raises(
        ConfigError, match=r"mixup=0\.4 and method 'tsb': it stores predictions of each image"
    ):
        check_config(tsb)
    check_config(dataclasses.replace(tsb, mixup=0.0, cutmix=0.0))


def test_sizes_beyond_the_images_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="image size 9: the images are 8 x 8"):
        run(CONFIG, tmp_path / "run", resize_schedule={2: 9})


def test_schedules_are_read_and_written(capsys):
    assert load_config(CONFIG.to_yaml(), "here") == CONFIG
    assert [CONFIG.size_at(epoch) for epoch in range(4)] == [None, 6, 8, 8]
    for text in (
        "resize_schedule: {a: 3}",
        "resize_schedule: {0: 1.5}",
        "resize_schedule: {0: true}",
        "resize_schedule: [0, 8]",
    ):
        with pytest.raises(ConfigError, match=r"resize_schedule=.* has the wrong type"):
            load_config(text, "here")
    assert cli.main(["train", "--data", "digits", "--resize-schedule", "0-8"]) == 2
    assert "--resize-schedule: '0-8' is not of the form EPOCH:SIZE" in capsys.readouterr().err
