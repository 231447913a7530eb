"""The color behind transparent pixels: in every loader, in the cache, conversions, and exports."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stream_loaders import LOADERS, picture

from fastokd.cli import main
from fastokd.data import Augment, FileSplit, list_files, open_dataset
from fastokd.data.convert import convert_dataset
from fastokd.data.decoding import decode, parse_color
from fastokd.errors import ConfigError
from fastokd.export import load_student, preprocess
from fastokd.export.preprocessing import background_of
from fastokd.train.runs import load_run

SIDE = 16
COLOR = (255, 128, 0)
BASE = picture(SIDE, SIDE, seed=1)
ALPHA = np.asarray(Image.linear_gradient("L").resize((SIDE, SIDE)))


def with_alpha(mode: str) -> Image.Image:
    image = BASE.convert("RGBA")
    image.putalpha(Image.fromarray(ALPHA))
    return image.convert(mode)


def on_color(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Levels [H, W, 3] on ``COLOR``, by the definition of alpha."""
    share = alpha[..., None] / 255
    return np.asarray(colors).astype(float) * share + np.array(COLOR) * (1 - share)


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


def cases() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files and their levels on ``COLOR``, by name."""
    rgb, gray = np.asarray(BASE), np.asarray(BASE.convert("L"))
    as_rgb = np.repeat(gray[..., None], 3, -1)
    square = np.full((SIDE, SIDE), 255)
    square[4:9, 4:9] = 0
    key, level = (1, 2, 3), 77
    keyed, gray_keyed = rgb.copy(), np.where(gray == level, level + 1, gray).astype(np.uint8)
    keyed[square == 0], gray_keyed[square == 0] = key, level
    deep = (gray_keyed.astype(np.uint16) << 8) | 255
    deep[0, 0] = level << 8  # not transparent, with the same high byte
    palette = BASE.quantize(15)
    indices = np.asarray(palette).copy()
    indices[square == 0] = 15
    colors = np.array([*palette.getpalette()[:45], 9, 9, 9]).reshape(16, 3)
    with_palette = Image.fromarray(indices, "P")
    with_palette.putpalette(colors.astype(np.uint8).tobytes())
    return {
        "rgba.png": (saved(with_alpha("RGBA"), "PNG"), on_color(rgb, ALPHA)),
        "la.png": (saved(with_alpha("LA"), "PNG"), on_color(as_rgb, ALPHA)),
        "rgba.webp": (
            saved(with_alpha("RGBA"), "WEBP", lossless=True, exact=True),
            on_color(rgb, ALPHA),
        ),
        "rgba.tif": (saved(with_alpha("RGBA"), "TIFF"), on_color(rgb, ALPHA)),
        "key.png": (
            saved(Image.fromarray(keyed), "PNG", transparency=key),
            on_color(keyed, square),
        ),
        "gray-key.png": (
            saved(Image.fromarray(gray_keyed), "PNG", transparency=level),
            on_color(np.repeat(gray_keyed[..., None], 3, -1), square),
        ),
        "deep-key.png": (
            saved(Image.fromarray(deep), "PNG", transparency=level << 8 | 255),
            on_color(np.repeat((deep >> 8)[..., None], 3, -1), square),
        ),
        "palette.png": (
            saved(with_palette, "PNG", transparency=15),
            on_color(colors[indices], square),
        ),
        "palette-gif.png": (
            saved(with_palette, "GIF", transparency=15),
            on_color(colors[indices], square),
        ),
        "opaque.png": (saved(BASE, "PNG"), rgb.astype(float)),
    }


CASES = cases()


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> FileSplit:
    root = tmp_path_factory.mktemp("transparent")
    for name, (content, _) in CASES.items():
        (root / name).write_bytes(content)
    return FileSplit("test", root, tuple(CASES), torch.arange(len(CASES)) % 2)


@pytest.mark.parametrize("name", CASES)
def test_decode_composes_on_the_color(name):
    content, want = CASES[name]
    pixels = np.asarray(decode(io.BytesIO(content), COLOR)).astype(float)
    assert np.abs(pixels - want).max() <= 1, name
    if name != "opaque.png":
        dropped = np.asarray(decode(io.BytesIO(content))).astype(float)
        assert np.abs(dropped - want).max() > 50, "the color is visible"


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_compose_on_the_color(split, loader):
    make = LOADERS[loader]
    settings = {"size": (SIDE, SIDE), "augment": Augment()}
    loaded = make(replace(split, background=COLOR), 5, False, **settings)
    images = torch.cat([batch.images for batch in loaded]).permute(0, 2, 3, 1).numpy()
    for (name, (_, want)), pixels in zip(CASES.items(), images, strict=True):
        assert np.abs(pixels - want).max() <= 1.01, name


def write_tree(root, count: int = 4):
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = picture(SIDE, SIDE, seed=10 * number + i).convert("RGBA")
                image.putalpha(Image.fromarray(np.roll(ALPHA, i, 0)))
                image.save(root / part / name / f"{i}.png")
    return root


def test_resident_dataset_and_its_cache_have_the_color(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastokd.data.cache.WORTH_SECONDS", 0.0)
    monkeypatch.setattr("fastokd.data.cache.SETTLED_SECONDS", -1.0)
    root = write_tree(tmp_path / "data")
    for _ in range(2):  # the second time from the cache
        for color in (None, COLOR, (0, 0, 0)):
            dataset = open_dataset(root, background=color)
            assert dataset.background == color
            want = decode(root / "train" / "cat" / "0.png", color)
            pixels = dataset.train.images[0].permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, np.asarray(want))
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 3
    assert list_files(root, background=COLOR).test.background == COLOR


@pytest.mark.parametrize("loader", ["resident", "torchvision", "dali"])
def test_run_and_export_prepare_images_alike(tmp_path, loader, capsys):
    root = write_tree(tmp_path / "data")
    options = ["--method", "baseline", "--model", "resnet8", "--epochs", "1", "--batch-size", "4"]
    options += ["--background", "#ff8000", "--loader", loader, "--out", str(tmp_path / "run")]
    assert main(["train", "--data", str(root), *options]) == 0
    assert "ff8000" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["export", str(tmp_path / "run")]) == 0
    _, record = load_student(tmp_path / "run" / "export")
    assert record["preprocessing"]["background"] == list(COLOR)
    run = load_run(tmp_path / "run")
    images = torch.cat([batch.images for batch in run.loader])
    for image, file in zip(images, run.images.files, strict=True):
        prepared = preprocess(record)(root / file)
        torch.testing.assert_close(prepared, image.contiguous(), rtol=0, atol=0.03)
        with Image.open(root / file) as opened:
            assert torch.equal(preprocess(record)(opened), prepared)
    capsys.readouterr()
    for model in (tmp_path / "run", tmp_path / "run" / "export"):
        assert main(["eval", str(model), "--data", str(root / "val")]) == 0
    accuracy = f"{100 * record['accuracy']['top1']:.2f}"
    assert capsys.readouterr().out.count(accuracy) >= 2


def test_record_without_background_drops_the_transparency():
    assert background_of({"preprocessing": {"image_size": [8, 8]}}) is None
    assert background_of({"preprocessing": {"background": [1, 2, 3]}}) == (1, 2, 3)


def test_conversion_composes_on_the_color(tmp_path, capsys):
    root = write_tree(tmp_path / "data")
    out = tmp_path / "out"
    command = ["data", "convert", str(root), "--out", str(out), "--shorter-side", "16"]
    assert main([*command, "--background", "#ff8000"]) == 0
    want = decode(root / "val" / "dog" / "1.png", COLOR)
    assert np.array_equal(np.asarray(Image.open(out / "val" / "dog" / "1.png")), np.asarray(want))
    with pytest.raises(ConfigError, match="another conversion"):
        convert_dataset(root, out, 16)


@pytest.mark.parametrize(
    ("text", "color"), [("white", (255, 255, 255)), ("#ff8000", COLOR), ("rgb(1,2,3)", (1, 2, 3))]
)
def test_color_names_and_numbers_are_read(text, color):
    assert parse_color(text) == color


@pytest.mark.parametrize("text", ["", "whit", "#ff80", "#ff800080", "255,0,0", "12"])
def test_other_texts_are_no_colors(text, tmp_path, capsys):
    with pytest.raises(ConfigError, match="not an opaque color; pass a name such as white"):
        parse_color(text)
    out = str(tmp_path / "run")
    assert main(["train", "--data", "digits", "--background", text, "--out", out]) == 2
    assert "not an opaque color" in capsys.readouterr().err
