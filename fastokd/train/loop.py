"""The training loop of one run on one device."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastokd.data import Loader
from fastokd.data.dataset import carve
from fastokd.data.images import Progress, first_of
from fastokd.errors import CheckpointError, ConfigError, FastOKDError, first_few, first_line
from fastokd.export import load_weights, student_record, write_student
from fastokd.models import find_backbone
from fastokd.models.summary import check_images
from fastokd.storage import write_json
from fastokd.train.build import build_model
from fastokd.train.checkpoint import load_checkpoint, save_checkpoint
from fastokd.train.config import TrainConfig, check_config, differences, load_config
from fastokd.train.data import (
    AnyDataset,
    data_record,
    explain_loader,
    loader_for,
    loader_name,
    open_data,
    with_augmentation,
)
from fastokd.train.logs import MetricSink, check_sinks, open_sinks
from fastokd.train.metrics import MetricSums
from fastokd.train.progress import Pace, Reporter
from fastokd.train.run_folder import RunFolder
from fastokd.train.step import BranchEvaluator, TrainStep, choose_device, uses_bf16
from fastokd.train.teacher import check_teacher, open_teacher, with_absolute_teacher


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




class Trainer:
    """One run: made new (``start``) or picked up (``resume``), then ``run()``."""

    def __init__(self, config: TrainConfig, run: RunFolder, reporter: Reporter, dataset: AnyDataset | None = None,
                 seen: Mapping[str, Any] | None = None) -> None:
        check_config(config)
        check_sinks(config.log_to)
        check_teacher(config)
        config = with_absolute_teacher(config)
        self.config, self.run_folder, self.reporter = config, run, reporter
        reporter.attach_log(run.log_path)
        self.sinks: list[MetricSink] = []
        self.device = choose_device(config.device)
        try:
            self.dataset = with_augmentation(config, open_data(config, self.device, seen, reporter.decoding) if dataset is None else dataset)
        finally:
            reporter.close()
        self.teacher = open_teacher(config, self.dataset, self.device)
        self.model = build_model(config, len(self.dataset.classes), self.device, self.teacher.network if self.teacher else None)
        check_images(self.model, self.dataset.image_size, max(find_backbone(name).image_size for name in config.model_names()))
        self.step = TrainStep(config, self.model, self.device, self.teacher.rows if self.teacher else None)
        images, held_out = self.dataset.train, None
        if fraction := self.step.criterion.held_out:
            images, held_out = carve(images, self.dataset.classes, fraction, config.seed)
        self._seen = seen
        self.num_held_out = 0 if held_out is None else len(held_out)
        self.held_out_loader = None if held_out is None else loader_for(config, self.dataset, held_out, False, self.device, seen)
        self.memory = self.step.criterion.prepare(len(images), len(self.dataset.classes), self.device)
        self.train_loader = loader_for(config, self.dataset, images, True, self.device, seen)
        self.eval_loader = loader_for(config, self.dataset, self.dataset.evaluation, False, self.device, seen)
        self.kept = self.step.kept
        self.epoch = 0
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_epoch = -1
        self.seconds = 0.0
        self._replaced = 0  # bad pictures that were reported
        self.pace = Pace(config.epochs, config.batch_size)

    def start(self) -> None:
        """Write what identifies a new run."""
        self.run_folder.save_config(self.config)
        self.run_folder.save_environment(self.device, self.dataset.describe())

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            CheckpointError: it is of another architecture or of other data.
            ConfigError: the run is finished, or its configuration was changed since.
        """
        where = str(self.run_folder.last)
        _check_classes(where, state, self.dataset)
        if state["data"].get("fingerprint") != self.dataset.fingerprint:
            raise CheckpointError(f"{where} was trained on other images than {self.config.data} holds now; restore them, or start a new run")
        before = load_config(state["config"], f"the configuration in {where}")
        changed = differences(dataclasses.replace(before, **{name: getattr(self.config, name) for name in _MAY_CHANGE}), self.config)
        if changed:
            raise ConfigError(f"{self.run_folder.config_path} was changed since the checkpoint ({'; '.join(changed)}): undo that, or start a new run with --config")
        if self.teacher and state.get("teacher") != self.teacher.fingerprint:
            raise CheckpointError(f"{where} was distilled from another teacher than {self.teacher.description} is now; restore that one, or start a new run")
        load_weights(self.model, state["model"], where)
        load_weights(self.step.criterion, state["criterion"], where)
        try:
            for name, optimizer in self.step.optimizers.items():
                optimizer.load_state_dict(state["optimizer"][name])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where} has an optimizer state that does not fit ({first_line(error)})") from error
        self.epoch = state["epoch"]
        self.best_epoch, self.last, self.best, self.seconds = state["best_epoch"], state["last"], state["best"], state["seconds"]
        if self.epoch >= self.config.epochs:
            raise ConfigError(f"the run has {self.epoch} finished epochs, and --epochs {self.config.epochs} is not more; to train on, pass a larger --epochs")
        if self.config.epochs != before.epochs:
            done, next_one = (f"lr {config.lr_at(epoch):g}, kd_weight {config.kd_weight_at(epoch):.4g}"
                              for config, epoch in ((before, self.epoch - 1), (self.config, self.epoch)))
            self.reporter.say(
                f"the run now has {self.config.epochs} epochs instead of {before.epochs}: learning-rate decay and ramp-up follow the new number "
                f"(epoch {self.epoch} ran with {done}; epoch {self.epoch + 1} goes on with {next_one})")
        self.run_folder.save_config(self.config)
        self.run_folder.add_session(self.device)
        self.run_folder.keep_metrics_before(self.epoch)

    def run(self) -> Summary:
        """Train the remaining epochs.

        Raises:
            Interrupted: Ctrl-C; the last checkpoint is intact.
            NonFiniteLoss: the loss became NaN or infinite.
            StorageError: the disk refused.
        """
        self._introduce()
        records = self.run_folder.read_metrics()
        self.reporter.start_run(self.kept, records)
        try:
            self.sinks = open_sinks(self.config.log_to, self.run_folder.path, dataclasses.asdict(self.config), records, self.reporter.say)
            while self.epoch < self.config.epochs:
                self._run_epoch()
        except KeyboardInterrupt:
            message = f"interrupted in epoch {self.epoch + 1}; {self._what_is_saved()}"
            self.reporter.log(message)
            raise Interrupted(message) from None
        except BaseException as error:
            self.reporter.log(f"{type(error).__name__}: {first_line(error)}")
            raise
        finally:
            self.reporter.close()
            for sink in self.sinks:
                sink.close()
            self.run_folder.unlock()
        summary = self.finish()
        self.reporter.log(f"finished: {summary.epochs} epochs, {summary.seconds:.1f} s of training, {summary.images_per_second:.0f} img/s; "
                          f"student {100 * summary.last[self.kept]:.2f} %, in its best epoch ({summary.best_epoch + 1}) {100 * summary.best[self.kept]:.2f} %")
        return summary

    def finish(self) -> Summary:
        """Write and return the summary of the epochs so far."""
        images = self.epoch * len(self.train_loader) * self.config.batch_size
        summary = Summary(self.epoch, self.last, self.best, self.best_epoch, self.seconds, images / self.seconds, str(self.run_folder.student))
        write_json(self.run_folder.summary_path, summary.__dict__)
        return summary

    def _what_is_saved(self) -> str:
        # What is on the disk says it, wherever between two instructions the signal came.
        if not self.run_folder.last.exists():
            return "no epoch was saved, so there is no checkpoint"
        saved = load_checkpoint(self.run_folder.last)["epoch"]
        return f"the last checkpoint has {saved} finished epochs; continue with 'fastokd train --resume {self.run_folder.path}'"

    def _introduce(self) -> None:
        say = self.reporter.info
        config, data = self.config, self.dataset
        say(f"run {self.run_folder.path}: {config.model}, method {config.method} ({config.preset}), {config.num_branches()} branches, on {self.device}")
        say(f"data {data.name}: {len(data.classes)} classes, {len(data.train)} training and {len(data.evaluation)} {data.evaluation.name} images")
        say(explain_loader(config, data, self.device, self._seen))
        if self.teacher:
            say(f"teacher {self.teacher.description}")
        coefficients = [(term.name, term.coefficient, term.scheduled) for term in self.step.criterion.graph.terms]
        coefficients += [(name, *term) for name, term in self.step.criterion.extra_terms.items()]
        terms = ", ".join(f"{coefficient:g}{'*kd_weight' if scheduled else ''} {name}" for name, coefficient, scheduled in coefficients)
        say(f"loss (T^2 and weights multiplied out): {terms}{self._describe_schedule()}")
        if self.num_held_out:
            say(f"{self.num_held_out} of the training images are held out: nobody trains on them, the loss looks at them before every epoch")
        if self.memory:
            say(self.memory)

    def _describe_schedule(self) -> str:
        config, length = self.config, self.config.ramp_length()
        if not length:
            return ""
        return f"; kd_weight is {config.kd_weight_at(0):.3g} in epoch 1, {config.kd_weight_at(length - 1):.3g} in epoch {length} and 1 after it"

    def _run_epoch(self) -> None:
        config, started = self.config, time.monotonic()
        lr, ramp = config.lr_at(self.epoch), config.kd_weight_at(self.epoch)
        self.step.set_lr(lr)
        # What a layer draws depends on seed and epoch alone, so a resumed epoch draws what it would have drawn.
        torch.manual_seed(config.seed * 1_000_003 + self.epoch + 1)
        kd_weight = torch.tensor(ramp, device=self.device)
        if self.held_out_loader is not None:
            self.step.criterion.see_held_out((result.logits, target) for result, target in self.step.results(self.held_out_loader))
        sums = MetricSums()
        self.model.train()
        self.train_loader.set_size(config.size_at(self.epoch))
        self.train_loader.set_epoch(self.epoch)
        self.reporter.start_epoch(self.epoch, config.epochs, len(self.train_loader))
        self.pace.start_epoch(self.epoch, len(self.train_loader))
        for index, batch in enumerate(self.pace.waiting(self.train_loader), start=1):
            sums.add(self.step(batch, kd_weight), batch.target.shape[0])
            progress = None
            if self.reporter.wants_note():
                means = sums.means()
                self._check_finite(means)
                memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
                progress = self.pace.look(index, means, lr, ramp, memory)
            self.reporter.step(index, progress)
        train = sums.means()
        self._check_finite(train)
        trained = time.monotonic() - started
        self.reporter.evaluating()
        last = self.step.evaluate(self.eval_loader)
        record = {
            "epoch": self.epoch, "lr": lr, "kd_weight": ramp, "train": train, "eval": last,
            "seconds": round(trained, 3), "images_per_second": round(sums.count / trained, 1),
            "waiting_share": round(self.pace.waiting_share(), 4),
        }
        self.seconds += trained
        self.epoch, self.last = self.epoch + 1, last
        is_best = not self.best or last[self.kept] > self.best[self.kept]
        if is_best:
            self.best, self.best_epoch = dict(last), self.epoch - 1
        self._save(record, is_best)
        # Only after the checkpoint: what a sink was given cannot be taken back everywhere.
        for sink in self.sinks:
            sink.write(record)
        self.reporter.end_epoch(record, self.pace.end_epoch())
        self._report_replaced()

    def _report_replaced(self) -> None:
        found: Mapping[int, str] = getattr(self.train_loader, "replaced", {})
        if len(found) > self._replaced:
            names = [f"{self.dataset.train.files[i]} ({reason})" for i, reason in found.items()][self._replaced:]
            self._replaced = len(found)
            self.reporter.say(f"pictures that cannot be decoded and were replaced, so far {len(found)}: {first_of(names)}")

    def _check_finite(self, means: dict[str, float]) -> None:
        if math.isfinite(means["loss"]):
            return
        broken = [name for name, value in means.items() if name != "loss" and not math.isfinite(value)]
        fix = "lower --lr" + (", or try --precision fp32" if uses_bf16(self.config, self.device) else "")
        raise NonFiniteLoss(f"the loss is {means['loss']} in epoch {self.epoch + 1} (terms: {', '.join(broken) or 'none alone'}); {self._what_is_saved()}. To mend it {fix}")

    def _save(self, record: dict[str, Any], is_best: bool) -> None:
        """Write the epoch. ``last.pt`` comes last: until it is there, a resume trains the epoch again and writes the rest anew."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.step.optimizers.items()},
            "criterion": self.step.criterion.state_dict(),
            "epoch": self.epoch,
            "last": self.last, "best": self.best, "best_epoch": self.best_epoch, "seconds": self.seconds,
            "classes": list(self.dataset.classes), "data": data_record(self.dataset, loader_name(self.config, self.dataset, self.device, self._seen)), "config": self.config.to_yaml(),
        }
        if self.teacher:
            state["teacher"] = self.teacher.fingerprint
        if is_best:
            save_checkpoint(self.run_folder.best, state)
        write_student(self.run_folder.student, self.model.student(), student_record(
            self.model.name, self.dataset, accuracy=self.last[self.kept], epoch=self.epoch, provenance=provenance(self.config, self.run_folder, self.dataset.fingerprint)))
        self.run_folder.append_metrics(record)
        save_checkpoint(self.run_folder.last, state)


_MAY_CHANGE = ("data", "device", "epochs")
"""Where a run goes on, and how far, may change when it is resumed; what it computes may not."""


def provenance(config: TrainConfig, run: RunFolder, fingerprint: str | None) -> dict[str, Any]:
    """Where a student comes from, for its record: the method's settings, and the versions that the run was started with.

    ``run`` in it is the same for all exports of a run, however it was resumed: a hash of its configuration and of the
    fingerprint of the data it is trained on.
    """
    fixed = [(item.name, getattr(config, item.name)) for item in dataclasses.fields(config) if item.name not in _MAY_CHANGE]
    identity = hashlib.sha256(repr((fixed, fingerprint)).encode()).hexdigest()[:12]
    return {"run": identity, "method": config.method, "preset": config.preset, "branches": config.num_branches(), "aux_blocks": config.aux_blocks,
            "compression": config.compression, "seed": config.seed, "epochs": config.epochs, **run.versions()}


def resume_run(path: Path, reporter: Reporter, **changes: Any) -> Trainer:
    """A trainer that continues the run in a folder; ``changes`` may give ``epochs``, ``device`` and (moved) ``data``.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, of another architecture or of other data.
        ConfigError: another process is training there, the run is finished, or its configuration was changed.
    """
    run = RunFolder.open(path)
    run.lock()
    config = dataclasses.replace(run.load_config(), **changes)
    check_config(config)
    state = load_checkpoint(run.last)
    trainer = Trainer(config, run, reporter, seen=state["data"])
    trainer.resume(state)
    return trainer


@dataclass(frozen=True)
class LoadedRun:
    """A run's weights and images, ready to be evaluated or exported."""

    config: TrainConfig
    dataset: AnyDataset
    evaluator: BranchEvaluator
    loader: Loader
    state: dict[str, Any]


def load_run(path: Path, which: str = "last", data: str | None = None, device: str = "auto", split: str | None = None,
             progress: Progress | None = None) -> LoadedRun:
    """A finished or interrupted run with the weights of its last or best epoch.

    Args:
        path: the run folder.
        which: "last" or "best".
        data: another dataset than the run's; its classes must be the same. Its images are prepared as those of the run were.
        device: as in the configuration.
        split: "train", "val" or "test"; by default what the run is evaluated on.
        progress: called with (files done, files in all) while files are decoded.

    Raises:
        CheckpointError: not a run, no such checkpoint, damaged, or of other classes.
    """
    run = RunFolder.open(path)
    config = dataclasses.replace(run.load_config(), device=device, **({"data": data} if data else {}))
    check_config(config)
    where = choose_device(device)
    file = run.last if which == "last" else run.best
    state = load_checkpoint(file)
    dataset = with_augmentation(config, open_data(config, where, state["data"], progress))
    _check_classes(str(path), state, dataset)
    model = build_model(config, len(dataset.classes), where)
    load_weights(model, state["model"], str(file))
    evaluator = BranchEvaluator(config, model.eval(), where)
    # Mixing weights that a loss has found; there is no room for what it remembers of single images, and no need.
    evaluator.criterion.load_state_dict(state["criterion"], strict=False)
    chosen = dataset.evaluation if split is None else dataset.split(split)
    return LoadedRun(config, dataset, evaluator, loader_for(config, dataset, chosen, False, where, state["data"]), state)


def _check_classes(where: str, state: Mapping[str, Any], dataset: AnyDataset) -> None:
    if list(state["classes"]) != list(dataset.classes):
        raise CheckpointError(f"{where} was trained on the classes {first_few(state['classes'])}, the data has {first_few(dataset.classes)}")
