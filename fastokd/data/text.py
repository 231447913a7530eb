"""Text of lists and label files: encodings, and the spellings of class names."""

import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastokd.data.dataset import invalid
from fastokd.errors import escape, summarize

_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_COLUMN_NAMES = {
    "path": (
        "path file filename filepath filepaths image imagepath imagename imagefile img imgpath"
        " imgname fname name imageid id"
    ),
    "label": (
        "label labels class classes classname classlabel classid target targets category"
        " categoryname categoryid labelname y"
    ),
    "split": "split set subset dataset partition isvalid istest",
}
COLUMNS = {column: names.split() for column, names in _COLUMN_NAMES.items()}
"""The names that each column may have, in order of preference, without case, blanks and signs."""
SPLIT_COLUMNS = frozenset({"split", "isvalid", "istest"})
"""Columns that only tell the split; a subset or set may also be a category."""
_MISSING = frozenset({"nan", "NaN", "NAN", "<NA>", "NaT", "None", "null", "NULL", "#N/A"})


def plain(cell: str) -> str:
    """A column's name without case, blanks and signs."""
    return re.sub(r"[\W_]+", "", cell.lower())


def decode_text(content: bytes, where: Path) -> str:
    """The text of a file in UTF-8 (other bytes are kept as surrogates), UTF-16 or UTF-32.

    Raises:
        DataError: a binary file, or damaged UTF-16.
    """
    encoding = next((name for mark, name in _BOMS.items() if content.startswith(mark)), "")
    head = content[:200]
    if not encoding and b"\0" in head:
        encoding = "utf-16-le" if not any(head[1::2]) else "utf-16-be" if not any(head[::2]) else ""
        if not encoding:
            raise invalid(where, "a binary file, not a list; save it as text in UTF-8")
    try:
        return content.decode(encoding) if encoding else content.decode("utf-8", "surrogateescape")
    except UnicodeDecodeError:
        raise invalid(where, f"not valid {encoding.upper()}; save it as UTF-8") from None


def readable(text: str, where: object) -> str:
    """Text without undecodable bytes: bytes that are not UTF-8 are read as Windows-1252, with a
    warning.

    Raises:
        DataError: they are not valid in Windows-1252 either.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            repaired = text.encode("utf-8", "surrogateescape").decode("cp1252")
        except UnicodeDecodeError:
            raise invalid(where, f"{escape(text)} is not valid text; save as UTF-8") from None
        warnings.warn(
            f"{escape(where)}: not UTF-8; read as Windows-1252, for example '{repaired}'; if that"
            " is wrong, save the file as UTF-8",
            stacklevel=2,
        )
        return repaired
    return text


def check_class_names(names: Iterable[str], where: object) -> None:
    """Raise ``DataError`` for class names that are spellings of one class, or a missing value.

    Numbers are compared by value; other names without case (except single letters, which datasets
    of characters distinguish), surrounding blanks and composition of accents.
    """
    spellings: dict[object, list[str]] = {}
    for name in names:
        if name in _MISSING:
            fix = "drop its images, or give the class another name"
            raise invalid(where, f"the class '{name}' is a missing value; {fix}")
        spellings.setdefault(_meaning(name), []).append(name)
    doubled = [" and ".join(f"'{name}'" for name in sorted(v)) for v in spellings.values() if v[1:]]
    if doubled:
        fix = "write each class in one way"
        raise invalid(where, f"spellings of one class: {summarize(doubled)}; {fix}")


def _meaning(name: str) -> object:
    folded = " ".join(unicodedata.normalize("NFKC", name).split())
    try:
        return float(folded.replace("_", "x"))  # "1_000" is a name
    except ValueError:
        return folded if len(folded) == 1 else folded.casefold()


def conflict(pairs: Iterable[tuple[str, str]]) -> Mapping[str, tuple[str, str]]:
    """The names with two values, and the first two."""
    known: dict[str, str] = {}
    return {
        name: (known[name], value)
        for name, value in pairs
        if known.setdefault(name, value) != value
    }
