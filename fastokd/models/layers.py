"""The layers that the families share."""

from collections import OrderedDict
from typing import Literal

from torch import nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, *,
         fan: Literal["fan_in", "fan_out"] = "fan_out") -> nn.Conv2d:
    """A padded convolution without bias, Kaiming-normal: std sqrt(2 / (kernel^2 out_channels)) by fan-out."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode=fan, nonlinearity="relu")
    return layer


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, *,
              activation: type[nn.Module] | None = nn.ReLU) -> list[nn.Module]:
    """A convolution, its batch norm and the activation, if any: the layers, for a sequence of the caller's."""
    layers = [conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)]
    return layers if activation is None else [*layers, activation()]


def linear(in_features: int, out_features: int, std: float | None = None) -> nn.Linear:
    """A linear layer with the bias 0 and weights from N(0, std^2), or with the library's weights."""
    layer = nn.Linear(in_features, out_features)
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def pooled(**layers: nn.Module) -> nn.Sequential:
    """A head: global average pooling, then the given layers on [B, channels]."""
    return nn.Sequential(OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), **layers))


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: [B, channels, H, W] to logits [B, C]."""
    return pooled(fc=nn.Linear(channels, num_classes))
