"""Xception (Chollet, CVPR 2017) for 32x32 images, branched before its last two blocks.

FFM+CD (ACCV 2020), which trains it on CIFAR, gives no details but that the last two blocks are
separated; this is the usual form: a stem without strides, all else as for ImageNet. A branch has
the last of the eight middle blocks, of which auxiliary blocks are more, and the exit flow.
"""

import itertools
from collections import OrderedDict

from torch import Tensor, nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import classifier, conv, conv_norm
from fastokd.models.staged import Parts, Stage, block_stage, staged_network

MIDDLE, FEATURES = 728, 2048


class Xception(PlainNetwork):
    """conv1, conv2, entry1 .. entry3, middle, middle_last, exit, avgpool, flatten, fc."""


def separable(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A depthwise 3x3 convolution, a 1x1 and batch norm."""
    return [
        conv(in_channels, in_channels, 3, groups=in_channels),
        *conv_norm(in_channels, out_channels, 1, activation=None),
    ]


class Block(nn.Module):
    """Separable convolutions of these widths, ReLU before each, around a shortcut; ``down`` halves
    height and width.
    """

    def __init__(self, *widths: int, down: bool = False, first_relu: bool = True) -> None:
        super().__init__()
        shortcut = conv_norm(widths[0], widths[-1], 1, 2, activation=None) if down else None
        self.shortcut = shortcut
        layers: list[nn.Module] = []
        for i, pair in enumerate(itertools.pairwise(widths)):
            layers += ([nn.ReLU()] if first_relu or i else []) + separable(*pair)
        self.body = nn.Sequential(*layers, *([nn.MaxPool2d(3, 2, 1)] if down else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def middle_stage(name: str, num_blocks: int) -> Stage:
    return block_stage(name, num_blocks, MIDDLE, lambda *_: Block(*(MIDDLE,) * 4))


def stem() -> Parts:
    return OrderedDict(
        conv1=conv_norm(3, 32, 3),
        conv2=conv_norm(32, 64, 3),
        entry1=Block(64, 128, 128, down=True, first_relu=False),
        entry2=Block(128, 256, 256, down=True),
        entry3=Block(256, MIDDLE, MIDDLE, down=True),
    )


def tail(channels: int) -> Parts:
    return OrderedDict(
        exit=nn.Sequential(
            Block(channels, channels, 1024, down=True),
            *separable(1024, 1536),
            nn.ReLU(),
            *separable(1536, FEATURES),
            nn.ReLU(),
        )
    )


def backbone(name: str) -> Backbone:
    return staged_network(
        name,
        Xception,
        stem,
        stem_channels=MIDDLE,
        stages=[middle_stage("middle", 7), middle_stage("middle_last", 1)],
        tail=tail,
        tail_channels=FEATURES,
        head=classifier,
        split=1,
    )


BACKBONES = {"xception": backbone("xception")}
