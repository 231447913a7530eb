"""ResNets (He et al., CVPR 2016, 4.2) and wide ResNets (Zagoruyko & Komodakis, BMVC 2016, without
dropout) for 32x32 images, branched at the last of three stages.
"""

from collections import OrderedDict

from torch import nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import classifier, conv, linear, pooled
from fastokd.models.residual import (
    BasicBlock,
    Block,
    Bottleneck,
    PreActivationBlock,
    residual_stage,
)
from fastokd.models.staged import Parts, Stage, staged_network


class CifarResNet(PlainNetwork):
    """conv1, bn1, relu, layer1 .. layer3, avgpool, flatten, fc: [B, 3, 32, 32] to logits [B, C]."""


class WideResNet(PlainNetwork):
    """conv1, layer1 .. layer3, bn, relu, avgpool, flatten, fc: [B, 3, 32, 32] to logits [B, C]."""


def three_stages(block: Block, factor: int, num_blocks: int, **options: int) -> list[Stage]:
    """Stages of 16, 32 and 64 channels times ``factor``; the second and third halve the maps."""
    return [
        residual_stage(f"layer{i}", block, factor * width, num_blocks, stride, **options)
        for i, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1)
    ]


def stem() -> Parts:
    return OrderedDict(conv1=conv(3, 16, 3), bn1=nn.BatchNorm2d(16), relu=nn.ReLU())


def backbone(name: str, block: Block, num_blocks: int, **options: int) -> Backbone:
    """A ResNet with ``num_blocks`` blocks in each stage."""
    stages = three_stages(block, 1, num_blocks, **options)
    return staged_network(name, CifarResNet, stem, 16, stages, classifier, split=2)


def wide_backbone(name: str, depth: int, widen: int) -> Backbone:
    """WRN-depth-widen, depth = 6n + 4: n pre-activation blocks in each stage."""
    return staged_network(
        name,
        WideResNet,
        stem=lambda: OrderedDict(conv1=conv(3, 16, 3)),
        stem_channels=16,
        stages=three_stages(PreActivationBlock, widen, (depth - 4) // 6),
        tail=lambda channels: OrderedDict(bn=nn.BatchNorm2d(channels), relu=nn.ReLU()),
        head=lambda channels, num_classes: pooled(fc=linear(channels, num_classes)),
        split=2,
    )


# Two convolutions a block, three stages, stem and classifier: depth 6n + 2. The papers' ResNet-110
# is made of bottlenecks: three convolutions a block, depth 9n + 2. So is OKDDip's WRN-20-8, whose
# inner convolutions are 8 times as wide; it is not the pre-activation network of the wide ResNets'
# paper.
BACKBONES = {
    **{
        f"resnet{6 * n + 2}": backbone(f"resnet{6 * n + 2}", BasicBlock, n)
        for n in (1, 2, 3, 5, 7, 9)
    },
    **{
        f"wrn{depth}_{widen}": wide_backbone(f"wrn{depth}_{widen}", depth, widen)
        for depth, widen in ((16, 2), (16, 4), (28, 2))
    },
    "resnet110": backbone("resnet110", Bottleneck, 12),
    "wrn20_8": backbone("wrn20_8", Bottleneck, 2, widen=8),
}
