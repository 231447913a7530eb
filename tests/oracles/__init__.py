"""Independent float64 formulas in NumPy: no torch, no fastokd, nothing shared with what they
judge.
"""
