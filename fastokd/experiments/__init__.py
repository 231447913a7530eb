"""Recipes, sweeps, reproduced tables, analysis, the step benchmark and the demo."""
