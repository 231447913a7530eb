"""One of the processes of ``test_distributed_runs.py``: torchrun's environment, and python
rank_runs.py FOLDER NAME ...
"""

import dataclasses
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from method_runs import few_digits
from torch import Tensor

from fastokd.data import Dataset
from fastokd.errors import Preempted
from fastokd.train.config import TrainConfig
from fastokd.train.distributed import Ranks, process_group
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder
from fastokd.train.trainer import NonFiniteLoss, Trainer

SMALL = TrainConfig(
    data="digits",
    model="resnet8",
    method="ahbf",
    branches=2,
    aux_blocks=0,
    epochs=2,
    batch_size=32,
    lr=0.01,
    device="cpu",
    deterministic=True,
)
"""The run whose parts are compared; two epochs of 8 steps on 256 images."""
COMMAND = (
    "train",
    "--data",
    "digits",
    "--model",
    "resnet8",
    "--branches",
    "2",
    "--aux-blocks",
    "0",
    "--epochs",
    "3",
    "--batch-size",
    "64",
    "--lr",
    "0.01",
    "--device",
    "cpu",
    "--deterministic",
    "True",
)
"""The command line of the run "command", on all digits."""
CONFIGS = {
    "command": dataclasses.replace(SMALL, epochs=3, batch_size=64),
    "plain": SMALL,
    "synchronized": dataclasses.replace(SMALL, epochs=1, sync_bn=True, flat=True),
    "parts": dataclasses.replace(SMALL, epochs=1, device_batch=8),
    "skip": dataclasses.replace(SMALL, epochs=1, on_nonfinite="skip"),
    "stop": SMALL,
    "average": dataclasses.replace(SMALL, ema=0.9, mixup=0.2),
    "late": dataclasses.replace(SMALL, teach_from=1.0),
    "later": dataclasses.replace(SMALL, epochs=3, teach_from=2.0),
    "tsb": dataclasses.replace(
        SMALL, epochs=1, method="tsb", branches=None, ramp_epochs=0, device_batch=8
    ),
    "kdcl": dataclasses.replace(
        SMALL,
        epochs=1,
        method="kdcl",
        branches=None,
        method_options={"variant": "general", "icl": False},
        device_batch=8,
    ),
}


class Stopper(Reporter):
    """Signals this process when it has done a step of the second epoch, or when that is
    evaluated.
    """

    def __init__(self, at: int | None) -> None:
        super().__init__(silent=True)
        self.at, self.epoch = at, 0

    def start_epoch(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        super().start_epoch(epoch, epochs, steps, done)
        self.epoch = epoch

    def step(self, done: int, progress: Any = None) -> None:
        if self.epoch == 1 and done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluating(self) -> None:
        if self.epoch == 1 and self.at == -1:
            os.kill(os.getpid(), signal.SIGTERM)


def dataset(count: int = 256, evaluated: int = 99) -> Dataset:
    digits = few_digits(count)
    return dataclasses.replace(digits, test=digits.test.select(torch.arange(evaluated)))


def with_dropout(trainer: Trainer) -> Trainer:
    """The run "average" with dropout: the small networks have none, and the random state would show
    in nothing. The others are compared with runs of other processes, which draw something else.
    """
    if trainer.config.ema:
        trainer.model.branches[0].register_forward_pre_hook(
            lambda module, given: (torch.nn.functional.dropout(given[0], 0.2, module.training),)
        )
    return trainer


def make(
    config: TrainConfig, folder: Path, images: Dataset | None, at: int | None = None
) -> Trainer:
    """A new run, in which the last process gets a signal ``at`` that step of the second epoch."""
    ranks = Ranks.current()
    run = RunFolder.create(folder) if ranks.is_main else RunFolder(folder)
    trainer = Trainer(config, run, Stopper(at if ranks.rank == ranks.size - 1 else None), images)
    trainer.start()
    return with_dropout(trainer)


def train(
    config: TrainConfig, folder: Path, images: Dataset | None, at: int | None = None
) -> Trainer:
    """A run from the start to the end, or to the signal."""
    trainer = make(config, folder, images, at)
    trainer.run()
    return trainer


def resume(folder: Path, processes: int | None = None) -> Trainer:
    """The rest of a run, on the images that the test gives, which have no name; with
    ``processes`` of the first ones only.
    """
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    state["ranks"] = state["ranks"][:processes]
    trainer = Trainer(
        CONFIGS[folder.name.partition("@")[0]],
        RunFolder.open(folder),
        Reporter(silent=True),
        dataset(),
        saved_data=state["data"],
    )
    trainer.resume(state)
    with_dropout(trainer).run()
    return trainer


def run_with_a_bad_step(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """A run in which the second branch of the last process computes NaN in the third step."""
    trainer = make(config, folder, dataset())
    calls = iter(range(1, 1000))

    def spoil(
        _: torch.nn.Module, __: object, result: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return (result[0], result[1] * float("nan")) if next(calls) == 3 else result

    if trainer.ranks.rank == trainer.ranks.size - 1:
        trainer.model.branches[1].register_forward_hook(spoil)
    try:
        trainer.run()
    except NonFiniteLoss as error:
        return {"message": str(error)}
    return found(trainer)


def found(trainer: Trainer) -> dict[str, Any]:
    """The final state of a run."""
    states = {
        "model": trainer.model.state_dict(),
        "criterion": trainer.step.criterion.state_dict(),
        "optimizer": trainer.step.optimizers.state_dict(),
    }
    if trainer.step.average is not None:
        states["average"] = trainer.step.average.state_dict()
    if trainer.ranks.is_main:
        states["train"] = [record["train"] for record in trainer.run_folder.read_metrics()]
    return {**states, "last": trainer.last, "share": trainer.step.share.describe()}


def run(name: str, folder: Path) -> dict[str, Any]:
    """One of ``CONFIGS``, without a stop or, as NAME@STEP, stopped there in the second epoch and
    continued; -1 is in the evaluation.
    """
    name, _, at = name.partition("@")
    if name == "tiny":  # fewer images to evaluate than processes
        return found(
            train(dataclasses.replace(SMALL, epochs=1, batch_size=30), folder, dataset(64, 2))
        )
    config = CONFIGS[name]
    if name in ("skip", "stop"):
        return run_with_a_bad_step(config, folder)
    if not at:
        return found(train(config, folder, None if name == "command" else dataset()))
    try:
        train(config, folder, dataset(), int(at))
    except Preempted as stopped:
        message, code = str(stopped), stopped.exit_code
    if Ranks.current().is_main:
        for copies in ("stopped", "kept"):
            shutil.copytree(folder, folder.parent / copies / folder.name)
    ended = {**found(resume(folder)), "message": message, "code": code}
    if name == "plain" and Ranks.current().size > 1:
        ended["fewer"] = found(resume(folder.parent / "stopped" / folder.name, 1))
    return ended


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with process_group("cpu") as ranks:
        for name in sys.argv[2:]:
            torch.save(run(name, folder / name), folder / f"{name}.{ranks.rank}.pt")
