"""A part's result file: its rows, written one by one, all of one device, the same versions and the
same code.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastokd.errors import first_line
from fastokd.experiments.timing import processor
from fastokd.storage import storage_error, write_atomically, write_json
from fastokd.train.run_folder import environment

ROOT = Path(__file__).resolve().parents[2]
MEASURED_CODE = (
    "kernels",
    *(
        f"fastokd/{package}"
        for package in ("graph", "ops", "losses", "methods", "models", "data", "train")
    ),
)
"""The code that the results of all parts depend on. It identifies a file instead of the commit,
which also changes with results and pages.
"""
EARLIER = "earlier"
"""The folder, next to the result files, of replaced files."""


def code_identity(sources: Sequence[str] = ()) -> str:
    """A hash of ``MEASURED_CODE`` and of these files and folders. It needs no git."""
    found = hashlib.sha256()
    for source in (*MEASURED_CODE, *sources):
        for path in sorted((ROOT / source).rglob("*")) or [ROOT / source]:
            if path.suffix in (".py", ".cpp", ".h", ".hpp") and path.is_file():
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def identity(device: torch.device, sources: Sequence[str] = ()) -> dict[str, Any]:
    """The common properties of all rows of a file; ``sources`` as in ``code_identity``."""
    now = environment(device)
    return {
        **{name: now[name] for name in ("device", "python", "torch", "triton", "cuda", "cudnn")},
        "code": code_identity(sources),
    }


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, before anything is measured.

    Raises:
        StorageError: they cannot.
    """
    probe = folder / ".writable"
    write_atomically(probe, lambda file: file.write(b""), durable=False)
    probe.unlink(missing_ok=True)


class Results:
    """The result file of a part.

    A file with the same identity is continued. A complete file with another identity is not
    changed; an incomplete one is moved to ``earlier/`` and started again, as is any file with
    ``again``. No measurement is deleted.

    Args:
        path: the file.
        part: the part's name.
        own: the identity of the current measurements.
        device: where they run.
        entries: the name of the list of rows in the file.
        again: start again.

    Raises:
        StorageError: the file cannot be moved.
    """

    def __init__(
        self,
        path: Path,
        part: str,
        own: dict[str, Any],
        device: torch.device,
        entries: str = "rows",
        again: bool = False,
    ) -> None:
        self.path = path
        self.note = ""
        """A message about an existing file, or empty."""
        self._entries = entries
        self._now = environment(device)
        self._new = {
            "part": part,
            "complete": False,
            "identity": own,
            "environment": self._now,
            "processor": processor(),
            "sessions": [],
            "left": {},
            entries: [],
        }
        self._written = False
        self.values = self._new
        if not path.exists():
            return
        found, why = self._read()
        if not why and again:
            why = "--again"
        if not why and found["identity"] != own and not found["complete"]:
            changed = [
                f"{name} {found['identity'].get(name)}, now {value}"
                for name, value in own.items()
                if found["identity"].get(name) != value
            ]
            why = f"it is of {'; '.join(changed)}"
        if why:
            self.note = f"{path.name} was moved to {EARLIER}/ and is started again: {why}"
            self._move_away(found)
        else:
            self.values = found
            if found["identity"] != own:
                self.note = (
                    f"of torch {found['environment']['torch']}, commit"
                    f" {found['environment']['commit']}, not of the current code"
                )

    def _read(self) -> tuple[dict[str, Any], str]:
        """The content of the file, and the reason why it cannot be continued."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            for name, kind in (
                ("part", str),
                ("complete", bool),
                ("identity", dict),
                ("environment", dict),
                ("sessions", list),
                (self._entries, list),
            ):
                if not isinstance(found[name], kind):
                    raise ValueError(f"its '{name}' is no {kind.__name__}")
            if found["part"] != self._new["part"]:
                raise ValueError(f"it is of the part '{found['part']}'")
        except OSError as error:
            raise storage_error(self.path, error) from error
        except (ValueError, KeyError, TypeError) as error:
            return {}, f"it cannot be read ({first_line(error)})"
        return found, ""

    def _move_away(self, found: dict[str, Any]) -> None:
        begun = str(
            found.get("environment", {}).get("started")
            or datetime.now().astimezone().isoformat(timespec="seconds")
        )
        aside = (
            self.path.parent
            / EARLIER
            / f"{self.path.stem}-{begun[:19].replace(':', '').replace('-', '')}{self.path.suffix}"
        )
        while aside.exists():
            aside = aside.with_stem(f"{aside.stem}-more")
        try:
            aside.parent.mkdir(exist_ok=True)
            os.replace(self.path, aside)
        except OSError as error:
            raise storage_error(aside, error) from error

    @property
    def complete(self) -> bool:
        """True if every row was measured."""
        return bool(self.values["complete"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far, including incomplete ones (``partial``: the reason) and failed ones
        (``error``).
        """
        return list(self.values[self._entries])

    def find(self, name: str) -> dict[str, Any] | None:
        """The row of that name, or None."""
        return next((row for row in self.rows if row["row"] == name), None)

    def has(self, name: str) -> bool:
        """True if the row exists and need not be measured again."""
        row = self.find(name)
        return row is not None and "error" not in row and not row.get("partial")

    def head(self, **values: Any) -> None:
        """Set values of the whole file."""
        self.values |= values
        self._write()

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, or replace that of its name."""
        rows = self.values[self._entries]
        places = [place for place, other in enumerate(rows) if other["row"] == row["row"]]
        if places:
            rows[places[0]] = row
        else:
            rows.append(row)
        self._write()

    def finish(self, left: dict[str, str]) -> None:
        """Record the missing rows, each with the reason."""
        failed = {
            row["row"]: f"failed: {row['error']}" if "error" in row else row["partial"]
            for row in self.rows
            if not self.has(row["row"])
        }
        self.values |= {"left": failed | left, "complete": not (left or failed)}
        self._write()

    def _write(self) -> None:
        if not self._written:  # only a call with results counts as a session
            self._written = True
            self.values["sessions"].append(
                {name: self._now[name] for name in ("started", "command", "commit")}
            )
        write_json(self.path, self.values)
