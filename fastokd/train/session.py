"""Starting a run and resuming one: from a configuration or a run folder to a ``Trainer``."""

import dataclasses
from pathlib import Path
from typing import Any

from fastokd.train.batches import BatchChoice
from fastokd.train.checkpoint import checkpoint_files
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import completed
from fastokd.train.distributed import Ranks, from_main
from fastokd.train.initial import check_initial
from fastokd.train.progress import Reporter
from fastokd.train.rules import check_config
from fastokd.train.run_folder import RunFolder, default_run_path
from fastokd.train.runs import newest_checkpoint
from fastokd.train.signals import StopSignals
from fastokd.train.trainer import Trainer


def begin_run(
    config: TrainConfig,
    out: str | Path | None,
    name: str,
    reporter: Reporter,
    resume: bool = False,
    allow_config_change: bool = False,
    signals: StopSignals | None = None,
    batch_choice: BatchChoice = None,
) -> Trainer:
    """A trainer for a new run.

    Args:
        out: the run folder; None for a new folder by ``name`` in ``runs/``.
        resume: if the folder already holds a run, resume it with this configuration.
        allow_config_change: see ``Trainer.resume``.
        signals: the process's signal handlers, if it has installed some.
        batch_choice: see ``choose_batch``. A resumed run keeps its batch size.

    Raises:
        ConfigError: a setting is wrong, or the folder is not empty.
        StorageError: the folder cannot be created or written.
    """
    check_config(config)
    config = completed(config)
    default = Path("runs") / name if resume else default_run_path(name)
    folder = from_main(default if out is None else Path(out))
    if resume and from_main(bool(checkpoint_files(RunFolder(folder).checkpoints))):
        changes = dict(vars(config))
        if batch_choice is not None:
            del changes["batch_size"]
        if batch_choice == "data":
            del changes["lr"]
        return resume_run(folder, reporter, allow_config_change, signals, **changes)
    check_initial(config)
    is_main = Ranks.current().is_main
    run = RunFolder.create(folder) if is_main else RunFolder(folder)
    try:
        trainer = Trainer(config, run, reporter, signals=signals, batch_choice=batch_choice)
        trainer.start()
    except BaseException:
        if is_main:
            run.discard_without_checkpoint()
        raise
    return trainer


def resume_run(
    path: Path,
    reporter: Reporter,
    allow_config_change: bool = False,
    signals: StopSignals | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer that resumes the run in a folder, with ``changes`` to its configuration; see
    ``Trainer.resume`` and ``begin_run``.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or does not fit.
        ConfigError: another process trains there, or as ``Trainer.resume``.
    """
    run = RunFolder.open(path)
    if Ranks.current().is_main:
        run.lock()
    config = dataclasses.replace(run.load_config(), **changes)
    check_config(config)  # before a large checkpoint is read
    config = completed(config)
    state, _ = newest_checkpoint(run, reporter.print)
    trainer = Trainer(config, run, reporter, saved_data=state["data"], signals=signals)
    trainer.resume(state, allow_config_change)
    return trainer
