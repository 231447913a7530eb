"""Moved to ``fastokd.experiments.recipes``."""

from fastokd._moved import alias

alias(__name__, "fastokd.experiments.recipes")
