"""The records of the epochs as ``metrics.csv``, and in TensorBoard and Weights & Biases.

A record is a line of ``metrics.jsonl``, from which everything here can be made again: after a
resume a sink gets the records that it lacks, and drops those of epochs that are trained again.
"""

import contextlib
import csv
import io
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastokd.errors import MissingExtra, first_line
from fastokd.storage import write_text

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
    """The records as CSV, a line each, with a column for every name that occurs in any."""
    rows = [flatten(record) for record in records]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_sinks(names: Sequence[str]) -> None:
    """Import the packages of these sinks; a ``MissingExtra`` if one is not installed."""
    for name in names:
        _SINKS[name].require()


def open_sinks(
    names: Sequence[str],
    run_path: Path,
    config: Mapping[str, Any],
    records: Sequence[Record],
    report: Callable[[str], object],
) -> list["MetricSink"]:
    """The sinks of a run, for its main process; raises as ``check_sinks``.

    Args:
        names: "tensorboard", "wandb".
        run_path: the run folder, in which both keep their files.
        config: the run's configuration as plain values.
        records: of the epochs so far, when a run is resumed.
        report: called once if a sink fails; the run continues without it.
    """
    check_sinks(names)
    sinks = [MetricSink(name, run_path, config, report) for name in names]
    for sink in sinks:
        for record in records:
            sink.write(record)
    return sinks


class MetricSink:
    """A receiver of the records, which never raises: it is dropped at its first failure, because a
    full disk or a lost network must not end a run.
    """

    def __init__(
        self, name: str, path: Path, config: Mapping[str, Any], report: Callable[[str], object]
    ) -> None:
        self._name, self._report = name, report
        self._sink: Any = None
        with self._dropped_on_error():
            self._sink = _SINKS[name](path, dict(config))

    def write(self, record: Record) -> None:
        """Take the record of the next epoch."""
        values = flatten(record)
        epoch = values.pop("epoch")
        with self._dropped_on_error():
            if self._sink is not None:
                self._sink.write(epoch, values)

    def close(self) -> None:
        """Flush."""
        with self._dropped_on_error():
            if self._sink is not None:
                self._sink.close()
        self._sink = None

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a library may raise anything
            self._sink = None
            self._report(
                f"{self._name}: {first_line(error)}; continuing without it, metrics.jsonl has every"
                f" epoch{_SINKS[self._name].hint}"
            )


def _missing(name: str) -> MissingExtra:
    return MissingExtra(f"--log-to {name} needs {name}: pip install -e '.[{name}]'")


class _TensorBoard:
    """Event files in ``tensorboard/``; steps are epochs from 0."""

    hint = ""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        # A new file that purges the steps of the files before it, and all records again, so that
        # TensorBoard shows metrics.jsonl. The first session purges too: TensorBoard's Python
        # reader takes the first purge for the run's start and ignores it.
        self._writer = self.require()(str(path / "tensorboard"), purge_step=0)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", textwrap.indent(text, "    "), 0)  # indented: code

    @staticmethod
    def require() -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        # AttributeError: a folder with the package's name shadows it.
        except (ImportError, AttributeError):
            raise _missing("tensorboard") from None
        return SummaryWriter

    def write(self, epoch: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()  # raises errors of the writer's thread

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for all sessions of a run; steps are epochs from 0.

    W&B's environment variables apply: WANDB_MODE=offline, WANDB_PROJECT (default fastokd),
    WANDB_NAME (default the run folder's), ... Offline every session leaves a folder with all epochs
    so far, so syncing the newest gives the whole run.
    """

    hint = " ('wandb login' or WANDB_MODE=offline, then --resume, restores it)"

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        wandb = self.require()
        id_path = path / "wandb" / "fastokd-run.txt"
        # Do not upload the terminal's output or the user's code.
        settings: dict[str, Any] = {"console": "off", "save_code": False, "quiet": True}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):
            # Without a network the end of a run would wait forever; 'wandb sync' sends the rest.
            settings["finish_timeout"] = 20.0
        run_id = id_path.read_text(encoding="utf-8").strip() if id_path.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fastokd",
            name=os.environ.get("WANDB_NAME") or path.name,
            dir=str(path),
            config=config,
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(**settings),
        )
        write_text(id_path, self._run.id)

    @staticmethod
    def require() -> Any:
        try:
            import wandb
        except ImportError:
            wandb = None
        # A folder named wandb, as W&B itself creates, is importable as an empty package.
        if not hasattr(wandb, "init"):
            raise _missing("wandb") from None
        return wandb

    def write(self, epoch: int, values: dict[str, Any]) -> None:
        # W&B keeps the steps it has and takes no earlier ones.
        if epoch >= self._run.step:
            self._run.log(values, step=epoch, commit=True)

    def close(self) -> None:
        self._run.finish()


_SINKS: Mapping[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
