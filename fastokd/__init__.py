"""fastokd: online knowledge distillation at the speed of the hardware.

Importing it does nothing else: no device query, no seed, no file access. The public packages are
``fastokd.losses`` (losses for any training loop), ``fastokd.models`` (branched networks),
``fastokd.graph`` (the distillation graph) and ``fastokd.experiments.recipes``; the command line is
``fastokd``, or ``python -m fastokd``.
"""

from fastokd.version import __version__

__all__ = ["__version__"]
