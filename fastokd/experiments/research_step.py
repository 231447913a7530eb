"""A training step as published research code has it, the baseline of the step benchmark."""

import itertools
import statistics

import torch
from torch import Tensor

from fastokd.data import Dataset
from fastokd.experiments.step_timer import TimedStep
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.methods.modules import BranchOutput
from fastokd.train.config import TrainConfig
from fastokd.train.loss import build_loss


class ResearchStep(TimedStep):
    """The step as the published code of these methods has it: a plain loss, autograd through each
    of its operations, PyTorch's own SGD, and ``.item()`` for the loss and every accuracy in every
    step.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        self.method = get_method(config.method)
        self.criterion = build_loss(config).to(device)
        self.criterion.prepare(len(dataset.train), len(dataset.classes), device)
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self._batches = itertools.chain.from_iterable(self.epochs())
        self._losses: list[float] = []
        self._accuracies: dict[str, float] = {}

    def advance(self, steps: int) -> None:
        # PyTorch's defaults.
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        for batch in itertools.islice(self._batches, steps):
            result = self.model(batch.images)
            loss = self.method.loss(self.criterion, result, MethodBatch(batch.target, batch.index))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._losses.append(loss.item())
            rows = self.method.named_logits(self.criterion, result)
            self._accuracies = {name: _top1(row, batch.target).item() for name, row in rows.items()}

    def loss(self) -> float:
        mean = statistics.fmean(self._losses)
        self._losses.clear()
        return mean

    def loss_backward(self, output: BranchOutput, batch: MethodBatch) -> None:
        self.method.loss(self.criterion, output, batch).backward()


def _top1(row: Tensor, target: Tensor) -> Tensor:
    """The accuracy of logits [B, C], from the five largest, as in research code."""
    top = row.topk(min(5, row.shape[1]), 1).indices
    return (top[:, 0] == target).float().mean()
