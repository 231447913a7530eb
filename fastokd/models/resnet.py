"""ResNets of four stages (He et al., CVPR 2016) for ImageNet, and ResNeXt (Xie et al., CVPR 2017)
for 32x32 images. State dicts are torchvision's.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import classifier, conv
from fastokd.models.residual import BasicBlock, Block, Bottleneck, residual_stage
from fastokd.models.staged import Parts, staged_network


class ResNet(PlainNetwork):
    """conv1, bn1, relu, (maxpool,) layer1 .. layer4, avgpool, flatten, fc: images to logits."""


def imagenet_stem() -> Parts:
    """A quarter of height and width."""
    return OrderedDict(
        conv1=conv(3, 64, 7, 2),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )


def cifar_stem() -> Parts:
    return OrderedDict(conv1=conv(3, 64, 3), bn1=nn.BatchNorm2d(64), relu=nn.ReLU())


def backbone(
    name: str,
    block: Block,
    num_blocks: Sequence[int],
    stem: Callable[[], Parts],
    image_size: int,
    split: int,
    **options: int,
) -> Backbone:
    stages = [
        residual_stage(f"layer{i + 1}", block, 64 * 2**i, count, 2 if i else 1, **options)
        for i, count in enumerate(num_blocks)
    ]
    return staged_network(
        name, ResNet, stem, 64, stages, classifier, split, compressed_split=2, image_size=image_size
    )


# On ImageNet stages 3 and 4 branch and deepen in turn, as in AHBF's published code (its paper says
# the last stage). ResNeXt-50 for CIFAR (FFM+CD, ACCV 2020, gives no details) has the usual changes:
# a 3x3 stem of stride 1, no max-pool. It branches at the last stage, as the other networks for
# CIFAR.
BACKBONES = {
    **{
        name: backbone(name, block, num_blocks, imagenet_stem, 224, split=2)
        for name, block, num_blocks in (
            ("resnet18_imagenet", BasicBlock, (2, 2, 2, 2)),
            ("resnet34_imagenet", BasicBlock, (3, 4, 6, 3)),
            ("resnet50_imagenet", Bottleneck, (3, 4, 6, 3)),
        )
    },
    "resnext50_32x4d": backbone(
        "resnext50_32x4d", Bottleneck, (3, 4, 6, 3), cifar_stem, 32, split=3, widen=2, groups=32
    ),
}
