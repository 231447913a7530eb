"""The optimizations of a training step, decided for a device."""

from dataclasses import dataclass

import torch

from fastokd.errors import ConfigError
from fastokd.models import BranchedModel
from fastokd.train.config import TrainConfig
from fastokd.train.optimizers import tied_parameters
from fastokd.train.precision import choose_precision


@dataclass(frozen=True)
class StepOptions:
    """The optimizations of a step, by the names of ``TrainConfig``; none is "auto" or open."""

    precision: str
    channels_last: bool
    compile: bool
    cuda_graph: bool
    streams: bool
    flat: bool
    cast_once: bool

    def describe(self) -> str:
        """One line for the start of a run."""
        names = {
            "channels_last": "channels-last",
            "compile": "compiled",
            "streams": "branches on separate streams",
            "flat": "parameters in one tensor",
            "cast_once": "weights cast once",
            "cuda_graph": "one CUDA graph",
        }
        chosen = [text for name, text in names.items() if getattr(self, name)]
        return ", ".join([self.precision, *chosen])


def choose_step_options(
    config: TrainConfig,
    model: BranchedModel,
    device: torch.device,
    world_size: int = 1,
    host_rows: bool = False,
) -> StepOptions:
    """The options of a configuration on a device; where it leaves one open, use what pays there.

    On a CPU all open options are off: there are no graphs and streams, and compiling takes minutes.

    Args:
        world_size: the number of processes.
        host_rows: a teacher's rows are looked up in host memory.

    Raises:
        ConfigError: an option was requested that is not available here; the message says why.
    """
    gpu = device.type == "cuda"
    without_gpu = None if gpu else f"not available on {device}"
    precision = choose_precision(config, device)
    tied = tied_parameters(model)
    no_flat = "parameters {} and {} are tied".format(*tied) if tied else None
    reasons = {
        "cuda_graph": without_gpu or _graph_unavailable(config, host_rows),
        "streams": without_gpu or _streams_unavailable(config, model),
        "flat": no_flat,
        "compile": (
            "sync_bn waits for the other processes in every batch norm"
            if config.sync_bn and world_size > 1
            else None
        ),
        "cast_once": no_flat or _cast_once_unavailable(config, precision, gpu, world_size),
    }
    chosen = {}
    for name, reason in reasons.items():
        requested = getattr(config, name)
        if requested and reason:
            raise ConfigError(f"{name}=True: {reason}; omit it")
        # Graphs and streams of several processes are untested on GPUs, so they are opt-in.
        single = world_size == 1 or name not in ("cuda_graph", "streams")
        chosen[name] = gpu and not reason and single if requested is None else requested
    return StepOptions(precision, config.channels_last, **chosen)


def _cast_once_unavailable(
    config: TrainConfig, precision: str, gpu: bool, world_size: int
) -> str | None:
    if precision not in ("bf16", "fp16"):
        return f"precision={precision} casts no weights"
    if config.flat is False or (config.flat is None and not gpu):
        return "it needs flat=True"
    if world_size > 1:
        # DistributedDataParallel averages the gradients of the parameters, which have none.
        return "gradients of several processes are averaged in float32"
    return None


def _graph_unavailable(config: TrainConfig, host_rows: bool) -> str | None:
    if config.impl == "cpu":
        return "impl=cpu computes on the host"
    return "the teacher's stored rows are in host memory" if host_rows else None


def _streams_unavailable(config: TrainConfig, model: BranchedModel) -> str | None:
    if model.num_branches == 1:
        return "there is one branch"
    if model.overrides_forward:
        return f"method '{config.method}' runs the branches itself"
    return None
