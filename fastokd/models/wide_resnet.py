"""Wide ResNets for 32x32 images (Zagoruyko & Komodakis, BMVC 2016), without dropout."""

from collections import OrderedDict

from torch import nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import conv, linear, pooled
from fastokd.models.residual import PreActivationBlock, residual_stage
from fastokd.models.staged import staged_network


class WideResNet(PlainNetwork):
    """conv1, layer1 .. layer3, bn, relu, avgpool, flatten, fc: [B, 3, 32, 32] to logits [B, C]."""


def backbone(name: str, depth: int, widen: int) -> Backbone:
    """WRN-depth-widen, depth = 6n + 4: three stages of n blocks, the last of which branches."""
    return staged_network(
        name,
        WideResNet,
        stem=lambda: OrderedDict(conv1=conv(3, 16, 3)),
        stem_channels=16,
        stages=[
            residual_stage(f"layer{i}", PreActivationBlock, widen * width, (depth - 4) // 6, stride)
            for i, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1)
        ],
        tail=lambda channels: OrderedDict(bn=nn.BatchNorm2d(channels), relu=nn.ReLU()),
        head=lambda channels, num_classes: pooled(fc=linear(channels, num_classes)),
        split=2,
    )


BACKBONES = {
    f"wrn{depth}_{widen}": backbone(f"wrn{depth}_{widen}", depth, widen)
    for depth, widen in ((16, 2), (16, 4), (28, 2))
}
