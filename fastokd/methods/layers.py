"""Modules shared by several methods, and running a peer stage by stage."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """A weight in (0, 1) for every channel (CBAM, Woo et al., ECCV 2018, eq. 2): one small network
    of ``channels / ratio`` hidden units on the channels' means and maxima, added, and a sigmoid.
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(channels // ratio, 1)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, c, H, W] to weights [B, c, 1, 1]."""
        pooled = (x.mean((2, 3)), x.amax((2, 3)))
        mean, peak = (self.expand(F.relu(self.reduce(values))) for values in pooled)
        return torch.sigmoid(mean + peak)[:, :, None, None]


class SpatialAttention(nn.Module):
    """A weight in (0, 1) per position: 7x7 convolution of channel mean and maximum (CBAM eq. 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, c, H, W] to weights [B, 1, H, W]."""
        pooled = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
        return torch.sigmoid(self.conv(torch.cat(pooled, 1)))


class FusionHead(nn.Module):
    """A classifier on the feature maps of several networks (FFSD and AFID, published code).

    A depth-wise 3x3 convolution of their concatenation and a 1x1 convolution to ``channels``, each
    with batch norm and ReLU, give the fused map; pooling and a linear layer its logits.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fuse = depthwise_pointwise(in_channels, channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [B, c_m, H, W] to the fused map [B, channels, H, W] and logits [B, C]."""
        fused = self.fuse(torch.cat(tuple(maps), 1))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(fused, 1).flatten(1))
        return fused, logits


def depthwise_pointwise(in_channels: int, channels: int) -> nn.Sequential:
    """A depth-wise 3x3 and a 1x1 convolution to ``channels``, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Stage(NamedTuple):
    """A run of a peer's children whose output has one spatial size."""

    end: int
    """Index after its last child."""
    channels: int
    """Of its output."""
    size: tuple[int, int]
    """Height and width of its output for images of 64 x 64."""


def children(peer: nn.Module) -> list[nn.Module]:
    """The modules that a peer runs up to its feature maps, in order.

    Raises:
        ValueError: its trunk or its branch's body is no ``nn.Sequential``.
    """
    parts = (getattr(peer, "trunk", None), getattr(getattr(peer, "branch", None), "body", None))
    modules: list[nn.Module] = []
    for part in parts:
        if not isinstance(part, nn.Sequential):
            reason = "this network does not run as a sequence of modules"
            raise ValueError(f"it needs the maps between the stages, and {reason}")
        modules += part
    return modules


def run_head(peer: nn.Module, features: Tensor) -> Tensor:
    """The logits [B, C] of a peer's head, from its feature maps."""
    branch: Any = peer.branch
    logits: Tensor = branch.head(features)
    return logits


def stages(peer: nn.Module) -> list[Stage]:
    """The stages of a peer, one for each spatial size of its maps; errors as ``children``."""
    result: list[Stage] = []
    x = torch.empty(1, 3, 64, 64, device="meta")
    with torch.no_grad():
        for index, child in enumerate(children(peer), start=1):
            x = copy.deepcopy(child).to("meta").eval()(x)
            size = (x.shape[2], x.shape[3])
            if result and result[-1].size == size:
                result.pop()
            result.append(Stage(index, x.shape[1], size))
    return result


def run_stages(peer: nn.Module, x: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """Images to the maps after each of ``ends``, ascending indices into ``children``."""
    maps = []
    for index, child in enumerate(children(peer), start=1):
        x = child(x)
        if index in ends:
            maps.append(x)
    return maps
