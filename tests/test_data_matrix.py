"""Every loader gives the same pixels for every file that one of them accepts, or all refuse it:
format x mode x metadata, and damage.
"""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from stream_loaders import LOADERS, dali_alone, picture

from fastokd.data import FileSplit
from fastokd.data.check import Image as Listed
from fastokd.data.check import look_at
from fastokd.data.decoding import decode, decodes_alike
from fastokd.data.files import check_headers
from fastokd.data.images import reason_of, try_decode_all
from fastokd.errors import DataError

SIDE = 48
BASE = picture(90, 60, seed=5)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description'
    b' xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(BASE.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.merge("LAB", BASE.split())
    if mode in ("RGBA", "LA", "RGBa"):
        image = BASE.convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image.convert(mode)
    return BASE.convert(mode)


def exif(orientation: object = 6) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


METADATA = {
    "plain": {},
    "exif": {"exif": exif()},
    "invalid-orientation": {"exif": exif(9)},
    "broken-exif": {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"},
    "xmp": {"xmp": XMP},
    "icc": {"icc_profile": b"not a profile"},
}
FORMATS = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    "WEBP": ("L", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I"),
    "TGA": ("L", "P", "RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "I;16"),
    "AVIF": ("L", "RGB", "RGBA"),
    "ICO": ("RGB", "RGBA"),
}


def chunk(name: bytes, data: bytes, error: int = 0) -> bytes:
    checksum = zlib.crc32(name + data) ^ error
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(rows: bytes, *extra: bytes, error: int = 0, end: bool = True, size=(64, 64)) -> bytes:
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    body = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows), error), *extra]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + (chunk(b"IEND", b"") if end else b"")


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def tiff(levels: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """An uncompressed grayscale TIFF of 12 or 16 bits, [H, W] with an even W."""
    height, width = levels.shape
    if bits == 12:
        p, q = levels[:, ::2].astype(int), levels[:, 1::2].astype(int)
        packed = np.stack([p >> 4, (p & 15) << 4 | q >> 8, q & 255], -1).astype(np.uint8).tobytes()
    else:
        packed = levels.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    wide = {273: 8, 279: len(packed)}
    entries = sorted((*((t, 3, v) for t, v in tags.items()), *((t, 4, v) for t, v in wide.items())))
    ifd = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + ifd + bytes(4)


def premultiplied() -> bytes:
    """A TIFF file with the tag ExtraSamples set to associated alpha."""
    content = saved(in_mode("RGBa").convert("RGBA"), "TIFF")
    entry, value = struct.pack("<HHI", 338, 3, 1), struct.pack("<H", 2)
    assert content.count(entry + value) == 1
    return content.replace(entry + value, entry + struct.pack("<H", 1))


def special_files() -> dict[str, bytes]:
    gray = np.tile(np.linspace(0, 255, 64).astype(int), (64, 1))
    rgb = np.asarray(BASE.resize((64, 64)))
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    cmyk = saved(in_mode("CMYK"), "JPEG")
    at = cmyk.index(b"\xff\xee")
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "exif\n      20\n" + exif().hex())
    late = png(rows, chunk(b"eXIf", exif()[6:]))
    frames = [BASE, BASE.transpose(Image.Transpose.ROTATE_180)]
    return {
        "cmyk-without-adobe": cmyk[:at] + cmyk[at + 2 + int.from_bytes(cmyk[at + 2 : at + 4]) :],
        "tiff-12": tiff(gray * 4095 // 255, 12),
        "tiff-16": tiff(gray * 257, 16),
        "tiff-16-inverted": tiff(gray * 257, 16, photometric=0),
        "tiff-12-inverted": tiff(gray * 4095 // 255, 12, photometric=0),
        "tiff-premultiplied": premultiplied(),
        "ppm-maxval-100": b"P6\n64 64\n100\n"
        + (rgb.astype(int) * 100 // 255).astype("u1").tobytes(),
        "pgm-maxval-1000": b"P5\n64 64\n1000\n" + (gray * 1000 // 255).astype(">u2").tobytes(),
        "ppm-ascii": b"P3\n64 64\n255\n" + " ".join(map(str, rgb.ravel())).encode(),
        "apng": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif-animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp-animated": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "png-text-orientation": saved(BASE, "PNG", pnginfo=text),
        "png-late-exif": late,
        "png-palette-transparent": saved(BASE.quantize(16), "PNG", transparency=3),
        "png-rgb-transparent": saved(BASE, "PNG", transparency=(10, 20, 30)),
        "png-black-last-row": png(rows[: -(1 + 64 * 3)] + bytes(1 + 64 * 3)),
        "jpeg-progressive": saved(BASE, "JPEG", progressive=True),
        "jpeg-keep-rgb": saved(BASE, "JPEG", keep_rgb=True),
        "jpeg-gray-image": saved(Image.new("RGB", (90, 60), (128, 128, 128)), "JPEG"),
        "jpeg-trailing-bytes": saved(BASE, "JPEG") + b"\0" * 100,
        "elongated": saved(BASE.resize((3, 900)), "PNG"),
    }


def matrix() -> dict[str, bytes]:
    files = special_files()
    for file_format, modes in FORMATS.items():
        for mode, (label, options) in itertools.product(modes, METADATA.items()):
            if label != "plain" and file_format not in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
                continue
            image, options = in_mode(mode), dict(options)
            if file_format == "PNG" and "xmp" in options:
                options = {"pnginfo": PngImagePlugin.PngInfo()}
                options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
            if file_format == "TIFF" and "xmp" in options:
                options = {"tiffinfo": {700: XMP}}
            if file_format in ("WEBP", "AVIF"):
                options["quality"] = 95
            try:
                files[f"{file_format}-{mode}-{label}"] = saved(image, file_format, **options)
            except (OSError, ValueError, SyntaxError, struct.error, RuntimeError):
                assert label == "broken-exif", (file_format, mode, label)
    return files


def damaged_files() -> dict[str, bytes]:
    rgb = np.asarray(BASE.resize((64, 64)))
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    half = saved(picture(64, 64), "JPEG")
    half = half[: len(half) // 2]
    return {
        "rows-missing": png(rows[: len(rows) // 2]),
        "no-rows": png(b""),
        "checksum": png(rows, error=1),
        "late-checksum": png(rows, chunk(b"tEXt", b"a\0b", error=1)),
        "no-end": png(rows, end=False),
        "jpeg-half": half,
        "jpeg-half-with-end": half + b"\xff\xd9",
        "jpeg-no-end": saved(BASE, "JPEG")[:-2],
        "gif-half": saved(BASE, "GIF")[:500],
        "webp-half": saved(BASE, "WEBP")[:500],
        "tiff-half": saved(BASE, "TIFF")[:5000],
        "bmp-half": saved(BASE, "BMP")[:5000],
        "ppm-half": saved(BASE, "PPM")[:5000],
    }


FILES = matrix()


def accepted() -> dict[str, bytes]:
    def valid(content: bytes) -> bool:
        try:
            decode(io.BytesIO(content))
        except Exception:
            return False
        return True

    return {name: content for name, content in FILES.items() if valid(content)}


ACCEPTED = accepted()
REFUSED = {name: content for name, content in FILES.items() if name not in ACCEPTED}


def as_split(root, files) -> FileSplit:
    for name, content in files.items():
        (root / f"{name}.jpg").write_bytes(content)
    names = tuple(f"{name}.jpg" for name in files)
    return FileSplit("test", root, names, torch.arange(len(names)) % 2)


def test_matrix_refuses_only_pixels_without_a_range():
    kinds = {"-".join(name.split("-")[:2]) for name in REFUSED}
    # Pillow does not read 12 bits where white is zero.
    assert kinds == {"TIFF-I", "TIFF-F", "TIFF-LAB", "tiff-12"}
    assert "tiff-12" in ACCEPTED
    assert len(ACCEPTED) > 120
    assert sum(map(decodes_alike, ACCEPTED.values())) > 25, "fast decoders are used"


@pytest.mark.parametrize("make", [*LOADERS.values(), dali_alone], ids=[*LOADERS, "dali-alone"])
def test_loaders_give_the_pixels_of_decode_for_every_file(make, tmp_path):
    """At most 3 of 255 levels on average: chroma upsampling and resizing round differently."""
    loader = make(as_split(tmp_path, ACCEPTED), 16, False, size=(SIDE, SIDE))
    images = torch.cat([batch.images for batch in loader]).permute(0, 2, 3, 1).numpy()
    cover = round(SIDE * 256 / 224)
    for (name, content), pixels in zip(ACCEPTED.items(), images, strict=True):
        image = decode(io.BytesIO(content))
        if name == "elongated":  # only that it is read
            continue
        width, height = image.size
        short = min(width, height)
        scaled = image.resize(
            (cover * width // short, cover * height // short), Image.Resampling.BILINEAR
        )
        left, top = round((scaled.width - SIDE) / 2), round((scaled.height - SIDE) / 2)
        want = np.asarray(scaled.crop((left, top, left + SIDE, top + SIDE))).astype(float)
        difference = np.abs(pixels - want).mean()
        assert difference < 3, (name, difference)


@pytest.mark.parametrize("name", [*REFUSED, *damaged_files()])
def test_all_loaders_and_the_check_refuse_a_file(name, tmp_path):
    split = as_split(tmp_path, {name: (REFUSED | damaged_files())[name]})
    content = split.read(0)
    _, corrupt = try_decode_all(tmp_path, split.files, lambda i: content, SIDE)
    assert list(corrupt) == [0]
    assert look_at(Listed("", "a", split.files[0], split.path(0))).findings
    for make in LOADERS.values():
        with pytest.raises(DataError, match=r"\.jpg"):
            list(make(split, 1, False, size=(SIDE, SIDE)))


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_deep_grayscale_keeps_its_high_bits(bits, photometric):
    levels = np.tile(np.linspace(0, 2**bits - 1, 64).astype(int), (64, 1))
    want = levels >> (bits - 8)
    image = decode(io.BytesIO(tiff(levels, bits, photometric)))
    assert np.array_equal(np.asarray(image)[..., 0], want if photometric else 255 - want)


@pytest.mark.parametrize("label", ["exif", "xmp"])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_turns_the_image(file_format, label):
    plain = decode(io.BytesIO(FILES[f"{file_format}-RGB-plain"]))
    turned = decode(io.BytesIO(FILES[f"{file_format}-RGB-{label}"]))
    want = np.rot90(np.asarray(plain).astype(int), -1)
    assert np.abs(np.asarray(turned).astype(int) - want).mean() < 2


def test_premultiplied_alpha_is_divided_out():
    levels = np.asarray(decode(io.BytesIO(FILES["tiff-premultiplied"]))).astype(float)
    stored = np.asarray(in_mode("RGBa").convert("RGBA")).astype(float)
    color, alpha = stored[..., :3], stored[..., 3:]
    assert (alpha > 250).any()
    clear = alpha[..., 0] > 0
    want = np.minimum(color * 255 / np.maximum(alpha, 1), 255)
    assert np.abs(levels - want)[clear].max() <= 1


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_refused_pixel_types_are_found_before_training(mode, tmp_path):
    names = (f"TIFF-{mode}-plain", "TIFF-RGB-plain")
    for name in names:
        (tmp_path / f"{name}.tif").write_bytes(FILES[name])
    split = FileSplit("train", tmp_path, tuple(f"{name}.tif" for name in names), torch.arange(2))
    with pytest.raises(DataError, match=f"1 of 2 image files.*TIFF-{mode}-plain.tif"):
        check_headers([split])
    check_headers([split.select(torch.tensor([1]))])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "decode_jpeg, /__w/vision/a/decode_jpeg.cpp:171, Image is incomplete",
            "Image is incomplete",
        ),
        ("[/opt/dali/x/decoder.cc:12] nvImageCodec failure", "nvImageCodec failure"),
        ("\x1b[31mred\x1b[0m text", "red text"),
    ],
)
def test_reasons_have_no_build_paths_or_escape_codes(message, reason):
    assert reason in reason_of(RuntimeError(message))
    assert "/" not in reason_of(RuntimeError(message))
    assert reason_of(RuntimeError(message)).isprintable()


def test_fallback_files_of_dali_are_deleted(tmp_path, monkeypatch):
    split = as_split(tmp_path, {name: FILES[f"TIFF-{name}-plain"] for name in ("L", "RGB", "P")})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    loader = LOADERS["dali"](split, 1, True, size=(SIDE, SIDE))
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert len(list(loader)) == 3
        assert list((tmp_path / "temporary").rglob("*.ppm")) == []
    loader.close()
    assert list((tmp_path / "temporary").glob("fastokd-dali-*")) == []
