"""IDX files are read; other archives and containers are refused with the command that helps."""

import gzip
import shlex
import struct
import zipfile

import numpy as np
import pytest
import torch

from fastokd.data import list_datasets, list_files, open_dataset
from fastokd.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)
LABELS = (np.arange(20) % 4).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write(root, mark="-", compressed=False):
    for part, stop in (("train", 20), ("t10k", 8)):
        for content, array in (("images", IMAGES), ("labels", LABELS)):
            data = idx(array[:stop])
            name = f"{part}-{content}{mark}idx{array.ndim}-ubyte"
            if compressed:
                name, data = f"{name}.gz", gzip.compress(data)
            (root / name).write_bytes(data)


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read(tmp_path, mark, compressed):
    write(tmp_path, mark, compressed)
    for spec in (tmp_path, f"idx:{tmp_path}"):
        opened = open_dataset(spec)
        assert opened.classes == ("0", "1", "2", "3")
        assert (len(opened.train), len(opened.test)) == (20, 8)
        assert torch.equal(opened.train.images[:, 0], torch.from_numpy(IMAGES))
        assert torch.equal(opened.train.images[:, 2], torch.from_numpy(IMAGES))
        assert opened.train.targets.tolist() == LABELS.tolist()
    assert open_dataset(tmp_path, 12).train.images.shape == (20, 3, 12, 12)
    assert "idx" in list_datasets()


@pytest.mark.parametrize("prefix", ["", "emnist-letters-"])
@pytest.mark.parametrize("folder", ["", "raw"])
def test_idx_files_of_other_datasets_are_read(tmp_path, prefix, folder):
    """Names of EMNIST, its labels from 1 on, and torchvision's folder."""
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    for part in ("train", "test"):
        (root / f"{prefix}{part}-images-idx3-ubyte").write_bytes(idx(IMAGES))
        (root / f"{prefix}{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS + 1)))
    opened = open_dataset(tmp_path)
    assert opened.classes == ("1", "2", "3", "4")
    assert opened.test.targets.tolist() == LABELS.tolist()
    (root / "emnist-digits-train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    with pytest.raises(DataError, match=r"several datasets: .*emnist-digits"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", None, "missing train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", None, "missing t10k-images-idx3-ubyte"),
        ("train-images-idx3-ubyte", idx(IMAGES)[:-1], "599 bytes for the shape"),
        ("train-labels-idx1-ubyte", idx(LABELS[:5]), "20 images and 5 labels"),
        ("train-labels-idx1-ubyte", idx(IMAGES), "not an IDX file of bytes in 1 dim"),
        ("train-images-idx3-ubyte", b"<html>", "not an IDX file of bytes in 3 dim"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, name, content, message):
    write(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset(f"idx:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a.zip", "unzip "),
        ("a b.tar.gz", "tar -xf '"),
        ("a.tgz", "tar -xf "),
        ("A.ZIP", "unzip "),
        ("a.7z", "7z x"),
        ("data-00000-of-00001.arrow", "fromarray"),
        ("a.npz", "fromarray"),
        ("a.h5", "fromarray"),
        ("data.mdb", "fromarray"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_containers_are_refused_with_a_command(tmp_path, name, command, inside):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as refused:
        list_files(tmp_path if inside else tmp_path / name)
    assert name in str(refused.value)
    assert command in str(refused.value)


def test_command_for_an_archive_works(tmp_path):
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (5, 5)).save(out, "PNG")
    with zipfile.ZipFile(tmp_path / "my data.zip", "w") as archive:
        for name in ("cat", "dog"):
            for i in range(2):
                archive.writestr(f"{name}/{i}.png", out.getvalue())
    with pytest.raises(DataError) as refused:
        list_files(tmp_path / "my data.zip")
    command = str(refused.value).partition("run: ")[2].partition("; then")[0]
    command = command.replace("FOLDER", str(tmp_path / "out"))
    words = shlex.split(command)
    assert words[:2] == ["unzip", str(tmp_path / "my data.zip")]
    with zipfile.ZipFile(words[1]) as archive:  # unzip may not be installed here
        archive.extractall(words[3])
    assert list_files(tmp_path / "out", val_split=0.5).classes == ("cat", "dog")


@pytest.mark.parametrize("suffix", [".heic", ".npy"])
def test_class_of_other_files_names_their_suffix(tmp_path, suffix):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "val" / name).mkdir(parents=True)
        for split in ("train", "val"):
            if name == "cat":
                Image.new("RGB", (5, 5)).save(tmp_path / split / name / "a.png")
            else:
                (tmp_path / split / name / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"train/dog \(only {suffix}\)"):
        list_files(tmp_path)


@pytest.mark.parametrize(
    "suffix", [".jfif", ".JPE", ".avif", ".jp2", ".tga", ".pnm", ".dib", ".ico"]
)
def test_further_image_suffixes_are_listed(tmp_path, suffix):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (16, 16), (9, 90, 200)).save(tmp_path / name / f"{i}{suffix.lower()}")
            (tmp_path / name / f"{i}{suffix.lower()}").rename(tmp_path / name / f"x{i}{suffix}")
    opened = open_dataset(tmp_path, 16, val_split=0.5)
    assert len(opened.train) == 2
    assert opened.ignored_files == 0
