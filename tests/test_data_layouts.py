"""The layouts people have: each gives the images, labels and splits it should, decoded or listed,
or says what is wrong.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd.data import list_files, list_source, open_dataset, open_evaluation
from fastokd.data.check import check_dataset
from fastokd.data.files import IMAGENET_MEAN
from fastokd.errors import EXIT_DATA, DataError

RNG = np.random.default_rng(0)


def png(size=(6, 6), colour=None) -> bytes:
    pixels = (
        RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
        if colour is None
        else np.full((*size, 3), colour, dtype=np.uint8)
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if content is None else content)
    return path


def refused(spec, match, open_it=open_dataset, **settings) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_it(spec, **settings)
    assert str(caught.value).isprintable(), "one line"
    assert caught.value.exit_code == EXIT_DATA


def labelled(split, classes) -> dict[str, str]:
    return {
        file: classes[target]
        for file, target in zip(split.files, split.targets.tolist(), strict=True)
    }


def check_agreement(spec, **settings) -> None:
    """Listing and decoding give the same files and labels, and ``read`` the bytes that were
    decoded.
    """
    listed, opened = list_files(spec, **settings), open_dataset(spec, **settings)
    assert (listed.classes, listed.name) == (opened.classes, opened.name)
    for name in ("train", "test", "val"):
        files, images = getattr(listed, name), getattr(opened, name)
        assert (files is None) == (images is None)
        if files is None:
            continue
        assert (files.files, files.name, len(files)) == (images.files, images.name, len(images))
        assert torch.equal(files.targets, images.targets)
        for i, image in enumerate(images.images):
            decoded = np.asarray(Image.open(io.BytesIO(files.read(i))).convert("RGB"))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), decoded)


class TestOneFolder:
    def test_folder_without_splits_uses_val_split(self, tmp_path):
        for name in ("cat", "dog"):
            for i in range(5):
                put(tmp_path / name / f"{i}.png")
        refused(tmp_path, "no val/ or test/ images; hold out training images, e.g. --val-split 0.1")
        opened = open_dataset(tmp_path, val_split=0.4)
        assert (len(opened.train), opened.evaluation.name, len(opened.evaluation), opened.val) == (
            6,
            "val",
            4,
            None,
        )
        assert opened.test.targets.tolist() == [0, 0, 1, 1]
        assert not set(opened.train.files) & set(opened.test.files)
        check_agreement(tmp_path, val_split=0.4, seed=3)

    def test_folder_with_only_train_uses_val_split(self, tmp_path):
        for name in ("cat", "dog"):
            for i in range(4):
                put(tmp_path / "train" / name / f"{i}.png")
        assert len(open_dataset(tmp_path, val_split=0.5).test) == 4

    def test_folder_without_images_or_classes_is_refused(self, tmp_path):
        (tmp_path / "a").mkdir()
        refused(tmp_path, r"no train/ \(found a/\), and no images in them")
        put(tmp_path / "x.png")
        (tmp_path / "a").rmdir()
        refused(tmp_path, r"no train/ \(found 1 images\).*<class>/ to use with --val-split")
        put(tmp_path / "a" / "x.png")
        (tmp_path / "b").mkdir()
        refused(tmp_path, r"1 class folder\(s\) without images: b")


class TestSplitWords:
    def test_split_names_are_recognized_by_every_layout(self, tmp_path):
        for split, count in (("training", 3), ("validation", 2), ("testing", 1)):
            write_shard(
                tmp_path / "shards" / f"{split}-0.tar",
                [(f"{name}{i}", name) for name in ("cat", "dog") for i in range(count)],
            )
            for name in ("cat", "dog"):
                for i in range(count):
                    put(tmp_path / "tree" / split / name / f"{i}.png")
        (tmp_path / "tree" / "list.csv").write_text(
            "".join(
                f"{file.relative_to(tmp_path / 'tree')},"
                f"{file.parent.name},{file.parent.parent.name}\n"
                for file in sorted((tmp_path / "tree").rglob("*.png"))
            )
        )
        for spec in (tmp_path / "tree", tmp_path / "shards", tmp_path / "tree" / "list.csv"):
            listed = list_files(spec)
            assert listed.classes == ("cat", "dog")
            assert {split.name: len(split) for split in listed.splits} == {
                "train": 6,
                "val": 4,
                "test": 2,
            }
            check_agreement(spec)
            assert check_dataset(spec).images == {"train": 6, "val": 4, "test": 2}
        assert len(open_evaluation(tmp_path / "tree", "test").images) == 2
        put(tmp_path / "tree" / "training" / "emu" / "0.png")
        refused(tmp_path / "tree", r"1 class\(es\) in training/ and not in validation/: emu")

    def test_split_in_two_folders_is_refused(self, tmp_path):
        for split in ("train", "val", "valid"):
            for name in ("cat", "dog"):
                put(tmp_path / split / name / "0.png")
        refused(tmp_path, "both val/ and valid/ exist; put the images of a split into one folder")


class TestFlatValidation:
    WNIDS = ("n01", "n02", "n03")

    def tree(self, root: Path, folder="val") -> Path:
        """Three classes, two training images each; six validation images whose classes are 2 0 1 1
        0 2.
        """
        for name in self.WNIDS:
            for i in range(2):
                put(root / "train" / name / f"{name}_{i}.JPEG")
        for i in range(1, 7):
            put(root / folder / f"ILSVRC2012_val_{i:08}.JPEG")
        return root

    def check(self, root: Path) -> None:
        opened = list_files(root)
        assert [opened.classes[i] for i in opened.test.targets] == [
            "n03",
            "n01",
            "n02",
            "n02",
            "n01",
            "n03",
        ]
        assert [os.path.basename(file) for file in opened.test.files] == [
            f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 7)
        ]
        check_agreement(root)

    def test_flat_validation_reads_image_synset_pairs(self, tmp_path):
        self.tree(tmp_path)
        wanted = dict(zip(range(1, 7), ("n03", "n01", "n02", "n02", "n01", "n03"), strict=True))
        lines = [f"val/ILSVRC2012_val_{i:08}.JPEG {wanted[i]}" for i in (3, 1, 2, 6, 5, 4)]
        (tmp_path / "val.txt").write_text("\n".join(lines) + "\n")
        self.check(tmp_path)
        # Kaggle's: no extension, a heading, and boxes after the synset.
        (tmp_path / "val.txt").unlink()
        kaggle = [
            "ImageId,PredictionString",
            *(f"ILSVRC2012_val_{i:08},{wanted[i]} 1 2 3 4 " for i in wanted),
        ]
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(kaggle))
        self.check(tmp_path)

    def test_validation_labels_do_not_apply_to_flat_test_folder(self, tmp_path):
        self.tree(tmp_path)
        for i in range(4):
            put(tmp_path / "test" / f"ILSVRC2012_test_{i:08}.JPEG")
        synsets = b"n03\nn01\nn02\nn02\nn01\nn03\n"
        kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        for place in (tmp_path, kit):
            file = put(place / "imagenet_2012_validation_synset_labels.txt", synsets)
            self.check(tmp_path)
            assert list_files(tmp_path).ignored_files == 4
            assert check_dataset(tmp_path).problems.get("no labels") is None
            assert torch.equal(
                open_evaluation(tmp_path, "val", decoded=False).images.targets,
                list_files(tmp_path).test.targets,
            )
            with pytest.raises(DataError, match="test: images without a label file"):
                open_evaluation(tmp_path, "test", decoded=False)
            file.unlink()
        put(
            tmp_path / "val" / "val_annotations.txt",
            b"".join(
                b"ILSVRC2012_val_%08d.JPEG %s\n" % (i, name)
                for i, name in enumerate(synsets.split(), start=1)
            ),
        )
        for place, name in (
            (tmp_path / "test", "val_annotations.txt"),
            (tmp_path, "test.txt"),
            (kit, "test_labels.txt"),
        ):
            file = put(place / name, b"n01\nn02\nn03\nn01\n")
            opened = list_files(tmp_path)
            assert (
                opened.test.name,
                opened.test.targets.tolist(),
                opened.val.targets.tolist(),
            ) == ("test", [0, 1, 2, 0], [2, 0, 1, 1, 0, 2])
            file.unlink()

    def test_flat_validation_reads_class_numbers(self, tmp_path):
        self.tree(tmp_path)
        lines = [
            f"ILSVRC2012_val_{i:08}.JPEG {label}"
            for i, label in enumerate((2, 0, 1, 1, 0, 2), start=1)
        ]
        (tmp_path / "val.txt").write_text("\n".join(lines))
        self.check(tmp_path)
        (tmp_path / "val.txt").write_text(
            "\n".join(lines).replace(" 2", " 3").replace(" 1", " 2").replace(" 0", " 1")
        )
        refused(
            tmp_path, "labels are the numbers 1 to 3, and the 3 class folders in order are 0 to 2"
        )
        # Within range, and still not sure to begin with 0.
        (tmp_path / "val.txt").write_text("\n".join(lines).replace(" 0", " 1"))
        refused(tmp_path, "labels are the numbers 1 to 2")

    def test_flat_validation_reads_synset_labels(self, tmp_path):
        self.tree(tmp_path)
        file = tmp_path / "imagenet_2012_validation_synset_labels.txt"
        file.write_text("n03\nn01\nn02\nn02\nn01\nn03\n")
        self.check(tmp_path)
        file.write_text("n03\nn01\n")
        refused(tmp_path, "2 labels for 6 images")

    def test_flat_validation_reads_official_ground_truth(self, tmp_path):
        io_ = pytest.importorskip("scipy.io")
        self.tree(tmp_path)
        kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        # The numbers are not in the synsets' order, and inner nodes of the hierarchy follow the
        # leaves.
        kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
        synsets = np.array(
            [(1, "n02", "b", 0), (2, "n03", "c", 0), (3, "n01", "a", 0), (4, "n99", "animal", 2)],
            dtype=kind,
        )
        kit.mkdir(parents=True)
        truth = put(kit / "ILSVRC2012_validation_ground_truth.txt", b"2\n3\n1\n1\n3\n2\n")
        refused(tmp_path, "meta.mat of the development kit; put it in the same folder")
        io_.savemat(kit / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
        self.check(tmp_path)
        truth.write_text("2\n3\n1\n1\n3\n7\n")
        refused(tmp_path, r"numbers that .*meta.mat does not have: 7")
        (kit / "meta.mat").write_bytes(b"no matrix")
        refused(tmp_path, "not the meta.mat of ImageNet's development kit")

    def test_tiny_imagenet_folder_is_read(self, tmp_path):
        for name in ("n01", "n02"):
            for i in range(2):
                put(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG")
            (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(
                "n01_0.JPEG\t0\t10\t63\t58\n"
            )
        for i in range(3):
            put(tmp_path / "val" / "images" / f"val_{i}.JPEG")
            put(tmp_path / "test" / "images" / f"test_{i}.JPEG")
        (tmp_path / "val" / "val_annotations.txt").write_text(
            "".join(
                f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n"
                for i, name in enumerate(("n02", "n01", "n02"))
            )
        )
        opened = open_dataset(tmp_path)
        assert labelled(opened.test, opened.classes) == {
            "val/images/val_0.JPEG": "n02",
            "val/images/val_1.JPEG": "n01",
            "val/images/val_2.JPEG": "n02",
        }
        assert labelled(opened.train, opened.classes)["train/n02/images/n02_1.JPEG"] == "n02"
        assert opened.ignored_files == 5  # two box files, and three test images without labels
        check_agreement(tmp_path)

    def test_missing_validation_labels_are_reported(self, tmp_path):
        self.tree(tmp_path)
        refused(
            tmp_path, "6 images and no class folders.*val_annotations.txt with 'image class' lines"
        )
        (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n03\n")
        refused(tmp_path, "no label for 5 of 6 images: ILSVRC2012_val_00000002.JPEG")
        (tmp_path / "val.txt").write_text(
            "".join(f"ILSVRC2012_val_{i:08}.JPEG n0{i}\n" for i in range(1, 7))
        )
        refused(tmp_path, r"3 class\(es\) that have no folder in train/: n04, n05, n06")


class TestCsv:
    ROWS = (
        ("a/1.png", "dog", "train"),
        ("a/2.png", "cat", "train"),
        ("b/3.png", "dog", "val"),
        ("b/4.png", "cat", "test"),
        ("ünï 5.png", "cat", "train"),
    )

    def images(self, root: Path) -> None:
        for file, _, _ in self.ROWS:
            put(root / file)

    @pytest.mark.parametrize(
        ("head", "order"),
        [("", (0, 1, 2)), ("path,label,split\n", (0, 1, 2)), ("Split,Class,File\n", (2, 1, 0))],
    )
    def test_csv_with_split_column_is_read(self, tmp_path, head, order):
        self.images(tmp_path)
        (tmp_path / "list.csv").write_text(
            head + "\n".join(",".join(row[i] for i in order) for row in self.ROWS) + "\n"
        )
        opened = open_dataset(tmp_path / "list.csv")
        assert (opened.name, opened.classes) == ("list", ("cat", "dog"))
        assert labelled(opened.train, opened.classes) == {
            "a/1.png": "dog",
            "a/2.png": "cat",
            "ünï 5.png": "cat",
        }
        assert labelled(opened.val, opened.classes) == {"b/3.png": "dog"}
        assert labelled(opened.test, opened.classes) == {"b/4.png": "cat"}
        check_agreement(f"csv:{tmp_path / 'list.csv'}")

    @pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
    def test_csv_reads_numeric_labels_and_absolute_paths(self, tmp_path, suffix, mark):
        files = [put(tmp_path / "pictures" / f"{i}.png") for i in range(24)]
        lists = tmp_path / "lists"
        lists.mkdir()
        (lists / f"all{suffix}").write_text(
            "".join(f"{file}{mark}{i % 12}\n" for i, file in enumerate(files))
        )
        opened = open_dataset(lists / f"all{suffix}", val_split=0.5)
        assert opened.classes == ("0", "1", "10", "11", *(str(i) for i in range(2, 10))), (
            "as the folders of a tree are ordered"
        )
        assert (len(opened.train), len(opened.test)) == (12, 12)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "empty; write path,label"),
            ("a.png,cat,train,extra\n", "4 columns without names"),
            ("a.png\n", "1 columns without names"),
            ("a.png,cat\nb.png\n", "line 2 has 1 columns"),
            ("a.png,cat\n,dog\n", "line 2 has an empty path"),
            ("a.png,cat\n\nb.png, \n", "line 3 has an empty label"),
            (
                "a.png,cat,train\nb.png,dog,tset\n",
                "line 2 has the split 'tset'; use train, val or test",
            ),
            (
                "a.png,cat\na.png,dog\n",
                "line 2 lists a.png as 'dog' in train, an earlier line as 'cat' in train",
            ),
            ("a.png,cat,val\n", "no training images"),
            ("a.png,cat,train\nb.png,dog,test\n", "no training images of dog"),
            ("a.png,cat\nb.png,cat\n", r"1 class\(es\)"),
        ],
    )
    def test_csv_error_names_line(self, tmp_path, content, message):
        put(tmp_path / "a.png")
        (tmp_path / "list.csv").write_text(content)
        refused(tmp_path / "list.csv", message, list_files)

    def test_csv_missing_image_is_named(self, tmp_path):
        (tmp_path / "list.csv").write_text("a.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n")
        put(tmp_path / "a.png")
        refused(
            tmp_path / "list.csv",
            r"3 of 4 image files cannot be decoded: b.png \(No such file",
            val_split=0.5,
        )


def write_shard(path: Path, samples, label=str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, target in samples:
            for name, content in (
                (f"{key}.png", png()),
                (f"{key}.cls", label(target).encode()),
                (f"{key}.json", b"{}"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


class TestWebDataset:
    @pytest.mark.parametrize(
        "names",
        [
            ("train-0.tar", "train-1.tar", "val-0.tar"),
            ("train/00.tar", "train/01.tar", "val/00.tar"),
            ("imgs_train_0.tar",),
            ("imgs_0.tar",),
            (
                "imagenet1k-train-0000.tar",
                "imagenet1k-train-0001.tar",
                "imagenet1k-validation-00.tar",
            ),
            ("training-0.tar", "training-1.tar", "validation-000.tar"),
            ("TRAINING_1.tar", "training/0.tar", "valid-0.tar"),
        ],
    )
    def test_shard_splits_follow_name_or_folder(self, tmp_path, names):
        for i, name in enumerate(names):
            write_shard(tmp_path / name, [(f"deep/er.d/{i}{k}", k % 3) for k in range(6)])
        if len(names) == 1:
            refused(tmp_path, "--val-split")
            opened = list_files(tmp_path, val_split=0.5)
            assert (len(opened.train), len(opened.test)) == (3, 3)
            check_agreement(tmp_path, val_split=0.5)
            return
        opened = list_files(tmp_path)
        assert opened.classes == ("0", "1", "2")
        assert opened.train.targets.tolist() == [0, 1, 2] * 4
        assert opened.train.files[7] == f"{names[1]}/deep/er.d/11.png"
        assert opened.train.members.shards == names[:2]
        assert (len(opened.train), opened.test.name, len(opened.test)) == (12, "val", 6)
        check_agreement(tmp_path)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ("imagenet-train-0.tar", "imagenet-train-val-0.tar"),
                "imagenet-train-val-0.tar: its name says train and val",
            ),
            (("train/0.tar", "train/test-0.tar"), "train/test-0.tar: its name says test and train"),
            (
                ("imagenet-train-0.tar", "imagenet-trainval-0.tar", "valley-0.tar"),
                "whose split is unknown: imagenet-trainval-0.tar, valley-0.tar",
            ),
        ],
    )
    def test_shard_names_with_ambiguous_split_are_refused(self, tmp_path, names, message):
        for name in names:
            write_shard(tmp_path / name, [("a", 0), ("b", 1)])
        refused(tmp_path, message, list_files)

    @pytest.mark.parametrize("label", ["2026112100", "9" * 20, "7" * 5000, "-1", "5"])
    @pytest.mark.parametrize("listed", [False, True])
    def test_shard_label_out_of_range_is_named(self, tmp_path, label, listed):
        write_shard(tmp_path / "train-0.tar", [("a", 0), ("b", 1)])
        write_shard(tmp_path / "test-0.tar", [("c", 1), ("d", label), ("e", 0)])
        if listed:
            (tmp_path / "classes.txt").write_text("dog\ncat\n")
        refused(
            tmp_path,
            rf"test-0.tar: sample d.png has the class number {label[:10]}.*, outside"
            rf" 0\.\.{1 if listed else 4} for",
            list_files,
        )

    def test_shard_duplicate_sample_is_named(self, tmp_path):
        write_shard(tmp_path / "train-0.tar", [("x/7", 0), ("y/7", 1), ("x/7", 1)])
        write_shard(tmp_path / "test-0.tar", [("7", 0), ("8", 1)])
        refused(tmp_path, "train-0.tar: sample x/7 has a second .png file", list_files)

    def test_shard_class_names_come_from_labels_or_file(self, tmp_path):
        write_shard(tmp_path / "train-0.tar", [("a", "dog"), ("b", "cat")])
        write_shard(tmp_path / "test-0.tar", [("c", "cat")])
        assert list_files(tmp_path).classes == ("cat", "dog")
        (tmp_path / "classes.txt").write_text("dog\ncat\n")
        opened = list_files(tmp_path)
        assert (opened.classes, opened.train.targets.tolist()) == (("dog", "cat"), [0, 1])
        write_shard(tmp_path / "train-0.tar", [("a", 0), ("b", 1)])
        write_shard(tmp_path / "test-0.tar", [("c", 1)])
        opened = list_files(tmp_path)
        assert (opened.classes, opened.test.targets.tolist()) == (("dog", "cat"), [1])

    def test_shard_subset_reads_selected_samples(self, tmp_path):
        write_shard(tmp_path / "train-0.tar", [(str(k), k % 2) for k in range(8)])
        split = list_files(tmp_path, val_split=0.25).train
        part = split.select(torch.tensor([4, 1]))
        assert [part.read(0), part.read(1)] == [split.read(4), split.read(1)]

    def test_hard_links_in_shards_are_read(self, tmp_path):
        """GNU tar writes a file of several names once."""
        write_shard(tmp_path / "train-0.tar", [(str(k), k % 2) for k in range(4)])
        with tarfile.open(tmp_path / "train-0.tar", "a") as archive:
            for key, name in (("8", "0"), ("9", "3")):
                for extension in ("png", "cls"):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.type, info.linkname = tarfile.LNKTYPE, f"{name}.{extension}"
                    archive.addfile(info)
        source = list_source(tmp_path).train
        assert [file.split("/")[-1] for file in source.files][-2:] == ["8.png", "9.png"]
        assert source.targets.tolist() == [0, 1, 0, 1, 0, 1]
        assert (source.read(4), source.read(5)) == (source.read(0), source.read(3))

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            ("", "sample 0 has the label '' in its .cls file; write a class number or name"),
            ("a\0\0", r"sample 0 has the label 'a\\x00\\x00' in its"),
            ("{}", "class numbers from 1 on; number them from 0"),
        ],
    )
    def test_shards_with_unusable_labels_are_refused(self, tmp_path, label, message):
        samples = [(str(k), k % 2 + 1) for k in range(8)]
        write_shard(tmp_path / "train-0.tar", samples, lambda target: label.format(target))
        refused(tmp_path, message, val_split=0.25)

    def test_sample_with_two_images_is_refused(self, tmp_path):
        write_shard(tmp_path / "train-0.tar", [(str(k), k % 2) for k in range(4)])
        with tarfile.open(tmp_path / "train-0.tar", "a") as archive:
            archive.addfile(tarfile.TarInfo("2.jpg"))
        refused(tmp_path, r"sample 2 has 2 images \(2.png, 2.jpg\); keep one", val_split=0.25)

    def test_damaged_shard_is_named(self, tmp_path, monkeypatch):
        def denied(*given, **more):
            raise PermissionError(13, "Permission denied")

        shard = tmp_path / "train-0.tar"
        write_shard(shard, [(str(k), k % 2) for k in range(4)])
        whole = shard.read_bytes()
        put(shard, whole[: len(whole) // 2])
        refused(
            tmp_path, "train-0.tar: not an uncompressed tar archive, or truncated", val_split=0.5
        )
        put(shard, b"")
        refused(tmp_path, "train-0.tar: not an uncompressed tar", val_split=0.5)
        with tarfile.open(shard, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        refused(tmp_path, "train-0.tar: not an uncompressed tar", val_split=0.5)
        with tarfile.open(shard, "w") as archive:
            archive.addfile(tarfile.TarInfo("7.png"))
        refused(tmp_path, "sample 7 has no .cls file")
        with tarfile.open(shard, "w") as archive:
            archive.addfile(tarfile.TarInfo("7.cls"))
        refused(tmp_path, "sample 7 has no image")
        shard.unlink()
        shard.mkdir()
        refused(tmp_path, "train-0.tar: cannot be read: Is a directory")
        shard.rmdir()
        put(shard, whole)
        monkeypatch.setattr(tarfile, "open", denied)
        refused(tmp_path, "train-0.tar: cannot be read: Permission denied", list_files)
        monkeypatch.undo()
        write_shard(tmp_path / "more-0.tar", [("a", 0)])
        refused(tmp_path, "whose split is unknown: more-0.tar")
        (tmp_path / "more-0.tar").unlink()
        shard.rename(tmp_path / "val-0.tar")
        refused(tmp_path, "no training shards")
        refused(f"webdataset:{tmp_path / 'nowhere'}", "no .tar files there")


class TestSmallSets:
    CINIC = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def test_cinic10_folder_is_recognized(self, tmp_path):
        for split in ("train", "valid", "test"):
            for name in self.CINIC:
                put(tmp_path / split / name / "0.png", png((32, 32)))
        opened = open_dataset(tmp_path)
        assert (opened.name, opened.classes, opened.augment.pad, opened.augment.flip) == (
            "cinic10",
            self.CINIC,
            4,
            True,
        )
        assert (opened.evaluation.name, opened.mean[0]) == ("val", 0.47889522)
        assert opened.val.files[0] == "valid/airplane/0.png"
        (tmp_path / "valid" / "truck").rename(tmp_path / "valid" / "lorry")
        refused(f"cinic10:{tmp_path}", "1 class.*in train/ and not in valid/: truck")

    def test_svhn_files_are_read(self, tmp_path):
        io_ = pytest.importorskip("scipy.io")
        pixels = {
            name: RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
            for name in ("train", "test")
        }
        labels = np.array([*range(1, 11), *range(1, 11)], dtype=np.uint8).reshape(-1, 1)
        refused(f"svhn:{tmp_path}", "missing train_32x32.mat, test_32x32.mat")
        for name, array in pixels.items():
            io_.savemat(tmp_path / f"{name}_32x32.mat", {"X": array, "y": labels})
        opened = open_dataset(tmp_path)
        assert (opened.name, opened.augment.flip) == ("svhn", False)
        assert opened.train.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
        assert np.array_equal(opened.test.images.numpy(), pixels["test"].transpose(3, 2, 0, 1))
        refused(tmp_path, "not made of image files; use --loader resident", list_files)
        io_.savemat(tmp_path / "test_32x32.mat", {"X": pixels["test"].astype(float), "y": labels})
        refused(tmp_path, "X is float64")
        (tmp_path / "test_32x32.mat").write_bytes(b"nonsense")
        refused(tmp_path, "not an SVHN file")


def test_listed_files_have_normalization_size_and_content(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(3):
                put(tmp_path / "here" / split / name / f"{i}.png", png((20, 24)))
    listed = list_files(tmp_path / "here")
    assert (listed.mean, listed.image_size) == (IMAGENET_MEAN, (20, 24))
    assert listed.describe()["num_images"] == {"train": 6, "val": 6}
    assert list_files(
        tmp_path / "here", image_size=64, mean=(0, 0, 0), std=(1, 1, 1)
    ).image_size == (64, 64)
    before = listed.fingerprint
    (tmp_path / "here").rename(tmp_path / "there")
    assert list_files(tmp_path / "there", val_split=0.34, seed=1).fingerprint == before
    put(tmp_path / "there" / "val" / "dog" / "2.png", png((400, 300)))
    assert list_files(tmp_path / "there").fingerprint != before
    put(tmp_path / "there" / "train" / "cat" / "0.png", png((21, 24)))
    assert list_files(tmp_path / "there").image_size == (224, 224)
