"""Predictions for image files, and the preprocessing of an exported student."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as transforms
from PIL import Image

from fastokd.cli import main
from fastokd.export import load_student, open_export, preprocess
from fastokd.train.runs import load_run

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise with one stronger color, in files of different sizes and modes."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 6)):
        for shift, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (24 + number, 40 - number // 2, 3)
                pixels = generator.integers(0, 120, size, dtype=np.uint8)
                pixels[..., 2 - shift] += 120
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    options = "--model resnet8 --method baseline --epochs 3 --batch-size 32 --lr 0.05 --quiet"
    train = ["train", "--data", images, "--image-size", 16, "--device", "cpu", "--out", folder]
    assert main([*map(str, train), *options.split()]) == 0
    return folder


def predict(capsys, *arguments):
    capsys.readouterr()
    code = main(["predict", *map(str, arguments)])
    output, errors = capsys.readouterr()
    return code, output, errors


def by_torchvision(path, record):
    settings = record["preprocessing"]
    image = transforms.resize(Image.open(path).convert("RGB"), settings["shorter_side"])
    image = transforms.to_tensor(transforms.center_crop(image, settings["image_size"]))
    return transforms.normalize(image, settings["mean"], settings["std"])


def test_preprocess_equals_torchvision_and_evaluation(run, images):
    _, record = load_student(run)
    prepare = preprocess(record)
    files = sorted((images / "val").rglob("*.png"))
    prepared = torch.stack([prepare(file) for file in files])
    expected = torch.stack([by_torchvision(file, record) for file in files])
    torch.testing.assert_close(prepared, expected, rtol=1e-6, atol=1e-6)
    loader = load_run(run, device="cpu").loader
    torch.testing.assert_close(prepared, torch.cat([batch.images for batch in loader]))
    larger = {**record["preprocessing"], "shorter_side": 20, "image_size": [12, 16]}
    for settings in (record["preprocessing"], larger):
        record = {**record, "preprocessing": settings}
        expected = by_torchvision(files[0], record)
        for source in (str(files[0]), files[0].read_bytes(), Image.open(files[0])):
            found = preprocess(record)(source)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_predict_prints_the_students_classes(run, images, capsys):
    code, output, _ = predict(capsys, run, images / "val", "--json")
    results = json.loads(output)
    files = sorted((images / "val").rglob("*.png"))
    assert (code, [result["file"] for result in results]) == (0, [str(file) for file in files])
    student, record = load_student(run)
    with torch.no_grad():
        logits = student(torch.stack([by_torchvision(file, record) for file in files]))
    for result, row in zip(results, logits.softmax(1), strict=True):
        values, order = row.sort(descending=True)
        names = [item["class"] for item in result["predictions"]]
        assert names == [CLASSES[index] for index in order]  # of three classes, all are shown
        found = [item["probability"] for item in result["predictions"]]
        assert found == pytest.approx(values.tolist(), abs=1e-5)


def test_predict_takes_files_folders_and_patterns(run, images, capsys, tmp_path):
    val = images / "val"
    arguments = [val / "red" / "03.png", val / "blue", val / "*" / "01.png", "--top", 1]
    code, output, _ = predict(capsys, run, *arguments)
    lines = output.splitlines()
    assert (code, len(lines)) == (0, 1 + 6 + 3)
    assert lines[0].startswith(f"{val / 'red' / '03.png'}: ")
    assert all(line.count("%") == 1 for line in lines)
    empty = tmp_path / "empty"
    empty.mkdir()
    for argument, message in (
        (tmp_path / "absent.png", "there is no such file"),
        (tmp_path / "*.jpg", "no image has such a name"),
        (empty, "it holds no images"),
    ):
        code, output, errors = predict(capsys, run, argument)
        assert (code, output, message in errors) == (3, "", True)
    assert "no images; pass image files" in predict(capsys, run)[2]


def test_predict_continues_after_a_corrupt_image(run, images, capsys, tmp_path):
    Image.open(images / "val" / "red" / "00.png").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    code, output, errors = predict(capsys, run, tmp_path)
    lines = output.splitlines()
    assert (code, errors) == (3, "fastokd: 1 of 2 images cannot be read\n")
    assert "%" in lines[0]
    assert lines[1] == f"{tmp_path / 'b.png'}: not read: not an image, or empty"
    results = json.loads(predict(capsys, run, tmp_path, "--json")[1])
    assert [set(result) for result in results] == [{"file", "predictions"}, {"file", "error"}]


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_export_with_preprocessing_takes_pixels(run, images, capsys, tmp_path, to):
    options = ["--to", to, "--with-preprocessing", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["export", str(run), *options]) == 0
    output = capsys.readouterr().out
    assert "verified by running the file" in output
    assert "input of the file: pixels, uint8 [B, 3, H, W]" in output
    path, record, _ = open_export(tmp_path)
    file = images / "val" / "green" / "02.png"
    pixels = preprocess(record)(file)[None]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (1, 3, 16, 16))
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        logits = torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0])
    else:
        logits = torch.export.load(path).module()(pixels)
    student, plain = load_student(run)
    expected = student(by_torchvision(file, plain)[None])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    texts = [predict(capsys, each, images / "val", "--top", 1)[1] for each in (run, tmp_path)]
    names = [[line.split(" ")[1] for line in text.splitlines()] for text in texts]
    assert names[0] == names[1]
    assert main(["eval", str(tmp_path), "--data", str(images), "--device", "cpu"]) == 0


def test_preprocessing_in_a_file_of_weights_is_refused(run, capsys):
    assert main(["export", str(run), "--with-preprocessing"]) == 2
    error = capsys.readouterr().err
    assert "safetensors files hold weights only; use --to onnx or torch-export" in error


def test_preprocess_converts_images_without_a_file(run):
    _, record = load_student(run)
    gray = (np.arange(400) % 256).astype(np.uint8).reshape(20, 20)
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "png")
    prepare = preprocess(record)
    assert torch.equal(prepare(Image.fromarray(gray)), prepare(buffer.getvalue()))


def test_predict_with_an_unfinished_run_names_the_fix(run, images, capsys, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("student.*"))
    code, _, errors = predict(capsys, unfinished, images / "val")
    assert code == 4
    assert f"{unfinished} is not finished; write the student" in errors
    assert main(["export", str(unfinished), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert predict(capsys, unfinished / "export", images / "val")[0] == 0
