"""The training loop of one run."""

import contextlib
import dataclasses
import hashlib
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastokd.data import Batch, Loader
from fastokd.data.dataset import split_off
from fastokd.data.images import Progress
from fastokd.errors import (
    CheckpointError,
    ConfigError,
    FastOKDError,
    Preempted,
    StorageError,
    first_line,
    summarize,
)
from fastokd.export import load_weights, student_record, write_student
from fastokd.models import find_backbone
from fastokd.models.summary import check_images
from fastokd.storage import write_json
from fastokd.train.build import build_model
from fastokd.train.checkpoint import (
    CheckpointStore,
    check_resumable,
    checkpoint_files,
    load_checkpoint,
    load_newest,
    state_bytes,
)
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
from fastokd.train.distributed import (
    Agreement,
    Ranks,
    choose_device,
    from_main,
    gather_states,
    local_main_first,
    share_of_batch,
)
from fastokd.train.ema import StudentAverage
from fastokd.train.guard import NonFinite
from fastokd.train.logs import MetricSink, check_sinks, open_sinks
from fastokd.train.memory import describe_memory, fit_batch_size, is_out_of_memory, out_of_memory
from fastokd.train.progress import EpochProgress, Pace, Reporter
from fastokd.train.randomness import be_deterministic, random_state, set_random_state
from fastokd.train.run_folder import RunFolder, default_run_path
from fastokd.train.runner import StepRunner
from fastokd.train.signals import StopSignals
from fastokd.train.step import BranchEvaluator, TrainStep
from fastokd.train.teacher import check_teacher, open_teacher, with_absolute_teacher


class NonFiniteLoss(FastOKDError, ArithmeticError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


class RunIsFinished(ConfigError):
    """There is nothing left to train; the message says how to train on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says where the run can be picked up."""


@dataclass(frozen=True)
class Summary:
    """What a finished run says: accuracies in [0, 1] per branch and mixture, from the last and from
    the best epoch.

    ``best`` is the epoch with the highest accuracy of the student on the evaluation split; choosing
    an epoch there is optimistic if that split is the test set, which is why ``last`` comes first.
    """

    epochs: int
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    seconds: float
    images_per_second: float
    student: str


class Trainer:
    """One run: made new (``start``) or picked up (``resume``), then ``run()``.

    Of several processes that train together each has one, and all call the same. The main process
    alone writes files and shows something; what it decides by its clock or by what is on the disk,
    the others are told.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        reporter: Reporter,
        dataset: AnyDataset | None = None,
        seen: Mapping[str, Any] | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        check_config(config)
        check_sinks(config.log_to)
        check_teacher(config)
        config = with_absolute_teacher(config)
        self.config, self.run_folder, self.reporter = config, run, reporter
        self.ranks = Ranks.current()
        share_of_batch(
            config, self.ranks
        )  # a batch that cannot be divided is refused before the images are read
        if self.ranks.is_main:
            reporter.attach_log(run.log_path)
        self.sinks: list[MetricSink] = []
        self.device = choose_device(config.device)
        be_deterministic(config.deterministic)
        self.dataset = (
            _open_dataset(config, self.device, reporter, seen)
            if dataset is None
            else with_augmentation(config, dataset)
        )
        self.teacher = open_teacher(config, self.dataset, self.device)
        self.model = build_model(
            config,
            len(self.dataset.classes),
            self.device,
            self.teacher.network if self.teacher else None,
        )
        check_images(
            self.model,
            self.dataset.image_size,
            max(find_backbone(name).image_size for name in config.model_names()),
        )
        self.step = TrainStep(
            config, self.model, self.device, self.teacher.rows if self.teacher else None
        )
        self.runner = StepRunner(self.step, reporter.say)
        images, held_out = self.dataset.train, None
        if fraction := self.step.criterion.held_out:
            images, held_out = split_off(images, self.dataset.classes, fraction, config.seed)
        self._seen = seen
        self.num_held_out = 0 if held_out is None else len(held_out)
        self.held_out_loader = (
            None
            if held_out is None
            else loader_for(config, self.dataset, held_out, False, self.device, seen)
        )
        self.memory = self.step.criterion.prepare(
            len(images), len(self.dataset.classes), self.device
        )
        self.train_loader = loader_for(config, self.dataset, images, True, self.device, seen)
        self.eval_loader = loader_for(
            config, self.dataset, self.dataset.evaluation, False, self.device, seen
        )
        self._eval_steps = max(gather_states(len(self.eval_loader)))  # of the process that has most
        self.store = (
            CheckpointStore(run.checkpoints, config.keep_checkpoints)
            if self.ranks.is_main
            else None
        )
        self.signals = signals or StopSignals()
        self._agreement = Agreement()
        self.kept = self.step.reported
        self.epoch = 0
        self.done = 0  # batches of the epoch
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_epoch = -1
        self.seconds = 0.0  # of training in the epochs before
        self._trained = 0.0  # seconds of training in this epoch
        self._rollbacks = 0
        self._replaced = 0  # bad pictures that were reported
        self.pace = Pace(config.epochs, config.batch_size)

    def start(self) -> None:
        """Write what identifies a new run."""
        if not self.ranks.is_main:
            return
        self.run_folder.save_config(self.config)
        self.run_folder.save_environment(self.device, self.dataset.describe())

    def resume(self, state: dict[str, Any], allow_config_change: bool = False) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            CheckpointError: it is of another architecture or of other data.
            RunIsFinished: the run has all its epochs; its summary is written anew.
            ConfigError: its configuration was changed since and ``allow_config_change`` is False.
        """
        where = str(self.run_folder.last)
        _check_classes(where, state, self.dataset)
        if state["data"].get("fingerprint") != self.dataset.fingerprint:
            raise CheckpointError(
                f"{where} was trained on other images than {self.config.data} holds now; restore"
                " them, or start a new run"
            )
        before = load_config(state["config"], f"the configuration in {where}")
        changed = differences(
            dataclasses.replace(
                before, **{name: getattr(self.config, name) for name in MAY_CHANGE}
            ),
            self.config,
        )
        if changed and not allow_config_change:
            raise ConfigError(
                f"the configuration is not that of the checkpoint (was, is: {'; '.join(changed)}):"
                " undo that, pass --allow-config-change, or start a new run"
            )
        if changed:
            self.reporter.say(
                f"going on with another configuration than before (was, is: {'; '.join(changed)})"
            )
        if self.teacher and state.get("teacher") != self.teacher.fingerprint:
            raise CheckpointError(
                f"{where} was distilled from another teacher than {self.teacher.description} is"
                " now; restore that one, or start a new run"
            )
        check_resumable(state, where)
        self._load(state, where)
        self.epoch, self.done = state["epoch"], 0
        self.best_epoch, self.last, self.best, self.seconds = (
            state["best_epoch"],
            state["last"],
            state["best"],
            state["seconds"],
        )
        if self.epoch >= self.config.epochs:
            self.finish()  # it may have been killed after its last checkpoint
            raise RunIsFinished(
                f"the run has {self.epoch} finished epochs, and --epochs {self.config.epochs} is"
                " not more; to train on, pass a larger --epochs"
            )
        if self.best and self.kept not in self.best:
            self.best, self.best_epoch = {}, -1  # what was the student then is not what is now
        if not from_main(
            self.store.restore_best(self.best_epoch) if self.store is not None else None
        ):
            self.reporter.say(
                f"{self.run_folder.best} is not of the best epoch so far ({self.best_epoch + 1}),"
                " and no other checkpoint is: the best of those to come is kept"
            )
            self.best, self.best_epoch = {}, -1
        self._find_place(state, not changed)
        if self.config.epochs != before.epochs:
            done, next_one = (
                f"lr {config.lr_at(epoch):g}, kd_weight {config.kd_weight_at(epoch):.4g}"
                for config, epoch in ((before, max(self.epoch - 1, 0)), (self.config, self.epoch))
            )
            self.reporter.say(
                f"the run now has {self.config.epochs} epochs instead of {before.epochs}:"
                " learning-rate decay and ramp-up follow the new number (epoch"
                f" {max(self.epoch, 1)} ran with {done}; epoch {self.epoch + 1} goes on with"
                f" {next_one})"
            )
        if self.ranks.is_main:
            self.run_folder.save_config(self.config)
            self.run_folder.add_session(self.device)
            self.run_folder.keep_metrics_before(self.epoch)

    def _load(self, state: dict[str, Any], where: str) -> None:
        """The weights, and everything else that the steps change."""
        step = self.step
        load_weights(self.model, state["model"], where)
        load_weights(step.criterion, state["criterion"], where)
        try:
            step.optimizers.load_state_dict(state["optimizer"])
            if step.average is not None and state["ema"]:
                step.average.load_state_dict(state["ema"], where)
            if step.scale is not None and state["scaler"]:
                step.scale.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{where} has an optimizer state that does not fit ({first_line(error)})"
            ) from error

    def _find_place(self, state: dict[str, Any], exactly: bool) -> None:
        """Go on within the epoch where the checkpoint was written, if it was.

        Not ``exactly`` is with another configuration: other terms may be measured, so what was
        measured is left, unless no step of the epoch is to come.
        """
        self.step.number.fill_(state["step"])
        if not state["loader"]:
            return
        self.train_loader.load_state_dict(state["loader"])
        self.done = state["loader"]["position"] // self.config.batch_size
        self._trained = state["sums"]["seconds"]
        exactly = exactly or self.done == len(self.train_loader)
        if exactly and len(state["ranks"]) == self.ranks.size:
            own = state["ranks"][self.ranks.rank]
            self.step.sums.load_state_dict(own["sums"], self.device)
            set_random_state(own["rng"])
            for name, buffer in self._own_statistics().items():
                if name in own["statistics"]:
                    buffer.copy_(own["statistics"][name])
            return
        # Other processes or settings than before: what is measured stays whole, and what layers
        # draw begins anew.
        for each in state["ranks"] if exactly else ():
            self.step.sums.add_state(each["sums"], self.device)
        if not self.ranks.is_main:
            self.step.sums.clear()
        self._seed()

    def run(self) -> Summary:
        """Train the remaining epochs.

        Raises:
            Interrupted: Ctrl-C; the last checkpoint is intact.
            Preempted: SIGTERM or SIGUSR1; a checkpoint of this very step was written.
            NonFiniteLoss: the loss became NaN or infinite.
            StorageError: the disk refused.
        """
        self._introduce()
        records = self.run_folder.read_metrics()
        self.reporter.start_run(self.kept, records)
        try:
            with self.signals:
                self.sinks = open_sinks(
                    self.config.log_to if self.ranks.is_main else (),
                    self.run_folder.path,
                    dataclasses.asdict(self.config),
                    records,
                    self.reporter.say,
                )
                self._run_epochs()
                self._close_store()
        except KeyboardInterrupt:
            self._finish_writing()
            message = f"interrupted in epoch {self.epoch + 1}; {self._what_is_saved()}"
            self.reporter.log(message)
            raise Interrupted(message) from None
        except BaseException as error:
            self._finish_writing()
            self.reporter.log(f"{type(error).__name__}: {first_line(error)}")
            if is_out_of_memory(error):
                raise out_of_memory(self.config, self.device) from error
            raise
        finally:
            self.reporter.close()
            for sink in self.sinks:
                sink.close()
            self.run_folder.unlock()
        summary = self.finish()
        self.reporter.log(
            f"finished: {summary.epochs} epochs, {summary.seconds:.1f} s of training,"
            f" {summary.images_per_second:.0f} img/s; student {100 * summary.last[self.kept]:.2f}"
            f" %, in its best epoch ({summary.best_epoch + 1})"
            f" {100 * summary.best[self.kept]:.2f} %"
        )
        return summary

    def _run_epochs(self) -> None:
        if self.store is not None:
            self.store.check_space(state_bytes(self._state(True, [])))
        if self.config.on_nonfinite == "rollback" and not from_main(
            bool(checkpoint_files(self.run_folder.checkpoints))
        ):
            self._save(None)  # something to roll back to
        while self.epoch < self.config.epochs:
            self._run_epoch()

    def _finish_writing(self) -> None:
        """Let a write that is under way end; what it has to say must not hide what ended the
        run.
        """
        with contextlib.suppress(StorageError):
            self._close_store()

    def _close_store(self) -> None:
        if self.store is not None:
            self.store.close()

    def finish(self) -> Summary:
        """Write and return the summary of the epochs so far."""
        images = self.epoch * len(self.train_loader) * self.config.batch_size
        summary = Summary(
            self.epoch,
            self.last,
            self.best,
            self.best_epoch,
            self.seconds,
            images / self.seconds,
            str(self.run_folder.student),
        )
        if self.ranks.is_main:
            write_json(self.run_folder.summary_path, summary.__dict__)
        return summary

    def _what_is_saved(self) -> str:
        # What is on the disk says it, wherever between two instructions the signal came.
        if not checkpoint_files(self.run_folder.checkpoints):
            return "no epoch was saved, so there is no checkpoint"
        state = load_newest(self.run_folder.checkpoints)[0]
        within = (
            f" and {state['loader']['position'] // self.config.batch_size} steps of the next"
            if state["loader"]
            else ""
        )
        return (
            f"the last checkpoint has {state['epoch']} finished epochs{within}; continue with"
            f" 'fastokd train --resume {self.run_folder.path}'"
        )

    def _introduce(self) -> None:
        say = self.reporter.info
        config, data = self.config, self.dataset
        say(
            f"run {self.run_folder.path}: {config.model}, method {config.method} ({config.preset}),"
            f" {config.num_branches()} branches, on {self.device}"
        )
        say(
            f"data {data.name}: {len(data.classes)} classes, {len(data.train)} training and"
            f" {len(data.evaluation)} {data.evaluation.name} images"
        )
        say(explain_loader(config, data, self.device, self._seen))
        say(f"step: {self.step.levers.describe()}; {self.step.share.describe()}")
        if self.reporter.shows_info:
            for line in describe_memory(
                config, data, self.device, self.teacher.network if self.teacher else None
            ):
                say(line)
        if self.teacher:
            say(f"teacher {self.teacher.description}")
        coefficients = [
            (term.name, term.coefficient, term.scheduled)
            for term in self.step.criterion.graph.terms
        ]
        coefficients += [(name, *term) for name, term in self.step.criterion.extra_terms.items()]
        terms = ", ".join(
            f"{coefficient:g}{'*kd_weight' if scheduled else ''} {name}"
            for name, coefficient, scheduled in coefficients
        )
        say(f"loss (T^2 and weights multiplied out): {terms}{self._describe_schedule()}")
        if self.num_held_out:
            say(
                f"{self.num_held_out} of the training images are held out: nobody trains on them,"
                " the loss looks at them before every epoch"
            )
        if self.memory:
            say(self.memory)

    def _describe_schedule(self) -> str:
        config, length = self.config, self.config.ramp_length()
        if not length:
            return ""
        return (
            f"; kd_weight is {config.kd_weight_at(0):.3g} in epoch 1,"
            f" {config.kd_weight_at(length - 1):.3g} in epoch {length} and 1 after it"
        )

    def _run_epoch(self) -> None:
        self.reporter.start_epoch(self.epoch, self.config.epochs, len(self.train_loader), self.done)
        self.pace.start_epoch(self.epoch, len(self.train_loader), self.done)
        if self.done < len(self.train_loader):
            self._train_epoch()
        self.reporter.evaluating()
        self.step.mean_statistics()
        last, mixing = self.step.measure(self._unless_stopped(self.eval_loader))
        record = {
            "epoch": self.epoch,
            "lr": self._lr(self.done - 1),
            "kd_weight": self.config.kd_weight_at(self.epoch),
            "train": self.step.sums.means(of_all=True),
            "eval": last,
            **({"mixing": mixing} if mixing else {}),
            "seconds": round(self._trained, 3),
            "images_per_second": round(self.done * self.config.batch_size / self._trained, 1),
            "waiting_share": round(self.pace.waiting_share(), 4),
        }
        self.seconds += self._trained
        self.epoch, self.done, self._trained, self.last = self.epoch + 1, 0, 0.0, last
        is_best = not self.best or last[self.kept] > self.best[self.kept]
        if is_best:
            self.best, self.best_epoch = dict(last), self.epoch - 1
        self._save(record, is_best)
        if self.sinks and self.store is not None:
            self.store.wait()  # what a sink was given cannot be taken back everywhere
        for sink in self.sinks:
            sink.write(record)
        self.reporter.end_epoch(record, self.pace.end_epoch())
        self._report_replaced()

    def _lr(self, done: int) -> float:
        """The learning rate of the step that comes after ``done`` of this epoch."""
        return self.config.lr_at(self.epoch + done / len(self.train_loader))

    def _train_epoch(self) -> None:
        config, step, kd_weight = self.config, self.step, self.config.kd_weight_at(self.epoch)
        self.train_loader.set_size(config.size_at(self.epoch))
        self.train_loader.set_epoch(self.epoch)
        if not self.done:
            self._seed()
            step.sums.clear()
            self._rollbacks = 0
            if self.held_out_loader is not None:
                step.criterion.see_held_out(
                    (result.logits, target) for result, target in step.results(self.held_out_loader)
                )
        self.model.train()
        begun, counted, looked, saved = (
            self.done,
            time.monotonic(),
            time.monotonic(),
            time.monotonic(),
        )
        step.set_schedule(self._lr(begun), kd_weight)
        for done in self.runner.epoch(self.train_loader, begun, self.pace.waiting):
            self.done, now = done, time.monotonic()
            self._trained, counted = self._trained + now - counted, now
            wanted = self.reporter.wants_note()
            save = bool(config.save_minutes) and now - saved > 60 * config.save_minutes
            due = self._agree(
                _STOP
                if self.signals.received
                else _SAVE
                if save
                else _CHECK
                if wanted or now - looked > CHECK_SECONDS
                else 0
            )
            if due:
                looked = now
                self._check_finite()
            self.reporter.step(done, self._progress(kd_weight) if wanted else None)
            if due == _STOP:
                self._stop()
            if due == _SAVE:
                saved = now
                self._save(None)
            step.set_schedule(self._lr(done), kd_weight)
        self._agreement.settle()
        # Waits for the device, which a captured step leaves far behind the host
        self._check_finite()
        self._trained += time.monotonic() - counted
        self.pace.device_is_done()

    def _seed(self) -> None:
        """What a layer draws depends on seed, epoch and process alone, so an epoch that is trained
        again draws what it drew.
        """
        torch.manual_seed(self.config.seed * 1_000_003 + self.epoch + 1 + self.ranks.rank * 10**16)

    def _agree(self, wanted: int) -> int:
        """What is to be done after this step: the most that any process wanted, at this step or, of
        several processes, at the last.
        """
        due = self._agreement.exchange(wanted)
        if due:
            self._agreement.settle()  # what was wanted now is done with it, or will be wanted again
        return due

    def _own_statistics(self) -> dict[str, torch.Tensor]:
        """The running statistics, which differ between processes within an epoch; empty for a
        process alone.
        """
        if self.ranks.size == 1 or self.config.sync_bn:
            return {}
        parts = {
            "model": self.model,
            **({} if self.step.average is None else {"average": self.step.average.module}),
        }
        buffers = {
            id(buffer)
            for module in parts.values()
            for buffer in module.buffers()
            if buffer.is_floating_point()
        }
        # Those of the state dict: a frozen teacher is not in it, and has nothing that changes.
        return {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.state_dict(keep_vars=True).items()
            if id(value) in buffers
        }

    def _progress(self, kd_weight: float) -> EpochProgress:
        memory = (
            torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        )
        return self.pace.look(
            self.done, self.step.sums.means(), self._lr(self.done - 1), kd_weight, memory
        )

    def _unless_stopped(self, loader: Loader) -> Iterator[Batch]:
        batches = iter(loader)
        for _ in range(self._eval_steps):
            if (batch := next(batches, None)) is not None:
                yield batch
            if self._agree(_STOP if self.signals.received else 0):
                self._stop()
        self._agreement.settle()

    def _stop(self) -> None:
        """Save this very place and end the run, because a signal asked for it."""
        self._check_finite()
        self._save(None)
        self._close_store()
        received = max(gather_states(self.signals.received))
        # Nobody leaves before the main process has saved: a launcher ends the others when one has
        # ended.
        raise Preempted(
            from_main(
                f"stopped by {signal.Signals(received).name}; {self._what_is_saved()}"
                if self.ranks.is_main
                else None
            )
        )

    def _report_replaced(self) -> None:
        found: dict[int, str] = {}
        for each in gather_states(dict(getattr(self.train_loader, "replaced", {}))):
            found |= each
        if len(found) > self._replaced:
            names = [f"{self.dataset.train.files[i]} ({reason})" for i, reason in found.items()][
                self._replaced :
            ]
            self._replaced = len(found)
            self.reporter.say(
                f"pictures that cannot be decoded and were replaced, so far {len(found)}:"
                f" {summarize(names)}"
            )

    def _check_finite(self) -> None:
        """Look at what the steps found not finite since the last look, and do about it what the
        configuration says.
        """
        if (found := self.step.guard.read()) is None:
            return
        # All saw the same steps, but only some may have had what was not finite in them.
        terms, parameters = (
            [name for each in gather_states(list(names)) for name in each]
            for names in (found.terms, found.parameters)
        )
        found = dataclasses.replace(
            found, terms=tuple(dict.fromkeys(terms)), parameters=tuple(dict.fromkeys(parameters))
        )
        policy = self.config.on_nonfinite
        if policy == "skip" and found.count <= MAX_SKIPPED:
            self.reporter.say(f"left out in epoch {self.epoch + 1}, {found.describe()}")
        elif policy == "rollback" and self._rollbacks < MAX_ROLLBACKS:
            self._roll_back(found)
        else:
            self._finish_writing()
            fix = "lower --lr" + (
                ", or try --precision fp32" if self.step.precision in ("bf16", "fp16") else ""
            )
            often = {
                "skip": f"; more than {MAX_SKIPPED} steps were to be left out",
                "rollback": f"; {MAX_ROLLBACKS} rollbacks in this epoch did not help",
            }.get(policy, "")
            raise NonFiniteLoss(
                f"epoch {self.epoch + 1}, {found.describe()}{often};"
                f" {from_main(self._what_is_saved() if self.ranks.is_main else None)}. To mend it"
                f" {fix}"
            )
        self.step.guard.clear()

    def _roll_back(self, found: NonFinite) -> None:
        """Go back to the weights of the last checkpoint, and on with the batches that come next,
        not those that broke it.
        """
        self._rollbacks += 1
        if self.store is not None:
            self.store.wait()
        state, where, complaints = _newest_of_main(self.run_folder)
        self._load(state, where)
        for complaint in complaints:
            self.reporter.say(complaint)
        self.reporter.say(
            f"rolled back in epoch {self.epoch + 1}, {found.describe()}; the weights are those of"
            f" step {state['step']} again"
        )

    def _save(self, record: dict[str, Any] | None, is_best: bool = False) -> None:
        """Write a checkpoint: of a finished epoch with its record, or of this place within one.

        ``last.pt`` comes last: until it is there, a resume trains the epoch again and writes the
        rest anew.
        """
        step, within = self.step, record is None
        own = {
            "rng": random_state(),
            **(
                {"sums": step.sums.state_dict(), "statistics": self._own_statistics()}
                if within
                else {}
            ),
        }
        ranks = gather_states(own)
        if self.store is not None:
            self.store.save(
                self._state(within, ranks),
                is_best=is_best,
                before=None if record is None else self._epoch_writer(record),
            )

    def _state(self, within: bool, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint holds: of a place within an epoch, or of its end."""
        step = self.step
        state = {
            "model": self.model.state_dict(),
            "optimizer": step.optimizers.state_dict(),
            "criterion": step.criterion.state_dict(),
            "ema": {} if step.average is None else step.average.state_dict(),
            "scaler": {} if step.scale is None else step.scale.state_dict(),
            "epoch": self.epoch,
            "step": int(step.number),
            "loader": self.train_loader.state_dict() if within else {},
            "sums": {"seconds": self._trained} if within else {},
            "ranks": ranks,
            "last": self.last,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "classes": list(self.dataset.classes),
            "data": data_record(
                self.dataset, loader_name(self.config, self.dataset, self.device, self._seen)
            ),
            "config": self.config.to_yaml(),
            "config_hash": run_identity(self.config, self.dataset.fingerprint),
        }
        if self.teacher:
            state["teacher"] = self.teacher.fingerprint
        return state

    def _epoch_writer(self, record: dict[str, Any]) -> Callable[[], None]:
        """What writes the student and the epoch's record, both as they are now."""
        student = self.step.student().cpu()
        about = student_record(
            self.model.name,
            self.dataset,
            accuracy=self.last[self.kept],
            epoch=self.epoch,
            provenance=provenance(self.config, self.run_folder, self.dataset.fingerprint),
        )

        def write() -> None:
            write_student(self.run_folder.student, student, about)
            self.run_folder.append_metrics(record)

        return write


CHECK_SECONDS = 5.0
"""How long a step that was not finite may go unseen by the host; looking waits for the device."""
MAX_SKIPPED = 20
"""Steps between two looks that may be left out before the run is given up."""
MAX_ROLLBACKS = 3
"""Rollbacks in one epoch before the run is given up."""

_CHECK, _SAVE, _STOP = 1, 2, 3
"""What may be due after a step: look for what is not finite; that, and save; that, and stop."""

MAY_CHANGE = (
    "data",
    "device",
    "epochs",
    "impl",
    "compile",
    "cuda_graph",
    "streams",
    "flat",
    "keep_checkpoints",
    "save_minutes",
    "log_to",
)
"""Where a run goes on, how far and how fast may change when it is resumed; what it computes may
not.
"""


def run_identity(config: TrainConfig, fingerprint: str | None) -> str:
    """A hash of what a run computes: the fields that may not change when it is resumed, and the
    fingerprint of its data.
    """
    fixed = [
        (item.name, getattr(config, item.name))
        for item in dataclasses.fields(config)
        if item.name not in MAY_CHANGE
    ]
    return hashlib.sha256(repr((fixed, fingerprint)).encode()).hexdigest()


def provenance(config: TrainConfig, run: RunFolder, fingerprint: str | None) -> dict[str, Any]:
    """Where a student comes from, for its record: the method's settings, and the versions that the
    run was started with.

    ``run`` in it is the same for all exports of a run, however it was resumed: a hash of its
    configuration and of the fingerprint of the data it is trained on.
    """
    return {
        "run": run_identity(config, fingerprint)[:12],
        "method": config.method,
        "preset": config.preset,
        "branches": config.num_branches(),
        "aux_blocks": config.aux_blocks,
        "compression": config.compression,
        "seed": config.seed,
        "epochs": config.epochs,
        **run.versions(),
    }


def _open_dataset(
    config: TrainConfig,
    device: torch.device,
    reporter: Reporter,
    seen: Mapping[str, Any] | None = None,
) -> AnyDataset:
    try:
        with local_main_first():
            return with_augmentation(config, open_data(config, device, seen, reporter.decoding))
    finally:
        reporter.close()


def begin_run(
    config: TrainConfig,
    out: Path | None,
    name: str,
    reporter: Reporter,
    resume: bool = False,
    allow_config_change: bool = False,
    signals: StopSignals | None = None,
    largest_batch: int | None = None,
) -> Trainer:
    """A trainer for a new run.

    Args:
        config: the run's configuration.
        out: the run folder; None for one by ``name`` in ``runs/``.
        reporter: of this process.
        name: of the run.
        resume: go on with the run that is in the folder, if one is there, by ``resume_run`` with
            this configuration.
        allow_config_change: see ``Trainer.resume``.
        signals: what has heard signals since before; the run follows them at its first step.
        largest_batch: choose the batch size by memory, up to this, see ``fit_batch_size``; None for
            that of the configuration. A run that goes on keeps its own.

    Raises:
        ConfigError: a setting is wrong, or the folder holds something else or a run.
        StorageError: the folder cannot be made or written to.
    """
    check_config(config)
    folder = Path(
        from_main(str(out or (Path("runs") / name if resume else default_run_path(name))))
    )
    if resume and from_main(bool(checkpoint_files(RunFolder(folder).checkpoints))):
        given = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
        if largest_batch is not None:
            del given["batch_size"]
        return resume_run(folder, reporter, allow_config_change, signals, **given)
    is_main = Ranks.current().is_main
    run = RunFolder.create(folder) if is_main else RunFolder(folder)
    try:
        dataset, reason = None, ""
        if largest_batch is not None:
            config, dataset, reason = _with_fitting_batch(config, reporter, largest_batch)
        trainer = Trainer(config, run, reporter, dataset, signals=signals)
        if reason:
            reporter.info(reason)
        trainer.start()
    except BaseException:
        if is_main:
            run.discard_without_checkpoint()
        raise
    return trainer


def _with_fitting_batch(
    config: TrainConfig, reporter: Reporter, largest: int
) -> tuple[TrainConfig, AnyDataset, str]:
    """The configuration with a batch size chosen by memory, the dataset that it was chosen for, and
    the reason.
    """
    check_teacher(config)
    device = choose_device(config.device)
    be_deterministic(config.deterministic)
    dataset = _open_dataset(config, device, reporter)
    batch_size, reason = fit_batch_size(
        config, dataset, device, open_teacher(config, dataset, device), largest
    )
    return dataclasses.replace(config, batch_size=batch_size), dataset, reason


def resume_run(
    path: Path,
    reporter: Reporter,
    allow_config_change: bool = False,
    signals: StopSignals | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer that continues the run in a folder, with ``changes`` to its configuration, see
    ``Trainer.resume`` and ``begin_run``.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, of another architecture or of other
            data.
        ConfigError: another process is training there, the run is finished, or its configuration
            was changed.
    """
    run = RunFolder.open(path)
    if Ranks.current().is_main:
        run.lock()
    config = dataclasses.replace(run.load_config(), **changes)
    check_config(config)
    state, _, complaints = _newest_of_main(run)
    for complaint in complaints:
        reporter.say(complaint)
    trainer = Trainer(config, run, reporter, seen=state["data"], signals=signals)
    trainer.resume(state, allow_config_change)
    return trainer


def _newest_of_main(run: RunFolder) -> tuple[dict[str, Any], str, list[str]]:
    """What the main process finds by ``load_newest``, for all; the path as text."""
    if Ranks.current().is_main:
        state, path, complaints = load_newest(run.checkpoints)
        return tuple(from_main([state, str(path), complaints]))
    return tuple(from_main(None))


@dataclass(frozen=True)
class LoadedRun:
    """A run's weights and images, ready to be evaluated or exported."""

    config: TrainConfig
    dataset: AnyDataset
    evaluator: BranchEvaluator
    loader: Loader
    state: dict[str, Any]


def load_run(
    path: Path,
    which: str = "last",
    data: str | None = None,
    device: str = "auto",
    split: str | None = None,
    progress: Progress | None = None,
) -> LoadedRun:
    """A finished or interrupted run with the weights of its last or best epoch. A damaged last one
    is passed over with a warning.

    Args:
        path: the run folder.
        which: "last" or "best".
        data: another dataset than the run's; its classes must be the same. Its images are prepared
            as those of the run were.
        device: as in the configuration.
        split: "train", "val" or "test"; by default what the run is evaluated on.
        progress: called with (files done, files in all) while files are decoded.

    Raises:
        CheckpointError: not a run, no such checkpoint, damaged, or of other classes.
    """
    run = RunFolder.open(path)
    config = dataclasses.replace(
        run.load_config(), device=device, **({"data": data} if data else {})
    )
    check_config(config)
    where = choose_device(device)
    if config.precision == "tf32" and where.type != "cuda":
        config = dataclasses.replace(config, precision="fp32")  # the same numbers with more bits
    if which == "last":
        state, file, complaints = load_newest(run.checkpoints)
        for complaint in complaints:
            warnings.warn(complaint, stacklevel=2)
    else:
        file = run.best
        state = load_checkpoint(file)
    dataset = with_augmentation(config, open_data(config, where, state["data"], progress))
    _check_classes(str(path), state, dataset)
    model = build_model(config, len(dataset.classes), where)
    load_weights(model, state["model"], str(file))
    evaluator = BranchEvaluator(config, model.eval(), where)
    if state["ema"]:
        evaluator.average = StudentAverage(model, config.ema)
        evaluator.average.load_state_dict(state["ema"])
    # Mixing weights that a loss has found; there is no room for what it remembers of single images,
    # and no need.
    evaluator.criterion.load_state_dict(state["criterion"], strict=False)
    chosen = dataset.evaluation if split is None else dataset.split(split)
    return LoadedRun(
        config,
        dataset,
        evaluator,
        loader_for(config, dataset, chosen, False, where, state["data"]),
        state,
    )


def _check_classes(where: str, state: Mapping[str, Any], dataset: AnyDataset) -> None:
    if list(state["classes"]) != list(dataset.classes):
        raise CheckpointError(
            f"{where} was trained on the classes {summarize(state['classes'], 4)}, the data has"
            f" {summarize(dataset.classes, 4)}"
        )
