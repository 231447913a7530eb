"""The handwritten digits that come with the package: 1,797 images of 8 x 8, so that a first run
needs no files.

Source and license: the ``NOTICE`` file. Within each class, every fifth image in the order of the
source is a test image (``TEST_EVERY``).
"""

from pathlib import Path

import numpy as np
import torch

from fastokd.data.augment import Augment
from fastokd.data.dataset import DataSource, Split
from fastokd.data.images import resize_all
from fastokd.data.kinds import DatasetKind, ReadOptions
from fastokd.errors import ConfigError

FILE = Path(__file__).with_name("digits.npz")
TEST_EVERY = 5


def read(path: Path | None, options: ReadOptions) -> DataSource[Split]:
    """Read the digits as RGB, their 17 gray levels spread over 0..255."""
    if path is not None:
        raise ConfigError(
            f"digits are part of the package and take no folder; write digits, not digits:{path}"
        )
    with np.load(FILE) as stored:
        levels, targets = (torch.from_numpy(stored[name]) for name in ("levels", "targets"))
    targets = targets.long()
    # 0..16 to 0..255, rounded to the nearest integer.
    gray = ((levels.int() * 255 + 8) // 16).to(torch.uint8)
    images = gray.unsqueeze(-1).repeat(1, 1, 1, 3).permute(0, 3, 1, 2)
    images = resize_all(images, options.image_size, "digits")
    one_hot = torch.nn.functional.one_hot(targets, 10)
    rank_in_class = (one_hot.cumsum(0) * one_hot).sum(1) - 1
    is_test = rank_in_class % TEST_EVERY == TEST_EVERY - 1
    whole = Split("train", images, targets)
    train = whole.select((~is_test).nonzero().flatten())
    test = whole.select(is_test.nonzero().flatten(), "test")
    augment = Augment(pad=images.shape[-1] // 8, flip=False)
    return DataSource("digits", tuple(map(str, range(10))), train, test, augment=augment)


DIGITS = DatasetKind(read)
