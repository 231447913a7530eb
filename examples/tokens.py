"""Train a small sequence model with branches, one label for each token: logits [B, T, V].

python examples/tokens.py --steps 150

The task is synthetic: each token's label is the sum of the tokens in a window of three, modulo V.
Sequences have different lengths; positions after the end are labeled -100 and ignored.
"""

import argparse

import torch
from torch import Tensor, nn

from fastokd.losses import DMLLoss, ramp_up

VOCABULARY, LENGTH = 8, 24


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, T]."""
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    padded = nn.functional.pad(tokens, (1, 1))
    labels = (padded[:, :-2] + tokens + padded[:, 2:]) % VOCABULARY
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
    labels[torch.arange(LENGTH) >= lengths] = -100
    return tokens, labels


class Branch(nn.Module):
    """Convolutions over the sequence, and a classifier of every token."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, width, T] to logits [B, T, V]."""
        for layer in self.layers:
            features = features + layer(features).relu()
        return self.head(features.transpose(1, 2))


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=150)
steps = parser.parse_args().steps
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
width = 48
embedding = nn.Embedding(VOCABULARY, width).to(device)
branches = nn.ModuleList(Branch(depth, width) for depth in (2, 3)).to(device)
criterion = DMLLoss(num_branches=2, class_dim=-1)
optimizer = torch.optim.AdamW([*embedding.parameters(), *branches.parameters()], lr=3e-3)
for step in range(steps):
    tokens, labels = (each.to(device) for each in sequences(64, generator))
    features = embedding(tokens).transpose(1, 2)
    logits = [branch(features) for branch in branches]
    loss = criterion(logits, labels, kd_weight=ramp_up(step, steps))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (step + 1) % 50 == 0 or step + 1 == steps:
        print(f"step {step + 1}: loss {loss.item():.3f}")
with torch.no_grad():
    tokens, labels = (each.to(device) for each in sequences(256, generator))
    predicted = branches[0](embedding(tokens).transpose(1, 2)).argmax(-1)
counted = labels != -100
accuracy = (predicted == labels)[counted].float().mean()
print(f"student: token accuracy {100 * accuracy:.1f} %")
