"""TFRecord and RecordIO files: the same images and labels as the files they were packed from, by an
encoder of this test's own.
"""

import struct

import pytest
import torch
from stream_loaders import each_loader, write_split

from fastokd.data import list_datasets, list_files
from fastokd.errors import DataError


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(key: str, content: bytes) -> bytes:
    return field(1, field(1, key.encode()) + field(2, content))


def example(
    image: bytes,
    label: int,
    packed: bool = True,
    synset: str | None = None,
    keys: tuple[str, str] = ("image/encoded", "image/class/label"),
) -> bytes:
    label %= 2**64  # two's complement
    number = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
    body = feature("image/height", field(3, field(1, varint(480)))) + feature(
        keys[0], field(1, field(1, image))
    )
    if synset is not None:
        body += feature("image/class/synset", field(1, field(1, synset.encode())))
    body += feature(keys[1], field(3, number)) + feature(
        "image/score", field(2, field(1, struct.pack("<f", 0.5)))
    )
    return field(1, body)


def tfrecord(images, labels, **options) -> bytes:
    out = b""
    for image, label in zip(images, labels, strict=True):
        synset = options.get("synset")
        message = example(
            image,
            label,
            options.get("packed", True),
            synset and f"n{label:03d}",
            options.get("keys", ("image/encoded", "image/class/label")),
        )
        out += struct.pack("<Q", len(message)) + b"\0\0\0\0" + message + b"\0\0\0\0"
    return out


def recordio(images, labels, several: bool = False) -> bytes:
    out = b""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        head = (
            struct.pack("<IfQQf", 1, -1.0, i, 0, label)
            if several
            else struct.pack("<IfQQ", 0, label, i, 0)
        )
        body = head + image
        out += struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4)
    return out


PACKERS = {
    "tfrecord": (".tfrecord", tfrecord),
    "tfrecord-unpacked": (
        ".tfrecord",
        lambda images, labels: tfrecord(images, labels, packed=False),
    ),
    "tfrecord-from-one": (
        ".tfrecord",
        lambda images, labels: tfrecord(images, [label + 1 for label in labels]),
    ),
    "tfrecord-synset": (
        ".tfrecord",
        lambda images, labels: tfrecord(images, [label + 1 for label in labels], synset=True),
    ),
    "tfrecord-tfds": (
        ".tfrecord-00000-of-00001",
        lambda images, labels: tfrecord(images, labels, keys=("image", "label")),
    ),
    "tfrecord-numbered": ("-00000-of-00001", tfrecord),
    "recordio": (".rec", recordio),
    "recordio-labels": (".rec", lambda images, labels: recordio(images, labels, several=True)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def pack(root, split, suffix, encode) -> None:
    """Two archives for training and one for evaluation."""
    root.mkdir()
    for name, part in (
        ("train-0", slice(0, 5)),
        ("train-1", slice(5, 14)),
        ("val", slice(0, 14, 2)),
    ):
        images = [(split.root / file).read_bytes() for file in split.files[part]]
        (root / f"{name}{suffix}").write_bytes(encode(images, split.targets[part].tolist()))


@pytest.mark.parametrize("kind", PACKERS)
def test_archives_hold_the_same_images_and_labels(tmp_path, kind):
    split, (suffix, encode) = write_split(tmp_path / "files", 14), PACKERS[kind]
    pack(tmp_path / "packed", split, suffix, encode)
    dataset = list_files(tmp_path / "packed")
    assert torch.equal(dataset.train.targets, split.targets)
    assert [dataset.train.read(i) for i in range(14)] == [
        (split.root / file).read_bytes() for file in split.files
    ]
    assert torch.equal(dataset.test.targets, split.targets[::2])
    assert len(set(dataset.train.files)) == 14
    assert dataset.classes == {
        "tfrecord-synset": ("n001", "n002", "n003"),
        "tfrecord-from-one": ("1", "2", "3"),
    }.get(kind, ("0", "1", "2"))


@each_loader
@pytest.mark.parametrize("kind", ["tfrecord", "recordio"])
def test_loaders_read_archives_as_they_read_files(tmp_path, make, kind):
    split, (suffix, encode) = write_split(tmp_path / "files", 14), PACKERS[kind]
    pack(tmp_path / "packed", split, suffix, encode)
    for batch, want in zip(
        make(list_files(tmp_path / "packed").train, 7, True), make(split, 7, True), strict=True
    ):
        assert torch.equal(batch.images, want.images)
        assert torch.equal(batch.target, want.target)


@pytest.mark.parametrize("kind", ["tfrecord", "tfrecord-unpacked", "recordio"])
@pytest.mark.parametrize("label", [-1, 4_000_000_000])
def test_a_label_that_can_be_no_class_is_named_with_its_record(tmp_path, kind, label):
    split, (suffix, encode) = write_split(tmp_path / "files", 14), PACKERS[kind]
    pack(tmp_path / "packed", split, suffix, encode)
    images = [(split.root / file).read_bytes() for file in split.files[:3]]
    file = tmp_path / "packed" / f"train-2{suffix}"
    file.write_bytes(encode(images, [0, 1, label]))
    with pytest.raises(
        DataError,
        match=(
            rf"sample train-2{suffix}/2 has the class number {label}, outside 0\.\.23 for 24 images"
        ),
    ) as caught:
        list_files(tmp_path / "packed")
    assert str(file) in str(caught.value)


def test_class_names_come_from_a_list(tmp_path):
    split = write_split(tmp_path / "files", 14)
    for kind in ("tfrecord", "tfrecord-from-one"):
        pack(tmp_path / kind, split, *PACKERS[kind])
        (tmp_path / kind / "classes.txt").write_text("ant\nbee\ncat\n")
        dataset = list_files(tmp_path / kind)
        assert dataset.classes == ("ant", "bee", "cat")
        assert torch.equal(dataset.train.targets, split.targets)


def test_an_archive_is_read_through_once_and_again_when_it_changed(tmp_path, cache, monkeypatch):
    split = write_split(tmp_path / "files", 14)
    pack(tmp_path / "packed", split, *PACKERS["tfrecord"])
    first = list_files(tmp_path / "packed")
    assert len(list(cache.iterdir())) == 3
    with monkeypatch.context() as patched:
        patched.setattr(
            "fastokd.data.tfrecord._sample", lambda *arguments: pytest.fail("read again")
        )
        again = list_files(tmp_path / "packed")
    assert again.fingerprint == first.fingerprint
    with monkeypatch.context() as patched:
        patched.setattr("fastokd.data.archives.INDEX_VERSION", -1)
        patched.setattr(
            "fastokd.data.tfrecord._sample", lambda *arguments: pytest.fail("read again")
        )
        with pytest.raises(pytest.fail.Exception, match="read again"):
            list_files(tmp_path / "packed")
    images = [(split.root / file).read_bytes() for file in split.files[:5]]
    (tmp_path / "packed" / "train-0.tfrecord").write_bytes(tfrecord(images, [2, 1, 0, 2, 1]))
    assert list_files(tmp_path / "packed").train.targets[:5].tolist() == [2, 1, 0, 2, 1]
    for file in cache.iterdir():
        file.write_text("[")
    assert list_files(tmp_path / "packed").train.targets[:5].tolist() == [2, 1, 0, 2, 1]
    monkeypatch.setenv("FASTOKD_CACHE", "/proc/nowhere")
    assert len(list_files(tmp_path / "packed").train) == 14
    assert {"tfrecord", "recordio"} <= set(list_datasets())


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("tfrecord", lambda data: data[:-30], "cut off"),
        ("tfrecord", lambda data: data[:5], "record 0"),
        ("tfrecord", lambda data: b"hello world, these are no records", "record 0"),
        ("tfrecord", lambda data: b"", "cannot be used|empty|cut off"),
        (
            "tfrecord",
            lambda data: data.replace(b"image/encoded", b"image/dedocne"),
            "no image/encoded",
        ),
        (
            "tfrecord",
            lambda data: data.replace(b"image/class/label", b"image/class/lebal"),
            "no image/class/label",
        ),
        ("recordio", lambda data: data[:-30], "its end is missing"),
        ("recordio", lambda data: b"hello world, these are no records", "no record begins there"),
        (
            "recordio",
            lambda data: (
                data[:4] + struct.pack("<I", struct.unpack("<I", data[4:8])[0] | 1 << 29) + data[8:]
            ),
            "several parts",
        ),
        (
            "recordio",
            lambda data: data[:12] + struct.pack("<f", 0.5) + data[16:],
            r"0\.5 is no class number",
        ),
        (
            "recordio",
            lambda data: data[:12] + struct.pack("<f", float("nan")) + data[16:],
            "cannot be used",
        ),
    ],
)
def test_damaged_archives_are_refused_in_one_line(tmp_path, kind, damage, said):
    split, (suffix, encode) = write_split(tmp_path / "files", 14), PACKERS[kind]
    pack(tmp_path / "packed", split, suffix, encode)
    file = tmp_path / "packed" / f"train-0{suffix}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=said) as caught:
        list_files(tmp_path / "packed")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
