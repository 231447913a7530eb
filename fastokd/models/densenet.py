"""DenseNet-BC for 32x32 images (Huang et al., CVPR 2017), branched at the last dense block. The
distillation papers' "DenseNet-40-12" is this form, with bottlenecks and compressing transitions.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.models.branched import Backbone, PlainNetwork
from fastokd.models.layers import conv, linear, pooled
from fastokd.models.staged import Stage, staged_network


class DenseNet(PlainNetwork):
    """conv1, dense1 .. dense3, norm, relu, avgpool, flatten, fc: [B, 3, H, W] to logits [B, C]."""


class DenseLayer(nn.Module):
    """Batch norm, ReLU and convolution, 1x1 then 3x3: appends ``growth`` channels to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, 4 * growth, 1, fan="fan_in")
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth, 3, fan="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        new = self.conv2(F.relu(self.norm2(new)))
        return torch.cat((x, new), 1)


def dense_stage(name: str, num_blocks: int, growth: int, *, transition: bool) -> Stage:
    """Dense layers, and a transition that halves channels, height and width, if any."""

    def out_channels(in_channels: int, count: int) -> int:
        return (in_channels + count * growth) // (2 if transition else 1)

    def build(in_channels: int, count: int) -> nn.Sequential:
        inputs = (in_channels + i * growth for i in range(count))
        layers: list[nn.Module] = [DenseLayer(channels, growth) for channels in inputs]
        if transition:
            channels = in_channels + count * growth
            halve = conv(channels, out_channels(in_channels, count), 1, fan="fan_in")
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), halve, nn.AvgPool2d(2)]
        return nn.Sequential(*layers)

    return Stage(name, num_blocks, build, out_channels)


def backbone(name: str, num_blocks: int, growth: int) -> Backbone:
    """Three stages of ``num_blocks`` dense layers."""
    return staged_network(
        name,
        DenseNet,
        stem=lambda: OrderedDict(conv1=conv(3, 24, 3, fan="fan_in")),
        stem_channels=24,
        stages=[dense_stage(f"dense{i}", num_blocks, growth, transition=i < 3) for i in (1, 2, 3)],
        tail=lambda channels: OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU()),
        head=lambda channels, num_classes: pooled(fc=linear(channels, num_classes)),
        split=2,
    )


# Two convolutions a layer, 6 layers a stage, two transitions, stem and classifier: depth 40.
BACKBONES = {"densenet40_12": backbone("densenet40_12", 6, 12)}
