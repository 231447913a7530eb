"""Looking at runs: curves and tables."""
