"""Layers shared by the network families."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    fan: Literal["fan_in", "fan_out"] = "fan_out",
) -> nn.Conv2d:
    """A padded convolution without bias, Kaiming-normal."""
    sizes = in_channels, out_channels, kernel, stride, kernel // 2
    layer = nn.Conv2d(*sizes, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode=fan, nonlinearity="relu")
    return layer


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """A convolution, its batch norm and its activation, if any."""
    layers = [conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


def linear(in_features: int, out_features: int, std: float | None = None) -> nn.Linear:
    """A linear layer with bias 0 and weights from N(0, std^2), or with PyTorch's weights."""
    layer = nn.Linear(in_features, out_features)
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def pooled(**layers: nn.Module) -> nn.Sequential:
    """A head: global average pooling, then the given layers on [B, channels]."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(OrderedDict(avgpool=pool, flatten=nn.Flatten(), **layers))


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: [B, channels, H, W] to logits [B, C]."""
    return pooled(fc=nn.Linear(channels, num_classes))


@contextlib.contextmanager
def uncounted_batches(module: nn.Module) -> Iterator[None]:
    """Context in which batch norms with a momentum, which do not read their count of batches, do
    not count: one small kernel less per norm. The counters stay in the state dict.
    """
    counters = [
        (norm._buffers, norm.num_batches_tracked)
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and None not in (norm.momentum, norm.num_batches_tracked)
    ]
    try:
        for buffers, _ in counters:
            buffers["num_batches_tracked"] = None
        yield
    finally:
        for buffers, counter in counters:
            buffers["num_batches_tracked"] = counter
