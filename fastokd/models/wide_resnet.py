"""Wide ResNets for 32x32 images (Zagoruyko & Komodakis, BMVC 2016): pre-activation blocks, no
dropout.
"""

from collections import OrderedDict

from torch import nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import conv, linear, pooled
from fastokd.models.residual import PreActivationBlock, residual_stage
from fastokd.models.staged import Parts, StagedNetwork


class WideResNet(PlainNetwork):
    """conv1, layer1, layer2, layer3, bn, relu, avgpool, flatten, fc: images [B, 3, 32, 32] to
    logits [B, C].
    """


def stem() -> Parts:
    return OrderedDict(conv1=conv(3, 16, 3))


def tail(channels: int) -> Parts:
    return OrderedDict(bn=nn.BatchNorm2d(channels), relu=nn.ReLU())


def head(channels: int, num_classes: int) -> nn.Sequential:
    return pooled(fc=linear(channels, num_classes))


def backbone(name: str, depth: int, widen: int) -> Backbone:
    """WRN-depth-widen, depth = 6n + 4: three stages of n blocks, the last of which branches."""
    stages = tuple(
        residual_stage(f"layer{i}", PreActivationBlock, widen * width, (depth - 4) // 6, stride)
        for i, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1)
    )
    return StagedNetwork(
        name, WideResNet, stem, 16, stages, head, split=2, compressed_split=1, tail=tail
    ).backbone()


BACKBONES = {
    f"wrn{depth}_{widen}": backbone(f"wrn{depth}_{widen}", depth, widen)
    for depth, widen in ((16, 2), (16, 4), (28, 2))
}
