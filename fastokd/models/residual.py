"""The ResNets' blocks (He et al., CVPR 2016) with torchvision's names, and identity blocks."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastokd.models.layers import conv, conv_norm
from fastokd.models.staged import Stage, block_stage

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution with batch norm where stride or width changes, else None (the identity)."""
    if stride == 1 and in_channels == out_channels:
        return None
    return conv_norm(in_channels, out_channels, 1, stride, activation=None)


class ResidualBlock(nn.Module):
    """A block around a shortcut. ``drop_path`` is its stochastic depth, None without."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path: nn.Module | None = None

    def set_drop_path(self, rate: float) -> None:
        """Skip the block's layers for a random fraction ``rate`` of the images in training."""
        from torchvision.ops import StochasticDepth

        self.drop_path = StochasticDepth(rate, "row") if rate else None

    def add(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """The sum of the layers' output and the shortcut, both [B, C, H, W]."""
        return (out if self.drop_path is None else self.drop_path(out)) + shortcut


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions around a shortcut, to [B, width, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(self.add(out, x if self.downsample is None else self.downsample(x)))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, to [B, 4 width, H / stride, W / stride].

    The stride is on the 3x3 convolution, which has ``widen * width`` channels in ``groups`` groups:
    ``widen`` makes a wide ResNet of it, and with groups a ResNeXt.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, widen: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        inner, out_channels = widen * width, self.expansion * width
        self.conv1 = conv(in_channels, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(self.add(out, x if self.downsample is None else self.downsample(x)))


class PreActivationBlock(ResidualBlock):
    """Two 3x3 convolutions, batch norm and ReLU before each, to [B, width, H / stride, W / stride].

    Where the width changes, the shortcut is a 1x1 convolution of the first ReLU's output (Zagoruyko
    & Komodakis, BMVC 2016, after He et al., ECCV 2016).
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        changes = stride > 1 or in_channels != width
        self.shortcut = conv(in_channels, width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.add(self.conv2(F.relu(self.bn2(out))), shortcut)


Block = type[BasicBlock] | type[Bottleneck] | type[PreActivationBlock]


def residual_stage(
    name: str, block: Block, width: int, num_blocks: int, stride: int, **options: int
) -> Stage:
    """Blocks of one width; the first has the stride. ``options`` are the block's."""

    def build(in_channels: int, is_first: bool) -> nn.Module:
        return block(in_channels, width, stride if is_first else 1, **options)

    return block_stage(name, num_blocks, width * block.expansion, build)


@torch.no_grad()
def zeros_for_identity(
    block: nn.Module, x: Tensor, *others: Any, **options: Any
) -> list[str] | None:
    """The names of parameters whose zeros make a block, which may be on the meta device, the
    identity of inputs such as ``x``, whatever its other parameters are; None if there are none.

    Tried are the last layer, as in residual blocks of convolutions; the last layer of each part
    with several layers, as in transformer blocks; and normalization between parts (Swin V2).
    """
    trial = copy.deepcopy(block).eval()
    if any(value.is_meta for value in trial.state_dict().values()):
        trial.to_empty(device=x.device)
        for buffer in trial.buffers():
            buffer.fill_(1)
    values = {
        name: torch.linspace(0.01, 0.1, each.numel()).view(each.shape).to(each)
        for name, each in trial.named_parameters()
    }
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in values))
    children = dict(trial.named_children())
    parts = [[each for each in layers if f"{each}.".startswith(f"{name}.")] for name in children]
    norms = [name for name, child in children.items() if isinstance(child, NORMS)]
    for zero in (layers[-1:], [part[-1] for part in parts if len(part) > 1], norms):
        names = [name for name in values if name.rpartition(".")[0] in zero]
        for name, parameter in trial.named_parameters():
            parameter.copy_(values[name] * (name not in names))
        output = trial(x.clone(), *others, **options)
        if isinstance(output, Tensor) and torch.equal(output, x):
            return names
    return None
