"""ResNets for 32x32 images (He et al., CVPR 2016, section 4.2), branched at the last stage (AHBF, AAAI 2023)."""

from collections import OrderedDict

from torch import nn

from fastokd.models.branched import Backbone, Branch, PlainNetwork
from fastokd.models.residual import BasicBlock, Block, Bottleneck, classifier, conv, stage

WIDTHS = (16, 32, 64)


class CifarResNet(PlainNetwork):
    """conv1, bn1, relu, layer1, layer2, layer3, avgpool, flatten, fc: images [B, 3, 32, 32] to logits [B, C]."""


def level_blocks(num_blocks: int, level: int, aux_blocks: int) -> int:
    """Blocks in stage 3 of a branch of hierarchy level 1, 2, ...: the first has the plain network's (AHBF section 3.2)."""
    return num_blocks + aux_blocks * (level - 1)


def backbone(name: str, block: Block, num_blocks: int) -> Backbone:
    """The network with three stages of ``num_blocks`` blocks: stem and stages 1 and 2 are the trunk, stage 3 branches."""
    stage1, stage2, stage3 = (width * block.expansion for width in WIDTHS)

    def build_trunk() -> nn.Sequential:
        return nn.Sequential(OrderedDict(
            conv1=conv(3, 16, 3),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            layer1=stage(block, 16, WIDTHS[0], num_blocks, stride=1),
            layer2=stage(block, stage1, WIDTHS[1], num_blocks, stride=2),
        ))

    def build_branch(num_classes: int, level: int, aux_blocks: int) -> Branch:
        layer3 = stage(block, stage2, WIDTHS[2], level_blocks(num_blocks, level, aux_blocks), stride=2)
        return Branch(nn.Sequential(OrderedDict(layer3=layer3)), classifier(stage3, num_classes), stage3)

    return Backbone(name, build_trunk, build_branch, CifarResNet.join)


# Two convolutions a block, three stages, stem and classifier: depth 6n + 2. The papers' ResNet-110 is made of
# bottlenecks: three convolutions a block, depth 9n + 2.
BACKBONES = {
    **{f"resnet{6 * n + 2}": backbone(f"resnet{6 * n + 2}", BasicBlock, n) for n in (1, 2, 3, 5, 7, 9)},
    "resnet110": backbone("resnet110", Bottleneck, 12),
}
