"""One training step: forward of trunk and branches, loss, backward, optimizer."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastokd.data import Batch
from fastokd.errors import ConfigError
from fastokd.methods import get_method
from fastokd.models import BranchedModel, BranchOutput
from fastokd.models.layers import uncounted_batches
from fastokd.train.config import TrainConfig
from fastokd.train.metrics import correct_counts
from fastokd.train.teacher import StoredRows


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device '{name}' is not there: torch sees {count} GPUs; use --device cpu or see 'fastokd doctor'")
        return torch.device("cuda", device.index or 0)
    return device


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the forward pass runs under bfloat16 autocast."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


class BranchEvaluator:
    """A branched model with the loss of its method: what is needed to say how good every branch and mixture is."""

    def __init__(self, config: TrainConfig, model: BranchedModel, device: torch.device) -> None:
        self.method = get_method(config.method)
        self.model = model
        self.device = device
        self.criterion = self.method.loss_class(num_branches=config.num_branches(), **config.loss_options()).to(device)
        self.kept = self.criterion.graph.logits[model.kept]
        self._bf16 = uses_bf16(config, device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    def named_rows(self, result: BranchOutput) -> dict[str, Tensor]:
        """The logits [B, C] of every branch, head and mixture (such as a teacher assistant) by name."""
        return self.criterion.named_rows(result.logits, **self.method.loss_inputs(result))

    @torch.no_grad()
    def results(self, batches: Iterable[Batch]) -> Iterator[tuple[BranchOutput, Tensor]]:
        """What the model in evaluation mode computes for each batch, and the targets."""
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                with self.autocast():
                    result = self.model(batch.images)
                yield result, batch.target
        finally:
            self.model.train(was_training)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The accuracy in [0, 1] of every branch and mixture over all samples, each counted once.

        ``branch_mean`` is the mean over the branches, for methods whose published number that is.
        """
        right: dict[str, Tensor] = {}
        count = 0
        for result, target in self.results(batches):
            found = correct_counts(self.named_rows(result), target)
            right = {name: right.get(name, 0) + value for name, value in found.items()}
            count += target.shape[0]
        accuracies = {name: int(value) / count for name, value in right.items()}
        if self.method.reports_mean:
            branches = self.criterion.graph.logits[:self.criterion.num_branches]
            accuracies["branch_mean"] = sum(accuracies[name] for name in branches) / len(branches)
        return accuracies


def build_optimizers(config: TrainConfig, model: BranchedModel) -> dict[str, torch.optim.Optimizer]:
    """SGD as configured under "sgd", and under "adam" what the method trains with Adam, if anything."""
    special = model.companion.parameter_groups() if model.companion is not None else []
    apart = {id(parameter) for group in special for parameter in group.parameters}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in apart]
    groups: list[dict[str, Any]] = [{"params": rest}]
    groups += [{"params": group.parameters, "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay}
               for group in special if group.optimizer == "sgd"]
    found: dict[str, torch.optim.Optimizer] = {"sgd": torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay)}
    if adam := [{"params": group.parameters, "lr": group.lr} for group in special if group.optimizer == "adam"]:
        found["adam"] = torch.optim.Adam(adam)
    return found


class TrainStep(BranchEvaluator):
    """The step of one run: owns criterion and optimizer, changes the model in place."""

    def __init__(self, config: TrainConfig, model: BranchedModel, device: torch.device, stored: StoredRows | None = None) -> None:
        super().__init__(config, model, device)
        self.stored = stored
        self.optimizers = build_optimizers(config, model)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizers["sgd"].param_groups:
            group["lr"] = lr

    def __call__(self, batch: Batch, kd_weight: Tensor) -> dict[str, Tensor]:
        """Train on a batch; returns sums over its samples on the device: loss, each term, right answers per row."""
        with self.autocast(), uncounted_batches(self.model):
            result = self.model(batch.images)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        inputs = self.method.loss_inputs(result)
        if self.method.needs_index:
            inputs["index"] = batch.index
        if self.stored is not None:
            inputs["teacher"] = self.stored(batch.index)
        loss, terms = self.criterion.forward_backward(result.logits, batch.target, kd_weight=kd_weight, **inputs)
        for optimizer in self.optimizers.values():
            optimizer.step()
        count = batch.target.shape[0]
        sums = {"loss": loss * count, **{name: value * count for name, value in terms.items()}}
        sums.update({f"accuracy/{name}": right for name, right in correct_counts(self.named_rows(result), batch.target).items()})
        return sums
