"""Random state and determinism of a process."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that layers use: the CPU's, and that of the run's GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda" and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore a ``random_state``."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def be_deterministic(wanted: bool) -> None:
    """Use only deterministic operations in this process, or let cuDNN choose the fastest."""
    if wanted:  # read when cuBLAS is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Filling new tensors helps to find bugs, and costs a write of each. The attribute is a property
    # that torch's annotations lack.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted
