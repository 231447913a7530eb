"""The former module of the losses and their checks; use ``fastokd.losses``."""

from fastokd._moved import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "fastokd.losses": ("GraphLoss",),
        "fastokd.losses.options": ("Impl", "Reduction"),
        "fastokd.losses.checks": ("as_rows", "check_target", "checked_rows", "mean_prediction"),
    },
)
