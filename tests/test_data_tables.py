"""CSV lists and label files as people have them: read, or refused with the cause."""

import io
import os

import pytest
from PIL import Image

from fastokd.data import list_files
from fastokd.errors import DataError

BUFFER = io.BytesIO()
Image.new("RGB", (6, 6), (10, 120, 40)).save(BUFFER, "PNG")
LABELS = ["cat", "dog"] * 4


@pytest.fixture
def images(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(8):
        (tmp_path / "img" / f"{i}.png").write_bytes(BUFFER.getvalue())
    return [f"img/{i}.png" for i in range(8)]


def read(root, content, name="list.csv"):
    data = content.encode() if isinstance(content, str) else content
    (root / name).write_bytes(data)
    listed = list_files(root / name, val_split=0.25)
    pairs = {}
    for split in listed.splits:
        for file, target in zip(split.files, split.targets.tolist(), strict=True):
            pairs[file] = listed.classes[target]
    return pairs


def lines(rows, mark=",", head="path,label"):
    return "".join(mark.join(row) + "\n" for row in [head.split(","), *rows])


@pytest.mark.parametrize(
    "head",
    [
        "file_name,label",
        "image_id,label",
        "Image,Class",
        "filename,target",
        "filepaths,labels",
        "File Name,Category",
        "img,class_name",
        "ID,y",
        "image-path,Class ID",
    ],
)
def test_common_headings_are_known(tmp_path, images, head):
    rows = list(zip(images, LABELS, strict=True))
    assert read(tmp_path, lines(rows, head=head)) == dict(rows)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("prefix", ["", "sep={}\n"])
def test_dialects_are_read(tmp_path, images, mark, encoding, prefix):
    rows = list(zip(images, ["café", "naïve, or not"] * 4, strict=True))
    if mark == ",":
        text = lines([(name, f'"{label}"') for name, label in rows])
    else:
        text = lines(rows, mark)
    content = prefix.format(mark) + text
    assert read(tmp_path, content.encode(encoding)) == dict(rows)


def test_windows_1252_is_read_with_a_warning(tmp_path, images):
    rows = list(zip(images, ["café", "dog"] * 4, strict=True))
    with pytest.warns(UserWarning, match="Windows-1252.*café"):
        assert read(tmp_path, lines(rows).encode("cp1252")) == dict(rows)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: name.removesuffix(".png"),
        lambda name: name.replace("/", "\\"),
        lambda name: name.replace(".png", ".PNG"),
        lambda name: f"./{name}",
        lambda name: name.removesuffix(".png").replace("/", "\\"),
    ],
)
def test_paths_in_other_spellings_are_found(tmp_path, images, spelling):
    rows = [(spelling(name), label) for name, label in zip(images, LABELS, strict=True)]
    found = read(tmp_path, lines(rows))
    assert {os.path.normpath(name): label for name, label in found.items()} == dict(
        zip(images, LABELS, strict=True)
    )


def test_id_of_two_images_is_refused(tmp_path, images):
    (tmp_path / "img" / "0.jpg").write_bytes(BUFFER.getvalue())
    rows = [(name.removesuffix(".png"), label) for name, label in zip(images, LABELS, strict=True)]
    with pytest.raises(DataError, match=r"line 2: img/0 may be 0.jpg, 0.png"):
        read(tmp_path, lines(rows))


@pytest.mark.parametrize(
    ("head", "flags", "split"),
    [
        ("name,label,is_valid", ("True", "False"), "val"),
        ("name,label,is_test", ("1", "0"), "test"),
        ("name,label,Set", ("Validation", "TRAIN"), "val"),
        ("name,label,data set", ("dev", "training"), "val"),
    ],
)
def test_split_columns_are_read(tmp_path, images, head, flags, split):
    rows = [
        (name, label, flags[i < 6])
        for i, (name, label) in enumerate(zip(images, LABELS, strict=True))
    ]
    (tmp_path / "list.csv").write_text(lines(rows, head=head))
    listed = list_files(tmp_path / "list.csv")
    assert {each.name: len(each) for each in listed.splits} == {"train": 6, split: 2}


def test_unknown_heading_is_refused_with_its_names(tmp_path, images):
    rows = list(zip(images, LABELS, strict=True))
    with pytest.raises(DataError, match=r"unknown names of columns \(photo, animal\)"):
        read(tmp_path, lines(rows, head="photo,animal"))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (("0", "00"), "'0' and '00'"),
        (("1", "01"), "'01' and '1'"),
        (("1e3", "1000"), "'1000' and '1e3'"),
        (("Cat", "cat"), "'Cat' and 'cat'"),
        (("great  dane", "great dane"), "'great  dane' and 'great dane'"),
        (("caf\u00e9", "cafe\u0301"), "spellings of one class"),
        (("cat", "nan"), "'nan' is a missing value"),
        (("cat", "None"), "'None' is a missing value"),
        (("cat", "<NA>"), "'<NA>' is a missing value"),
    ],
)
def test_spellings_of_one_class_are_refused(tmp_path, images, labels, named):
    with pytest.raises(DataError, match=named):
        read(tmp_path, lines(list(zip(images, labels * 4, strict=True))))
    for label in labels:
        (tmp_path / "tree" / label).mkdir(parents=True)
        (tmp_path / "tree" / label / "0.png").write_bytes(BUFFER.getvalue())
    with pytest.raises(DataError, match=named):
        list_files(tmp_path / "tree", val_split=0.25)


def test_whole_numbers_with_decimals_are_read_with_a_warning(tmp_path, images):
    labels = ["0", "1", "0.0", "1.0", "0.00", "1", "0", "1"]
    with pytest.warns(UserWarning, match=r"read 0.0 as 0, 0.00 as 0, 1.0 as 1"):
        found = read(tmp_path, lines(list(zip(images, labels, strict=True))))
    assert [found[name] for name in images] == ["0", "1"] * 4
    (tmp_path / "tree" / "0").mkdir(parents=True)
    (tmp_path / "tree" / "0.0").mkdir()
    for label in ("0", "0.0"):
        (tmp_path / "tree" / label / "a.png").write_bytes(BUFFER.getvalue())
    with pytest.raises(DataError, match=r"'0' and '0.0'"):
        list_files(tmp_path / "tree", val_split=0.25)


@pytest.mark.parametrize("labels", [("a", "A"), ("0", "1"), ("none", "some"), ("1_0", "10")])
def test_similar_class_names_are_accepted(tmp_path, images, labels):
    assert set(read(tmp_path, lines(list(zip(images, labels * 4, strict=True)))).values()) == set(
        labels
    )


@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "hard link", "folder link"])
@pytest.mark.parametrize("change", ["label", "split"])
def test_file_by_two_paths_with_other_values_is_refused(tmp_path, images, kind, change):
    other = {
        "dots": "img/../img/0.png",
        "absolute": str(tmp_path / "img" / "0.png"),
        "link": "link.png",
        "hard link": "hard.png",
        "folder link": "other/0.png",
    }[kind]
    (tmp_path / "link.png").symlink_to(tmp_path / "img" / "0.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "img" / "0.png")
    (tmp_path / "other").symlink_to(tmp_path / "img")
    rows = [(name, label, "train") for name, label in zip(images, LABELS, strict=True)]
    rows.append((other, "dog", "train") if change == "label" else (other, "cat", "val"))
    with pytest.raises(DataError, match=r"line 10 lists .* an earlier line as 'cat' in train"):
        read(tmp_path, lines(rows, head="path,label,split"))


def flat(root, names, content, classes=("great", "great dane"), list_name="val.csv"):
    for name in classes:
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / "0.png").write_bytes(BUFFER.getvalue())
    (root / "val").mkdir()
    for name in names:
        (root / "val" / name).write_bytes(BUFFER.getvalue())
    (root / list_name).write_bytes(content if isinstance(content, bytes) else content.encode())
    listed = list_files(root)
    split = listed.evaluation
    return {
        os.path.basename(file): listed.classes[target]
        for file, target in zip(split.files, split.targets.tolist(), strict=True)
    }


@pytest.mark.parametrize("mark", [",", "\t", ";", " ", ", "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("quoted", [False, True])
def test_label_list_with_blanks_in_names_is_read(tmp_path, mark, encoding, quoted):
    want = {"my pet 0.png": "great", "my pet 1.png": "great dane", "2.png": "great dane"}
    form = '"{}"{}{}' if quoted and mark != " " else "{}{}{}"
    text = "".join(form.format(name, mark, label) + "\n" for name, label in want.items())
    assert flat(tmp_path, want, text.encode(encoding)) == want


def test_label_list_with_lines_of_other_images_warns(tmp_path):
    text = "name,label\n0.png,great\n1.png,great dane\n7.png,great\n"
    with pytest.warns(UserWarning, match=r"1 lines name no image of the split: 7.png"):
        flat(tmp_path, ["0.png", "1.png"], text)


def test_label_list_with_further_columns_is_read(tmp_path):
    text = "0.png\tgreat dane\t1\t2\t3\n1.png\tgreat\t1\t2\t3\n"
    assert flat(tmp_path, ["0.png", "1.png"], text, list_name="val.txt") == {
        "0.png": "great dane",
        "1.png": "great",
    }


def test_one_class_per_line_with_blanks_is_read(tmp_path):
    text = "great dane\ngreat\n"
    assert flat(tmp_path, ["a.png", "b.png"], text, list_name="val.txt") == {
        "a.png": "great dane",
        "b.png": "great",
    }


@pytest.mark.parametrize("names", [("1.png", "2.png", "10.png"), ("a9.png", "a10.png", "b1.png")])
def test_one_class_per_line_in_unclear_order_is_refused(tmp_path, names):
    with pytest.raises(DataError, match=r"another order as numbers than as text.*'image class'"):
        flat(tmp_path, names, "great\ngreat\ngreat dane\n", list_name="val.txt")


@pytest.mark.parametrize("again", ["1.png", "val/1.png", "val\\1.png"])
def test_image_with_two_classes_is_refused(tmp_path, again):
    text = f"1.png,great\n2.png,great dane\n{again},great dane\n"
    with pytest.raises(DataError, match=r"two classes: 1.png as 'great' and 'great dane'"):
        flat(tmp_path, ["1.png", "2.png"], text)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("id,breed", r"unknown names of columns \(id, breed\)"),
        ("image_id,cat,dog", r"no column of labels \(found image_id, cat, dog\)"),
        ("file,a,b,c", r"a column of 0 and 1 for each class is not read"),
    ],
)
def test_headings_without_labels_are_refused_by_name(tmp_path, images, head, message):
    rows = [(os.path.basename(image), *"100"[: head.count(",")]) for image in images]
    with pytest.raises(DataError, match=message):
        read(tmp_path, lines(rows, head=head))


def test_list_of_missing_files_names_the_folder_that_holds_them(tmp_path, images):
    rows = [(os.path.basename(image), label) for image, label in zip(images, LABELS, strict=True)]
    with pytest.raises(
        DataError, match=r"none of its 8 files exists, for example 0.png.* img/ hold"
    ):
        read(tmp_path, lines(rows))
    with pytest.raises(DataError, match=r"none of its 8 files exists.* img/ holds it"):
        read(tmp_path, lines([(os.path.splitext(row[0])[0], row[1]) for row in rows]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("img/1.png,cat, big", "line 3 has 3 columns, and the first line 2; quote values that"),
        (
            'img/1.png,"cat\nimg/2.png,dog"',
            "line 4 ends a value of several lines; check the quotes",
        ),
        ('img/1.png,"cat\nimg/2.png,"dog"', "not a CSV file: .* before line 5; check the quotes"),
        ('img/1.png,"cat', "not a CSV file: unexpected end of data .*; check the quotes"),
    ],
)
def test_wrong_quotes_and_separators_in_lists_are_refused(tmp_path, images, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, f"path,label\nimg/0.png,dog\n{row}\n")


def test_blanks_before_quotes_and_empty_last_columns_are_read(tmp_path, images):
    rows = list(zip(images, ["cat, big", "dog"] * 4, strict=True))
    text = "path, label\n" + "".join(f'{name}, "{label}",,\n' for name, label in rows)
    assert read(tmp_path, text) == dict(rows)


def test_value_of_several_lines_in_another_column_is_read_with_a_warning(tmp_path, images):
    rows = list(zip(images, LABELS, strict=True))
    text = "path,label,caption\n" + "".join(f'{a},{b},"two\nlines"\n' for a, b in rows)
    with pytest.warns(UserWarning, match="over several lines, the first until line 3; check the"):
        assert read(tmp_path, text) == dict(rows)


def test_path_with_a_zero_byte_is_refused(tmp_path, images):
    rows = "".join(f"{name},{label}\n" for name, label in zip(images, LABELS, strict=True))
    with pytest.raises(DataError, match="line 18 has a path with a zero byte"):
        read(tmp_path, f"path,label\n{rows}{rows}img/0\0.png,cat\n")


@pytest.mark.parametrize("more", ["is_test,is_valid", "split,is_test"])
def test_several_columns_that_tell_the_split_are_refused(tmp_path, images, more):
    rows = [(name, label, "0", "0") for name, label in zip(images, LABELS, strict=True)]
    with pytest.raises(
        DataError, match=f"several columns tell the split: {more.replace(',', ', ')}"
    ):
        read(tmp_path, lines(rows, head=f"image,label,{more}"))


@pytest.mark.parametrize("head", ["filename,sex,label", "label,sex,filename"])
def test_heading_of_a_label_file_names_the_columns(tmp_path, images, head):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(BUFFER.getvalue())
    (tmp_path / "img").rename(tmp_path / "val")
    labels = ["cat", "cat", "cat", "dog", "dog", "dog", "cat", "dog"]
    rows = [(f"{i}.png", ("dog", "cat")[i % 2], label) for i, label in enumerate(labels)]
    if head.startswith("label"):
        rows = [row[::-1] for row in rows]
    (tmp_path / "val.csv").write_text(lines(rows, head=head))
    listed = list_files(tmp_path)
    assert [listed.classes[i] for i in listed.evaluation.targets.tolist()] == labels


def test_column_of_categories_next_to_splits_is_accepted(tmp_path, images):
    splits = ["train"] * 6 + ["test"] * 2
    rows = list(zip(images, LABELS, ["art"] * 8, splits, strict=True))
    (tmp_path / "list.csv").write_text(lines(rows, head="image,label,subset,split"))
    assert len(list_files(tmp_path / "list.csv").test) == 2
