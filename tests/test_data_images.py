"""Decoding: every colour mode and orientation gives the RGB pixels it should, and damage is
reported in one line.
"""

import io
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastokd.data import images as data_images
from fastokd.data.images import corrupt_files_error, decode, fit, resize_all, try_decode_all
from fastokd.errors import DataError, escape


def decode_all(root, files, *args, **options) -> torch.Tensor:
    """The decoded images; raises the error for corrupt files."""
    decoded, corrupt = try_decode_all(
        root, files, lambda i: (root / files[i]).read_bytes(), *args, **options
    )
    if corrupt:
        raise corrupt_files_error(root, files, corrupt)
    return decoded


@pytest.fixture
def picture() -> Image.Image:
    """A smooth 24 x 16 picture with a different ramp in every channel."""
    y, x = np.mgrid[0:16, 0:24]
    return Image.fromarray(
        np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], axis=-1).astype(np.uint8)
    )


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}]
)
def test_color_jpeg_decodes_to_rgb(picture, tmp_path, options):
    picture.save(tmp_path / "a.jpg", **options)
    assert np.array_equal(
        pixels(decode(tmp_path / "a.jpg")), pixels(Image.open(tmp_path / "a.jpg").convert("RGB"))
    )


def test_gray_jpeg_is_repeated_over_channels(picture, tmp_path):
    picture.convert("L").save(tmp_path / "a.jpg")
    grey = pixels(Image.open(tmp_path / "a.jpg"))
    assert grey.ndim == 2
    assert np.array_equal(
        pixels(decode(tmp_path / "a.jpg")), np.repeat(grey[..., None], 3, axis=-1)
    )


def test_cmyk_jpeg_keeps_colors(picture, tmp_path):
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    decoded = decode(tmp_path / "a.jpg")
    assert decoded.mode == "RGB"
    assert np.array_equal(pixels(decoded), pixels(Image.open(tmp_path / "a.jpg").convert("RGB")))
    assert np.abs(pixels(decoded) - pixels(picture)).mean() < 8  # not inverted


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    decoded = decode(tmp_path / "a.jpg")
    assert np.array_equal(
        pixels(decoded), pixels(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    )
    assert decoded.size == ((16, 24) if orientation > 4 else (24, 16))


@pytest.mark.parametrize(
    "transparency", [{}, {"transparency": 0}, {"transparency": bytes([0, 128])}]
)
@pytest.mark.filterwarnings("error")
def test_palette_png_decodes_to_rgb(picture, tmp_path, transparency):
    palette = picture.quantize(16)
    palette.save(tmp_path / "a.png", **transparency)
    assert np.array_equal(pixels(decode(tmp_path / "a.png")), pixels(palette.convert("RGB")))


def test_16_bit_gray_png_keeps_high_byte(tmp_path):
    levels = np.linspace(0, 65535, 24 * 16).astype(np.uint16).reshape(16, 24)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.pgm")
    for name in ("a.png", "a.pgm"):
        decoded = pixels(decode(tmp_path / name))
        assert np.array_equal(decoded, np.repeat((levels >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P"])
def test_other_modes_become_rgb(picture, tmp_path, mode):
    image = picture.convert("L").convert(mode) if mode == "LA" else picture.convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(pixels(decode(tmp_path / "a.png")), pixels(image.convert("RGB")))


def test_image_format_is_of_content_and_animation_is_first_frame(picture, tmp_path):
    picture.save(tmp_path / "png.jpg", format="PNG")
    assert np.array_equal(pixels(decode(tmp_path / "png.jpg")), pixels(picture))
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(decode(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (40, 40), (7, 50), (33, 32), (100, 3)])
@pytest.mark.parametrize("side", [16, 9, 32])
def test_fit_equals_torchvision_resize_and_center_crop(size, side):
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    want = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])(image)
    assert np.array_equal(pixels(fit(image, side)), pixels(want))


def test_resize_all_equals_fit_of_each_image():
    images = torch.randint(0, 256, (5, 3, 9, 12), dtype=torch.uint8)
    got = resize_all(images, 6, "here")
    assert got.is_contiguous(memory_format=torch.channels_last)
    for one, image in zip(got, images, strict=True):
        want = fit(Image.fromarray(image.permute(1, 2, 0).numpy()), 6)
        assert torch.equal(one, torch.from_numpy(np.array(want)).permute(2, 0, 1))


def save_many(folder, count, size=(6, 5)):
    rng = np.random.default_rng(1)
    names = [f"{i:03}.png" for i in range(count)]
    arrays = [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in names]
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array).save(folder / name)
    return names, arrays


@pytest.mark.parametrize("workers", [1, 3, None])
def test_decode_all_keeps_the_order_and_reports_progress(tmp_path, workers):
    names, arrays = save_many(tmp_path, 150)
    calls = []
    images = decode_all(tmp_path, names, workers=workers, progress=lambda *call: calls.append(call))
    assert images.shape == (150, 3, 5, 6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(arrays))
    assert calls == [(64, 150), (128, 150), (150, 150)]


def test_damaged_files_are_all_named_and_counted(tmp_path, picture):
    picture.save(tmp_path / "good.jpg", quality=95)
    whole = (tmp_path / "good.jpg").read_bytes()
    names = [
        "good.jpg",
        "cut.jpg",
        "empty.jpg",
        "text.jpg",
        "gone.jpg",
        "cut.png",
        "float.tif",
        "new\nline.jpg",
        "bad\udcff.jpg",
    ]
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "new\nline.jpg").write_bytes(b"")
    (tmp_path / "bad\udcff.jpg").write_bytes(b"")
    picture.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    Image.fromarray(np.zeros((16, 24), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError) as caught:
        decode_all(tmp_path, names)
    message = str(caught.value)
    assert "8 of 9 image files cannot be decoded" in message
    assert all(escape(name) in message for name in names[1:])
    assert "good.jpg" not in message
    assert message.isprintable()
    assert message.endswith("replace or delete them")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp"])
def test_truncated_file_is_refused_or_complete(picture, tmp_path, suffix):
    picture.save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    want, cut = pixels(decode(tmp_path / f"whole.{suffix}")), tmp_path / f"cut.{suffix}"
    for length in {*range(0, len(whole), 7), *range(len(whole) - 20, len(whole))}:
        cut.write_bytes(whole[:length])
        try:
            decoded = pixels(decode(cut))
        except Exception:
            continue
        assert np.array_equal(decoded, want), length  # only the bytes after the picture are gone


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("restarts", [{"restart_marker_blocks": 3}, {"restart_marker_rows": 1}])
def test_rows_missing_between_restart_markers_are_noticed(mode, subsampling, restarts):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    content = io.BytesIO()
    image = Image.fromarray(noise).convert(mode)
    image.save(content, "JPEG", subsampling=subsampling, **restarts)
    whole = content.getvalue()
    decode(io.BytesIO(whole))
    decode(io.BytesIO(whole + b"further bytes \xff\xd0"))
    markers = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", whole)]
    for cut in (markers[0], markers[len(markers) // 2], markers[-1]):
        with pytest.raises(ValueError, match="rows of the JPEG file are missing"):
            decode(io.BytesIO(whole[:cut] + b"\xff\xd9"))


def test_decode_all_names_at_most_ten_damaged_files(tmp_path):
    names = [f"{i}.jpg" for i in range(200)]
    with pytest.raises(DataError, match="200 of 200") as caught:
        decode_all(tmp_path, names)
    assert "9.jpg (No such file or directory) and 190 more" in str(caught.value)
    assert "10.jpg" not in str(caught.value)


def test_image_with_too_many_pixels_is_refused(tmp_path, picture, monkeypatch):
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a.png \(too many pixels\)"):
        decode_all(tmp_path, ["a.png"])


def test_images_of_different_sizes_are_refused_or_fitted(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 9)).save(tmp_path / "b.png")
    with pytest.raises(
        DataError, match=r"a.png is 6x8 and b.png is 9x5 \(height x width\).*--image-size 5$"
    ):
        decode_all(tmp_path, ["a.png", "b.png"])
    assert decode_all(tmp_path, ["a.png", "b.png"], image_size=7).shape == (2, 3, 7, 7)


def test_differing_sizes_stop_decoding_early(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 9)).save(tmp_path / "b.png")
    started = time.monotonic()
    with pytest.raises(DataError, match="differ in size"):
        decode_all(tmp_path, ["a.png", "b.png"] * 200_000, workers=1)
    assert time.monotonic() - started < 10


def test_images_larger_than_memory_are_refused_early(tmp_path, monkeypatch):
    Image.new("RGB", (512, 1024)).save(tmp_path / "a.png")
    monkeypatch.setattr(data_images, "available_memory", lambda: 2 * 2**30)
    with pytest.raises(
        DataError,
        match=r"1000 images of 1024x512 need 1.46 GiB decoded, more than half of the 2 GiB",
    ):
        decode_all(tmp_path, ["a.png"] * 1000)
    with pytest.raises(DataError, match="--image-size"):
        resize_all(torch.zeros(2000, 3, 1, 1, dtype=torch.uint8), 512, "cifar")
    assert decode_all(tmp_path, ["a.png"] * 3).shape == (3, 3, 1024, 512)


def test_available_memory_is_plausible():
    available = data_images.available_memory()
    assert available is None or 2**20 < available < 2**50
