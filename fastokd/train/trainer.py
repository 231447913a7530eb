"""Training one run: epochs, evaluation, checkpoints and stops."""

import contextlib
import dataclasses
import gc
import itertools
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastokd._moved import renamed_property
from fastokd.data import Batch, FileDataset, Loader
from fastokd.data.dataset import split_off
from fastokd.errors import Preempted, first_line, summarize
from fastokd.export import student_record, write_student
from fastokd.storage import write_json
from fastokd.train.batches import BatchChoice, choose_batch, describe_batches
from fastokd.train.build import is_before_teaching, with_safe_layout
from fastokd.train.cadence import Cadence, Due
from fastokd.train.checkpoint import (
    CheckpointStore,
    check_resumable,
    checkpoint_files,
    snapshot,
    state_bytes,
)
from fastokd.train.compute import epoch_costs
from fastokd.train.config import TrainConfig, one_teacher
from fastokd.train.config_files import load_config
from fastokd.train.data import AnyDataset, data_record, loader_for, loader_name, open_data, prepared
from fastokd.train.describe import describe_extension, describe_loss, describe_run
from fastokd.train.distributed import (
    Ranks,
    choose_device,
    from_main,
    gather_states,
    local_main_first,
    share_of_batch,
)
from fastokd.train.guard import NonFinite
from fastokd.train.initial import normalization_of, read_initial, with_absolute_weights
from fastokd.train.introduction import introduction
from fastokd.train.late_teaching import build_step, check_late_teaching, check_same_phase
from fastokd.train.logs import MetricSink, check_sinks, open_sinks
from fastokd.train.loss import build_loss
from fastokd.train.memory import is_out_of_memory, out_of_memory
from fastokd.train.outcome import Interrupted, NonFiniteLoss, RunIsFinished, Summary
from fastokd.train.progress import EpochProgress, Reporter, Throughput
from fastokd.train.randomness import be_deterministic, random_state, set_random_state
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder
from fastokd.train.runner import StepRunner
from fastokd.train.runs import (
    check_same_run,
    fingerprints,
    newest_checkpoint,
    provenance,
    resume_hint,
    run_identity,
)
from fastokd.train.signals import StopSignals, signal_name
from fastokd.train.step import Evaluation
from fastokd.train.teacher import check_teacher, open_teacher, with_absolute_teacher

MAX_SKIPPED = 20
"""Non-finite steps between two checks that ``on_nonfinite="skip"`` tolerates."""
MAX_ROLLBACKS = 3
"""Rollbacks in one epoch that ``on_nonfinite="rollback"`` tolerates."""


class Trainer:
    """One training run. Call ``start`` (a new run) or ``resume`` (from a checkpoint), then ``run``.

    In a distributed run every process has a trainer, and all make the same calls. Only the main
    process writes files and prints. It sends the others decisions that depend on its clock or disk.

    Args:
        run: the run folder, see ``RunFolder.create`` and ``RunFolder.open``.
        dataset: the run's dataset; None to open it.
        saved_data: ``data_record`` from the checkpoint of a resumed run; None for a new run.
        signals: signal handlers that are already installed; None to install new ones in ``run``.
        batch_choice: how to choose the batch size; None for that of the configuration.

    Attributes:
        epoch, done: finished epochs, and finished steps of the current epoch.
        last, best: accuracies of the last and the best epoch, the student's at ``student_name``.
        best_epoch: the best epoch, from 0; -1 before the first.
        seconds: training time of the finished epochs.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        reporter: Reporter,
        dataset: AnyDataset | None = None,
        saved_data: Mapping[str, Any] | None = None,
        signals: StopSignals | None = None,
        batch_choice: BatchChoice = None,
    ) -> None:
        check_config(config)
        check_sinks(config.log_to)
        check_teacher(config)
        config = with_absolute_weights(with_absolute_teacher(config))
        self.run_folder, self.reporter, self._saved_data = run, reporter, saved_data
        self.ranks = Ranks.current()
        if batch_choice is None:
            share_of_batch(config, self.ranks)  # raises errors before images are read
        if self.ranks.is_main:
            reporter.attach_log(run.log_path)
        self.device = choose_device(config.device)
        be_deterministic(config.deterministic)
        initial = read_initial(config) if saved_data is None else []
        if dataset is None:
            with contextlib.closing(reporter), local_main_first():
                dataset = open_data(config, self.device, saved_data, reporter.decoding)
        self.dataset = prepared(config, dataset, saved_data, normalization_of(config, initial))
        config = with_safe_layout(config, len(self.dataset.classes), self.device, reporter.info)
        self.teacher = teacher = open_teacher(config, self.dataset, self.device)
        config, reason = choose_batch(config, self.dataset, self.device, teacher, batch_choice)
        if reason:
            reporter.info(reason)
        self.config = config
        if config.teach_epoch():
            check_late_teaching(config, len(self.dataset.classes), self.device, teacher)
        self._fingerprints = fingerprints(config, teacher, initial)
        self._build_step(alone=config.teach_epoch() > 0, initial=initial)
        self._open_loaders()
        self.store: CheckpointStore | None = None
        if self.ranks.is_main:
            self.store = CheckpointStore(run.checkpoints, config.keep_checkpoints)
        self.signals = signals or StopSignals()
        self.cadence = Cadence(config.save_minutes, self.signals)
        costs = epoch_costs(config, len(self.dataset.classes), self.dataset.image_size)
        self.throughput = Throughput(config.epochs, config.batch_size, costs=costs)
        self.sinks: list[MetricSink] = []
        self.student_name = self.step.reported
        self.epoch = self.done = 0
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_epoch = -1
        self.seconds = self._trained = 0.0  # the latter of this epoch
        self._rollbacks = self._replaced = 0

    def _build_step(self, **options: Any) -> None:
        """Build the networks and their step with ``options`` of ``build_step``."""
        self.step = build_step(self.config, self.dataset, self.device, self.teacher, **options)
        self.model = self.step.model
        self.runner = StepRunner(self.step, self.reporter.print)

    def _open_loaders(self) -> None:
        self._trained_images: Any = self.dataset.train
        self._views = 0  # of the training images
        self.num_held_out, self.held_out_loader = 0, None
        if fraction := build_loss(self.config).held_out_fraction:
            self._trained_images, held_out = split_off(
                self._trained_images, self.dataset.classes, fraction, self.config.seed
            )
            self.num_held_out, self.held_out_loader = len(held_out), self._loader(held_out)
        self.eval_loader = self._loader(self.dataset.evaluation)
        self._eval_steps = max(gather_states(len(self.eval_loader)))
        self._prepare_phase()

    def _loader(self, split: Any, train: bool = False) -> Loader:
        # The student alone, before ``teach_from``, has one view of each image.
        config = self.step.config
        return loader_for(config, self.dataset, split, train, self.device, self._saved_data)

    def _prepare_phase(self) -> None:
        """Allocate the loss's state and open the training images with the networks' views."""
        sizes = len(self._trained_images), len(self.dataset.classes)
        self._memory_note = self.step.criterion.prepare(*sizes, self.device)
        if self._views != (views := self.step.config.views()):
            self.train_loader = self._loader(self._trained_images, train=True)
            self._views = views

    def start(self) -> None:
        """Write the files that identify a new run."""
        if self.ranks.is_main:
            self.run_folder.save_config(self.config)
            data, prints = self.dataset.describe(), self._fingerprints
            self.run_folder.save_environment(self.device, self.step.precision, data, prints)

    def resume(self, state: dict[str, Any], allow_config_change: bool = False) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            CheckpointError: the checkpoint has another architecture, other data or another teacher.
            RunIsFinished: the run already finished; its summary is written again.
            ConfigError: the configuration changed and ``allow_config_change`` is False.
        """
        path = str(self.run_folder.last)
        before = one_teacher(load_config(state["config"], f"the configuration in {path}"))
        changed = check_same_run(
            path, state, before, self.config, self.dataset, self.teacher, allow_config_change
        )
        if changed:
            text = "; ".join(changed)
            self.reporter.print(f"resuming with a changed configuration (old, new: {text})")
        check_resumable(state, path)
        if weights := state.get("weights"):  # their file is not read again
            self._fingerprints["weights"] = weights
        check_same_phase(before, self.config, state, path)
        if self._is_alone and not is_before_teaching(self.config, state):
            self._build_step()
            self._prepare_phase()
        self.step.load_state_dict(state, path)
        self.epoch, self.done, self.seconds = state["epoch"], 0, state["seconds"]
        self.last, self.best, self.best_epoch = state["last"], state["best"], state["best_epoch"]
        if self.epoch >= self.config.epochs:
            self.finish()  # the process may have been killed before it wrote the summary
            done = f"the run already finished {self.epoch} of {self.config.epochs} epochs"
            raise RunIsFinished(f"{done}; pass a larger --epochs to continue")
        self._restore_best()
        self._restore_position(state, exactly=not changed)
        if self.config.epochs != before.epochs:
            self.reporter.print(describe_extension(before, self.config, self.epoch))
        if self.ranks.is_main:
            self.run_folder.save_config(self.config)
            self.run_folder.add_session(self.device, self.step.precision)
            self.run_folder.keep_metrics_before(self.epoch)

    def _restore_best(self) -> None:
        """Make ``best.pt`` match the best epoch, or start tracking a new best."""
        if self.student_name not in self.best:  # the best epoch of another student
            self.best, self.best_epoch = {}, -1
        if not from_main(self.store is None or self.store.restore_best(self.best_epoch)):
            self.reporter.print(
                f"{self.run_folder.best} does not match the best epoch ({self.best_epoch + 1}) and"
                " no other checkpoint does; tracking a new best from here"
            )
            self.best, self.best_epoch = {}, -1

    def _restore_position(self, state: dict[str, Any], exactly: bool) -> None:
        """Restore the position within an epoch, if the checkpoint was written within one. If not
        ``exactly``, the configuration changed: the loss may have other terms, so sums are dropped.
        """
        self.step.number.fill_(state["step"])
        if not state["loader"]:
            return
        self.train_loader.load_state_dict(state["loader"])
        self.done = state["loader"]["position"] // self.config.batch_size
        self._trained = state["sums"]["seconds"]
        exactly = exactly or self.done == len(self.train_loader)
        if exactly and len(state["ranks"]) == self.ranks.size:
            rank = state["ranks"][self.ranks.rank]
            self.step.sums.load_state_dict(rank["sums"], self.device)
            set_random_state(rank["rng"], self.device)
            for name, buffer in self.step.rank_statistics().items():
                if name in rank["statistics"]:
                    buffer.copy_(rank["statistics"][name])
            return
        # The number of processes or the configuration changed: add the sums of all processes if
        # ``exactly``, else drop them, and seed the generators again.
        for rank in state["ranks"] if exactly else ():
            self.step.sums.add_state(rank["sums"], self.device)
        if not self.ranks.is_main:
            self.step.sums.clear()
        self._seed()

    def run(self, until: int | None = None) -> Summary:
        """Train until ``until`` epochs are finished (None: all). Another call continues.

        Raises:
            Interrupted: Ctrl-C; a checkpoint of the current step was written.
            Preempted: the same for SIGTERM or SIGUSR1.
            NonFiniteLoss: the loss became NaN or infinite.
            StorageError: the disk refused a write.
        """
        if self.ranks.is_main:
            self.run_folder.lock()
        self._introduce()
        records = self.run_folder.read_metrics()
        self.reporter.start_run(self.student_name, records)
        try:
            with self.signals, self.signals.interrupts():
                self.sinks = open_sinks(
                    self.config.log_to if self.ranks.is_main else (),
                    self.run_folder.path,
                    dataclasses.asdict(self.config),
                    records,
                    self.reporter.print,
                )
                self._fit(self.config.epochs if until is None else min(until, self.config.epochs))
        except KeyboardInterrupt as error:  # or outside the main thread, without a message
            self.reporter.log(message := str(error) or self._stopped())
            raise Interrupted(message) from None
        except BaseException as error:
            self.reporter.log(f"{type(error).__name__}: {first_line(error)}")
            if is_out_of_memory(error):
                raise out_of_memory(self.config, self.device) from error
            raise
        finally:
            self.reporter.close()
            for sink in self.sinks:
                sink.close()
            self.run_folder.unlock()
        if self.epoch < self.config.epochs:
            return self.summary()
        summary = self.finish()
        last, best = (100 * each[self.student_name] for each in (summary.last, summary.best))
        self.reporter.log(
            f"finished: {summary.epochs} epochs, {summary.seconds:.1f} s of training,"
            f" {summary.images_per_second:.0f} img/s; student {last:.2f} %, in its best epoch"
            f" ({summary.best_epoch + 1}) {best:.2f} %"
        )
        return summary

    def _fit(self, until: int) -> None:
        """Train, evaluate and save, epoch by epoch."""
        if self.store is not None:
            self.store.check_space(state_bytes(self._state(True, [])))
        if self.config.on_nonfinite == "rollback" and not from_main(
            bool(checkpoint_files(self.run_folder.checkpoints))
        ):
            self._save()  # a rollback needs a checkpoint
        while self.epoch < until:
            if self._is_alone and self.epoch >= self.config.teach_epoch():
                self.start_teaching()
            steps = len(self.train_loader)
            self.reporter.start_epoch(self.epoch, self.config.epochs, steps, self.done)
            self.throughput.start_epoch(self.epoch, steps, self.done)
            if self.done < steps:
                self._train_epoch()
            if not self.last and isinstance(self.dataset, FileDataset):
                self._save()  # evaluation may find a corrupt image, which then costs no epoch
            self.reporter.evaluating()
            self.step.mean_statistics()
            self._finish_epoch(self.step.measure(self._evaluation_batches()))

    @property
    def _is_alone(self) -> bool:
        """True before ``teach_from``."""
        return self.step.config is not self.config

    def start_teaching(self) -> None:
        """Replace the student alone by all networks, at the start of an epoch."""
        student = snapshot(self.step.state_dict())
        if self.step.options.compile:
            torch.compiler.reset()  # its networks count against the limit of recompilations
        del self.runner, self.step, self.model  # their memory is needed for the new ones
        gc.collect()
        torch.cuda.empty_cache()  # nothing without a GPU
        self._build_step(student=student)
        self._prepare_phase()
        starts = f"teaching starts in epoch {self.epoch + 1}; step: {self.step.options.describe()}"
        for line in filter(
            None, (starts, describe_loss(self.step.criterion, self.config), self._memory_note)
        ):
            self.reporter.info(line)
        if self.store is not None:
            self.store.check_space(state_bytes(self._state(True, [])))
        if self.config.on_nonfinite == "rollback":
            self.train_loader.set_epoch(self.epoch)
            self._save()  # earlier checkpoints have no other branches

    def _train_epoch(self) -> None:
        step, kd_weight = self.step, self.config.kd_weight_at(self.epoch)
        self.train_loader.set_size(self.config.size_at(self.epoch))
        self.train_loader.set_epoch(self.epoch)
        if not self.done:
            self._seed()
            step.sums.clear()
            self._rollbacks = 0
            if self.held_out_loader is not None and not self._is_alone:
                step.criterion.fit_held_out(
                    (result.logits, target) for result, target in step.results(self.held_out_loader)
                )
        step.start_epoch(self.epoch)
        self.cadence.start()
        counted_until = time.monotonic()
        step.set_schedule(self._lr(self.done), kd_weight)
        for done in self.runner.epoch(self.train_loader, self.done, self.throughput.waiting):
            now = time.monotonic()
            self._trained += now - counted_until
            self.done, counted_until = done, now
            report = self.reporter.should_report()
            due = self.cadence.due(now, report)
            if due:
                self._check_finite()
            self.reporter.step(done, self._progress(kd_weight) if report else None)
            if due == Due.STOP:
                self._stop()
            if due == Due.SAVE:
                self._save()
            step.set_schedule(self._lr(done), kd_weight)
        self.cadence.settle()
        self._check_finite()  # waits for the device: a captured step returns long before it is done
        self._trained += time.monotonic() - counted_until
        self.throughput.device_is_done()

    def _evaluation_batches(self) -> Iterator[Batch]:
        """The evaluation batches of this process, until a signal stops the run."""
        batches = iter(self.eval_loader)
        for _ in range(self._eval_steps):
            if (batch := next(batches, None)) is not None:
                yield batch
            if self.cadence.must_stop():
                self._stop()
        self.cadence.settle()

    def _finish_epoch(self, result: Evaluation) -> None:
        """Record, save and report an epoch."""
        accuracies = result.accuracies
        record = {
            "epoch": self.epoch,
            "lr": self._lr(self.done - 1),
            "kd_weight": self.config.kd_weight_at(self.epoch),
            "train": self.step.sums.means(of_all=True),
            **result.record(),
            "seconds": round(self._trained, 3),
            "images_per_second": round(self.done * self.config.batch_size / self._trained, 1),
            "waiting_share": round(self.throughput.waiting_share(), 4),
        }
        self.seconds += self._trained
        self.epoch, self.done, self._trained, self.last = self.epoch + 1, 0, 0.0, accuracies
        is_best = not self.best or accuracies[self.student_name] > self.best[self.student_name]
        if is_best:
            self.best, self.best_epoch = dict(accuracies), self.epoch - 1
        self._save(record, is_best)
        for sink in self.sinks:  # after the checkpoint: some sinks cannot delete a record
            sink.write(record)
        self.reporter.end_epoch(record, self.throughput.end_epoch())
        self._report_replaced()

    def _lr(self, done: int) -> float:
        """The learning rate after ``done`` steps of this epoch."""
        return self.config.lr_at(self.epoch + done / len(self.train_loader))

    def _seed(self) -> None:
        """Seed the layers' generators by seed, epoch and process."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.epoch + 1 + self.ranks.rank * 10**16)

    def _progress(self, kd_weight: float) -> EpochProgress:
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        return self.throughput.look(
            self.done, self.step.sums.means(), self._lr(self.done - 1), kd_weight, memory
        )

    def _check_finite(self) -> None:
        """Apply the ``on_nonfinite`` policy to non-finite steps since the last check."""
        if (problem := self.step.guard.read()) is None:
            return
        # All processes skipped the same steps, but only some may have seen non-finite values.
        terms, parameters = (
            tuple(dict.fromkeys(name for names in gather_states(list(local)) for name in names))
            for local in (problem.terms, problem.parameters)
        )
        problem = dataclasses.replace(problem, terms=terms, parameters=parameters)
        policy = self.config.on_nonfinite
        if policy == "skip" and problem.count <= MAX_SKIPPED:
            self.reporter.print(f"skipped in epoch {self.epoch + 1}: {problem.describe()}")
        elif policy == "rollback" and self._rollbacks < MAX_ROLLBACKS:
            self._roll_back(problem)
        else:
            limit = {
                "skip": f"; more than {MAX_SKIPPED} steps were skipped",
                "rollback": f"; {MAX_ROLLBACKS} rollbacks in this epoch did not help",
            }.get(policy, "")
            low = ", or --precision fp32" if self.step.precision in ("bf16", "fp16") else ""
            hint = from_main(
                resume_hint(self.run_folder, self.config.batch_size) if self.ranks.is_main else None
            )
            text = f"epoch {self.epoch + 1}, {problem.describe()}{limit}"
            raise NonFiniteLoss(f"{text}; {hint}. Try a lower --lr{low}")
        self.step.guard.clear()

    def _roll_back(self, problem: NonFinite) -> None:
        """Load the last checkpoint's weights and continue with the next batch."""
        self._rollbacks += 1
        state, path = newest_checkpoint(self.run_folder, self.reporter.print)
        self.step.load_state_dict(state, path)
        self.reporter.print(
            f"rolled back in epoch {self.epoch + 1} to the weights of step {state['step']}:"
            f" {problem.describe()}"
        )

    def _stop(self) -> None:
        """Save at the current step and end the run, because of a signal."""
        self._check_finite()
        self._save()
        received = max(gather_states(self.signals.received))
        # Exchanged after the checkpoint is written: if one process exits, a launcher kills all.
        kind = Interrupted if received == signal.SIGINT else Preempted
        raise kind(from_main(self._stopped(received) if self.ranks.is_main else ""))

    def _stopped(self, number: int = signal.SIGINT) -> str:
        hint = resume_hint(self.run_folder, self.config.batch_size)
        return f"stopped by {signal_name(number)}; {hint}"

    def _save(self, record: dict[str, Any] | None = None, is_best: bool = False) -> None:
        """Write a checkpoint of a finished epoch with its record, or of a step within an epoch."""
        step, within = self.step, record is None
        rank: dict[str, Any] = {"rng": random_state(self.device)}
        if within:
            rank |= {"sums": step.sums.state_dict(), "statistics": step.rank_statistics()}
        ranks = gather_states(snapshot(rank))
        if self.store is not None:
            self.store.save(
                self._state(within, ranks),
                is_best=is_best,
                before=None if record is None else lambda: self._write_records(record),
            )

    def _state(self, within: bool, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of a checkpoint, written ``within`` an epoch or at its end."""
        step = self.step
        loader = loader_name(self.config, self.dataset, self.device, self._saved_data)
        state = {
            **step.state_dict(),
            "epoch": self.epoch,
            "loader": self.train_loader.state_dict() if within else {},
            "sums": {"seconds": self._trained} if within else {},
            "ranks": ranks,
            "last": self.last,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "classes": list(self.dataset.classes),
            "data": data_record(self.dataset, loader),
            "config": self.config.to_yaml(),
            "config_hash": run_identity(
                self.config, self.dataset.fingerprint, **self._fingerprints
            ),
        }
        return {**state, **self._fingerprints}

    def _write_records(self, record: dict[str, Any]) -> None:
        """Write the student and the record of the epoch."""
        description = student_record(
            self.model.name,
            self.dataset,
            accuracy=self.last[self.student_name],
            epoch=self.epoch,
            provenance=provenance(
                self.config, self.run_folder, self.dataset.fingerprint, **self._fingerprints
            ),
        )
        write_student(self.run_folder.student, self.step.student().cpu(), description)
        self.run_folder.append_metrics(record)

    def _report_replaced(self) -> None:
        """Report training images that were replaced because they are corrupt."""
        by_rank = gather_states(dict(getattr(self.train_loader, "replaced", {})))
        replaced = dict(itertools.chain(*(reasons.items() for reasons in by_rank)))
        if len(replaced) > self._replaced:
            files = self.dataset.train.files or ()
            names = [f"{files[index]} ({reason})" for index, reason in replaced.items()]
            text = f"corrupt training images replaced so far: {len(replaced)}"
            self.reporter.print(f"{text}; new: {summarize(names[self._replaced :])}")
            self._replaced = len(replaced)

    kept = renamed_property("Trainer.kept", "student_name")

    def summary(self) -> Summary:
        """The result of the epochs so far."""
        images = self.epoch * len(self.train_loader) * self.config.batch_size
        return Summary(
            self.epoch,
            self.last,
            self.best,
            self.best_epoch,
            self.seconds,
            images / max(self.seconds, 1e-9),
            str(self.run_folder.student),
        )

    def finish(self) -> Summary:
        """Write and return the summary of the epochs so far."""
        summary = self.summary()
        if self.ranks.is_main:
            write_json(self.run_folder.summary_path, summary.__dict__)
        return summary

    def _introduce(self) -> None:
        """Print the lines about the run, its data, step, memory, teacher and loss."""
        info, config, step = self.reporter.info, self.config, self.step
        info(f"run {self.run_folder.path}: {describe_run(config)}, on {self.device}")
        steps = len(self.train_loader)
        for line in introduction(
            config,
            self.dataset,
            step,
            self.teacher,
            batches=describe_batches(config, len(self._trained_images), steps, step.share),
            seen=self._saved_data,
            num_held_out=self.num_held_out,
            with_memory=self.reporter.shows_info,
        ):
            info(line)
        if self._memory_note:
            info(self._memory_note)
