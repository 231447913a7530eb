"""Branch a custom network: the callable takes num_classes, and --at names the branches' first part.

fastokd models own_network:make_net --plugin examples/own_network.py
fastokd train --data path/to/images --model own_network:make_net --at blocks.2 \
    --plugin examples/own_network.py --branches 3 --aux-blocks 1 --epochs 10
"""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block; the branches of AHBF add copies of the last one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.layers(x))


class Net(nn.Module):
    """Three stages and a linear classifier: images [B, 3, H, W] to logits [B, num_classes]."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 3, padding=1)
        down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(stem, Block(width), down, Block(2 * width), Block(2 * width))
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(images).mean((2, 3)))


def make_net(num_classes: int) -> nn.Module:
    """The network with fresh weights; further arguments need defaults."""
    return Net(num_classes)
