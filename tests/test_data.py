"""Datasets: what opens, what it holds, and the one line that says why something does not open."""

import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import write_cifar
from PIL import Image

from fastokd.data import (
    Augment,
    DataSource,
    Split,
    list_datasets,
    make_loader,
    open_dataset,
    register_dataset,
)
from fastokd.data.dataset import channel_statistics, prepare
from fastokd.errors import EXIT_DATA, ConfigError, DataError


def make_tree(
    root: Path, splits=("train", "test"), classes=("cat", "dog"), count=3, size=(8, 8)
) -> Path:
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return root


def refused(spec, match, **settings) -> str:
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(spec, **settings)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    assert caught.value.exit_code == EXIT_DATA
    return message


class TestDigits:
    def test_digits_equal_scikit_learn(self):
        digits = pytest.importorskip("sklearn.datasets").load_digits()
        opened = open_dataset("digits")
        is_test = np.zeros(1797, dtype=bool)
        for label in range(10):
            is_test[np.flatnonzero(digits.target == label)[4::5]] = True
        for split, rows in ((opened.train, ~is_test), (opened.test, is_test)):
            assert np.array_equal(split.targets.numpy(), digits.target[rows])
            want = np.floor(digits.images[rows] * 255 / 16 + 0.5)
            for channel in range(3):
                assert np.array_equal(split.images[:, channel].numpy(), want)

    def test_splits_are_stratified_and_of_fixed_size(self):
        digits = open_dataset("digits")
        assert (len(digits.train), len(digits.test)) == (1442, 355)
        assert digits.classes == tuple("0123456789")
        assert digits.image_size == (8, 8)
        assert digits.augment == Augment(pad=1, flip=False)
        assert torch.bincount(digits.test.targets).tolist() == [
            c // 5 for c in (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
        ]

    def test_image_size_resizes_images_and_padding(self):
        digits = open_dataset("digits", 32)
        assert digits.train.images.shape == (1442, 3, 32, 32)
        assert digits.augment.pad == 4

    def test_digits_with_folder_is_refused(self):
        with pytest.raises(ConfigError, match="take no folder"):
            open_dataset("digits:/tmp")


class TestFolder:
    def test_folder_images_equal_pillow(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, count=4))
        assert opened.classes == ("cat", "dog")
        assert opened.name == tmp_path.name
        assert opened.val is None
        for split in (opened.train, opened.test):
            assert split.targets.tolist() == [0] * 4 + [1] * 4
            for file, target, image in zip(split.files, split.targets, split.images, strict=True):
                assert file.startswith(f"{split.name}/{opened.classes[target]}/")
                assert np.array_equal(
                    image.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / file))
                )

    @pytest.mark.parametrize("spec", [str, lambda path: f"folder:{path}", lambda path: path])
    def test_folder_opens_from_any_spec_type(self, tmp_path, spec):
        assert len(open_dataset(spec(make_tree(tmp_path))).train) == 6

    def test_val_without_test_becomes_test_split(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, ("train", "val")))
        assert opened.test.name == "val"
        assert opened.val is None

    def test_val_and_test_folders_are_separate_splits(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, ("train", "val", "test")))
        assert (opened.val.name, opened.test.name) == ("val", "test")
        assert not torch.equal(opened.val.images, opened.test.images)
        refused(tmp_path, "already has a validation split; leave --val-split at 0", val_split=0.1)

    def test_rectangular_images_keep_their_size(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, size=(17, 32)))
        assert opened.image_size == (17, 32)
        assert opened.augment == Augment(pad=2, flip=True)

    def test_folder_reads_nested_linked_and_skips_hidden_files(self, tmp_path):
        make_tree(tmp_path, classes=("chien", "猫 été"))
        folder = tmp_path / "train" / "猫 été"
        (folder / "deeper").mkdir()
        (folder / "0.png").rename(folder / "deeper" / "ñ.PNG")
        (folder / "link.png").symlink_to(folder / "1.png")
        (folder / "loop").symlink_to(folder)
        (folder / "up").symlink_to(tmp_path / "train")
        (folder / "self").symlink_to(folder / "self")
        (folder / "notes.txt").write_text("not an image")
        (folder / "._0.png").write_bytes(b"litter of another system")
        (folder / ".cache").mkdir()
        (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
        opened = open_dataset(tmp_path)
        assert opened.train.files[3:] == tuple(
            f"train/猫 été/{name}" for name in ("1.png", "2.png", "deeper/ñ.PNG", "link.png")
        )
        assert opened.ignored_files == 2  # notes.txt and the link to itself

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_named_pipe_does_not_block(self, tmp_path):
        make_tree(tmp_path)
        os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
        assert len(open_dataset(tmp_path).train) == 6

    def test_missing_folder_is_refused(self, tmp_path):
        refused(tmp_path / "nowhere", "nowhere: no readable folder")
        refused("diggits", "did you mean 'digits'")
        refused("folder:nowhere", "no readable folder")
        refused("folder", "folder:PATH")

    def test_file_as_folder_is_refused(self, tmp_path):
        (tmp_path / "a").write_text("")
        refused(tmp_path / "a", "is a file")

    def test_empty_folder_is_refused(self, tmp_path):
        refused(tmp_path, r"no train/ \(found no folders\); arrange the images as train/<class>/")

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            (("train",), "no val/ or test/ images; hold out training images, e.g. --val-split 0.1"),
            (("test",), "no train/ .found test/."),
        ],
    )
    def test_missing_split_is_refused(self, tmp_path, splits, message):
        refused(make_tree(tmp_path, splits), message)

    def test_empty_split_is_refused(self, tmp_path):
        (make_tree(tmp_path, ("train",)) / "test").mkdir()
        refused(tmp_path, "test: empty; put the images of each class into a folder")

    def test_flat_validation_folder_is_refused(self, tmp_path):
        make_tree(tmp_path, ("train",))
        (tmp_path / "val").mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "val" / f"{i}.png")
        refused(tmp_path, "val: 3 images and no class folders")

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ("train", r"1 class\(es\) in train/ and not in test/: emu"),
            ("test", r"1 class\(es\) in test/ and not in train/: emu"),
        ],
    )
    def test_differing_classes_are_refused(self, tmp_path, extra, message):
        make_tree(tmp_path)
        make_tree(tmp_path, (extra,), ("emu",))
        refused(tmp_path, message)

    def test_empty_classes_are_all_named(self, tmp_path):
        make_tree(tmp_path)
        for split in ("train", "test"):
            (tmp_path / split / "emu").mkdir()
            (tmp_path / split / "emu" / "readme.txt").write_text("")
        refused(tmp_path, r"2 class folder\(s\) without images: train/emu, test/emu")

    def test_single_class_is_refused(self, tmp_path):
        refused(make_tree(tmp_path, classes=("cat",)), "two or more")

    def test_unreadable_files_of_all_splits_are_named(self, tmp_path):
        make_tree(tmp_path)
        (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
        (tmp_path / "test" / "dog" / "broken.jpg").symlink_to(tmp_path / "gone")
        message = refused(tmp_path, "2 of 13 image files cannot be decoded")
        assert "train/cat/1.png (not an image, or empty)" in message
        assert "test/dog/broken.jpg (No such file or directory)" in message

    @pytest.mark.parametrize("call", ["scandir", "stat"])
    def test_folder_without_permission_is_refused(self, tmp_path, monkeypatch, call):
        make_tree(tmp_path)
        allowed = getattr(os, call)

        def deny(path, *rest, **settings):
            if str(path).endswith("cat"):
                raise PermissionError(13, "Permission denied", str(path))
            return allowed(path, *rest, **settings)

        monkeypatch.setattr(os, call, deny)
        refused(tmp_path, "train/cat: cannot be read: Permission denied; check its permissions")

    def test_differing_sizes_need_image_size(self, tmp_path):
        make_tree(tmp_path)
        Image.new("RGB", (12, 10)).save(tmp_path / "test" / "dog" / "9.png")
        refused(tmp_path, r"train/cat/0.png is 8x8 and test/dog/9.png is 10x12 .*--image-size 8")
        assert open_dataset(tmp_path, image_size=6).image_size == (6, 6)


class TestCifar:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("keys", [str, str.encode])
    @pytest.mark.parametrize(
        ("kind", "count", "mean"), [("cifar10", 20, 0.4914), ("cifar100", 4, 0.5071)]
    )
    def test_cifar_opens_from_any_spec(self, tmp_path, kind, count, mean, protocol, keys):
        write_cifar(tmp_path, kind, protocol, keys=keys)
        for spec in (tmp_path, str(tmp_path), f"{kind}:{tmp_path}", next(tmp_path.iterdir())):
            opened = open_dataset(spec)
            assert opened.name == kind
            assert (len(opened.train), len(opened.test)) == (count, 4)
            assert opened.mean[0] == mean
            assert opened.augment == Augment(pad=4, flip=True)

    @pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
    def test_cifar_equals_torchvision(self, tmp_path, kind, monkeypatch):
        datasets = pytest.importorskip("torchvision.datasets")
        torchvision_kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
        write_cifar(tmp_path, kind)
        monkeypatch.setattr(
            torchvision_kind, "_check_integrity", lambda self: True
        )  # these are not the real files
        monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
        opened = open_dataset(tmp_path)
        for train, split in ((True, opened.train), (False, opened.test)):
            theirs = torchvision_kind(tmp_path, train=train)
            assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), theirs.data)
            assert split.targets.tolist() == theirs.targets
            assert list(opened.classes) == theirs.classes

    def test_image_size_resizes_images_and_padding(self, tmp_path):
        opened = open_dataset(write_cifar(tmp_path), image_size=16)
        assert opened.train.images.shape == (20, 3, 16, 16)
        assert opened.augment.pad == 2

    def test_both_cifars_in_one_folder_require_prefix(self, tmp_path):
        write_cifar(write_cifar(tmp_path, "cifar10"), "cifar100")
        refused(tmp_path, "cifar10 and cifar100; select one: cifar10:")
        assert open_dataset(f"cifar100:{tmp_path}").name == "cifar100"

    def test_missing_cifar_files_are_named(self, tmp_path):
        refused("cifar10", "needs a path: cifar10:PATH")
        refused(
            f"cifar10:{tmp_path}",
            r"no cifar-10-batches-py/; put the unpacked cifar-10-python.tar.gz there",
        )
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz"):
            pass
        refused(f"cifar10:{tmp_path}", "unpack cifar-10-python.tar.gz there: tar xzf")
        folder = write_cifar(tmp_path) / "cifar-10-batches-py"
        (folder / "data_batch_3").unlink()
        (folder / "batches.meta").unlink()
        refused(tmp_path, "missing data_batch_3, batches.meta; unpack")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no pickle",
            pickle.dumps([1, 2]),
            pickle.dumps({"labels": [0]}),
            pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}),
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
            pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}),
        ],
    )
    def test_damaged_cifar_file_is_refused(self, tmp_path, content):
        (write_cifar(tmp_path) / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
        refused(tmp_path, "data_batch_2: not .*; unpack")

    def test_label_outside_classes_is_refused(self, tmp_path):
        content = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2]}
        (write_cifar(tmp_path) / "cifar-10-batches-py" / "test_batch").write_bytes(
            pickle.dumps(content)
        )
        refused(tmp_path, r"split 'test' has label 2, outside 0..1")

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_malicious_pickle_is_not_executed(self, tmp_path, protocol):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "pwned"),)

        (write_cifar(tmp_path) / "cifar-10-batches-py" / "data_batch_1").write_bytes(
            pickle.dumps(Attack(), protocol)
        )
        refused(tmp_path, r"data_batch_1: not a CIFAR file \(it refers to \w+.mkdir")
        assert not (tmp_path / "pwned").exists()


class TestSplitting:
    @pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
    def test_val_split_is_stratified_and_complete(self, fraction):
        whole, carved = open_dataset("digits"), open_dataset("digits", val_split=fraction)
        before = torch.bincount(whole.train.targets)
        for label, total in enumerate(before.tolist()):
            held_out = int((carved.val.targets == label).sum())
            assert held_out == min(max(1, round(fraction * total)), total - 1)
        assert len(carved.train) + len(carved.val) == len(whole.train)
        both = torch.cat([carved.train.images, carved.val.images]).flatten(1)
        assert sorted(both.tolist()) == sorted(whole.train.images.flatten(1).tolist())
        assert torch.equal(carved.test.images, whole.test.images)

    def test_val_split_depends_only_on_seed(self):
        first, again, other = (
            open_dataset("digits", val_split=0.2, seed=seed) for seed in (1, 1, 2)
        )
        assert torch.equal(first.val.images, again.val.images)
        assert not torch.equal(first.val.images, other.val.images)

    def test_val_split_keeps_files_with_images(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, count=5), val_split=0.4)
        for split in (opened.train, opened.val):
            for file, image in zip(split.files, split.images, strict=True):
                assert np.array_equal(
                    image.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / file))
                )

    def test_val_split_out_of_range_is_refused(self, tmp_path):
        for fraction in (-0.1, 1.0, 2):
            with pytest.raises(ConfigError, match="val_split="):
                open_dataset("digits", val_split=fraction)
        refused(make_tree(tmp_path, count=1), "class 'cat' has 1 training image", val_split=0.5)

    def test_absent_split_is_refused(self):
        digits = open_dataset("digits")
        assert digits.split("train") is digits.train
        with pytest.raises(ConfigError, match="--val-split"):
            digits.split("val")
        with pytest.raises(ConfigError, match="use train, val or test"):
            digits.split("dev")


class TestNormalisation:
    def test_statistics_of_the_training_split(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, count=5), val_split=0.4)
        pixels = opened.train.images.double() / 255
        assert opened.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
        assert opened.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)

    def test_constant_channel_normalizes_to_zero(self):
        images = torch.full((3, 3, 2, 2), 7, dtype=torch.uint8)
        images[0, 1] = 9
        mean, std = channel_statistics(images)
        assert std[0] == std[2] == 1
        assert std[1] < 0.01
        assert mean[0] == pytest.approx(7 / 255)

    def test_mean_and_std_overrides_are_used(self):
        digits = open_dataset("digits", mean=(0.1, 0.2, 0.3), std=(1, 2, 3), augment=Augment())
        assert (digits.mean, digits.std, digits.augment) == ((0.1, 0.2, 0.3), (1, 2, 3), Augment())
        with pytest.raises(ConfigError, match="belong together"):
            open_dataset("digits", mean=(0, 0, 0))
        for std in ((1, 1), (1, 1, 0), (1, 1, float("nan"))):
            with pytest.raises(ConfigError, match="std is positive"):
                open_dataset("digits", mean=(0, 0, 0), std=std)

    def test_loaders_use_dataset_mean_and_std(self):
        digits = open_dataset("digits", val_split=0.1)
        images = torch.cat(
            [batch.images for batch in make_loader(digits, "train", 100, train=False)]
        ).double()
        assert images.mean().abs() < 1e-6
        assert images.std(correction=0) == pytest.approx(1, abs=1e-6)
        assert make_loader(digits, "train", 100).augment == digits.augment
        assert not make_loader(digits, "val", 100).train


class TestFingerprint:
    def test_fingerprint_depends_only_on_content(self, tmp_path):
        first = open_dataset(make_tree(tmp_path / "a"))
        moved = open_dataset(
            make_tree(tmp_path / "elsewhere"), val_split=0.5, seed=3, mean=(0, 0, 0), std=(1, 1, 1)
        )
        assert first.fingerprint == moved.fingerprint
        assert len(first.fingerprint) == 64

    @pytest.mark.parametrize(
        "change",
        [
            lambda root: Image.new("RGB", (8, 8)).save(root / "test" / "dog" / "2.png"),
            lambda root: (root / "train" / "dog" / "2.png").rename(
                root / "train" / "cat" / "3.png"
            ),
            lambda root: [
                (root / split / "dog").rename(root / split / "emu") for split in ("train", "test")
            ],
        ],
    )
    def test_fingerprint_changes_with_pixels_labels_and_names(self, tmp_path, change):
        before = open_dataset(make_tree(tmp_path)).fingerprint
        change(tmp_path)
        assert open_dataset(tmp_path).fingerprint != before

    def test_fingerprint_is_in_description(self, tmp_path):
        opened = open_dataset(make_tree(tmp_path, count=4), val_split=0.25)
        described = opened.describe()
        assert described["fingerprint"] == opened.fingerprint
        assert described["num_images"] == {"train": 6, "val": 2, "test": 8}
        assert described["root"] == str(tmp_path)


TOY = """
import torch
from fastokd.data import DataSource, DatasetKind, Split

def read(path, options):
    images, targets = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    splits = (Split("train", images, targets), Split("test", images, targets))
    return DataSource("toy", ("a", "b"), *splits)

KIND = DatasetKind(read, detect=lambda path: (path / "toy.txt").exists())
"""


class TestRegistry:
    def test_new_dataset_is_one_file_and_one_registry_entry(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("fastokd.data.registry._datasets.targets", {})
        (tmp_path / "toy_kind_of_test_data.py").write_text(TOY)
        register_dataset("toy", "toy_kind_of_test_data:KIND")
        assert list_datasets() == ["toy"]
        (tmp_path / "toy.txt").write_text("")
        for spec in ("toy", "toy:anywhere", tmp_path):
            assert len(open_dataset(spec).train) == 4

    def test_dataset_names_are_listed_and_suggested(self):
        assert list_datasets() == [
            "cifar10",
            "cifar100",
            "cinic10",
            "csv",
            "digits",
            "folder",
            "idx",
            "parquet",
            "svhn",
            "webdataset",
        ]
        with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
            open_dataset("cifar-10:/data")
        with pytest.raises(ConfigError, match=r"must read .package\.module:CONSTANT"):
            register_dataset("toy", "toy")

    def test_image_size_out_of_range_is_refused(self):
        with pytest.raises(ConfigError, match="image_size=0"):
            open_dataset("digits", image_size=0)

    def test_split_and_dataset_arguments_are_checked(self):
        images, targets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
        good = Split("train", images, targets)
        with pytest.raises(DataError, match="must be uint8"):
            Split("train", images.float(), targets)
        with pytest.raises(DataError, match="must be int64"):
            Split("train", images, targets.int())
        with pytest.raises(DataError, match="1 file names for 2 images"):
            Split("train", images, targets, ("a",))
        with pytest.raises(DataError, match="'test' is empty"):
            DataSource("toy", ("a", "b"), good, Split("test", images[:0], targets[:0]))
        with pytest.raises(DataError, match="one image_size"):
            prepare(DataSource("toy", ("a", "b"), good, Split("test", images[:, :, :3], targets)))
        with pytest.raises(DataError, match="label -1"):
            DataSource("toy", ("a", "b"), good, Split("test", images, targets - 1))
        with pytest.raises(DataError, match="no training images of c"):
            DataSource("toy", ("a", "b", "c"), good, good)


def test_data_import_does_not_load_optional_packages():
    code = (
        "import sys, fastokd.data; print([m for m in ('PIL', 'torchvision', 'sklearn', 'triton',"
        " 'nvidia.dali') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(
    "FASTOKD_TEST_DATA" not in os.environ,
    reason="FASTOKD_TEST_DATA does not name the CIFAR-10 (JPEG) tree",
)
def test_real_cifar10_is_read():
    opened = open_dataset(os.environ["FASTOKD_TEST_DATA"])
    assert (len(opened.train), len(opened.test), opened.num_classes, opened.image_size) == (
        50_000,
        10_000,
        10,
        (32, 32),
    )
    assert torch.bincount(opened.train.targets).tolist() == [5000] * 10
    assert opened.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert opened.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=4e-3)
    seen = torch.cat([batch.index for batch in make_loader(opened, "train", 128)])
    assert len(seen.unique()) == len(seen) == 390 * 128
    for i in range(0, 50_000, 9973):
        want = np.asarray(Image.open(opened.root / opened.train.files[i]).convert("RGB"))
        assert np.array_equal(opened.train.images[i].permute(1, 2, 0).numpy(), want)
