"""ResNets for 32x32 images (He et al., CVPR 2016, 4.2), branched at the last stage."""

from collections import OrderedDict

from torch import nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import classifier, conv
from fastokd.models.residual import BasicBlock, Block, Bottleneck, residual_stage
from fastokd.models.staged import Parts, staged_network


class CifarResNet(PlainNetwork):
    """conv1, bn1, relu, layer1 .. layer3, avgpool, flatten, fc: [B, 3, 32, 32] to logits [B, C]."""


def stem() -> Parts:
    return OrderedDict(conv1=conv(3, 16, 3), bn1=nn.BatchNorm2d(16), relu=nn.ReLU())


def backbone(name: str, block: Block, num_blocks: int, **options: int) -> Backbone:
    """The network with three stages of ``num_blocks`` blocks: stem and stages 1 and 2 are the
    trunk, stage 3 branches.

    In compression mode stages 2 and 3 branch.
    """
    stages = [
        residual_stage(f"layer{i}", block, width, num_blocks, stride, **options)
        for i, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1)
    ]
    return staged_network(name, CifarResNet, stem, 16, stages, classifier, split=2)


# Two convolutions a block, three stages, stem and classifier: depth 6n + 2. The papers' ResNet-110
# is made of bottlenecks: three convolutions a block, depth 9n + 2. So is OKDDip's WRN-20-8, whose
# inner convolutions are 8 times as wide; it is not the pre-activation network of the wide ResNets'
# paper.
BACKBONES = {
    **{
        f"resnet{6 * n + 2}": backbone(f"resnet{6 * n + 2}", BasicBlock, n)
        for n in (1, 2, 3, 5, 7, 9)
    },
    "resnet110": backbone("resnet110", Bottleneck, 12),
    "wrn20_8": backbone("wrn20_8", Bottleneck, 2, widen=8),
}
