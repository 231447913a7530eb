"""Attention on feature maps, for gates: [B, c, H, W] to the same shape."""

import torch
from torch import Tensor, nn

from fastokd.methods.layers import ChannelAttention, SpatialAttention


class SqueezeExcitation(nn.Module):
    """Channels weighed by a sigmoid of their means, c / 16 hidden units (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 1)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] to [B, c, H, W]."""
        return x * torch.sigmoid(self.mlp(x.mean((2, 3))))[:, :, None, None]


class CBAM(nn.Module):
    """Channels, then positions, weighed by their means and maxima (Woo et al., ECCV 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] to [B, c, H, W]."""
        x = x * self.channel(x)
        return torch.mul(x, self.spatial(x))


class NonLocal(nn.Module):
    """Add to every position a weighted sum over all: the embedded Gaussian block (Wang et al., CVPR
    2018, eq. 6). It starts as the identity: the batch norm at its end starts at 0.
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
        return torch.add(x, self.bn(self.out(seen)))


ATTENTIONS = {
    "none": lambda channels: nn.Identity(),
    "se": SqueezeExcitation,
    "cbam": CBAM,
    "nonlocal": NonLocal,
}
"""Constructors of the attention for c channels, by name."""
