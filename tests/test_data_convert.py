"""``fastokd data convert``: the same labels and pictures, scaled; whole files only; an interruption
costs what was not done.
"""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd import cli
from fastokd.data import convert, list_files, open_dataset
from fastokd.data.convert import convert_dataset
from fastokd.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def smooth(size=(24, 32), shift=0) -> Image.Image:
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    return Image.fromarray(
        np.stack([x * 6 + shift, y * 9 + shift, 255 - x * 3 - y * 3], axis=-1).astype(np.uint8)
    )


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "in"
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                smooth(shift=7 * i + 20 * c + 3 * s).save(
                    root / split / name / f"{i}.{'JPEG' if i % 2 else 'png'}", quality=95
                )
    return root


def content(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_convert_scales_shorter_side(tree, tmp_path):
    outcome = convert_dataset(tree, tmp_path / "out", 12)
    assert (outcome.written, outcome.kept) == (16, 0)
    before, after = list_files(tree), list_files(tmp_path / "out")
    assert (after.classes, after.train.files, after.test.files) == (
        before.classes,
        before.train.files,
        before.test.files,
    )
    assert torch.equal(after.train.targets, before.train.targets)
    for file in after.train.files:
        got = np.asarray(Image.open(tmp_path / "out" / file)).astype(int)
        want = np.asarray(
            Image.open(tree / file).resize((16, 12), Image.Resampling.BILINEAR)
        ).astype(int)
        assert got.shape == (12, 16, 3)
        assert np.abs(got - want).max() <= (0 if file.endswith(".png") else 8), file


def test_convert_copies_small_images_and_turns_rotated_ones(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        smooth().save(tmp_path / "in" / name / "0.jpg", quality=50)
        smooth().save(tmp_path / "in" / name / "1.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth().save(tmp_path / "in" / "a" / "turned.jpg", exif=exif, quality=95)
    smooth().convert("CMYK").save(tmp_path / "in" / "a" / "cmyk.jpg", quality=95)
    (tmp_path / "in" / "a" / "deep").mkdir()
    smooth((30, 30)).save(tmp_path / "in" / "a" / "deep" / "0.jpg")
    convert_dataset(tmp_path / "in", tmp_path / "out", 64)
    out = tmp_path / "out" / "train" / "a"
    assert (out / "0.jpg").read_bytes() == (tmp_path / "in" / "a" / "0.jpg").read_bytes()
    names = sorted(path.name for path in out.iterdir())
    assert names[0].startswith("0-")  # of the folder below, under another name
    assert names[1:] == ["0.jpg", "1.webp.png", "cmyk.jpg", "turned.jpg"]
    turned = Image.open(out / "turned.jpg")
    assert (turned.size, turned.getexif().get(0x0112, 1)) == ((24, 32), 1)
    assert Image.open(out / "cmyk.jpg").mode == "RGB"
    assert np.array_equal(
        np.asarray(Image.open(out / "1.webp.png")),
        np.asarray(Image.open(tmp_path / "in" / "a" / "1.webp").convert("RGB")),
    )


def test_interrupted_conversion_resumes_with_same_result(tree, tmp_path, monkeypatch):
    convert_dataset(tree, tmp_path / "straight", 12)
    real, calls = convert.converted_bytes, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(convert, "converted_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_dataset(tree, tmp_path / "out", 12, workers=1)
    assert not [path for path in (tmp_path / "out").rglob(".*")], "no temporary file is left"
    with pytest.raises(
        DataError, match="conversion is not finished; run the same 'fastokd data convert' again"
    ):
        open_dataset(tmp_path / "out")
    monkeypatch.setattr(convert, "converted_bytes", real)
    outcome = convert_dataset(tree, tmp_path / "out", 12, workers=1)
    assert outcome.written + outcome.kept == 16
    assert outcome.kept == 9
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert convert_dataset(tree, tmp_path / "out", 12).kept == 16


def test_damaged_converted_images_are_rewritten(tree, tmp_path):
    out = tmp_path / "out"
    convert_dataset(tree, out, 12)
    before = content(out)
    [*files] = [name for name in before if name.endswith(".JPEG")][:2]
    (out / files[0]).write_bytes(before[files[0]][: len(before[files[0]]) // 2])
    (out / files[1]).write_bytes(b"")
    outcome = convert_dataset(tree, out, 12)
    assert outcome.written == 2
    assert content(out) == before


def test_replaced_source_image_is_refused(tree, tmp_path):
    convert_dataset(tree, tmp_path / "out", 12)
    before = content(tmp_path / "out")
    picture = tree / "train" / "cat" / "0.png"
    status = picture.stat()
    smooth(shift=99).save(picture)
    for times in (None, (status.st_atime_ns, status.st_mtime_ns)):  # another size alone tells too
        if times is not None:
            picture.write_bytes(picture.read_bytes() + b"0")
            os.utime(picture, ns=times)
        with pytest.raises(ConfigError, match="or source images changed since; pass a new folder"):
            convert_dataset(tree, tmp_path / "out", 12)
    assert content(tmp_path / "out") == before


def test_only_repaired_source_image_may_change(tree, tmp_path, monkeypatch):
    bad, other = tree / "train" / "dog" / "2.png", tree / "train" / "dog" / "0.png"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(DataError, match="1 of 16"):
        convert_dataset(tree, tmp_path / "out", 12)
    before = other.read_bytes()
    times = other.stat()
    other.write_bytes(good)
    with pytest.raises(ConfigError, match="changed since"):
        convert_dataset(tree, tmp_path / "out", 12)
    other.write_bytes(before)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    bad.write_bytes(good)
    with monkeypatch.context() as patched:
        patched.setattr(
            convert,
            "run_in_processes",
            lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            convert_dataset(tree, tmp_path / "out", 12)
    bad.write_bytes(before)
    with pytest.raises(ConfigError, match="changed since"):
        convert_dataset(tree, tmp_path / "out", 12)


def test_corrupt_images_are_named_and_others_converted(tree, tmp_path):
    bad = tree / "train" / "dog" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    with pytest.raises(
        DataError,
        match=r"1 of 16 images cannot be decoded: train/dog/2.png \(.*the others are written",
    ):
        convert_dataset(tree, tmp_path / "out", 12)
    with pytest.raises(DataError, match="not finished"):
        list_files(tmp_path / "out")
    bad.write_bytes(good)
    outcome = convert_dataset(tree, tmp_path / "out", 12)
    assert outcome.written == 1


def test_convert_into_foreign_folder_is_refused(tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty"):
        convert_dataset(tree, tmp_path / "out", 12)
    assert content(tmp_path / "out") == {"thesis.tex": b"dear"}
    convert_dataset(tree, tmp_path / "done", 12)
    with pytest.raises(ConfigError, match=r"another conversion \(shorter_side 12 before, 16 now"):
        convert_dataset(tree, tmp_path / "done", 16)
    (tree / "train" / "cat" / "0.png").rename(tree / "train" / "cat" / "9.png")
    with pytest.raises(ConfigError, match="converted from other files"):
        convert_dataset(tree, tmp_path / "done", 12)


def test_settings_out_of_range_are_refused(tree, tmp_path):
    with pytest.raises(ConfigError, match="shorter_side=0"):
        convert_dataset(tree, tmp_path / "out", 0)
    with pytest.raises(DataError, match="digits is not made of image files"):
        convert_dataset("digits", tmp_path / "out", 4)
    (tmp_path / "list.csv").write_text(f"{tree}/train/cat/0.png,../up\n{tree}/train/cat/2.png,b\n")
    with pytest.raises(DataError, match=r"the class ../up cannot be the name of a folder"):
        convert_dataset(tmp_path / "list.csv", tmp_path / "out", 4)


def test_convert_command_writes_images(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        cli.main(
            [
                "data",
                "convert",
                str(tree),
                "--out",
                str(out),
                "--shorter-side",
                "12",
                "--workers",
                "2",
            ]
        )
        == 0
    )
    assert f"wrote 16 images to {out}; train with --data {out}" in capsys.readouterr().out
    assert json.loads((out / "fastokd-convert.json").read_text())["finished"]
    assert cli.main(["data", "convert", str(tree), "--out", str(out), "--shorter-side", "12"]) == 0
    assert "wrote 0 images" in capsys.readouterr().out
    split = list_files(out).train
    assert Image.open(io.BytesIO(split.read(0))).size == (16, 12)
    assert cli.main(["data", "convert", str(tree), "--out", str(out)]) == 2
    assert os.listdir(out)
