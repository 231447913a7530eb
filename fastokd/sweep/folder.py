"""The folder of a sweep or of a reproduced table: what it is of is written there once, and something else in it is refused."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastokd.errors import ConfigError
from fastokd.storage import storage_error, write_json

RUNS = "runs"
"""The folder with the run folders."""

Record = Mapping[str, Any]


def check_folder(out: Path, kind: str, record: Record, differences: Callable[[Record, Record], Iterable[str]]) -> None:
    """Check that a folder, if it is there, is of this.

    Args:
        out: the folder.
        kind: "sweep" or "reproduce"; the record is ``KIND.json``.
        record: what it should be of, as JSON has it.
        differences: what stands against going on, given the record that is there and this one.

    Raises:
        ConfigError: it is of something else, or holds other files.
        StorageError: it cannot be read.
    """
    path = out / f"{kind}.json"
    try:
        if not path.is_file():
            others = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
            if others:
                raise ConfigError(f"{out} is not empty ({', '.join(others[:3])}) and no folder of 'fastokd {kind}'; choose another --out")
            return
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise storage_error(out, error) from error
    try:
        different = list(differences(json.loads(text), record))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged; choose another --out, or delete that file if its runs are those of this command") from None
    if different:
        raise ConfigError(f"{out} is of another '{kind}' (there, here: {'; '.join(different)}); give that again to go on with it, or choose another --out")


def claim_folder(out: Path, kind: str, record: Record) -> None:
    """Make the folder, and write down what it is of.

    Raises:
        StorageError: it cannot be written to.
    """
    try:
        (out / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(out, error) from error
    write_json(out / f"{kind}.json", record)
