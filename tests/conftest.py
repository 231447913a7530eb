"""Makes the helpers beside the tests importable by name (graph_catalog, graph_strategy, oracles) in every import mode."""

import os
import sys
from pathlib import Path

os.environ.setdefault("FASTOKD_CACHE", "off")  # no test leaves decoded images behind, but those of the cache

_here = str(Path(__file__).resolve().parent)
if _here not in sys.path:
    sys.path.insert(0, _here)
