"""How the step is run on a device: which of the levers are on."""

from dataclasses import dataclass

import torch

from fastokd.errors import ConfigError
from fastokd.models import BranchedModel
from fastokd.train.config import TrainConfig
from fastokd.train.optimizers import sharing
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
        names = {
            "channels_last": "channels-last",
            "compile": "compiled",
            "streams": "branches on streams of their own",
            "flat": "parameters in one tensor",
            "cuda_graph": "one CUDA graph",
        }
        return ", ".join(
            [self.precision, *(text for name, text in names.items() if getattr(self, name))]
        )


def choose_levers(
    config: TrainConfig,
    model: BranchedModel,
    device: torch.device,
    world_size: int = 1,
    host_rows: bool = False,
) -> Levers:
    """The levers of a configuration on a device, with what it leaves open decided.

    On a CPU none of the open ones is on: there are no graphs and streams, and compiling takes
    minutes. ``host_rows``: a teacher's rows are looked up in host memory.

    Raises:
        ConfigError: a lever is asked for that cannot be had here, or does not go with another; the
            message says why.
    """
    gpu = device.type == "cuda"
    without_gpu = None if gpu else f"there are none on {device}"
    reasons = {
        "cuda_graph": without_gpu or _not_capturable(config, host_rows),
        "streams": without_gpu or _not_side_by_side(config, model),
        "flat": (
            "parameters {} and {} share memory".format(*shared)
            if (shared := sharing(model))
            else None
        ),
        "compile": (
            "sync_bn waits for the other processes in every batch norm"
            if config.sync_bn and world_size > 1
            else None
        ),
    }
    chosen = {}
    for name, reason in reasons.items():
        wanted = getattr(config, name)
        if wanted and reason:
            raise ConfigError(f"{name}=True: {reason}; leave it out")
        # Captured steps and streams of several processes have not been tried on GPUs yet: there for
        # who asks for them.
        by_default = (
            gpu and not reason and (world_size == 1 or name not in ("cuda_graph", "streams"))
        )
        chosen[name] = by_default if wanted is None else wanted
    return Levers(choose_precision(config, device), config.channels_last, **chosen)


def _not_capturable(config: TrainConfig, host_rows: bool) -> str | None:
    if config.impl == "cpu":
        return "impl=cpu computes on the host"
    return "the teacher's stored rows lie in host memory" if host_rows else None


def _not_side_by_side(config: TrainConfig, model: BranchedModel) -> str | None:
    if model.num_branches == 1:
        return "there is one branch"
    if model.runs_in_its_own_way:
        return f"method '{config.method}' runs the branches in its own way"
    return None
