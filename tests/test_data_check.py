"""``fastokd data check`` finds every kind of damage there is and nothing in sound data; what it
lists can be trained on.
"""

import io
import json
import os
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from fastokd import cli
from fastokd.data import check, list_files, open_dataset
from fastokd.errors import DataError

RNG = np.random.default_rng(0)


def picture(size=(12, 10)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, file_format="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def put(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def tree(tmp_path):
    """A sound tree of 24 pictures."""
    root = tmp_path / "tree"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(6):
                put(root / split / name / f"{i}.jpg", encoded(picture()))
    return root


def kinds(report) -> dict[str, int]:
    return {what: len(names) for what, names in (report.problems | report.remarks).items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_valid_dataset_has_no_findings(tree, workers, monkeypatch):
    monkeypatch.setattr(check, "_CHUNK", 4)
    calls = []
    report = check.check_dataset(tree, workers, lambda *call: calls.append(call))
    assert kinds(report) == {}
    assert (report.images, report.classes) == ({"train": 12, "val": 12}, {"train": 2, "val": 2})
    assert (report.formats, report.modes, report.sizes) == (
        {"JPEG": 24},
        {"RGB": 24},
        ((12, 10), (12, 10)),
    )
    assert len(report.clean) == 24
    assert calls[-1] == (24, 24)


def test_damaged_images_are_reported_and_omitted(tree, monkeypatch, tmp_path):
    whole = encoded(picture((40, 40)))
    train = tree / "train" / "cat"
    put(train / "empty.jpg", b"")
    put(train / "cut.jpg", whole[: len(whole) // 2])
    put(train / "cut.png", encoded(picture((40, 40)), "PNG")[:200])
    put(train / "text.jpg", b"no image at all")
    (train / "gone.jpg").symlink_to(tmp_path / "nowhere")
    put(train / "png.jpg", encoded(picture(), "PNG"))
    put(train / "tiny.jpg", encoded(picture((4, 30))))
    put(train / "wide.jpg", encoded(picture((50, 60))))
    put(train / "wide-cut.jpg", encoded(picture((50, 60)))[:-2000])
    put(train / "enormous.jpg", encoded(picture((120, 100))))
    put(train / "notes.txt", b"")
    (tree / "train" / "emu").mkdir()
    put(tree / "val" / "fox" / "0.jpg", encoded(picture()))
    monkeypatch.setattr(check, "HUGE_PIXELS", 2500)
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 2800
    )  # Pillow warns above it, and refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check.check_dataset(tree, workers=1)
    assert {
        what: sorted(os.path.basename(name.split(" (")[0]) for name in names)
        for what, names in (report.problems | report.remarks).items()
    } == {
        "empty file": ["empty.jpg"],
        "truncated": ["cut.jpg", "cut.png", "wide-cut.jpg"],
        "not an image": ["text.jpg"],
        "unreadable": ["gone.jpg"],
        "too large": ["enormous.jpg"],
        "huge": ["wide.jpg"],
        "misnamed": ["png.jpg"],
        "tiny": ["tiny.jpg"],
        "empty class": ["emu"],
        "one-sided class": ["fox"],
        "not an image file": ["notes.txt"],
    }
    assert "it is PNG" in report.remarks["misnamed"][0]
    assert report.remarks["huge"] == ["train/cat/wide.jpg (50 x 60)"]
    assert report.problems["too large"] == [
        "train/cat/enormous.jpg (Image size (12000 pixels) exceeds limit of 5600 pixels)"
    ]
    names = {os.path.basename(name) for name, _, _ in report.clean}
    assert names == {*(f"{i}.jpg" for i in range(6)), "png.jpg", "tiny.jpg", "wide.jpg"}
    assert not any(label == "fox" for _, label, _ in report.clean), "nobody could learn it"


def test_files_and_folders_without_permission(tree, monkeypatch):
    real_read, real_scan = check.read_bytes, os.scandir

    def read(path, *position):
        if path.endswith("dog/3.jpg"):
            raise PermissionError(13, "Permission denied")
        return real_read(path, *position)

    def scan(path):
        if str(path).endswith("val/cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scan(path)

    monkeypatch.setattr(check, "read_bytes", read)
    monkeypatch.setattr(os, "scandir", scan)
    report = check.check_dataset(tree, workers=1)
    assert len(report.problems["permission"]) == 3
    assert "val/cat: cannot be read: Permission denied" in report.problems["permission"][0]


class TestDuplicates:
    def test_duplicate_across_splits_omits_training_copy(self, tree):
        put(tree / "train" / "cat" / "copy.jpg", (tree / "val" / "cat" / "2.jpg").read_bytes())
        report = check.check_dataset(tree)
        assert kinds(report) == {"duplicate across splits": 1}
        assert report.problems["duplicate across splits"] == ["train/cat/copy.jpg = val/cat/2.jpg"]
        assert {name for name, _, _ in report.clean} == {
            f"{split}/{name}/{i}.jpg"
            for split in ("train", "val")
            for name in ("cat", "dog")
            for i in range(6)
        }

    def test_duplicate_pixels_in_other_bytes_are_reported(self, tree):
        image = picture()
        put(tree / "train" / "cat" / "a.png", encoded(image, "PNG", compress_level=1))
        put(tree / "val" / "cat" / "b.png", encoded(image, "PNG", compress_level=9))
        assert (
            "same pixels in other bytes"
            in check.check_dataset(tree).problems["duplicate across splits"][0]
        )

    def test_duplicate_across_classes_omits_all_training_copies(self, tree):
        put(tree / "train" / "dog" / "copy.jpg", (tree / "train" / "cat" / "2.jpg").read_bytes())
        report = check.check_dataset(tree)
        assert kinds(report) == {"duplicate across classes": 1}
        assert len(report.clean) == 23

    def test_duplicate_within_class_is_a_remark(self, tree):
        put(tree / "train" / "dog" / "copy.jpg", (tree / "train" / "dog" / "2.jpg").read_bytes())
        report = check.check_dataset(tree)
        assert (kinds(report), report.problems, len(report.clean)) == ({"duplicate": 1}, {}, 25)

    def test_equal_pixels_of_other_shape_are_not_duplicates(self, tree):
        for name, size in (("a", (8, 18)), ("b", (18, 8))):
            put(
                tree / "train" / "dog" / f"{name}.png",
                encoded(Image.new("RGB", size, "red"), "PNG"),
            )
        assert kinds(check.check_dataset(tree)) == {}


class TestOtherLayouts:
    def test_check_single_folder_without_splits(self, tree, tmp_path):
        report = check.check_dataset(tree / "train")
        assert (report.images, kinds(report)) == ({"": 12}, {})
        report.write_clean(tmp_path / "list.csv")
        assert (
            (tmp_path / "list.csv").read_text().startswith("path,label\ntree/train/cat/0.jpg,cat\n")
        )
        assert len(list_files(tmp_path / "list.csv", val_split=0.5).train) == 6

    def test_flat_validation_folder_needs_labels(self, tree):
        for name in ("cat", "dog"):
            for file in sorted((tree / "val" / name).iterdir()):
                file.rename(tree / "val" / f"{name}{file.name}")
            (tree / "val" / name).rmdir()
        assert kinds(check.check_dataset(tree)) == {"no labels": 1}
        (tree / "val.txt").write_text(
            "".join(f"{name}{i}.jpg {name}\n" for name in ("cat", "dog") for i in range(6))
        )
        report = check.check_dataset(tree)
        assert kinds(report) == {}
        assert ("val/dog3.jpg", "dog", "val") in report.clean

    def test_clean_list_keeps_class_order_of_tree(self, tmp_path):
        for split in ("train", "val"):
            for name in ("2", "10", "1"):
                for i in range(2):
                    put(tmp_path / "tree" / split / name / f"{i}.jpg", encoded(picture()))
        check.check_dataset(tmp_path / "tree").write_clean(tmp_path / "clean.csv")
        tree, listed = list_files(tmp_path / "tree"), list_files(tmp_path / "clean.csv")
        assert tree.classes == listed.classes == ("1", "10", "2")
        labels = [
            {
                os.path.basename(os.path.dirname(file)): target
                for file, target in zip(data.train.files, data.train.targets.tolist(), strict=True)
            }
            for data in (tree, listed)
        ]
        assert labels[0] == labels[1]

    def test_check_csv_list_reports_missing_image(self, tree):
        (tree / "list.csv").write_text(
            "train/cat/0.jpg,a\ntrain/cat/1.jpg,b\ntrain/cat/gone.jpg,a\n"
        )
        assert kinds(check.check_dataset(tree / "list.csv")) == {"unreadable": 1}

    def test_check_shards_reports_unreadable_image(self, tmp_path):
        with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
            for name, content in (
                ("0.jpg", encoded(picture())),
                ("0.cls", b"0"),
                ("1.jpg", b""),
                ("1.cls", b"1"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        report = check.check_dataset(tmp_path)
        assert report.problems == {"empty file": ["train-0.tar/1.jpg"]}
        with pytest.raises(DataError, match="images in archives cannot be listed"):
            report.write_clean(tmp_path / "list.csv")

    def test_check_without_images_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"no train/ \(found no folders\)"):
            check.check_dataset(tmp_path)
        with pytest.raises(DataError, match="digits is not made of image files"):
            check.check_dataset("digits")


def test_crashed_decoder_is_reported():
    images = [check.Image("train", "cat", f"{i}.jpg", f"/nowhere/{i}.jpg") for i in range(24)]
    with pytest.raises(
        DataError,
        match=r"a decoding process died.* among 0\.jpg and the 8 after it; try --workers 1",
    ):
        check.run_in_processes(crash, images, 2, None, chunk=4)


def crash(item):
    os._exit(11)


def test_huge_image_is_a_remark_and_undecodable_a_problem(tree, monkeypatch, capsys):
    put(tree / "train" / "cat" / "wide.jpg", encoded(picture((50, 60))))
    monkeypatch.setattr(check, "HUGE_PIXELS", 2500)
    assert cli.main(["data", "check", str(tree)]) == 0
    assert "huge: train/cat/wide.jpg (50 x 60)" in capsys.readouterr().out
    assert len(open_dataset(tree, image_size=8).train) == 13
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1400)
    assert cli.main(["data", "check", str(tree)]) == 3
    with pytest.raises(DataError, match=r"wide.jpg \(too many pixels\)"):
        open_dataset(tree, image_size=8)


def test_check_command_writes_trainable_list(tree, tmp_path, capsys):
    assert cli.main(["data", "check", str(tree)]) == 0
    assert "12 train images in 2 classes, 12 val images in 2 classes" in capsys.readouterr().out
    put(tree / "train" / "cat" / "3.jpg", b"")
    put(tree / "val" / "dog" / "x.jpg", b"[red]nothing[/red]")
    with pytest.raises(DataError):
        open_dataset(tree)
    lists = tmp_path / "lists"
    lists.mkdir()
    assert cli.main(["data", "check", str(tree), "--write-list", str(lists / "clean.csv")]) == 3
    captured = capsys.readouterr()
    assert "empty file: train/cat/3.jpg" in captured.out
    assert captured.err.splitlines()[-1].startswith("fastokd: 2 problems")
    opened = open_dataset(lists / "clean.csv")
    assert (opened.classes, len(opened.train), len(opened.test)) == (("cat", "dog"), 11, 12)
    assert cli.main(["data", "check", str(tree), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["problems"]["empty file"] == ["train/cat/3.jpg"]
    assert found["problems"]["not an image"][0].startswith("val/dog/x.jpg")
    assert cli.main(["data", "check", str(tree), "--write-list", "list.txt"]) == 2
    assert cli.main(["data", "chekc", str(tree)]) == 2
    assert "unknown command 'chekc'; did you mean 'check'?" in capsys.readouterr().err
    assert cli.main(["data", "check", str(tree), "--jsn"]) == 2
    assert "'fastokd data check --help' lists the options" in capsys.readouterr().err
