"""Parquet files as Hugging Face exports them: splits, columns, class names, and all loaders."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stream_loaders import LOADERS, picture

from fastokd.cli import main
from fastokd.data import list_datasets, list_files, list_source, open_dataset
from fastokd.data.check import check_dataset
from fastokd.errors import DataError, MissingExtra

pa = pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("cat", "dog", "eel")
TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"


def encoded(seed: int, file_format: str = "PNG", side: int = 12) -> bytes:
    content = io.BytesIO()
    picture(side, side, seed=seed).save(content, file_format, quality=95)
    return content.getvalue()


def write(
    file: Path,
    labels: list,
    names: tuple[str, ...] | None = NAMES,
    image: str = "image",
    label: str = "label",
    seed: int = 0,
    plain: bool = False,
    **more: list,
) -> Path:
    """Write a file as ``datasets.Dataset.to_parquet`` does."""
    images = [encoded(seed + i) for i in range(len(labels))]
    column = images if plain else [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)]
    table = pa.table({image: column, label: labels, **more})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=4)
    return file


@pytest.fixture
def data(tmp_path):
    write(tmp_path / TRAIN, [0, 1, 2, 2, 1, 0, 0, 1])
    write(tmp_path / TEST, [2, 1, 0], seed=100)
    (tmp_path / "README.md").write_text("text")
    return tmp_path


def test_files_are_read_with_the_names_of_the_metadata(data):
    assert "parquet" in list_datasets()
    for spec in (data, str(data), f"parquet:{data}"):
        opened = open_dataset(spec)
        assert opened.classes == NAMES
        assert opened.train.targets.tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
        assert opened.test.targets.tolist() == [2, 1, 0]
        for split, seed in ((opened.train, 0), (opened.test, 100)):
            for i, image in enumerate(split.images):
                want = np.asarray(Image.open(io.BytesIO(encoded(seed + i))))
                assert np.array_equal(image.permute(1, 2, 0).numpy(), want)
    assert opened.train.files[1] == f"{TRAIN}/1-1.png"


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_that_decode_while_training_read_the_images(data, loader):
    listed = list_files(data)
    settings = {"size": listed.image_size, "augment": listed.augment}
    loaded = LOADERS[loader](listed.test, 2, False, **settings)
    batches = list(loaded)
    assert torch.cat([batch.target for batch in batches]).tolist() == [2, 1, 0]
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(images):
        want = np.asarray(Image.open(io.BytesIO(encoded(100 + i)))).astype(float)
        assert np.abs(image - want).max() <= 1


@pytest.mark.parametrize(
    ("train", "test", "name"),
    [
        ("default/train/0000.parquet", "default/validation/0000.parquet", "test"),
        ("train.parquet", "val.parquet", "test"),
        ("TRAIN-00000-of-00002.PARQUET", "Validation-0.parquet", "test"),
        ("train/0.parquet", "test/0.parquet", "test"),
    ],
)
def test_words_in_paths_tell_the_split(tmp_path, train, test, name):
    write(tmp_path / train, [0, 1, 2])
    write(tmp_path / test, [2, 1, 0, 0], seed=50)
    opened = open_dataset(tmp_path)
    assert (len(opened.train), len(opened.test)) == (3, 4)


def test_file_without_splits_is_held_out_from_and_evaluated_whole(tmp_path, capsys):
    file = write(tmp_path / "test-0.parquet", [0, 1, 2] * 4)
    options = ["--method", "baseline", "--model", "resnet8", "--epochs", "1", "--batch-size", "4"]
    out = tmp_path / "run"
    assert (
        main(["train", "--data", str(file), "--val-split", "0.5", *options, "--out", str(out)]) == 0
    )
    other = write(tmp_path / "other" / "more.parquet", [0, 1, 2], seed=9)
    capsys.readouterr()
    assert main(["eval", str(out), "--data", str(other)]) == 0
    assert "3 more images" in capsys.readouterr().out
    with pytest.raises(DataError, match="--val-split"):
        open_dataset(file)


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({"names": None, "labels": ["b", "a", "c"]}, ("a", "b", "c")),
        ({"names": None, "labels": [0, 1, 2]}, ("0", "1", "2")),
        ({"labels": [2, 1, 0], "image": "img", "label": "labels"}, NAMES),
        ({"names": None, "labels": [0, 1, 2], "plain": True}, ("0", "1", "2")),
        ({"labels": [0, 1, 2], "caption": ["x", "y", "z"]}, NAMES),
        ({"labels": ["eel", "cat", "dog"]}, NAMES),
    ],
)
def test_columns_and_labels_of_other_kinds_are_read(tmp_path, options, classes):
    file = write(tmp_path / "a.parquet", **options)
    source = list_source(file)
    assert source.classes == classes
    labels = options["labels"]
    numbers = [classes.index(n) if isinstance(n, str) else n for n in labels]
    assert source.train.targets.tolist() == numbers


def test_dictionary_encoded_labels_are_names(tmp_path):
    labels = pa.array(["b", "a", "b"]).dictionary_encode()
    file = write(tmp_path / "a.parquet", labels, None)
    assert list_source(file).classes == ("a", "b")


def test_split_without_public_labels_is_skipped(data):
    write(data / "data" / "validation-00000-of-00001.parquet", [0, 1, 2], seed=20)
    write(data / TEST, [-1, -1], seed=30)
    source = list_source(data)
    assert [split.name for split in source.splits] == ["train", "val"]
    assert source.skipped == (TEST,)
    write(data / TEST, [-1, 0], seed=30)
    with pytest.raises(DataError, match=r"test-00000.*/0-0.png has the label -1"):
        list_source(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: write(d / TRAIN, [0, 1, 3]), r"has the label 3, outside 0..2 for the 3 class"),
        (lambda d: write(d / TRAIN, [0, None, 2]), "row 1 has no label"),
        (lambda d: write(d / TRAIN, [0.5, 1.0, 2.0]), "labels of type float"),
        (lambda d: write(d / TRAIN, [0, 1, 2], ("a", "b", "c")), "files with other class names"),
        (lambda d: write(d / TRAIN, [0, 1], image="photo", names=None), "no column of images"),
        (lambda d: write(d / TRAIN, [0, 1], label="caption", names=None), "no column of labels"),
        (lambda d: (d / TRAIN).write_bytes((d / TRAIN).read_bytes()[:-9]), "not a Parquet file"),
        (lambda d: (d / TRAIN).write_bytes(b""), "not a Parquet file"),
        (
            lambda d: write(d / "more" / "train.parquet", [0, 1, 2]),
            "several datasets: data/, more/",
        ),
        (lambda d: (d / TRAIN).unlink(), "no training files"),
        (lambda d: write(d / "data" / "more.parquet", [0]), "split is unknown: data/more.parquet"),
    ],
)
def test_unusable_files_are_refused_by_name(data, change, message):
    change(data)
    with pytest.raises(DataError, match=message):
        list_source(data)


def test_several_label_columns_are_refused_by_name(tmp_path):
    features = {
        "img": {"_type": "Image"},
        "fine_label": {"names": ["a", "b"], "_type": "ClassLabel"},
        "coarse_label": {"names": ["c", "d"], "_type": "ClassLabel"},
    }
    columns = {"img": [{"bytes": encoded(0), "path": None}], "fine_label": [0], "coarse_label": [1]}
    text = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="fine_label, coarse_label; name the one to use label"):
        list_source(tmp_path / "a.parquet")


def test_images_that_are_not_embedded_are_refused(tmp_path):
    rows = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": "/there/b.png"}]
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1 has no image, only the path /there/b.png"):
        list_source(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [[1, 2], [3]], "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column image is of type list"):
        list_source(tmp_path / "a.parquet")


def test_damaged_image_is_found_by_check_and_training(data, tmp_path, capsys):
    rows = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(4)]
    rows[2]["bytes"] = rows[2]["bytes"][:60]
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), data / TRAIN)
    pq.write_table(pa.table({"image": rows[:2], "label": [0, 1]}), data / TEST)
    report = check_dataset(data)
    assert [name for names in report.problems.values() for name in names if "2-2.png" in name]
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet/2-2.png"):
        open_dataset(data)


def test_copy_is_made_once_and_follows_changes(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("FASTOKD_CACHE", str(cache))
    open_dataset(data)
    copies = {file: file.stat().st_mtime_ns for file in (cache / "parquet").iterdir()}
    assert len(copies) == 4
    open_dataset(data)
    assert copies == {f: f.stat().st_mtime_ns for f in (cache / "parquet").iterdir()}
    write(data / TEST, [0, 0, 1, 2], seed=7)
    opened = open_dataset(data)
    want = np.asarray(Image.open(io.BytesIO(encoded(7))))
    assert np.array_equal(opened.test.images[0].permute(1, 2, 0).numpy(), want)
    for file in (cache / "parquet").glob("*.images"):
        file.write_bytes(b"cut")
    assert len(open_dataset(data).test) == 4


def test_without_a_cache_the_copy_is_temporary(data, monkeypatch):
    monkeypatch.setenv("FASTOKD_CACHE", "off")
    opened = open_dataset(data)
    assert len(opened.train) == 8


def test_folder_with_images_is_a_tree_next_to_parquet(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(8, 8).save(tmp_path / split / name / "a.png")
    write(tmp_path / "metadata.parquet", [0, 1])
    assert open_dataset(tmp_path).classes == ("cat", "dog")


def test_missing_pyarrow_names_the_extra(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"needs pyarrow: pip install -e '.\[parquet\]'"):
        list_source(data)


def test_column_tells_the_split_where_names_do_not(tmp_path):
    words = ["train", "Train", "validation", "test", "training", "val"]
    file = write(tmp_path / "images.parquet", [0, 1, 2, 0, 2, 1], split=words)
    opened = open_dataset(file)
    assert opened.train.targets.tolist() == [0, 1, 2]
    assert opened.val.targets.tolist() == [2, 1]
    assert opened.test.targets.tolist() == [0]
    for split, seeds in ((opened.train, (0, 1, 4)), (opened.val, (2, 5)), (opened.test, (3,))):
        for seed, image in zip(seeds, split.images, strict=True):
            want = np.asarray(Image.open(io.BytesIO(encoded(seed))))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), want)
    write(tmp_path / "images.parquet", [0, 1, 2], split=["train", "fold 3", "test"])
    with pytest.raises(DataError, match="column split has fold 3; use train, val or test"):
        open_dataset(file)


def test_names_of_files_precede_the_column_of_splits(tmp_path):
    write(tmp_path / TRAIN, [0, 1, 2], split=["test"] * 3)
    write(tmp_path / TEST, [2, 1], seed=50, split=["test"] * 2)
    opened = open_dataset(tmp_path)
    assert (len(opened.train), len(opened.test)) == (3, 2)


def test_several_labels_of_an_image_are_refused(tmp_path):
    write(tmp_path / TRAIN, [[0], [1, 2], [0]])
    with pytest.raises(DataError, match=r"row 0 has the label \[0\]; one class number or name"):
        open_dataset(tmp_path, val_split=0.5)


@pytest.mark.parametrize("classes", [3, 70])
def test_parquet_file_next_to_class_folders_is_not_the_dataset(tmp_path, classes):
    for number in range(classes):
        folder = tmp_path / f"class{number}"
        folder.mkdir()
        for index in range(2):
            (folder / f"{index}.png").write_bytes(encoded(index))
    (tmp_path / "metadata.parquet").write_bytes(b"a table")
    assert len(list_files(tmp_path, val_split=0.5).classes) == classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "", "dog"], "row 1 has the label ''; one class number or name per image"),
        ([1, 2, 1], "labels from 1 on; number the classes from 0"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, labels, message):
    write(tmp_path / TRAIN, labels, names=None)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, val_split=0.5)


def test_path_of_another_type_is_a_name_and_text_is_no_image(tmp_path):
    file = tmp_path / "train.parquet"
    images = [{"bytes": encoded(i), "path": i} for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), file)
    assert list_source(file).train.files[2].endswith("/2-2")
    images = [{"bytes": "aGVsbG8=", "path": "a.png"}] * 4
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), file)
    with pytest.raises(DataError, match="row 0 has an image of type str; the encoded bytes"):
        list_source(file)


@pytest.mark.parametrize("name", ["Split", "partition", "subset"])
def test_columns_of_splits_have_the_names_of_lists(tmp_path, name):
    file = write(tmp_path / "a.parquet", [0, 1, 2, 0], **{name: ["train"] * 3 + ["test"]})
    opened = open_dataset(file)
    assert (len(opened.train), len(opened.test)) == (3, 1)


def test_flags_and_missing_columns_of_splits_are_refused(tmp_path):
    file = write(tmp_path / "a.parquet", [0, 1, 2], is_valid=[False, True, False])
    with pytest.raises(DataError, match="column is_valid has false, true; use train, val or test"):
        open_dataset(file)
    write(tmp_path / "a.parquet", [0, 1, 2], split=["train", "train", "train"])
    write(tmp_path / "b.parquet", [0, 1, 2], seed=9)
    with pytest.raises(DataError, match="files without the column split of the others: b"):
        open_dataset(tmp_path)


def test_column_of_categories_is_no_column_of_splits(tmp_path):
    write(tmp_path / TRAIN, [0, 1, 2], subset=["art", "photo", "art"])
    write(tmp_path / TEST, [2, 1], seed=50, subset=["art", "photo"], is_valid=[True, False])
    opened = open_dataset(tmp_path)
    assert (len(opened.train), len(opened.test)) == (3, 2)
    file = write(tmp_path / "alone.parquet", [0, 1, 2, 0, 1, 2], subset=["art", "photo"] * 3)
    assert len(open_dataset(file, val_split=0.5).train) == 3
