"""Training on pictures that are decoded on the way: the command line, the choice of the loader,
resuming, the exported student.
"""

import dataclasses
import json
import re
import shutil
import sys

import pytest
import torch
from stream_loaders import picture

from fastokd.cli import main
from fastokd.data import Augment, list_files, make_loader
from fastokd.errors import DataError
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.data import (
    data_record,
    explain_loader,
    loader_for,
    loader_name,
    open_data,
    with_augmentation,
)

OPTIONS = {"dali": "threads=1", "torchvision": "workers=0", "auto": "prefetch=1"}
LOADERS = ("dali", "torchvision")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """24 training and 9 validation JPEG images of three classes, larger than the images kept
    decoded.
    """
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("birch", "maple", "oak")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(
                    160 + 8 * i, 150, seed=100 * label + i + (50 if split == "val" else 0)
                ).save(folder / f"{i}.jpg", quality=85)
    return root


def train(tree, out, loader, *more, size=24) -> int:
    return main(
        [
            "train",
            "--data",
            str(tree),
            "--model",
            "resnet8",
            "--method",
            "baseline",
            "--image-size",
            str(size),
            "--batch-size",
            "8",
            "--lr",
            "0.05",
            "--loader",
            loader,
            "--loader-options",
            OPTIONS[loader],
            "--out",
            str(out),
            *more,
        ]
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_train_evaluate_export(tree, tmp_path, capsys, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    out = tmp_path / "run"
    assert (
        train(tree, out, loader, "--epochs", "1", size=136) == 0
    )  # large enough for random resized crops
    said = capsys.readouterr().out
    assert f"loader {loader} (requested)" in said
    assert "24 training and 9 val images" in said
    accuracy = json.loads((out / "summary.json").read_text())["last"]["branch1"]
    assert round(accuracy * 9, 6) == round(accuracy * 9)
    assert main(["eval", str(out)]) == 0
    assert re.search(rf"branch1 \(student\) +{100 * accuracy:.2f} ", capsys.readouterr().out)
    assert main(["export", str(out)]) == 0
    assert (
        json.loads((out / "export" / "student.json").read_text())["preprocessing"]["shorter_side"]
        == 155
    )
    assert main(["eval", str(out / "export"), "--data", str(tree)]) == 0
    assert f"accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_run_equals_uninterrupted_run(tree, tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    constant = ["--lr-gamma", "1"]
    assert train(tree, tmp_path / "whole", loader, "--epochs", "2", *constant) == 0
    assert train(tree, tmp_path / "half", loader, "--epochs", "1", *constant) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--epochs", "2"]) == 0
    whole, half = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "half")
    )
    for name, value in whole["model"].items():
        assert torch.equal(value, half["model"][name]), name


def test_large_images_are_cropped_like_imagenet(tree):
    cpu = torch.device("cpu")
    config = TrainConfig(data=str(tree))
    dataset = with_augmentation(config, open_data(config, cpu))
    assert dataset.image_size == (224, 224)
    assert dataset.augment == Augment(flip=True, crop_scale=(0.08, 1.0))
    assert dataset.augment.evaluation_side(224) == 256
    assert dataset.mean == (0.485, 0.456, 0.406)
    config = TrainConfig(data=str(tree), batch_size=4, pad=6, image_size=160)
    dataset = with_augmentation(config, open_data(config, cpu))
    assert dataset.augment == Augment(pad=6, flip=True)
    assert next(iter(loader_for(config, dataset, dataset.train, True, cpu))).images.shape == (
        4,
        3,
        160,
        160,
    )


def test_auto_loader_reports_its_reason(tree, monkeypatch):
    cpu = torch.device("cpu")
    streamed = TrainConfig(data=str(tree))
    dataset = open_data(streamed, cpu)
    assert "are large or too many for memory, so they are decoded while training" in explain_loader(
        streamed, dataset, cpu
    )
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert loader_name(streamed, dataset, cpu) == "torchvision"
    assert re.search(
        r"loader torchvision: .*; dali cannot run \(DALI cannot be imported .*pip install"
        r" -e '\.\[dali\]'",
        explain_loader(streamed, dataset, cpu),
    )
    small = TrainConfig(data=str(tree), image_size=24)
    assert (
        explain_loader(small, open_data(small, cpu), cpu)
        == "loader resident: the images are small and fit in memory; kept on cpu"
    )
    digits = TrainConfig(data="digits")
    assert (
        explain_loader(digits, open_data(digits, cpu), cpu)
        == "loader resident: the dataset is already decoded; kept on cpu"
    )
    monkeypatch.setattr("fastokd.train.data.available_memory", lambda: 1000)
    assert loader_name(small, open_data(small, cpu), cpu) == "torchvision"


def test_auto_loader_skips_dali_for_unsupported_files(tree, tmp_path):
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    cpu = torch.device("cpu")
    assert (
        loader_name(TrainConfig(data=str(tree)), open_data(TrainConfig(data=str(tree)), cpu), cpu)
        == "dali"
    )
    shutil.copytree(tree, tmp_path / "tree")
    picture(200, 160).save(tmp_path / "tree" / "val" / "oak" / "moving.gif")
    config = TrainConfig(
        data=str(tmp_path / "tree"), batch_size=4, image_size=136, loader_options={"workers": 0}
    )
    dataset = open_data(config, cpu)
    assert re.search(
        r"^loader torchvision: .*; dali cannot run \(split 'val' of .*: DALI cannot decode"
        r" val/oak/moving\.gif; convert them[^\n]*$",
        explain_loader(config, dataset, cpu),
    )
    assert (
        sum(
            len(batch.target)
            for batch in loader_for(config, dataset, dataset.evaluation, False, cpu)
        )
        == 10
    )
    assert type(make_loader(dataset, dataset.evaluation, 4)).__name__ == "TorchvisionLoader"
    with pytest.raises(DataError, match=r"DALI cannot decode val/oak/moving\.gif"):
        make_loader(dataset, dataset.evaluation, 4, loader="dali")


def test_resumed_run_keeps_its_loader(tree, tmp_path, capsys, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    cpu, config = torch.device("cpu"), TrainConfig(data=str(tree))
    dataset = open_data(config, cpu)
    assert loader_name(config, dataset, cpu) == "dali"
    seen = data_record(dataset, "torchvision")
    again = open_data(config, cpu, seen)
    assert loader_name(config, again, cpu, seen) == "torchvision"
    assert (
        type(loader_for(config, again, again.evaluation, False, cpu, seen)).__name__
        == "TorchvisionLoader"
    )
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "nvidia.dali", None)
        assert (
            train(tree, tmp_path / "run", "auto", "--epochs", "1", "--lr-gamma", "1", size=136) == 0
        )
        assert (
            load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["data"]["loader"]
            == "torchvision"
        )
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert "loader torchvision: the images are large" in capsys.readouterr().out
    assert (
        load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["data"]["loader"]
        == "torchvision"
    )
    # What cannot run here any more is no reason to stop.
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert loader_name(config, again, cpu, data_record(dataset, "dali")) == "torchvision"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_image_dtypes_of_training_and_evaluation(tree, precision):
    cpu = torch.device("cpu")
    config = TrainConfig(
        data=str(tree),
        batch_size=4,
        precision=precision,
        loader="torchvision",
        loader_options={"workers": 0},
    )
    small = dataclasses.replace(config, image_size=24, loader="resident", loader_options={})
    for each in (config, small):
        dataset = open_data(each, cpu)
        made = {
            train: next(iter(loader_for(each, dataset, split, train, cpu))).images
            for train, split in ((True, dataset.train), (False, dataset.evaluation))
        }
        assert made[True].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert made[False].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loader", "dalli"], "unknown loader 'dalli'; did you mean 'dali'?"),
        (["--bad-images", "skip"], "unknown bad_images 'skip'"),
        (
            ["--loader", "torchvision", "--loader-options", "worker=2"],
            "unknown loader option 'worker'; did you mean 'workers'?",
        ),
        (
            ["--loader", "torchvision", "--loader-options", "workers=two"],
            "loader option workers='two': it must be an int",
        ),
        (
            ["--loader", "resident", "--image-size", "24", "--loader-options", "workers=2"],
            "loader resident takes no options",
        ),
        (["--loader", "torchvision", "--pad", "300"], "pad=300"),
    ],
)
def test_user_errors_are_one_line(tree, tmp_path, capsys, arguments, said):
    assert (
        main(
            [
                "train",
                "--data",
                str(tree),
                "--model",
                "resnet8",
                "--method",
                "baseline",
                "--batch-size",
                "8",
                "--out",
                str(tmp_path / "run"),
                *arguments,
            ]
        )
        == 2
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_missing_dali_is_one_line(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert train(tree, tmp_path / "run", "dali", "--epochs", "1") == 2
    assert "loader 'dali' cannot run here: DALI cannot be imported" in capsys.readouterr().err


def test_corrupt_image_stops_or_is_replaced(tree, tmp_path, capsys):
    broken = tmp_path / "tree"
    for split in ("train", "val"):
        (broken / split).mkdir(parents=True)
        for folder in (tree / split).iterdir():
            (broken / split / folder.name).mkdir()
            for file in folder.iterdir():
                (broken / split / folder.name / file.name).write_bytes(
                    file.read_bytes()[
                        : (
                            300
                            if (split, folder.name, file.name) == ("train", "maple", "3.jpg")
                            else None
                        )
                    ]
                )
    assert train(broken, tmp_path / "fails", "torchvision", "--epochs", "1") == 3
    assert "cannot decode train/maple/3.jpg" in capsys.readouterr().err
    assert not (tmp_path / "fails").exists()
    assert (
        train(
            broken, tmp_path / "goes-on", "torchvision", "--epochs", "2", "--bad-images", "replace"
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("corrupt training images replaced so far: 1; new: train/maple/3.jpg (") == 1


@pytest.mark.parametrize("loader", LOADERS)
def test_missing_file_is_a_corrupt_image(tree, tmp_path, capsys, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    rows = [
        f"{tree / split / name / f'{i}.jpg'},{name},{split}"
        for split, count in (("train", 8), ("val", 3))
        for name in ("birch", "maple", "oak")
        for i in range(count)
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows).replace("maple/3.jpg", "maple/gone.jpg"))
    assert (
        list_files(tmp_path / "list.csv").fingerprint
        == list_files(tmp_path / "list.csv").fingerprint
    )
    assert train(tmp_path / "list.csv", tmp_path / "fails", loader, "--epochs", "1") == 3
    assert re.search(
        r"^[^\n]*gone\.jpg \(No such file or directory\)[^\n]*--bad-images replace\n$",
        capsys.readouterr().err,
    )
    assert (
        train(
            tmp_path / "list.csv",
            tmp_path / "goes-on",
            loader,
            "--epochs",
            "1",
            "--bad-images",
            "replace",
        )
        == 0
    )
    assert "images replaced so far: 1; new: " in capsys.readouterr().out


def test_unknown_classes_are_refused(tree, tmp_path, capsys):
    assert train(tree, tmp_path / "run", "torchvision", "--epochs", "1") == 0
    other = tmp_path / "other"
    for split in ("train", "val"):
        for name in ("birch", "maple", "willow"):
            (other / split / name).mkdir(parents=True)
            picture(150, 150).save(other / split / name / "0.jpg")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--data", str(other)]) == 4
    assert (
        "was trained on the classes birch, maple, oak, the data has birch, maple, willow"
        in capsys.readouterr().err
    )


def test_fingerprint_depends_on_the_tree(tree):
    before = open_data(TrainConfig(data=str(tree)), torch.device("cpu")).fingerprint
    assert before == list_files(tree).fingerprint
    more = tree / "train" / "oak" / "more.jpg"
    more.write_bytes((tree / "train" / "oak" / "1.jpg").read_bytes())
    try:
        assert list_files(tree).fingerprint != before
    finally:
        more.unlink()
