"""The folder of a sweep or of a reproduced table: what it is of is written there once, and
something else in it is refused.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastokd.errors import ConfigError
from fastokd.experiments.sweep.images import Datasets
from fastokd.experiments.sweep.queue import Job, Outcome, Queue
from fastokd.storage import storage_error, write_json
from fastokd.train.run_folder import read_json_object

RUNS = "runs"
"""The folder with the run folders."""

Record = Mapping[str, Any]


def check_folder(
    out: Path,
    kind: str,
    record: Record,
    differences: Callable[[Record, Record], Iterable[str]],
    jobs: Sequence[Job],
    datasets: Datasets,
) -> None:
    """Check that a folder, if it is there, is of this, and its runs too.

    Args:
        out: the folder.
        kind: "sweep" or "reproduce"; the record is ``KIND.json``.
        record: what it should be of, as JSON has it.
        differences: what stands against going on, given the record that is there and this one.
        jobs: the runs; where they name no data, only that is not checked.
        datasets: opens the data, if the folder is there.

    Raises:
        ConfigError: it is of something else or of other images, or holds other files or runs.
        ConfigError, DataError: the data cannot be trained on.
        StorageError: it cannot be read.
    """
    path = out / f"{kind}.json"
    try:
        if not path.is_file():
            others = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
            if others:
                raise ConfigError(
                    f"{out} is not empty ({', '.join(others[:3])}) and no folder of 'fastokd"
                    f" {kind}'; choose another --out"
                )
            return
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise storage_error(out, error) from error
    try:
        there = json.loads(text)
        different = list(differences(there, record))
        images = dict(there.get("data", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is damaged; choose another --out, or delete that file if its runs are those of"
            " this command"
        ) from None
    if different:
        raise ConfigError(
            f"{out} is of another '{kind}' (there, here: {'; '.join(different)}); give that again"
            " to go on with it, or choose another --out"
        )
    configs = [job.config for job in jobs if job.config.data]
    for images_of, fingerprint in datasets.fingerprints(configs).items():
        if images.get(images_of, fingerprint) != fingerprint:
            raise ConfigError(
                f"{out} is of other images than {configs[0].data} has now: give the data that its"
                " runs are trained on, or choose another --out"
            )
    for job in jobs:
        job.check(datasets)


def _claim_folder(
    out: Path, kind: str, record: Record, jobs: Sequence[Job], datasets: Datasets
) -> None:
    """Make the folder, and write down what it is of, and of which images.

    Raises:
        ConfigError, DataError: the data cannot be trained on.
        StorageError: it cannot be written to.
    """
    images = datasets.fingerprints(job.config for job in jobs)
    try:
        (out / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(out, error) from error
    path = out / f"{kind}.json"
    write_json(path, {**record, "data": {**read_json_object(path).get("data", {}), **images}})


def run_in_folder(
    queue: Queue,
    out: Path,
    kind: str,
    record: Record,
    jobs: Sequence[Job],
    datasets: Datasets,
    check: Callable[[], None],
    write: Callable[[Mapping[str, str]], object],
) -> Outcome:
    """Run a queue in a folder that is checked before, and claimed when nothing stands against the
    first run.

    Args:
        queue: of ``jobs``, in ``out``.
        out, kind, record, jobs, datasets: see ``check_folder``.
        check: checks the folder.
        write: see ``Queue.run``.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: see ``check_folder`` and
            ``Queue.run``.
    """
    check()

    def claim() -> None:
        check()  # another queue may have been here since
        _claim_folder(out, kind, record, jobs, datasets)

    return queue.run(claim, write)
