"""The kernels, a folder next to this package in a checkout and inside it in a wheel.

``kernels/`` has no ``__init__.py``, because in the repository root it would hide other packages of
that name.
"""

from pathlib import Path

_installed = Path(__file__).with_suffix("")
__path__ = [str(_installed if _installed.is_dir() else _installed.parents[1] / "kernels")]
