"""ShuffleNetV2 (Ma et al., ECCV 2018) for 32x32 images, branched at the last stage.

FFM+CD (ACCV 2020), which trains it on CIFAR, gives no details; this is the usual form: a 3x3 stem
of stride 1 and no max-pool, all else as for ImageNet. State dicts are torchvision's.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import classifier, conv_norm
from fastokd.models.staged import Stage, staged_network

STEM, FEATURES = 24, 1024


class ShuffleNetV2(PlainNetwork):
    """conv1, stage2 .. stage4, conv5, avgpool, flatten, fc: [B, 3, 32, 32] to logits [B, C]."""


def shuffled_halves(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, c, H, W] to the halves of their interleaved channels a0, b0, a1, b1, ..., each
    in its own memory: this saves a concatenation, and a copy in the next convolution.
    """
    # The dimension of the channels in memory
    at = 3 if b.is_contiguous(memory_format=torch.channels_last) else 1

    def interleave(a: Tensor, b: Tensor) -> Tensor:
        pairs = torch.stack((a.movedim(1, at), b.movedim(1, at)), at + 1)
        return pairs.flatten(at, at + 1).movedim(at, 1)

    half = a.shape[1] // 2
    return interleave(a[:, :half], b[:, :half]), interleave(a[:, half:], b[:, half:])


def separable(in_channels: int, width: int, stride: int) -> list[nn.Module]:
    """A depthwise 3x3 convolution and a 1x1."""
    return [
        *conv_norm(in_channels, in_channels, 3, stride, groups=in_channels, activation=None),
        *conv_norm(in_channels, width, 1),
    ]


class DownUnit(nn.Module):
    """Halve height and width: [B, c, H, W] to two halves [B, width, H / 2, W / 2]."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.branch1 = nn.Sequential(*separable(in_channels, width, 2))
        self.branch2 = nn.Sequential(*conv_norm(in_channels, width, 1), *separable(width, width, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return shuffled_halves(self.branch1(x), self.branch2(x))


class Unit(nn.Module):
    """Convolve one half of the channels and shuffle both: two halves to two halves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch2 = nn.Sequential(*conv_norm(width, width, 1), *separable(width, width, 1))

    def forward(self, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return shuffled_halves(halves[0], self.branch2(halves[1]))


class Concatenate(nn.Module):
    """Two halves to the map at the end of a stage."""

    def forward(self, halves: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(halves, 1)


def shuffle_stage(name: str, channels: int, num_blocks: int) -> Stage:
    def build(in_channels: int, count: int) -> nn.Sequential:
        return nn.Sequential(
            DownUnit(in_channels, channels // 2),
            *(Unit(channels // 2) for _ in range(count - 1)),
            Concatenate(),
        )

    return Stage(name, num_blocks, build, lambda *_: channels)


def backbone(name: str) -> Backbone:
    return staged_network(
        name,
        ShuffleNetV2,
        stem=lambda: OrderedDict(conv1=conv_norm(3, STEM, 3)),
        stem_channels=STEM,
        stages=[shuffle_stage(f"stage{i}", 29 * 2**i, 8 if i == 3 else 4) for i in (2, 3, 4)],
        tail=lambda channels: OrderedDict(conv5=conv_norm(channels, FEATURES, 1)),
        tail_channels=FEATURES,
        head=classifier,
        split=2,
    )


BACKBONES = {"shufflenetv2_x1_0": backbone("shufflenetv2_x1_0")}
