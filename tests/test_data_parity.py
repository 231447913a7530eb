"""All loaders give the same images and labels; DALI and torchvision make the same pictures of the
same files, those that Pillow makes.
"""

import builtins
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from stream_loaders import CROP, LOADERS, dali, dali_alone, picture, torchvision, write_split

from fastokd.data import FileSplit, list_files, make_loader, open_dataset
from fastokd.data.torchvision_loader import jpeg_decoder

SIDE, COVER = 64, 73  # 64 * 256 / 224


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


GOLDEN = {
    "colour-420.jpg": lambda p: (p, {"quality": 90}),
    "colour-422.jpg": lambda p: (p, {"quality": 90, "subsampling": 1}),
    "colour-444.jpg": lambda p: (p, {"quality": 90, "subsampling": 0}),
    "coarse.jpg": lambda p: (p, {"quality": 20}),
    "greyscale.jpg": lambda p: (p.convert("L"), {"quality": 90}),
    "cmyk.jpg": lambda p: (p.convert("CMYK"), {"quality": 90}),
    "progressive.jpg": lambda p: (p, {"quality": 90, "progressive": True}),
    **{f"exif-{i}.jpg": lambda p, i=i: (p, {"quality": 90, "exif": exif(i)}) for i in range(2, 9)},
    "tall.jpg": lambda p: (p.transpose(Image.Transpose.ROTATE_90), {"quality": 90}),
    "odd.jpg": lambda p: (p.crop((0, 0, 151, 99)), {"quality": 90}),
    "smaller-than-the-result.jpg": lambda p: (p.resize((31, 50)), {"quality": 90}),
    "sliver.jpg": lambda p: (p.resize((300, 9)), {"quality": 90}),
    "colour.png": lambda p: (p, {}),
    "alpha.png": lambda p: (with_alpha(p), {}),
    "grey-alpha.png": lambda p: (with_alpha(p).convert("LA"), {}),
    "palette.png": lambda p: (p.quantize(64), {}),
    "colour.bmp": lambda p: (p, {}),
    "colour.tif": lambda p: (p, {}),
    "colour.ppm": lambda p: (p, {}),
    "colour.webp": lambda p: (p, {"quality": 90}),
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    for name, make in GOLDEN.items():
        image, options = make(picture(200, 150, seed=4))
        image.save(root / name, **options)
    return FileSplit("test", root, tuple(GOLDEN), torch.arange(len(GOLDEN)) % 5)


def evaluated(make, split) -> torch.Tensor:
    """Pixel levels [N, 3, SIDE, SIDE] in the order of the split."""
    return torch.cat([batch.images for batch in make(split, 5, False, size=(SIDE, SIDE))])


def by_pillow(path) -> np.ndarray:
    """Upright RGB, the shorter side scaled to COVER with an antialiased triangle filter, the
    central square: [SIDE, SIDE, 3].
    """
    with Image.open(path) as image:
        orientation = image.getexif().get(0x0112, 1)
        turn = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}.get(orientation, [])
        image = image.convert("RGB")
    for how in (
        turn
    ):  # FLIP_LEFT_RIGHT 0, FLIP_TOP_BOTTOM 1, ROTATE_90 2, 180 3, 270 4, TRANSPOSE 5, TRANSVERSE 6
        image = image.transpose(how)
    width, height = image.size
    short = min(width, height)
    image = image.resize(
        (COVER * width // short, COVER * height // short), Image.Resampling.BILINEAR
    )
    left, top = round((image.width - SIDE) / 2), round((image.height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).astype(np.float32)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """60 training pictures, which 1 to 4 ranks share without a rest, and 29 for evaluation, which
    they do not.
    """
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 60), ("val", 29)):
        for i in range(count):
            folder = root / split / ("birch", "maple", "oak")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            picture(20, 20, seed=i).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resident", {}),
        ("dali", {"options": {"threads": 1}}),
        ("torchvision", {"options": {"workers": 0}}),
    ],
)
def test_loaders_yield_each_image_once_with_its_class(tree, name, options, world_size):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")
    dataset = (open_dataset if name == "resident" else list_files)(tree, image_size=16)
    for split in dataset.splits:
        seen = Counter()
        for rank in range(world_size):
            loader = make_loader(
                dataset, split, 5, loader=name, rank=rank, world_size=world_size, **options
            )
            for epoch in range(3):
                loader.set_epoch(epoch)
                seen.update(
                    (split.files[i], dataset.classes[target])
                    for batch in loader
                    for i, target in zip(
                        *map(torch.Tensor.tolist, (batch.index, batch.target)), strict=True
                    )
                )
        assert seen == {
            (f"{split.name}/{file.parent.name}/{file.name}", file.parent.name): 3
            for file in (tree / split.name).rglob("*.png")
        }


@pytest.mark.parametrize("make", [*LOADERS.values(), dali_alone])
def test_evaluation_images_match_pillow(golden, make):
    wrong = {}
    for i, got in enumerate(evaluated(make, golden)):
        difference = np.abs(got.permute(1, 2, 0).numpy() - by_pillow(golden.path(i)))
        # Decoded pixels agree bit for bit; what is left is how each library rounds while it scales.
        if difference.max() > 1.01 or difference.mean() > 0.35:
            wrong[golden.files[i]] = difference.max(), difference.mean()
    assert not wrong


def test_dali_and_torchvision_evaluation_images_agree(golden):
    assert torch.equal(evaluated(dali, golden), evaluated(torchvision, golden))
    difference = (evaluated(dali_alone, golden) - evaluated(torchvision, golden)).abs()
    assert difference.max() <= 1.01
    assert difference.mean() <= 0.25


@pytest.mark.parametrize("make", [dali, dali_alone])
def test_dali_and_torchvision_use_same_crop_windows(tmp_path, make):
    split = write_split(tmp_path, 40)
    ours = make(split, 20, True, size=(48, 48), augment=CROP)
    for epoch in range(2):
        other = torchvision(split, 20, True, size=(48, 48), augment=CROP)
        for loader in (ours, other):
            loader.set_epoch(epoch)
        for mine, theirs in zip(ours, other, strict=True):
            assert torch.equal(mine.index, theirs.index)
            assert torch.equal(mine.target, theirs.target)
            difference = (mine.images - theirs.images).abs()
            # DALI decodes the window alone and so knows less of the chroma at its edge; a window
            # that is off by one pixel differs by seven and more on average on these pictures.
            assert difference.mean((1, 2, 3)).max() <= 1.0
            assert difference.mean() <= 0.5


def test_pillow_without_torchvision_decoder_gives_same_pixels(golden, monkeypatch):
    want = evaluated(torchvision, golden)
    real = builtins.__import__

    def gone(name, *args, **kwargs):
        if name == "torchvision.io":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    jpeg_decoder.cache_clear()
    monkeypatch.setattr(builtins, "__import__", gone)
    try:
        assert jpeg_decoder() is None
        assert torch.equal(evaluated(torchvision, golden), want)
    finally:
        jpeg_decoder.cache_clear()
