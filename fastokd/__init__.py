"""fastokd: online knowledge distillation at the speed of the hardware.

Nothing happens at import: no device query, no seed, no scan of the disk. The public rooms are
``fastokd.losses`` (drop-in losses), ``fastokd.models`` (branched networks), ``fastokd.graph`` (the
distillation graph), ``fastokd.experiments.recipes`` and the command line (``python -m fastokd``).
"""

from pathlib import Path

from fastokd.version import __version__

# In a checkout the kernels lie beside this package (kernels/), in a wheel inside it
# (fastokd/kernels/). kernels/ carries no __init__.py, because from the repository root that would
# shadow another installed package of the same name; extending __path__ makes `fastokd.kernels`
# resolve in a plain checkout and an editable install.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "triton").is_dir() and (_checkout / "CMakeLists.txt").is_file():
    __path__.append(str(_checkout))

__all__ = ["__version__"]
