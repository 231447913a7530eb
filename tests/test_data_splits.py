"""Split folders in the spellings that people use: recognized, or refused with their names."""

import io
import re
import tarfile

import pytest
from PIL import Image, UnidentifiedImageError

from fastokd.data import list_files, open_dataset
from fastokd.data.check import check_dataset
from fastokd.data.decoding import decode
from fastokd.errors import DataError
from fastokd.train.describe import describe_data

BUFFER = io.BytesIO()
Image.new("RGB", (6, 6), (200, 30, 90)).save(BUFFER, "PNG")


def make_tree(root, *folders, classes=("cat", "dog"), images=4):
    for folder in folders:
        for name in classes:
            (root / folder / name).mkdir(parents=True)
            for i in range(images):
                (root / folder / name / f"{i}.png").write_bytes(BUFFER.getvalue())


@pytest.mark.parametrize(
    ("train", "evaluation", "split"),
    [
        ("Training", "Testing", "test"),
        ("TRAIN", "TEST", "test"),
        ("seg_train", "seg_test", "test"),
        ("train", "Val", "val"),
        ("Train", "VALID", "val"),
        ("train", "Validation", "val"),
        ("train", "dev", "val"),
        ("train_images", "val_images", "val"),
        ("train2017", "val2017", "val"),
        ("training_set", "test_set", "test"),
        ("trainset", "testset", "test"),
        ("TrainingSet", "TestSet", "test"),
        ("Train Data", "Test Data", "test"),
        ("pets-train", "evaluation", "val"),
        ("train", "validate", "val"),
        ("train", "holdout", "val"),
        ("Trn", "Tst", "test"),
        ("training_set/training_set", "test_set/test_set", "test"),
        ("train/train", "val/Validation", "val"),
        ("train/images", "val/images", "val"),
    ],
)
def test_split_folders_in_any_spelling_are_recognized(tmp_path, train, evaluation, split):
    make_tree(tmp_path, train, evaluation)
    listed = list_files(tmp_path)
    assert listed.classes == ("cat", "dog")
    assert (listed.train.name, listed.evaluation.name) == ("train", split)
    assert len(listed.train) == len(listed.evaluation) == 8
    assert all(name.startswith(f"{evaluation}/") for name in listed.evaluation.files)
    assert check_dataset(tmp_path).classes == {"train": 2, split: 2}


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("Train", "train"), ["Train/", "train/"]),
        (("train", "Val", "validation"), ["Val/", "validation/"]),
        (("trainA", "trainB", "testA", "testB"), ["trainA/", "trainB/"]),
        (("cats_train", "dogs_test"), ["cats_train/", "dogs_test/"]),
        (("fold1", "fold2"), ["fold1/", "fold2/", "cat, dog"]),
        (("Entrenamiento", "Prueba"), ["Entrenamiento/", "Prueba/"]),
        (("seg_train", "seg_pred"), ["seg_train/", "seg_pred/"]),
        (("pets",), ["one folder, pets/", "pass "]),
    ],
)
def test_folders_that_may_be_splits_are_refused_by_name(tmp_path, folders, named):
    make_tree(tmp_path, *folders)
    with pytest.raises(DataError) as refused:
        list_files(tmp_path, val_split=0.25)
    for text in named:
        assert text in str(refused.value)


def test_dataset_one_folder_deeper_is_refused_with_its_path(tmp_path):
    make_tree(tmp_path / "chest_xray", "train", "val")
    with pytest.raises(DataError, match=r"chest_xray/, which holds train, val; pass .*/chest_xray"):
        list_files(tmp_path)
    assert len(list_files(tmp_path / "chest_xray").train) == 8


@pytest.mark.parametrize(
    "classes",
    [("bullet_train", "car"), ("test tube", "valid ticket"), ("latest", "trainee"), ("a", "A")],
)
def test_class_names_with_split_words_stay_classes(tmp_path, classes):
    make_tree(tmp_path, ".", classes=classes)
    assert set(list_files(tmp_path, val_split=0.25).classes) == set(classes)


def test_only_class_of_a_split_is_no_wrapper(tmp_path):
    make_tree(tmp_path, "train", classes=("cat", "images"))
    make_tree(tmp_path / "val" / "images", "day", "night", classes=(".",))
    with pytest.raises(DataError, match="2 class"):
        list_files(tmp_path)


def test_unused_folders_are_named_where_evaluation_images_are_missing(tmp_path):
    make_tree(tmp_path, "train", "Prueba")
    with pytest.raises(DataError, match=r"no val/ or test/ images \(unused folders: Prueba/\)"):
        list_files(tmp_path)


@pytest.mark.parametrize("folder", ["images", "train"])
def test_folder_without_classes_names_its_lists(tmp_path, folder):
    (tmp_path / folder).mkdir()
    for i in range(3):
        (tmp_path / folder / f"{i}.png").write_bytes(BUFFER.getvalue())
    for name in ("sample.csv", "train.csv"):
        (tmp_path / name).write_text("path,label\n")
    with pytest.raises(DataError, match=r"or pass a list of images \(sample.csv, train.csv\)"):
        list_files(tmp_path, val_split=0.5)
    if folder == "images":
        (refused,) = check_dataset(tmp_path).problems["refused"]
        assert "or pass a list of images" in refused
    else:
        with pytest.raises(DataError, match="or pass a list of images"):
            check_dataset(tmp_path)


def test_subfolders_of_classes_below_train_are_no_splits(tmp_path):
    make_tree(tmp_path / "train", "cat", "dog", classes=("day", "night"))
    assert list_files(tmp_path, val_split=0.25).classes == ("cat", "dog")


def test_dataset_two_folders_deeper_is_refused_with_its_path(tmp_path):
    make_tree(tmp_path / "a" / "b", "train", "val")
    with pytest.raises(DataError, match=r"which holds train, val; pass .*/a/b"):
        list_files(tmp_path)


def test_loose_images_are_counted(tmp_path):
    make_tree(tmp_path, "train", "val")
    (tmp_path / "train" / "loose.png").write_bytes(BUFFER.getvalue())
    assert "skipped files: 1 .png" in describe_data(list_files(tmp_path))


@pytest.mark.parametrize("classes", [("1", "1.0"), ("Cat", "cat"), ("cat", "nan")])
def test_check_reports_names_that_training_refuses(tmp_path, classes):
    make_tree(tmp_path, "train", "val", classes=classes)
    with pytest.raises(DataError) as refused:
        list_files(tmp_path)
    assert check_dataset(tmp_path).problems["refused"] == [str(refused.value)]


def test_unused_folders_and_files_are_counted_in_the_first_line(tmp_path):
    make_tree(tmp_path, "train", "val", "extra", "test_scripts", "__MACOSX")
    for name in ("a.txt", "b.txt", "c.NPY", "d"):
        (tmp_path / "train" / "cat" / name).write_text("x")
    listed = list_files(tmp_path)
    assert listed.ignored_files == 4
    line = describe_data(listed)
    assert "2 .txt, 1 .npy, 1 without extension" in line
    assert "unused folders: extra/, test_scripts/" in line
    assert "MACOSX" not in line


@pytest.mark.parametrize("loader", ["resident", "torchvision"])
def test_mixed_extensions_of_training_images_are_counted_in_the_first_line(tmp_path, loader):
    make_tree(tmp_path, "train", "val")
    before = describe_data(list_files(tmp_path))
    for name in ("a.JFIF", "b.jfif", "c"):
        (tmp_path / "train" / "dog" / name).write_bytes(BUFFER.getvalue())
    listed = list_files(tmp_path)
    dataset = open_dataset(tmp_path) if loader == "resident" else listed
    number = len(listed.train)
    assert describe_data(dataset).endswith(
        f"; extensions in training: {number - 2} .png, 2 .jfif; skipped files: 1 without extension"
    )
    assert "extensions in" not in before


@pytest.mark.parametrize("link", ["val", "train/owl", "test"])
def test_link_to_a_missing_folder_is_refused(tmp_path, link):
    make_tree(tmp_path, "train", "dev")
    (tmp_path / link).symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=rf"{link}: a link to .*/gone, which does not exist; rest"):
        list_files(tmp_path)
    (problem,) = check_dataset(tmp_path).problems["refused"]
    assert "which does not exist" in problem


def test_archive_next_to_splits_is_not_the_dataset(tmp_path):
    make_tree(tmp_path, "train", "val")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "train", "train")
    assert list_files(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("train", "val"), [("caf\u00e9", "cafe\u0301"), ("cat", "cat "), ("dog ", "dog")]
)
def test_class_names_that_look_alike_are_explained(tmp_path, train, val):
    make_tree(tmp_path, "train", classes=(train, "owl"))
    make_tree(tmp_path, "val", classes=(val, "owl"))
    expected = f"{train!a} and {val!a} differ in blanks or Unicode form: rename one"
    with pytest.raises(DataError, match=re.escape(expected)):
        list_files(tmp_path)


def test_postscript_is_not_executed(tmp_path, monkeypatch):
    """Pillow passes PostScript to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # would fail the test below
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UnidentifiedImageError):
        decode(io.BytesIO(program))
