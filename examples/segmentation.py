"""Train a branched segmentation network with AHBF's loss: one label for each pixel.

python examples/segmentation.py --steps 300

The images are synthetic: a disc or a square on a noisy background. The pixels around a shape's
border are labeled 255 and ignored, as in VOC and Cityscapes.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastokd.losses import AHBFLoss, ramp_up

CLASSES, SIZE, BORDER = 3, 32, 255


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] and labels [B, H, W]: 0 background, 1 disc, 2 square, 255 border."""
    steps = torch.arange(SIZE).float()
    center = torch.rand((count, 2, 1, 1), generator=generator) * (SIZE - 16) + 8
    radius = torch.rand((count, 1, 1), generator=generator) * 5 + 4
    y, x = (steps[:, None] - center[:, 0]).abs(), (steps[None] - center[:, 1]).abs()
    is_square = torch.rand((count, 1, 1), generator=generator) < 0.5
    distance = torch.where(is_square, torch.maximum(x, y), (x**2 + y**2).sqrt()) - radius
    labels = (distance < 0) * (1 + is_square.long())
    labels[distance.abs() < 0.7] = BORDER
    images = torch.randn((count, 3, SIZE, SIZE), generator=generator)
    images += 2 * (distance < 0)[:, None]
    return images.to(memory_format=torch.channels_last), labels


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class BranchedFCN(nn.Module):
    """A fully convolutional trunk and branches of 1, 2 and 3 blocks; the first is the student."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.trunk = nn.Sequential(block(3, width), nn.MaxPool2d(2), block(width, width))
        self.branches = nn.ModuleList(
            nn.Sequential(*[block(width, width) for _ in range(depth)]) for depth in (1, 2, 3)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, CLASSES, 1) for _ in range(3))
        self.gates = nn.ModuleList(nn.Conv2d(width, 2, 1) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits 3 x [B, C, H, W], and mixing weights 2 x [B, 2, H, W], one pair for each pixel."""
        shared = self.trunk(images)
        features = [
            F.interpolate(branch(shared), scale_factor=2, mode="bilinear")
            for branch in self.branches
        ]
        logits = [head(maps) for head, maps in zip(self.heads, features, strict=True)]
        gates = zip(self.gates, features[1:], strict=True)
        return logits, [gate(maps).softmax(1) for gate, maps in gates]


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
model = BranchedFCN().to(device, memory_format=torch.channels_last)
# The background has most pixels.
weight = torch.tensor([0.4, 1.0, 1.0])
criterion = AHBFLoss(num_branches=3, ignore_index=BORDER, class_weight=weight).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(steps):
    images, labels = (each.to(device) for each in shapes(16, generator))
    logits, scores = model(images)
    loss = criterion(logits, labels, scores=scores, kd_weight=ramp_up(step, steps))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (step + 1) % 100 == 0 or step + 1 == steps:
        print(f"step {step + 1}: loss {loss.item():.3f}")
model.eval()
with torch.no_grad():
    images, labels = (each.to(device) for each in shapes(128, generator))
    predicted = model(images)[0][0].argmax(1)
counted = labels != BORDER
overlaps = [
    ((predicted == c) & (labels == c)).sum() / (((predicted == c) | (labels == c)) & counted).sum()
    for c in range(CLASSES)
]
print(f"student: mean intersection over union {100 * torch.stack(overlaps).mean():.1f} %")
