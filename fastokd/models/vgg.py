"""VGG for 32x32 images (Simonyan & Zisserman, ICLR 2015) with batch norm, branched at the last
stage.

Dropout: the papers' code has 0.5 in the classifiers of every multi-branch network and none in the
baseline, so their comparison changes more than the method. Here ``vgg13`` and ``vgg16`` have 0.5,
the rate of VGG's paper, in every branch and in the baseline. ``backbone(..., dropout=0.0)`` makes a
network without.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import linear, pooled
from fastokd.models.staged import Stage, staged_network


class VGG(PlainNetwork):
    """stage1 .. stage5, avgpool, flatten, classifier: images [B, 3, 32, 32] to logits [B, C]."""


def vgg_stage(name: str, width: int, num_blocks: int) -> Stage:
    """3x3 convolutions with bias, batch norm and ReLU, then a max-pool that halves the maps."""

    def build(in_channels: int, count: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(count):
            conv = nn.Conv2d(in_channels, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.constant_(conv.get_parameter("bias"), 0)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            in_channels = width
        return nn.Sequential(*layers, nn.MaxPool2d(2))

    return Stage(name, num_blocks, build, lambda *_: width)


def backbone(name: str, num_blocks: Sequence[int], dropout: float = 0.5) -> Backbone:
    """The network with these numbers of convolutions in its five stages, and ``dropout`` between
    the classifier's linear layers.
    """

    def head(channels: int, num_classes: int) -> nn.Sequential:
        def hidden(in_features: int) -> list[nn.Module]:
            return [linear(in_features, 512, std=0.01), nn.ReLU(), nn.Dropout(dropout)]

        layers = [*hidden(channels), *hidden(512), linear(512, num_classes, std=0.01)]
        # Images of 32x32 leave one pixel, so pooling changes nothing; larger images fit too.
        return pooled(classifier=nn.Sequential(*layers))

    counts = enumerate(num_blocks)
    stages = [vgg_stage(f"stage{i + 1}", min(64 * 2**i, 512), count) for i, count in counts]
    return staged_network(name, VGG, OrderedDict, 3, stages, head, split=4)


BACKBONES = {
    "vgg13": backbone("vgg13", (2, 2, 2, 2, 2)),
    "vgg16": backbone("vgg16", (2, 2, 3, 3, 3)),
}
