"""Moved to ``fastokd.experiments.sweep``."""

from fastokd._moved import alias

alias(__name__, "fastokd.experiments.sweep")
