"""The training loop of one run on one device."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastokd.data import Dataset, ResidentLoader, Split, open_dataset
from fastokd.errors import CheckpointError, ConfigError, FastOKDError
from fastokd.export import student_record, write_student
from fastokd.methods import get_method
from fastokd.methods.ahbf import ramp_up
from fastokd.methods.base import effective_terms
from fastokd.models import BranchedModel, create_model
from fastokd.storage import write_json
from fastokd.train.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastokd.train.config import TrainConfig, check_config
from fastokd.train.metrics import MetricSums
from fastokd.train.progress import Reporter
from fastokd.train.run_folder import RunFolder
from fastokd.train.step import TrainStep, choose_device, evaluate_model


class NonFiniteLoss(FastOKDError, ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says where the run can be picked up."""


@dataclass(frozen=True)
class Summary:
    """What a finished run says: accuracies in [0, 1] per branch and mixture, from the last and from the best epoch.

    ``best`` is the epoch with the highest accuracy of the student on the evaluation split; choosing an epoch there is
    optimistic if that split is the test set, which is why ``last`` comes first.
    """

    epochs: int
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    seconds: float
    images_per_second: float
    student: str


def build_model(config: TrainConfig, num_classes: int, device: torch.device) -> BranchedModel:
    """The branched model of a configuration, initialised from its seed, on the device in its memory format."""
    torch.manual_seed(config.seed)
    model = create_model(config.model, config.method, num_classes, config.num_branches(), config.aux_blocks)
    return model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)


def open_data(config: TrainConfig) -> Dataset:
    """The dataset of a configuration, checked.

    Raises:
        ConfigError: no dataset is named.
        DataError: it cannot be trained on.
    """
    if not config.data:
        raise ConfigError("no dataset: pass --data FOLDER (with train/ and val/ or test/), --data cifar10:FOLDER or --data digits")
    return open_dataset(config.data, image_size=config.image_size, val_split=config.val_split, seed=config.seed)


def loader_for(config: TrainConfig, dataset: Dataset, split: Split, train: bool, device: torch.device) -> ResidentLoader:
    """The loader of one of the dataset's splits as the configuration wants it."""
    given = {name: value for name, value in (("pad", config.pad), ("flip", config.flip)) if value is not None}
    return ResidentLoader(
        split, config.batch_size, train, device, config.seed, mean=dataset.mean, std=dataset.std,
        augment=dataclasses.replace(dataset.augment, **given),
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)


class Trainer:
    """One run: made new or resumed, then ``run()``."""

    def __init__(self, config: TrainConfig, run: RunFolder, reporter: Reporter, dataset: Dataset | None = None) -> None:
        check_config(config)
        self.config, self.run_folder, self.reporter = config, run, reporter
        self.device = choose_device(config.device)
        self.dataset = open_data(config) if dataset is None else dataset
        self.model = build_model(config, len(self.dataset.classes), self.device)
        self.step = TrainStep(config, self.model, self.device)
        self.train_loader = loader_for(config, self.dataset, self.dataset.train, True, self.device)
        self.eval_loader = loader_for(config, self.dataset, self.dataset.evaluation, False, self.device)
        self.kept = f"branch{get_method(config.method).kept + 1}"
        self.epoch = 0
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_epoch = -1
        self.seconds = 0.0

    def start(self) -> None:
        """Write what identifies a new run."""
        self.run_folder.save_config(self.config)
        self.run_folder.save_environment(self.device, self.dataset.describe())

    def resume(self) -> None:
        """Continue from the last checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, of another architecture or of other data.
        """
        state = load_checkpoint(self.run_folder.last, self.device)
        if list(state["classes"]) != list(self.dataset.classes):
            raise CheckpointError(f"{self.run_folder.last} was trained on the classes {_short(state['classes'])}, the data has {_short(self.dataset.classes)}")
        load_weights(self.model, state["model"], str(self.run_folder.last))
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.last, self.best, self.seconds = state["last"], state["best"], state["seconds"]
        if self.epoch >= self.config.epochs:
            raise ConfigError(f"the run has finished its {self.config.epochs} epochs; to train on, pass a larger --epochs")
        self.run_folder.save_config(self.config)
        self.run_folder.keep_metrics_before(self.epoch)

    def run(self) -> Summary:
        """Train the remaining epochs.

        Raises:
            Interrupted: Ctrl-C; the last checkpoint is intact.
            NonFiniteLoss: the loss became NaN or infinite.
            StorageError: the disk refused.
        """
        self._introduce()
        try:
            while self.epoch < self.config.epochs:
                self._run_epoch()
        except KeyboardInterrupt:
            self.reporter.end_epoch()
            where = (f"the last checkpoint has {self.epoch} finished epochs; continue with 'fastokd train --resume {self.run_folder.path}'"
                     if self.epoch else "no epoch was finished, so there is no checkpoint")
            raise Interrupted(f"interrupted in epoch {self.epoch + 1}; {where}") from None
        except BaseException:
            self.reporter.end_epoch()
            raise
        return self.finish()

    def finish(self) -> Summary:
        """Write and return the summary of the epochs so far."""
        images = self.epoch * len(self.train_loader) * self.config.batch_size
        summary = Summary(self.epoch, self.last, self.best, self.best_epoch, self.seconds, images / self.seconds, str(self.run_folder.student))
        write_json(self.run_folder.summary_path, summary.__dict__)
        return summary

    def _introduce(self) -> None:
        say = (lambda text: None) if self.reporter.quiet else self.reporter.say
        config, data = self.config, self.dataset
        say(f"run {self.run_folder.path}: {config.model}, method {config.method} ({config.preset}), {config.num_branches()} branches, on {self.device}")
        say(f"data {data.name}: {len(data.classes)} classes, {len(data.train)} training and {len(data.evaluation)} {data.evaluation.name} images")
        ramp = self.config.ramp_length()
        terms = ", ".join(f"{coefficient:g}{'*kd_weight' if scheduled else ''} {name}"
                          for name, coefficient, scheduled in effective_terms(self.step.criterion.graph))
        say(f"loss (T^2 and weights multiplied out): {terms}" + (f"; kd_weight ramps up over {ramp} epochs" if ramp else ""))

    def _run_epoch(self) -> None:
        config, started = self.config, time.monotonic()
        lr, ramp = config.lr_at(self.epoch), ramp_up(self.epoch, config.ramp_length())
        self.step.set_lr(lr)
        # What a layer draws depends on seed and epoch alone, so a resumed epoch draws what it would have drawn.
        torch.manual_seed(config.seed * 1_000_003 + self.epoch + 1)
        kd_weight = torch.tensor(ramp, device=self.device)
        sums = MetricSums()
        self.model.train()
        self.train_loader.set_epoch(self.epoch)
        self.reporter.start_epoch(self.epoch, config.epochs, len(self.train_loader))
        for index, batch in enumerate(self.train_loader, start=1):
            sums.add(self.step(batch, kd_weight), batch.target.shape[0])
            note = ""
            if self.reporter.wants_note():
                means = sums.means()
                self._check_finite(means)
                rate = sums.count / (time.monotonic() - started)
                note = f"loss {means['loss']:.4f}  {self.kept} {100 * means[f'accuracy/{self.kept}']:.1f} %  {rate:.0f} img/s"
            self.reporter.step(index, note)
        train = sums.means()
        self._check_finite(train)
        trained = time.monotonic() - started
        self.last = evaluate_model(self.step, self.eval_loader)
        self.seconds += trained
        self.epoch += 1
        record = {
            "epoch": self.epoch - 1, "lr": lr, "kd_weight": ramp, "train": train, "eval": self.last,
            "seconds": round(trained, 3), "images_per_second": round(sums.count / trained, 1),
        }
        # The evaluated weights go to the disk before anything that names them.
        is_best = not self.best or self.last[self.kept] > self.best[self.kept]
        if is_best:
            self.best, self.best_epoch = dict(self.last), self.epoch - 1
        self._save(is_best)
        self.run_folder.append_metrics(record)
        self.reporter.end_epoch(record)

    def _check_finite(self, means: dict[str, float]) -> None:
        if math.isfinite(means["loss"]):
            return
        broken = [name for name, value in means.items() if name != "loss" and not math.isfinite(value)]
        raise NonFiniteLoss(
            f"the loss is {means['loss']} in epoch {self.epoch + 1} (terms: {', '.join(broken) or 'none alone'}); "
            f"the checkpoint of epoch {self.epoch} is intact. Lower --lr, or try --precision fp32")

    def _save(self, is_best: bool) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "epoch": self.epoch,
            "last": self.last, "best": self.best, "best_epoch": self.best_epoch, "seconds": self.seconds,
            "classes": list(self.dataset.classes),
            "config": self.config.to_yaml(),
        }
        save_checkpoint(self.run_folder.last, state)
        if is_best:
            save_checkpoint(self.run_folder.best, state)
        write_student(self.run_folder.student, self.model.student(), student_record(
            self.config.model, self.dataset, accuracy=self.last[self.kept], epoch=self.epoch,
            provenance={"method": self.config.method, "preset": self.config.preset, "branches": self.config.num_branches(), "seed": self.config.seed}))


def load_run(path: Path, which: str = "last", data: str | None = None, device: str = "auto") -> tuple[Trainer, dict[str, Any]]:
    """A finished or interrupted run with the weights of its last or best epoch, ready to evaluate or export.

    Args:
        path: the run folder.
        which: "last" or "best".
        data: another dataset than the run's; its classes must be the same.
        device: as in the configuration.

    Raises:
        CheckpointError: not a run, no such checkpoint, or damaged.
    """
    run = RunFolder.open(path)
    config = run.load_config()
    config = dataclasses.replace(config, device=device, **({"data": data} if data else {}))
    state = load_checkpoint(run.last if which == "last" else run.best)
    trainer = Trainer(config, run, Reporter(quiet=True))
    if list(state["classes"]) != list(trainer.dataset.classes):
        raise CheckpointError(f"{path} was trained on the classes {_short(state['classes'])}, the data has {_short(trainer.dataset.classes)}")
    load_weights(trainer.model, state["model"], str(run.last if which == "last" else run.best))
    return trainer, state


def _short(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(list(names)[:4])
    return f"{shown}, ... ({len(names)})" if len(names) > 4 else shown
