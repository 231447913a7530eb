"""Train a custom network with AHBF's loss in a custom loop.

python examples/own_loop.py --epochs 5
"""

import argparse

import torch
from torch import nn

from fastokd.data import make_loader, open_dataset
from fastokd.losses import AHBFLoss, ramp_up


class Branched(nn.Module):
    """A trunk, branches of 1, 2 and 3 convolutions (the first is the student), and their gates."""

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.trunk = layer(3, width)
        self.branches = nn.ModuleList(
            nn.Sequential(*[layer(width, width) for _ in range(depth)]) for depth in (1, 2, 3)
        )
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(width, 2) for _ in range(2))

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        shared = self.trunk(images)
        features = [branch(shared).mean((2, 3)) for branch in self.branches]
        logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        scores = [
            gate(feature).softmax(1) for gate, feature in zip(self.gates, features[1:], strict=True)
        ]
        return (
            logits,
            scores,
        )  # 3 x [B, C]; 2 x [B, 2], the weights of branch m and of the mixture below


def layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
epochs = parser.parse_args().epochs
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
digits = open_dataset("digits")
train, test = (
    make_loader(digits, "train", 64, device=device),
    make_loader(digits, "test", 256, device=device),
)
model, criterion = Branched(digits.num_classes).to(device), AHBFLoss.preset("paper", num_branches=3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
for epoch in range(epochs):
    model.train()
    train.set_epoch(epoch)
    for images, target, _ in train:
        logits, scores = model(images)
        loss = criterion(logits, target, scores=scores, kd_weight=ramp_up(epoch, epochs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum(
            (model(images)[0][0].argmax(1) == target).sum().item() for images, target, _ in test
        )
    print(
        f"epoch {epoch + 1}: loss {loss.item():.3f}, student {100 * right / len(digits.test):.2f} %"
    )
