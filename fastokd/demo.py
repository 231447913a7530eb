"""Moved to ``fastokd.experiments.demo``."""

from fastokd._moved import alias

alias(__name__, "fastokd.experiments.demo")
