"""Makes the helpers beside the tests importable by name (graph_catalog, graph_strategy, oracles) in every import mode."""

import sys
from pathlib import Path

_here = str(Path(__file__).resolve().parent)
if _here not in sys.path:
    sys.path.insert(0, _here)
