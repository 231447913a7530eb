"""Names of weights: prefixes of wrappers, and comparison with a network's names."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastokd.errors import CheckpointError

_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AT_THE_ROOT = {"module", "ema_model"}
_COUNTERS = {"n_averaged", "initted", "step"}


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the wrapped network.

    Removes the prefixes of ``torch.compile``, FSDP and activation checkpointing anywhere, those of
    data parallelism and averaging if all names have them, and the counters of averaging.
    """
    stripped = {
        ".".join(part for part in name.split(".") if part not in _ANYWHERE): value
        for name, value in weights.items()
    }
    while True:
        kept = {name: value for name, value in stripped.items() if name not in _COUNTERS}
        first = {name.split(".")[0] for name in kept}
        if len(first) != 1 or not first <= _AT_THE_ROOT:
            return stripped
        stripped = {name.split(".", 1)[1]: value for name, value in kept.items()}


def unwrap(module: nn.Module) -> nn.Module:
    """A copy of the network inside its wrappers, without wrappers around its own modules either."""
    while (inner := _inside(module)) is not None:
        module = inner
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            while (inner := _inside(child)) is not None:
                child = inner
                setattr(parent, name, child)
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None for other modules."""
    if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
        return module.module
    return module._modules.get("_orig_mod")  # the result of torch.compile has no public class


def load_weights(module: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    """Load weights strictly, without the prefixes of wrappers.

    Raises:
        CheckpointError: they belong to another architecture; the message names the first
            differences.
    """
    own, weights = module.state_dict(), strip_wrappers(weights)
    # Files of torch before 0.4.1 lack these counters, which nothing but batch norm without momentum
    # reads; torch accepts that too.
    weights |= {
        name: own[name]
        for name in own
        if name not in weights
        and name.endswith("num_batches_tracked")
        and name.replace("num_batches_tracked", "running_mean") in weights
    }
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {list(weights[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    kinds = (
        ("weights are missing", missing),
        ("are not the model's", extra),
        ("have another shape", shapes),
    )
    problems = [f"{len(found)} {problem}, e.g. {found[0]}" for problem, found in kinds if found]
    if problems:
        raise CheckpointError(f"{where} is of another architecture: {'; '.join(problems)}")
    module.load_state_dict(weights)
