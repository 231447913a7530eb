"""Old import path of the trainer. Use ``fastokd.train.trainer``, ``.session`` and ``.runs``."""

from fastokd._moved import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "fastokd.train.trainer": (
            "Interrupted",
            "NonFiniteLoss",
            "RunIsFinished",
            "Summary",
            "Trainer",
        ),
        "fastokd.train.session": ("begin_run", "resume_run"),
        "fastokd.train.runs": ("LoadedRun", "MAY_CHANGE", "load_run", "provenance", "run_identity"),
    },
)
