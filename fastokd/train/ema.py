"""A moving average of the student's weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import ConfigError
from fastokd.export import load_weights
from fastokd.models import BranchedModel


class StudentAverage:
    """The exponential moving average of the student's weights and batch-norm statistics (Polyak and
    Juditsky 1992; Tarvainen and Valpola 2017), on the device and without a host synchronization.

    The t-th update moves the average by ``1 - min(decay, t / (9 + t))`` of the way to the weights.
    The second term makes it forget the random initial weights: with a decay of 0.9999 alone, half
    of it would still be those after 7000 steps. ``t`` is on the device, so updates can be captured.

    The model must stay on its device.

    Raises:
        ConfigError: the method exports a copy of its modules, which training does not change.
    """

    def __init__(self, model: BranchedModel, decay: float) -> None:
        live = model.live_student()
        own = {id(tensor) for tensor in _tensors(model)}
        if not all(id(tensor) in own for tensor in _tensors(live)):
            raise ConfigError(
                f"ema={decay:g}: the student of method '{model.method}' is not made of the model's"
                " own modules; use ema=0"
            )
        self.module: nn.Module = copy.deepcopy(live).eval().requires_grad_(False)
        """The averaged student, a plain network as ``model.student()``, in evaluation mode."""
        self._decay = decay
        self._updates = torch.zeros((), dtype=torch.int64, device=next(live.parameters()).device)
        self._averaged, self._copies = _by_kind(self.module)
        self._live, self._originals = _by_kind(live)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average; integers, such as batch-norm counters, are
        copied.

        After a skipped step the same weights count once more, which is harmless if the batch-norm
        statistics were restored before (``RunningStatistics``).
        """
        self._updates += 1
        rest = 1 - (self._updates / (9 + self._updates)).clamp(max=self._decay)
        # Not _foreach_lerp_: with a weight on the device it launches a kernel for every tensor.
        steps = torch._foreach_sub(self._live, self._averaged)
        torch._foreach_mul_(steps, rest)
        torch._foreach_add_(self._averaged, steps)
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights under the plain network's names, and the number of updates."""
        return {"weights": self.module.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any], where: str = "the state") -> None:
        """Load a ``state_dict`` in place; ``where`` names it in messages.

        Raises:
            CheckpointError: it has another architecture.
        """
        load_weights(self.module, state["weights"], where)
        self._updates.copy_(state["updates"])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _by_kind(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of a module, and the others."""
    tensors = _tensors(module)
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return floating, [tensor for tensor in tensors if not tensor.is_floating_point()]
