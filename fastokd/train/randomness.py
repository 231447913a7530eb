"""Random state and determinism of a process."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Where the generators stand that layers draw from: the CPU's, and the current GPU's if it was
    used.
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Go on where ``random_state`` stood."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def be_deterministic(wanted: bool) -> None:
    """Whether this process takes only operations that give the same bits again; if not, cuDNN tries
    which are fastest.
    """
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it is for finding mistakes, and writes every new tensor
    )
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted
