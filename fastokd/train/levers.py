"""Old import path of ``fastokd.train.step_options``."""

from fastokd._moved import moved_names

__getattr__ = moved_names(
    __name__,
    {"fastokd.train.step_options": ("Levers=StepOptions", "choose_levers=choose_step_options")},
)
