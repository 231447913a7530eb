"""Where the records of the epochs go beside ``metrics.jsonl``: ``metrics.csv``, TensorBoard,
Weights & Biases.

A record is what ``metrics.jsonl`` has a line of. That file is the truth and everything here is made
from it: after a resume a sink gets the records that it lacks, and what it has of epochs that will
be trained again is void.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from fastokd.errors import MissingExtra, first_line
from fastokd.storage import write_atomically

Record = Mapping[str, Any]


def flatten(record: Record) -> dict[str, Any]:
    """A record with one level: "epoch", "lr", "train/loss", "eval/branch1".

    >>> flatten({"epoch": 0, "eval": {"branch1": 0.5}})
    {'epoch': 0, 'eval/branch1': 0.5}
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": item for inner, item in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def csv_text(records: Sequence[Record]) -> str:
    """The records as CSV: a line each, and a column for every name that any of them has; cells that
    one lacks are empty.
    """
    rows = [flatten(record) for record in records]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class MetricSink(Protocol):
    """A place that takes the record of each epoch. Whatever goes wrong there, neither method
    raises.
    """

    def write(self, record: Record) -> None:
        """Take the record of the next epoch."""

    def close(self) -> None:
        """Flush what is left."""


def check_sinks(names: Sequence[str]) -> None:
    """Import what these sinks need, before a run begins that would want them at its end.

    Raises:
        MissingExtra: a package is not installed.
    """
    for name in names:
        _SINKS[name].require()


def open_sinks(
    names: Sequence[str],
    run_path: Path,
    config: Mapping[str, Any],
    records: Sequence[Record],
    say: Callable[[str], object],
) -> list[MetricSink]:
    """The sinks of a run, for its first process alone.

    Args:
        names: "tensorboard", "wandb".
        run_path: the run folder, below which both keep their files.
        config: the run's configuration as plain values.
        records: of the epochs so far, when a run is resumed.
        say: is told once when a sink fails; the run goes on without it, and ``metrics.jsonl`` has
            every record all the same.

    Raises:
        MissingExtra: a package is not installed.
    """
    check_sinks(names)
    return [
        _Guarded(name, lambda name=name: _SINKS[name](run_path, config, records), say)
        for name in names
    ]


class _Guarded:
    """A sink that is dropped at its first failure: a full disk or a lost network is no reason to
    lose a run.
    """

    def __init__(
        self, name: str, make: Callable[[], MetricSink], say: Callable[[str], object]
    ) -> None:
        self._name, self._say = name, say
        self._sink: MetricSink | None = None
        self._try(lambda: setattr(self, "_sink", make()))

    def write(self, record: Record) -> None:
        if self._sink is not None:
            self._try(lambda: self._sink.write(record))

    def close(self) -> None:
        if self._sink is not None:
            self._try(self._sink.close)
        self._sink = None

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a library's own errors, of any kind
            self._sink = None
            self._say(
                f"{self._name}: {first_line(error)}; the run goes on without it, and metrics.jsonl"
                f" has every epoch{_SINKS[self._name].hint}"
            )


class _TensorBoard:
    """Event files in ``tensorboard/``; steps are epochs from 0."""

    hint = ""

    def __init__(
        self, run_path: Path, config: Mapping[str, Any], records: Sequence[Record]
    ) -> None:
        # A new file that voids all steps of the files before it, and all records again: what is
        # shown is metrics.jsonl, whatever a killed run had written beyond its checkpoint or not yet
        # written. The first session says so too: TensorBoard's Python reader takes the first purge
        # that it sees for the run's start and ignores it.
        self._writer = self.require()(str(run_path / "tensorboard"), purge_step=0)
        lines = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).splitlines()
        self._writer.add_text(
            "config", "".join(f"    {line}\n" for line in lines), 0
        )  # Markdown's indented code
        for record in records:
            self._add(record)
        self._writer.flush()

    @staticmethod
    def require() -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except (
            ImportError,
            AttributeError,
        ):  # AttributeError: a folder with the package's name stands in its place
            raise MissingExtra(
                "--log-to tensorboard needs TensorBoard: pip install 'fastokd[tensorboard]'"
            ) from None
        return SummaryWriter

    def write(self, record: Record) -> None:
        self._add(record)
        self._writer.flush()  # an error of the writer's thread shows here

    def _add(self, record: Record) -> None:
        for name, value in flatten(record).items():
            if name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for all sessions of a run; steps are epochs from 0.

    The usual variables hold: WANDB_MODE=offline, WANDB_PROJECT (default fastokd), WANDB_NAME
    (default the run folder's), ... Offline every session leaves a folder with all epochs so far, so
    that syncing the newest gives the whole run.
    """

    hint = " ('wandb login' once, or WANDB_MODE=offline, and --resume bring it back)"

    def __init__(
        self, run_path: Path, config: Mapping[str, Any], records: Sequence[Record]
    ) -> None:
        wandb = self.require()
        kept = run_path / "wandb" / "fastokd-run.txt"
        # Neither the terminal's table nor the user's code is anything to upload; quiet still says
        # where the run can be seen.
        settings: dict[str, Any] = {"console": "off", "save_code": False, "quiet": True}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):
            # Without a network the end of a run would wait forever; 'wandb sync' sends the rest.
            settings["finish_timeout"] = 20.0
        run_id = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fastokd",
            name=os.environ.get("WANDB_NAME") or run_path.name,
            dir=str(run_path),
            config=dict(config),
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(**settings),
        )
        write_atomically(kept, lambda file: file.write(self._run.id.encode()))
        for record in records:
            self.write(record)

    @staticmethod
    def require() -> Any:
        try:
            import wandb
        except ImportError:
            wandb = None
        if not hasattr(
            wandb, "init"
        ):  # a folder named wandb, as W&B itself makes, is importable as an empty package
            raise MissingExtra(
                "--log-to wandb needs Weights & Biases: pip install 'fastokd[wandb]'"
            ) from None
        return wandb

    def write(self, record: Record) -> None:
        # W&B keeps what it has of a step and takes no earlier ones.
        if record["epoch"] >= self._run.step:
            self._run.log(
                {name: value for name, value in flatten(record).items() if name != "epoch"},
                step=record["epoch"],
                commit=True,
            )

    def close(self) -> None:
        self._run.finish()


_SINKS: Mapping[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
