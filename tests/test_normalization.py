"""The normalization of a run, from its start to the exported student: pixels are compared with
NumPy's, computed from the files.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import SHORT_RUN
from PIL import Image

from fastokd.export import load_student, open_export, predict_files, preprocess
from fastokd.export.evaluate import evaluate_export
from fastokd.train.describe import describe_normalization
from fastokd.train.export_run import export_run
from fastokd.train.progress import Reporter
from fastokd.train.runs import load_run
from fastokd.train.session import begin_run, resume_run

CPU = torch.device("cpu")
SIDE = 16
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
PLAIN = dataclasses.replace(
    SHORT_RUN, image_size=SIDE, pad=0, flip=False, batch_size=4, branches=2, aux_blocks=0
)
"""Without augmentation, so that the network gets the pixels of the files."""


def write_images(root: Path, low: int, high: int) -> Path:
    """Noise of three classes as PNG files: 6 images of each in train, 3 in val."""
    rng = np.random.default_rng(low)
    for split, count in (("train", 6), ("val", 3)):
        for label in ("a", "b", "c"):
            (folder := root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers([low, low, 0], [high, 256, high], (SIDE, SIDE, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def pixels(file):
    """The file's pixels as fractions of 255, [H, W, 3]."""
    return np.asarray(Image.open(file).convert("RGB"), np.float64) / 255


def statistics(data):
    """Mean and standard deviation of each channel over the training images."""
    images = np.stack([pixels(file) for file in sorted((data / "train").rglob("*.png"))])
    return images.mean((0, 1, 2)), images.std((0, 1, 2))


def normalized(file, normalization):
    """The normalized pixels of a file, [3, H, W]."""
    mean, std = normalization
    return ((pixels(file) - mean) / std).transpose(2, 0, 1)


def assert_images_of(images, files, normalization):
    """Each image [3, H, W] is one of the files, and each file is there."""
    expected = np.stack([normalized(file, normalization) for file in files])
    matched = set()
    for image in images:
        distances = np.abs(expected - image.double().numpy()).max((1, 2, 3))
        assert distances.min() < 1e-5
        matched.add(int(distances.argmin()))
    assert len(matched) == len(files)


class Seen:
    """Keeps the images that a module gets."""

    def __init__(self, module):
        self.images = []
        module.register_forward_pre_hook(self)

    def __call__(self, module, arguments):
        self.images.extend(arguments[0].detach().clone().unbind())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("new"), 0, 120)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run on brighter images, with their normalization; the images."""
    images = write_images(tmp_path_factory.mktemp("old"), 90, 256)
    config = dataclasses.replace(PLAIN, data=str(images), method="baseline", branches=1, epochs=1)
    path = tmp_path_factory.mktemp("before") / "run"
    begin_run(config, path, "before", Reporter(quiet=True)).run()
    return path, images


CASES = [
    ("data", True, "resident"),
    ("imagenet", True, "resident"),
    ("weights", True, "resident"),
    ("auto", True, "resident"),
    ("auto", False, "resident"),
    ("imagenet", False, "torchvision"),
    ("weights", True, "torchvision"),
]


@pytest.mark.parametrize(("normalization", "from_weights", "loader"), CASES)
def test_normalization_is_the_same_from_training_to_prediction(
    tmp_path, data, before, normalization, from_weights, loader
):
    run, old_images = before
    follows = from_weights and normalization in ("auto", "weights")
    expected = IMAGENET if normalization == "imagenet" else statistics(data)
    if follows:
        expected = statistics(old_images)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((run / "student.safetensors").read_bytes())
    config = dataclasses.replace(
        PLAIN,
        data=str(data),
        weights=str(weights) if from_weights else "",
        normalization=normalization,
        loader=loader,
        loader_options={"workers": 0} if loader == "torchvision" else {},
        teacher=str(run),
    )
    train, val = (sorted((data / split).rglob("*.png")) for split in ("train", "val"))

    # Training and its evaluation; the teacher gets the same images in its own normalization.
    trainer = begin_run(config, tmp_path / "run", "name", Reporter(quiet=True))
    seen, taught = Seen(trainer.model.trunk), Seen(inner(trainer.teacher.network))
    trainer.run(until=1)
    images = len(train) - len(train) % config.batch_size
    check_epoch(seen.images, train, val, images, expected)
    check_epoch(taught.images, train, val, images, statistics(old_images))
    text = (tmp_path / "run/log.txt").read_text()
    assert describe_normalization(expected) in text
    of_teacher = describe_normalization(statistics(old_images))
    assert f"teacher {run}, {parameters(trainer.teacher):,} parameters; {of_teacher}" in text

    # A resumed run, without the file of weights
    weights.unlink()
    resumed = resume_run(tmp_path / "run", Reporter(quiet=True))
    seen, taught = Seen(resumed.model.trunk), Seen(inner(resumed.teacher.network))
    resumed.run()
    check_epoch(seen.images, train, val, images, expected)
    check_epoch(taught.images, train, val, images, statistics(old_images))

    # Evaluation of the run
    loaded = load_run(tmp_path / "run")
    evaluated = torch.cat([batch.images for batch in loaded.loader])[: len(val)]
    assert_images_of(evaluated, val, expected)

    # The exported student: its record, the preparation of a file, its evaluation and predictions
    path = export_run(tmp_path / "run").path
    student, record = load_student(path)
    stored = record["preprocessing"]
    for name, values in zip(("mean", "std"), expected, strict=True):
        np.testing.assert_allclose(stored[name], values, atol=1e-6)
    assert json.loads(path.with_suffix(".json").read_text())["preprocessing"] == stored
    prepare = preprocess(record)
    for file in val:
        wanted = normalized(file, expected)
        np.testing.assert_allclose(prepare(file).numpy(), wanted, atol=1e-5)
    batch = torch.from_numpy(np.stack([normalized(file, expected) for file in val])).float()
    probabilities = student(batch).softmax(1).detach()
    found = predict_files(open_export(path), [str(file) for file in val], top=3)
    for prediction, row in zip(found, probabilities, strict=True):
        for label, value in prediction.classes:
            assert value == pytest.approx(float(row["abc".index(label)]), abs=1e-5)
    labels = torch.tensor(["abc".index(file.parent.name) for file in val])
    accuracy = float((probabilities.argmax(1) == labels).double().mean())
    assert evaluate_export(path, str(data), None, CPU).accuracy == pytest.approx(accuracy)


def parameters(teacher):
    return sum(each.numel() for each in teacher.network.parameters())


def inner(network):
    """The teacher's own network, which gets images in its normalization."""
    return getattr(network, "network", network)


def check_epoch(images, train, val, count, normalization):
    """The first ``count`` images are training images, the following the evaluation's."""
    expected = np.stack([normalized(file, normalization) for file in train])
    for image in images[:count]:
        assert np.abs(expected - image.double().numpy()).max((1, 2, 3)).min() < 1e-5
    assert_images_of(images[count : count + len(val)], val, normalization)
