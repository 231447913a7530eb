"""How the step is run on a device: which of the levers are on."""

from dataclasses import dataclass

import torch

from fastokd.errors import ConfigError
from fastokd.methods import get_method
from fastokd.models import BranchedModel
from fastokd.train.config import TrainConfig
from fastokd.train.precision import choose_precision


@dataclass(frozen=True)
class Levers:
    """The levers of a step, each decided.

    Attributes:
        precision: "fp32", "tf32", "bf16" or "fp16".
        channels_last: images and weights in channels-last memory format.
        compile: trunk, branches and the method's modules are compiled, each on its own.
        cuda_graph: the whole step is replayed as one CUDA graph.
        streams: the branches run on CUDA streams of their own.
        flat: all parameters of a kind lie in one tensor.
    """

    precision: str
    channels_last: bool
    compile: bool
    cuda_graph: bool
    streams: bool
    flat: bool

    def describe(self) -> str:
        """One line for a run's first lines."""
        names = {"channels_last": "channels-last", "compile": "compiled", "streams": "branches on streams of their own",
                 "flat": "parameters in one tensor", "cuda_graph": "one CUDA graph"}
        return ", ".join([self.precision, *(text for name, text in names.items() if getattr(self, name))])


def choose_levers(config: TrainConfig, model: BranchedModel, device: torch.device, world_size: int = 1) -> Levers:
    """The levers of a configuration on a device, with what it leaves open decided.

    On a CPU none of the open ones is on: there are no graphs and streams, and compiling takes minutes.

    Raises:
        ConfigError: a lever is asked for that cannot be had here, or does not go with another; the message says why.
    """
    gpu = device.type == "cuda"
    without_gpu = None if gpu else f"there are none on {device}"
    reasons = {
        "cuda_graph": without_gpu or _not_capturable(config),
        "streams": without_gpu or _not_side_by_side(config, model),
        "flat": None,
        "compile": "sync_bn waits for the other processes in every batch norm" if config.sync_bn and world_size > 1 else None,
    }
    chosen = {}
    for name, reason in reasons.items():
        wanted = getattr(config, name)
        if wanted and reason:
            raise ConfigError(f"{name}=True: {reason}; leave it out")
        # Captured steps and streams of several processes have not been tried on GPUs yet: there for who asks for them.
        by_default = gpu and not reason and (world_size == 1 or name not in ("cuda_graph", "streams"))
        chosen[name] = by_default if wanted is None else wanted
    return Levers(choose_precision(config, device), config.channels_last, **chosen)


def _not_capturable(config: TrainConfig) -> str | None:
    if config.impl == "cpu":
        return "impl=cpu computes on the host"
    if get_method(config.method).needs_teacher and str(config.model_options().get("teacher", "")).endswith(".npy"):
        return "stored teacher rows may lie in host memory"
    return None


def _not_side_by_side(config: TrainConfig, model: BranchedModel) -> str | None:
    if model.num_branches == 1:
        return "there is one branch"
    if config.merge_first_conv:
        return "merge_first_conv runs the branches' first convolutions as one"
    if model.runs_in_its_own_way:
        return f"method '{config.method}' runs the branches in its own way"
    return None
