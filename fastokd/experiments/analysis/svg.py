"""Pictures as SVG files that say which data they show."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastokd.storage import write_atomically


def fingerprint(data: Any) -> str:
    """The digest of what can be written as JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save_svg(plt: Any, figure: Any, path: Path, data: Any) -> Path:
    """Write a figure and close it; one version of matplotlib writes the same bytes for the same
    data.

    Args:
        plt: matplotlib.pyplot.
        figure: what is written.
        path: the file.
        data: what is drawn; its digest is in the file, for ``shows``.

    Raises:
        StorageError: the disk refused.
    """
    with plt.rc_context({"svg.hashsalt": "fastokd"}):
        write_atomically(
            path,
            lambda file: figure.savefig(
                file, format="svg", metadata={"Date": None, "Identifier": fingerprint(data)}
            ),
        )
    plt.close(figure)
    return path


def shows(path: Path, data: Any) -> bool:
    """Whether the file is there and was drawn from these data, by whatever version of
    matplotlib.
    """
    return path.is_file() and fingerprint(data) in path.read_text(encoding="utf-8")
