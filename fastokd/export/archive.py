"""Archives that PyTorch writes programs into; they are inspected before PyTorch loads them."""

import io
import zipfile
from collections.abc import Mapping

from fastokd.export.record import KEY

RECORD_FILE = f"{KEY}.json"


def read_entries(blob: bytes) -> dict[str, bytes]:
    """Every file of an archive, by its name below the archive's only folder.

    Raises:
        zipfile.BadZipFile: not an archive, truncated, damaged, or with two files of one name in any
            case.
    """
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = [(name, name.partition("/")[2]) for name in archive.namelist()]
        # PyTorch could read a second entry after the first was inspected; it ignores case.
        if len({inner.lower() for _, inner in names}) != len(names):
            raise zipfile.BadZipFile("a name is in it twice")
        return {inner: archive.read(name) for name, inner in names}  # read compares checksums


def write_entries(entries: Mapping[str, bytes]) -> bytes:
    """An archive of exactly these files, so that every reader gets the inspected content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def find_record(blob: bytes) -> bytes | None:
    """The record's JSON, which PyTorch stores as an extra file."""
    return read_entries(blob).get(f"extra/{RECORD_FILE}")
