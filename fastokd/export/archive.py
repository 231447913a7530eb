"""The archives that PyTorch writes programs into: looked through before PyTorch is asked to load one."""

import io
import zipfile

from fastokd.export.record import KEY

RECORD_FILE = f"{KEY}.json"


def read_entries(blob: bytes) -> dict[str, bytes]:
    """Every file of an archive by its name below the archive's one folder.

    Raises:
        zipfile.BadZipFile: not an archive, cut short, changed bytes, or a name that is there twice.
    """
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = archive.namelist()
        # A second entry of one name could be what PyTorch reads after the first was looked at.
        if len(set(names)) != len(names):
            raise zipfile.BadZipFile("a name is in it twice")
        return {name.partition("/")[2]: archive.read(name) for name in names}  # read compares checksums


def find_record(blob: bytes) -> bytes | None:
    """The record's JSON of an archive, where PyTorch keeps extra files."""
    return read_entries(blob).get(f"extra/{RECORD_FILE}")
