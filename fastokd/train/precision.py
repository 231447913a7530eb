"""Number formats of the forward and backward pass: autocast, TF32 and loss scaling."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastokd.errors import ConfigError
from fastokd.train.config import TrainConfig

_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ``ONEDNN_MAX_CPU_ISA`` without bfloat16 products."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """The precision of a run on a device, "auto" decided: "fp32", "tf32", "bf16" or "fp16".

    Raises:
        ConfigError: TF32 on a device without it.
    """
    capability = (8, 0)  # assumed for a GPU of another machine
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    # Compute capability 8.0 introduced bfloat16 and TF32 units, 7.0 tensor cores for float16.
    if config.precision == "auto":
        if device.type != "cuda":
            return "bf16" if has_bf16_arithmetic() else "fp32"
        if capability < (7, 0):
            return "fp32"
        return "bf16" if capability >= (8, 0) else "fp16"
    if config.precision == "tf32" and (device.type != "cuda" or capability < (8, 0)):
        raise ConfigError(f"precision=tf32: {device} has no TF32 units; use fp32 or bf16")
    return config.precision


def has_bf16_arithmetic() -> bool:
    """True if convolutions use the CPU's instructions for bfloat16 products (AVX-512 BF16, AMX).

    Elsewhere bfloat16 is emulated, and slower than float32. False if PyTorch cannot tell, and if
    the environment variable ``ONEDNN_MAX_CPU_ISA`` forbids these instructions.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BF16:
        return False
    capabilities: Mapping[str, bool | int | str] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def image_dtype(precision: str) -> torch.dtype:
    """The dtype of training images, that of the first convolution."""
    return _AUTOCAST.get(precision, torch.float32)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass.

    It does not cache casts of weights: each is used once per pass, and a captured graph must make
    its own.
    """
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(
        device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
    )


def allow_tf32(allowed: bool) -> None:
    """Allow TF32 for float32 convolutions and matrix products on GPUs in this process, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32 within the context."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class LossScale:
    """The dynamic loss scale of fp16 training (Micikevicius et al. 2018, section 3.2), on the
    device and without a host synchronization.

    It is halved after a step whose gradients overflowed, and doubled after ``GROWTH_STEPS``
    consecutive others.
    """

    START, GROWTH_STEPS, LARGEST = 2.0**16, 2000, 2.0**24

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), self.START, device=device)
        self._good_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """Update the scale after a step; ``overflowed`` is a 0-d bool tensor."""
        steps = torch.where(overflowed, 0.0, self._good_steps + 1)
        grow = steps >= self.GROWTH_STEPS
        factor = torch.where(overflowed, 0.5, torch.where(grow, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp_(1.0, self.LARGEST))
        self._good_steps.copy_(torch.where(grow, 0.0, steps))

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and the number of steps since it changed."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the scale of a ``state_dict``."""
        self.value.copy_(state["value"])
        self._good_steps.copy_(state["good_steps"])


def in_float32(value: Any) -> Any:
    """A loss's inputs with float32 for float16, in which scaled gradients would overflow."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return tree_map_only(Tensor, convert, value)
