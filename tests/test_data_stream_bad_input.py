"""Pictures that cannot be decoded, formats and packages that are not there: what the loaders that
decode while training say and do.
"""

import os
import signal
import sys
import tarfile
import time

import pytest
import torch
from stream_loaders import LOADERS, each_loader, picture, torchvision, write_split

from fastokd.data import FileSplit, torchvision_loader
from fastokd.data.files import Members
from fastokd.data.torchvision_loader import TorchvisionOptions
from fastokd.errors import ConfigError, DataError, MissingExtra

COUNT = 24


def truncate(path):
    path.write_bytes(path.read_bytes()[:400])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("<html>404 not found</html>")


def missing(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


@each_loader
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated"),
        (empty, "empty"),
        (text, "not an image"),
        (missing, "No such file"),
        (folder, "directory"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_corrupt_image_stops_the_run_and_is_named(tmp_path, make, damage, reason, train):
    split = write_split(tmp_path, COUNT)
    damage(tmp_path / split.files[9])
    with pytest.raises(DataError) as caught:
        list(make(split, 6, train))
    message = str(caught.value)
    assert split.files[9] in message
    assert reason.lower() in message.lower()
    assert "fastokd data check" in message
    assert ("--bad-images replace" in message) == train
    assert "\n" not in message
    assert split.files[8] not in message
    assert split.files[10] not in message


@each_loader
def test_corrupt_image_is_replaced_by_next_of_its_class(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    good = list(make(split, 6, True))
    truncate(tmp_path / split.files[9])
    loader = make(split, 6, True, bad_images="replace")
    for _ in range(2):
        replaced = 0
        for batch, want in zip(loader, good, strict=True):
            for i, j, image, same in zip(
                batch.index.tolist(), want.index.tolist(), batch.images, want.images, strict=True
            ):
                if j == 9:
                    replaced += 1
                    assert i == 12  # the next of its class
                else:
                    assert i == j
                    assert torch.equal(image, same)
            assert torch.equal(batch.target, split.targets[batch.index])
        assert replaced == 1
        assert list(loader.replaced) == [9]
        assert "truncated" in loader.replaced[9].lower()


def test_loaders_and_workers_replace_the_same_images(tmp_path):
    split = write_split(tmp_path, COUNT)
    truncate(tmp_path / split.files[COUNT - 1])  # the last of its class: the next one is its first
    loaders = [
        LOADERS["dali"](split, 6, True, bad_images="replace"),
        torchvision(split, 6, True, bad_images="replace"),
        torchvision(split, 6, True, bad_images="replace", options=TorchvisionOptions(workers=1)),
    ]
    orders = [[batch.index.tolist() for batch in loader] for loader in loaders]
    assert orders[0] == orders[1] == orders[2]
    assert all(list(loader.replaced) == [COUNT - 1] for loader in loaders)
    loaders[2].close()


@each_loader
def test_too_many_corrupt_images_stop_the_run(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    for i in (3, 4, 15):
        truncate(tmp_path / split.files[i])
    with pytest.raises(DataError, match=r"corrupt images.*at most 1 are replaced"):
        list(make(split, 6, True, bad_images="replace"))


@each_loader
def test_class_without_valid_image_stops_the_run(tmp_path, make, monkeypatch):
    monkeypatch.setattr("fastokd.data.stream.MAX_REPLACED", 0.5)
    split = write_split(tmp_path, COUNT, classes=8)
    for i in (2, 10, 18):
        truncate(tmp_path / split.files[i])
    with pytest.raises(DataError, match=r"none of the 3 images of the class of .* can be decoded"):
        list(make(split, 6, True, bad_images="replace"))


@each_loader
def test_evaluation_does_not_replace_corrupt_images(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    truncate(tmp_path / split.files[9])
    with pytest.raises(DataError, match=r"009\.jpg"):
        list(make(split, 6, False, bad_images="replace"))


@each_loader
def test_loader_works_after_corrupt_image_is_repaired(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    content = (tmp_path / split.files[9]).read_bytes()
    truncate(tmp_path / split.files[9])
    loader = make(split, 6, True)
    with pytest.raises(DataError):
        list(loader)
    (tmp_path / split.files[9]).write_bytes(content)
    assert len(list(loader)) == 4


@each_loader
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_named(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    (tmp_path / split.files[9]).chmod(0)
    with pytest.raises(DataError, match=r"009\.jpg \(Permission denied\)"):
        list(make(split, 6, True))


def archived(root, split) -> FileSplit:
    """The same pictures in two uncompressed archives."""
    shards, places = ("shard-0.tar", "shard-1.tar"), {}
    for number, name in enumerate(shards):
        with tarfile.open(root / name, "w") as archive:
            for file in split.files[number::2]:
                archive.add(root / file, file)
        with tarfile.open(root / name) as archive:
            places |= {member.name: (number, member.offset_data, member.size) for member in archive}
    shard, offset, size = torch.tensor([places[file] for file in split.files]).T
    return FileSplit(
        "train", root, split.files, split.targets, Members(shards, shard, offset, size)
    )


@each_loader
def test_archive_batches_equal_file_batches(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    for train in (True, False):
        for batch, want in zip(
            make(archived(tmp_path, split), 7, train), make(split, 7, train), strict=True
        ):
            assert torch.equal(batch.index, want.index)
            assert torch.equal(batch.images, want.images)


@each_loader
def test_corrupt_image_and_missing_archive_are_named(tmp_path, make):
    split = write_split(tmp_path, COUNT)
    truncate(tmp_path / split.files[9])
    packed = archived(tmp_path, split)
    with pytest.raises(DataError, match=r"(?i)009\.jpg \(.*truncated"):
        list(make(packed, 6, True))
    (tmp_path / "shard-1.tar").unlink()
    with pytest.raises(DataError, match="No such file"):
        list(make(packed, 6, True))


MEMORY = "a smaller --batch-size or fewer workers need less memory"
CRASH = "a file may crash the decoder: 'fastokd data check DATA' finds it"


@pytest.mark.parametrize(
    ("end", "reason", "fix"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal: Killed", MEMORY),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "killed by signal: Bus error", MEMORY),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "Segmentation fault", CRASH),
        (lambda: os._exit(3), "exited unexpectedly", CRASH),
        (lambda: time.sleep(60), "timed out after 2", "decoding is slow: pass a larger timeout"),
    ],
)
def test_lost_worker_is_explained_by_its_end(tmp_path, monkeypatch, end, reason, fix):
    split = write_split(tmp_path, 4)
    monkeypatch.setattr(torchvision_loader, "decode_rgb", lambda *_: end())
    options = TorchvisionOptions(workers=1, start_method="fork", timeout=2)
    with pytest.raises(DataError) as raised:
        list(torchvision(split, 2, False, options=options))
    assert reason in str(raised.value)
    assert fix in str(raised.value)
    assert (MEMORY in str(raised.value)) is (fix == MEMORY)


def test_missing_dali_names_the_extra(tmp_path, monkeypatch):
    from fastokd.data.dali import DaliLoader

    split = write_split(tmp_path, 4)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[dali\]'.*--loader torchvision"):
        DaliLoader(split, 2, True, size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))


def test_format_unknown_to_dali_is_refused_before_decoding(tmp_path):
    split = write_split(tmp_path, 4)
    picture(20, 20).save(tmp_path / "moving.gif")
    split = FileSplit("train", tmp_path, (*split.files[:3], "moving.gif"), split.targets)
    with pytest.raises(
        DataError,
        match=r"DALI cannot decode moving\.gif; convert them, or use --loader torchvision",
    ):
        LOADERS["dali"](split, 2, True)
    assert len(list(torchvision(split, 4, False))) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 0}, "threads=0"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"hw_decoder_load": 1.5}, "hw_decoder_load=1.5"),
        ({"decoder": "gpu"}, "unknown decoder 'gpu'"),
        ({"resize": "pillow"}, "unknown resize 'pillow'"),
        ({"width_hint": -1}, "width_hint=-1"),
    ],
)
def test_dali_options_out_of_range_are_refused(options, said):
    from fastokd.data.dali import DaliOptions

    with pytest.raises(ConfigError, match=said):
        DaliOptions(**options)


def test_gpu_decoding_with_cpu_step_is_refused(tmp_path):
    pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    from fastokd.data.dali import DaliOptions

    with pytest.raises(ConfigError, match="use decoder=cpu"):
        LOADERS["dali"](write_split(tmp_path, 4), 2, True, options=DaliOptions(decoder="mixed"))
