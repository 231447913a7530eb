"""Measured accuracies: methods x seeds on one dataset and budget, in one result file for each
preset. ``python -m bench.accuracy`` trains what its file lacks.
"""
