"""Images like ImageNet's to benchmark decoding: 500 x 375 JPEG files of about 100 KB, in class
folders.

    python -m bench.images OUT [--count N] [--source FOLDER]

They are composed of small photographs if a folder of them is given, otherwise generated. The same
arguments give the same images.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fastokd.storage import write_atomically

SIZE = (500, 375)
BYTES = 100_000
_TILE = 64
_CLASSES = 10


def compose(out: Path, count: int, source: Path | None = None) -> Path:
    """Write ``count`` training images and a tenth as many for evaluation to ``out``; returns it.
    Existing files are kept.

    Args:
        source: a folder with small JPEG files anywhere below it; None to generate the images.
    """
    files = (
        []
        if source is None
        else sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    )
    if source is not None and not files:
        raise SystemExit(f"{source}: no .jpg or .jpeg files below it")

    def write(item: tuple[str, int]) -> None:
        split, i = item
        path = out / split / f"class-{i % _CLASSES}" / f"{i:06d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                path,
                lambda file: file.write(
                    _encode(_image(np.random.default_rng([split == "val", i]), files))
                ),
                durable=False,
            )

    items = [
        (split, i)
        for split, number in (("train", count), ("val", max(_CLASSES, count // 10)))
        for i in range(number)
    ]
    # Pillow encodes and scales without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(write, items):
            pass
    return out


def _image(rng: np.random.Generator, files: list[Path]) -> Image.Image:
    columns, rows = SIZE[0] // _TILE + 1, SIZE[1] // _TILE + 1
    canvas = Image.new("RGB", (columns * _TILE, rows * _TILE))
    for place in range(columns * rows):
        if files:
            with Image.open(files[rng.integers(len(files))]) as tile:
                part = tile.convert("RGB").resize((_TILE, _TILE))
        else:
            coarse = rng.integers(
                0, 256, (rng.integers(2, 24), rng.integers(2, 24), 3), dtype=np.uint8
            )
            part = Image.fromarray(coarse).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        canvas.paste(part, (place % columns * _TILE, place // columns * _TILE))
    return canvas.crop((0, 0, *SIZE))


def _encode(image: Image.Image) -> bytes:
    """The image at the highest quality that stays within ``BYTES``."""
    for quality in range(98, 50, -2):
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= BYTES:
            break
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="training images (default 2000)")
    parser.add_argument("--source", type=Path, help="folder of small JPEG files to compose them of")
    options = parser.parse_args()
    print(compose(options.out, options.count, options.source))


if __name__ == "__main__":
    main()
