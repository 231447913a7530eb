"""Attention on feature maps, for the gates and fusion heads of methods: [B, c, H, W] to the same shape."""

import torch
from torch import Tensor, nn

REDUCTION = 16
"""Squeeze-and-excitation and CBAM look at c channels through c / 16 (both papers' default)."""


def _bottleneck(channels: int) -> nn.Sequential:
    inner = max(channels // REDUCTION, 1)
    return nn.Sequential(nn.Linear(channels, inner, bias=False), nn.ReLU(), nn.Linear(inner, channels, bias=False))


class SqueezeExcitation(nn.Module):
    """Channels weighed by a sigmoid of their means, through two linear layers (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = _bottleneck(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] to [B, c, H, W]."""
        return x * torch.sigmoid(self.mlp(x.mean((2, 3))))[:, :, None, None]


class ChannelAttention(nn.Module):
    """Channels weighed by their means and maxima through shared layers (CBAM, Woo et al., ECCV 2018, eq. 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = _bottleneck(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] to [B, c, H, W]."""
        return x * torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))[:, :, None, None]


class SpatialAttention(nn.Module):
    """Positions weighed by a 7x7 convolution of the channels' mean and maximum (CBAM, eq. 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] to [B, c, H, W]."""
        return x * torch.sigmoid(self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)))


class NonLocal(nn.Module):
    """Every position adds what it sees of all others: the embedded Gaussian block (Wang et al., CVPR 2018, eq. 6).

    The batch norm at its end starts at 0, so that the block starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] to [B, c, H, W]."""
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        share = torch.softmax(query.transpose(1, 2) @ key, 2)  # [B, positions, positions]
        seen = (value @ share.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.bn(self.out(seen))


def _cbam(channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelAttention(channels), SpatialAttention())


ATTENTIONS = {"none": lambda channels: nn.Identity(), "se": SqueezeExcitation, "cbam": _cbam, "nonlocal": NonLocal}
"""By name, what builds the attention for c channels."""


def build_attention(name: str, channels: int) -> nn.Module:
    """The attention of that name for c channels."""
    return ATTENTIONS[name](channels)
