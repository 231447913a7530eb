"""Moved to ``fastokd.experiments.analysis``."""

from fastokd._moved import alias

alias(__name__, "fastokd.experiments.analysis")
