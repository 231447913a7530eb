"""Number formats of the forward and backward pass: autocast, TF32 and loss scaling."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import ConfigError
from fastokd.train.config import TrainConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """What a run computes in on a device: "fp32", "tf32", "bf16" or "fp16"; "auto" is decided here.

    Raises:
        ConfigError: TF32 on a device that has none.
    """
    # Units for both came with the same generation of GPUs; before it bfloat16 is emulated.
    has_units = device.type == "cuda" and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    )
    if config.precision == "auto":
        return "bf16" if has_units else "fp32"
    if config.precision == "tf32" and not has_units:
        raise ConfigError(f"precision=tf32: {device} has no TF32 units; use fp32 or bf16")
    return config.precision


def image_dtype(precision: str) -> torch.dtype:
    """The dtype of training images: what the first convolution takes."""
    return _AUTOCAST.get(precision, torch.float32)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass.

    Casts of weights are not kept for later in it: each is used once per pass, and a captured graph
    must make its own.
    """
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(
        device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
    )


def allow_tf32(allowed: bool) -> None:
    """Whether float32 convolutions and matrix products on GPUs may run on TF32 units, for this
    process.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions and matrix products on GPUs are in float32 within it; then what was
    allowed before is so again.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class LossScale:
    """The dynamic loss scale of fp16 training (Micikevicius et al. 2018, section 3.2), on the
    device, without a host sync.

    It is halved after a step whose gradients overflowed, and doubled after ``GROWTH_STEPS`` in a
    row that did not.
    """

    START, GROWTH_STEPS, LARGEST = 2.0**16, 2000, 2.0**24

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), self.START, device=device)
        self._good_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """After a step; ``overflowed`` is a 0-d bool tensor."""
        steps = torch.where(overflowed, 0.0, self._good_steps + 1)
        grow = steps >= self.GROWTH_STEPS
        factor = torch.where(overflowed, 0.5, torch.where(grow, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp_(1.0, self.LARGEST))
        self._good_steps.copy_(torch.where(grow, 0.0, steps))

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and how long it has been good."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the scale of ``state``."""
        self.value.copy_(state["value"])
        self._good_steps.copy_(state["good_steps"])


def in_float32(value: Any) -> Any:
    """A loss's inputs with every float16 tensor in them in float32, so that scaled gradients do not
    overflow in the loss.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float16 else value
    if isinstance(value, Mapping):
        return {name: in_float32(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(in_float32(item) for item in value)
    return value
