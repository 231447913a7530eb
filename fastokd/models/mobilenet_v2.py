"""MobileNetV2 (Sandler et al., CVPR 2018) for 32x32 images and for ImageNet, branched after the row
of 64 channels.

State dicts of the ImageNet form are torchvision's. Each branch has its own rows of 96, 160 and 320
channels; a level's auxiliary blocks are in one of them. (In AHBF's published code every branch runs
the first branch's rows of 96 and 160 again, and its own are dead.)
"""

from collections import OrderedDict

from torch import Tensor, nn

from fastokd.models.branched import Backbone, Branch, PlainNetwork
from fastokd.models.layers import conv_norm, linear, pooled
from fastokd.models.staged import Stage, block_stage, staged_network

# Channels, blocks, stride on ImageNet and stride on 32x32 images of each row.
ROWS = (
    (16, 1, 1, 1),
    (24, 2, 2, 1),
    (32, 3, 2, 2),
    (64, 4, 2, 2),
    (96, 3, 1, 1),
    (160, 3, 2, 2),
    (320, 1, 1, 1),
)
FEATURES = 1280


class MobileNetV2(PlainNetwork):
    """features, avgpool, flatten, classifier: images [B, 3, H, W] to logits [B, C]."""

    @classmethod
    def join(cls, trunk: nn.Module, branch: Branch) -> "MobileNetV2":
        """As ``PlainNetwork.join``; all blocks from stem to last are one numbered sequence."""
        blocks: list[nn.Module] = []
        for name, part in (*trunk.named_children(), *branch.body.named_children()):
            blocks += part.children() if name.startswith("row") else [part]
        features = nn.Sequential(*blocks)
        features.training = trunk.training
        return cls(OrderedDict(features=features, **dict(branch.head.named_children())))


class InvertedResidual(nn.Module):
    """A widening 1x1 convolution (if there is an ``expansion``), a depthwise 3x3 and a narrowing
    1x1, with a shortcut if the shapes agree.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int | None,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        inner = (expansion or 1) * in_channels
        layers = [conv_norm(in_channels, inner, 1, activation=activation)] if expansion else []
        layers.append(conv_norm(inner, inner, 3, stride, groups=inner, activation=activation))
        self.conv = nn.Sequential(*layers, *conv_norm(inner, out_channels, 1, activation=None))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


def backbone(
    name: str,
    width: float,
    divisor: int,
    activation: type[nn.Module],
    dropout: float,
    image_size: int,
) -> Backbone:
    """The network with all channels but the last 1,280 times ``width``.

    Args:
        divisor: channels are rounded to a multiple of it, to at least 90 % of the exact value.
        activation: ReLU6 in the ImageNet form; the CIFAR codes use ReLU.
        dropout: probability of zeroing a feature before the classifier.
        image_size: 32 for the form with the strides for CIFAR, else the ImageNet form.
    """

    def scaled(channels: int) -> int:
        exact = channels * width
        rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * exact else rounded

    def row(name: str, width: int, num_blocks: int, stride: int, expansion: int | None) -> Stage:
        def build(in_channels: int, is_first: bool) -> nn.Module:
            step = stride if is_first else 1
            return InvertedResidual(in_channels, width, step, expansion, activation)

        return block_stage(name, num_blocks, width, build)

    def head(channels: int, num_classes: int) -> nn.Sequential:
        last = linear(channels, num_classes, std=0.01)
        return pooled(classifier=nn.Sequential(nn.Dropout(dropout), last))

    cifar = image_size == 32
    rows = []
    for channels, count, stride, cifar_stride in ROWS:
        # The first row is not widened, but the CIFAR code has the convolution there too.
        expansion = 6 if channels > ROWS[0][0] else 1 if cifar else None
        stride = cifar_stride if cifar else stride
        rows.append(row(f"row{channels}", scaled(channels), count, stride, expansion))
    return staged_network(
        name,
        MobileNetV2,
        stem=lambda: OrderedDict(stem=conv_norm(3, scaled(32), 3, 2, activation=activation)),
        stem_channels=scaled(32),
        stages=rows,
        tail=lambda channels: OrderedDict(
            last=conv_norm(channels, FEATURES, 1, activation=activation)
        ),
        tail_channels=FEATURES,
        head=head,
        split=4,
        compressed_split=4,
        image_size=image_size,
    )


BACKBONES = {
    # Without dropout: torchvision's 0.2 belongs to its ImageNet recipe.
    **{
        name: backbone(name, width, 1, nn.ReLU, 0.0, 32)
        for name, width in (("mobilenetv2_x0_5", 0.5), ("mobilenetv2_x1_0", 1.0))
    },
    **{
        name: backbone(name, width, 8, nn.ReLU6, 0.2, 224)
        for name, width in (("mobilenetv2_x0_5_imagenet", 0.5), ("mobilenetv2_x1_0_imagenet", 1.0))
    },
}
