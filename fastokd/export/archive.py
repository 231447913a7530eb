"""The archives that PyTorch writes programs into: looked through before PyTorch is asked to load
one.
"""

import io
import zipfile
from collections.abc import Mapping

from fastokd.export.record import KEY

RECORD_FILE = f"{KEY}.json"


def read_entries(blob: bytes) -> dict[str, bytes]:
    """Every file of an archive by its name below the archive's one folder.

    Raises:
        zipfile.BadZipFile: not an archive, cut short, changed bytes, or a name that is there twice,
            in whatever case.
    """
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = [(name, name.partition("/")[2]) for name in archive.namelist()]
        # A second entry of one name could be what PyTorch reads after the first was looked at; it
        # finds names in any case.
        if len({inner.lower() for _, inner in names}) != len(names):
            raise zipfile.BadZipFile("a name is in it twice")
        return {inner: archive.read(name) for name, inner in names}  # read compares checksums


def write_entries(entries: Mapping[str, bytes]) -> bytes:
    """An archive of these files and nothing else: whoever reads it, by whatever rules, finds what
    was looked at.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def find_record(blob: bytes) -> bytes | None:
    """The record's JSON of an archive, where PyTorch keeps extra files."""
    return read_entries(blob).get(f"extra/{RECORD_FILE}")
