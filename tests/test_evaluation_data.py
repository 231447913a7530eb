"""Data to evaluate a run on that has no training split: folders of classes, lists, one split."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastokd.cli import main
from fastokd.data import list_evaluation
from fastokd.train.runs import load_run

CLASSES = ("cat", "dog", "eel")


def write_classes(folder: Path, seed: int, count: int = 3, classes=CLASSES, side: int = 12) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((seed, number, i)).integers(0, 256, (side, side, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def write_list(folder: Path, images: Path) -> Path:
    paths = sorted(images.glob("*/*.png"))
    rows = "".join(f"{path},{path.parent.name}\n" for path in paths)
    (folder / "list.csv").write_text("path,label\n" + rows)
    return folder / "list.csv"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluation images were held out of a folder of classes."""
    folder = tmp_path_factory.mktemp("trained")
    write_classes(folder / "images", 0, count=6)
    options = ["--method", "baseline", "--model", "resnet8", "--epochs", "1", "--batch-size", "4"]
    data = ["--data", str(folder / "images"), "--val-split", "0.34", "--image-size", "12"]
    assert main(["train", *data, *options, "--out", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run")]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes, without splits, whose images have another size."""
    return write_classes(tmp_path_factory.mktemp("photos") / "photos", 1, side=20)


@pytest.mark.parametrize("loader", ["resident", "torchvision", "dali"])
def test_folder_of_classes_is_evaluated_like_a_split(trained, photos, tmp_path, loader):
    pytest.importorskip("nvidia.dali" if loader == "dali" else "torchvision")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "val").symlink_to(photos)
    (tmp_path / "tree" / "train").symlink_to(trained / "images")
    config = trained / "run" / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("loader: auto", f"loader: {loader}"))
    try:
        runs = [load_run(trained / "run", data=str(data)) for data in (photos, tmp_path / "tree")]
        results = [run.evaluator.measure(run.loader) for run in runs]
    finally:
        config.write_text(before)
    assert [len(run.images) for run in runs] == [9, 9]
    assert runs[0].loader.__class__.__name__.lower().startswith(loader)
    assert results[0].accuracies == results[1].accuracies
    assert results[0].metrics == results[1].metrics


def test_every_image_of_a_folder_or_list_is_evaluated(trained, photos, tmp_path, capsys):
    listed = write_list(tmp_path, photos)
    write_classes(tmp_path / "tree" / "test", 1)  # without train/
    for data in (photos, listed, tmp_path / "tree"):
        for model in (trained / "run", trained / "run" / "export"):
            capsys.readouterr()
            assert main(["eval", str(model), "--data", str(data)]) == 0
            assert ", 9 " in capsys.readouterr().out
    assert main(["analyze", str(trained / "run"), "--data", str(photos), "--max-images", "0"]) == 0
    assert "9 photos images" in capsys.readouterr().out


def test_data_of_the_run_keeps_its_held_out_images(trained, capsys):
    """Given again as --data, it must not evaluate on training images."""
    for data in ([], ["--data", str(trained / "images")]):
        assert main(["eval", str(trained / "run"), *data]) == 0
        assert "6 val images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog"), "not in the data: eel"),
        ((*CLASSES, "fox"), "only in the data: fox"),
        (("Cat", "dog", "eel"), "not in the data: cat; only in the data: Cat"),
    ],
)
def test_other_classes_are_refused_by_name(trained, tmp_path, capsys, classes, message):
    folder = write_classes(tmp_path / "photos", 2, classes=classes)
    for model in (trained / "run", trained / "run" / "export"):
        assert main(["eval", str(model), "--data", str(folder)]) == 4
        assert message in capsys.readouterr().err


def test_split_of_a_folder_without_splits_is_refused(trained, photos, capsys):
    for model in (trained / "run", trained / "run" / "export"):
        assert main(["eval", str(model), "--data", str(photos), "--split", "val"]) == 2
        assert "has no split 'val' (it has none)" in capsys.readouterr().err


def test_data_with_several_splits_is_not_listed_alone():
    assert list_evaluation("digits", None) is None
