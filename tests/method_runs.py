"""Checks of every method: that a real step lowers the loss, and that a short run
resumes exactly.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastokd.data import Batch, Dataset, open_dataset
from fastokd.export import check_same_logits, load_student
from fastokd.methods import get_method
from fastokd.methods.method import MethodBatch
from fastokd.models import create_student
from fastokd.train.build import build_model
from fastokd.train.checkpoint import load_checkpoint
from fastokd.train.config import TrainConfig
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.step import TrainStep
from fastokd.train.trainer import Trainer

NETWORKS = ("resnet8", "vgg13", "mobilenetv2_x0_5")


SHORT_RUN = TrainConfig(
    data="digits",
    model="resnet8",
    method="ahbf",
    branches=3,
    aux_blocks=1,
    epochs=2,
    batch_size=32,
    lr=0.01,
    device="cpu",
    deterministic=True,
    save_minutes=0.0,
)
"""A run on ``few_digits`` that resumes bit for bit."""


def losses_of_a_step(
    method: str, network: str, branches: int, lr: float = 0.01, **options: Any
) -> tuple[float, float]:
    """The loss of a batch before and after a step of gradient descent on it, with the same
    dropout.
    """
    config = TrainConfig(model=network, method=method, branches=branches, method_options=options)
    check_config(config)
    model = build_model(config, 10, torch.device("cpu"))
    chosen = get_method(method)
    criterion = chosen.loss_class(num_branches=branches, **config.loss_options())
    criterion.prepare(8, 10, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    shape = (branches, 4, 3, 32, 32) if config.views() > 1 else (4, 3, 32, 32)
    images, target, index = (
        torch.randn(shape, generator=generator),
        torch.tensor([3, 1, 4, 1]),
        torch.tensor([5, 0, 7, 2]),
    )
    losses = []
    for _ in range(2):
        torch.manual_seed(2)
        result = model(images)
        loss, _ = chosen.forward_backward(criterion, result, MethodBatch(target, index))
        losses.append(float(loss))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
                    parameter.grad = None
    return losses[0], losses[1]


def losses(step: TrainStep, batch: Batch) -> tuple[float, float]:
    """The loss of a batch before and after a step of training on it."""
    found = []
    for _ in range(2):
        step.sums.clear()
        step(batch)
        found.append(step.sums.means()["loss"])
    return found[0], found[1]


def few_digits(count: int = 256) -> Dataset:
    """The digits with ``count`` training and 100 test images."""
    digits = open_dataset("digits")
    return dataclasses.replace(
        digits,
        train=digits.train.select(torch.arange(count)),
        test=digits.test.select(torch.arange(100)),
    )


def make(config: TrainConfig, folder: Path, dataset: Dataset, resume: bool = False) -> Trainer:
    run = RunFolder.open(folder) if resume else RunFolder.create(folder)
    trainer = Trainer(config, run, Reporter(quiet=True), dataset)
    trainer.resume(load_checkpoint(run.last)) if resume else trainer.start()
    return trainer


def check_resume(config: TrainConfig, folder: Path, dataset: Dataset) -> Trainer:
    """Train two epochs straight and, from a checkpoint, one and one: the same to the last bit.
    Returns the straight run.
    """
    straight = make(config, folder / "straight", dataset)
    summary = straight.run()
    first = make(config, folder / "resumed", dataset)
    first.run(until=1)
    first.run_folder.unlock()
    second = make(config, folder / "resumed", dataset, resume=True)
    assert second.run().last == summary.last
    for mine, theirs in (
        (second.model, straight.model),
        (second.step.criterion, straight.step.criterion),
    ):
        states = mine.state_dict(), theirs.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name
    records = [trainer.run_folder.read_metrics() for trainer in (second, straight)]
    for record in (*records[0], *records[1]):
        del record["seconds"], record["images_per_second"], record["waiting_share"]
    assert records[0] == records[1]
    return straight


def check_student(trainer: Trainer, network: str, row: str) -> None:
    """The exported student is the plain network, and gives the kept row's logits."""
    student, record = load_student(trainer.run_folder.path)
    assert trainer.student_name == row
    assert record["architecture"] == {"name": network, "num_classes": 10}
    assert record["accuracy"]["top1"] == trainer.last[row]
    assert set(load_file(trainer.run_folder.student)) == set(
        create_student(network, 10).state_dict()
    )
    trainer.model.eval()
    check_same_logits(trainer.model.student(), student, trainer.eval_loader)
