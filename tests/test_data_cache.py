"""The cache of decoded images: it spares the second decoding, and never gives anything but what
decoding now would.
"""

import os
import stat
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd.data import cache, files, open_dataset
from fastokd.errors import ConfigError, DataError


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The cache's folder; everything is worth keeping."""
    monkeypatch.setenv("FASTOKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def decodings(monkeypatch):
    """Counts how many images are decoded."""
    counts = []
    real = files.try_decode_all

    def counted(*arguments):
        counts.append(len(arguments[1]))
        return real(*arguments)

    monkeypatch.setattr(files, "try_decode_all", counted)
    return counts


def picture(path, seed=0, size=(8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path, compress_level=0
    )


@pytest.fixture
def tree(tmp_path):
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(("cat", "dog")):
            for i in range(4):
                picture(tmp_path / "tree" / split / name / f"{i}.png", 100 * s + 10 * c + i)
    return tmp_path / "tree"


def same(left, right) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.files == b.files
        for a, b in ((left.train, right.train), (left.test, right.test))
    ) and (left.mean, left.std, left.fingerprint, left.classes) == (
        right.mean,
        right.std,
        right.fingerprint,
        right.classes,
    )


def test_cached_dataset_equals_first_without_decoding(kept, tree, decodings, monkeypatch):
    first = open_dataset(tree)
    assert decodings == [16]
    assert same(open_dataset(tree), first)
    assert decodings == [16]
    carved = open_dataset(tree, val_split=0.5, seed=3)
    monkeypatch.setenv("FASTOKD_CACHE", "off")
    assert same(open_dataset(tree, val_split=0.5, seed=3), carved)
    assert decodings == [16, 16]


def test_writing_to_images_does_not_change_cache(kept, tree, decodings):
    first = open_dataset(tree)
    again = open_dataset(tree)
    again.train.images.zero_()
    assert same(open_dataset(tree), first)
    assert decodings == [16]


def change_bytes(tree):
    """Another picture of the same size in bytes and pixels, with the modification time of the old
    one.
    """
    file = tree / "train" / "cat" / "0.png"
    before = file.stat()
    picture(file, 999)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def move_to_other_class(tree):
    (tree / "train" / "cat" / "0.png").rename(tree / "train" / "dog" / "9.png")


def swap_two(tree):
    one, two, other = (tree / "train" / "cat" / name for name in ("0.png", "1.png", "tmp"))
    one.rename(other), two.rename(one), other.rename(two)


def rename_class(tree):
    for split in ("train", "test"):
        (tree / split / "dog").rename(tree / split / "emu")


@pytest.mark.parametrize(
    "change",
    [
        change_bytes,
        move_to_other_class,
        swap_two,
        rename_class,
        lambda tree: (tree / "test" / "dog" / "3.png").unlink(),
    ],
)
def test_changed_tree_is_decoded_again(kept, tree, decodings, change, monkeypatch):
    first = open_dataset(tree)
    time.sleep(0.05)  # a file system's times advance in ticks
    change(tree)
    second = open_dataset(tree)
    assert len(decodings) == 2
    assert not same(first, second)
    monkeypatch.setenv("FASTOKD_CACHE", "off")
    assert same(open_dataset(tree), second)


def test_files_changed_just_now_are_not_cached(kept, tree, decodings, monkeypatch):
    """A file system may give another write the same time."""
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 2.0)
    open_dataset(tree)
    open_dataset(tree)
    assert decodings == [16, 16]
    assert not kept.exists()
    newest = max(file.stat().st_ctime_ns for file in tree.rglob("*.png"))
    monkeypatch.setattr(time, "time_ns", lambda: newest + 2 * 10**9 - 1)
    open_dataset(tree)
    assert not kept.exists()
    monkeypatch.setattr(time, "time_ns", lambda: newest + 2 * 10**9)
    first = open_dataset(tree)
    assert same(open_dataset(tree), first)
    assert len(decodings) == 4


def test_write_within_timestamp_resolution_is_detected(kept, tree, monkeypatch):
    """A write in the tick of an earlier one, as on a file system with coarse times."""
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 2.0)
    real = os.stat

    class Coarse:
        def __init__(self, *arguments, **options):
            self.status = real(*arguments, **options)

        def __getattr__(self, name):
            value = getattr(self.status, name)
            return value // 10**9 * 10**9 if name.endswith("time_ns") else value

    monkeypatch.setattr(os, "stat", Coarse)
    file = tree / "train" / "cat" / "0.png"
    first = open_dataset(tree)
    picture(file, 999)  # of the same size, and usually in the same tick
    assert not torch.equal(first.train.images, open_dataset(tree).train.images)


def test_other_image_size_has_separate_entry(kept, tree, decodings):
    open_dataset(tree)
    assert open_dataset(tree, image_size=4).image_size == (4, 4)
    assert open_dataset(tree).image_size == (8, 8)
    assert len(decodings) == 2


def test_changed_tree_replaces_its_entry(kept, tree):
    open_dataset(tree)
    time.sleep(0.05)
    rename_class(tree)
    open_dataset(tree)
    assert len(list(kept.iterdir())) == 1


def test_file_changed_while_decoding_is_not_cached(kept, tree, monkeypatch):
    real = files.try_decode_all

    def change_first(*arguments):
        time.sleep(0.05)
        picture(tree / "train" / "cat" / "0.png", 999)
        return real(*arguments)

    monkeypatch.setattr(files, "try_decode_all", change_first)
    open_dataset(tree)
    assert not kept.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"no archive"),
        lambda file: file.unlink(),
    ],
)
def test_damaged_entry_is_regenerated(kept, tree, decodings, damage):
    first = open_dataset(tree)
    [file] = kept.iterdir()
    damage(file)
    assert same(open_dataset(tree), first)
    assert same(open_dataset(tree), first)
    assert decodings == [16, 16]


def test_cache_limits_prevent_writing(kept, tree, monkeypatch):
    monkeypatch.setattr(cache, "MAX_BYTES", 100)
    open_dataset(tree)
    monkeypatch.setattr(cache, "MAX_BYTES", 2**30)
    monkeypatch.setattr(cache, "WORTH_SECONDS", 1000.0)
    open_dataset(tree)
    assert not kept.exists()


def test_unwritable_cache_folder_is_a_warning(kept, tree, decodings, monkeypatch):
    kept.parent.write_text("a file where the folder should be")
    with pytest.warns(
        UserWarning, match=r"not kept for the next start.*FASTOKD_CACHE names another folder"
    ):
        first = open_dataset(tree)
    kept.parent.unlink()
    assert same(open_dataset(tree), first)
    if os.geteuid():
        monkeypatch.setattr(cache, "VERSION", -1)
        kept.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.warns(UserWarning, match="not kept for the next start"):
            open_dataset(tree)


def test_cache_folder_follows_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTOKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "fastokd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "fastokd"
    for text in ("off", "OFF", "0"):
        monkeypatch.setenv("FASTOKD_CACHE", text)
        assert cache.cache_folder() is None


class TestBadImages:
    def test_corrupt_images_stop_by_default(self, kept, tree):
        (tree / "train" / "cat" / "1.png").write_bytes(b"")
        with pytest.raises(
            DataError,
            match=r"1 of 16 .*train/cat/1.png \(not an image, or empty\); .*--bad-images replace",
        ):
            open_dataset(tree)
        with pytest.raises(
            ConfigError, match="unknown bad_images 'replce'; did you mean 'replace'"
        ):
            open_dataset(tree, bad_images="replce")

    @pytest.mark.parametrize(("bad", "place", "instead"), [(3, 7, 4), (1, 5, 6)])
    def test_corrupt_images_are_replaced_by_next_of_class(
        self, kept, tree, decodings, bad, place, instead
    ):
        good = open_dataset(tree)
        (tree / "train" / "dog" / f"{bad}.png").write_bytes(b"no image")
        for _ in range(2):  # and are not kept: the next start says it again
            with pytest.warns(
                UserWarning,
                match="1 of 8 training images cannot be decoded and were replaced.*train/dog/",
            ):
                opened = open_dataset(tree, bad_images="replace")
            assert opened.replaced_files == opened.describe()["replaced_files"] == 1
            want = good.train.images.clone()
            want[place] = want[instead]
            assert torch.equal(opened.train.images, want)
            assert opened.fingerprint != good.fingerprint
        assert len(decodings) == 3

    def test_replacement_of_corrupt_images_is_limited(self, kept, tree):
        for name in ("0.png", "1.png"):
            (tree / "train" / "cat" / name).write_bytes(b"")
        with pytest.raises(
            DataError,
            match="takes at most 1; list the others with 'fastokd data check --write-list'",
        ):
            open_dataset(tree, bad_images="replace")
        picture(tree / "train" / "cat" / "1.png")
        (tree / "test" / "cat" / "0.png").write_bytes(b"")
        with pytest.raises(
            DataError, match=r"1 of 16 .*test/cat/0.png .*evaluation images are never replaced"
        ):
            open_dataset(tree, bad_images="replace")
        picture(tree / "test" / "cat" / "0.png")
        for name in ("1.png", "2.png", "3.png"):
            (tree / "train" / "cat" / name).unlink()
        with pytest.raises(DataError, match="none of the 1 images of the class of"):
            open_dataset(tree, bad_images="replace")
