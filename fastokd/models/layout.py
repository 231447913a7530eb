"""The channels-last memory format of networks, and where it must not be used."""

import torch
from torch import Tensor, nn

FEWEST_CHANNELS = 16


def to_memory_format(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Lay the 4-d weights of a network out in a memory format, in place; returns the network.

    ``Module.to`` also converts 5-d weights, which cannot be channels-last, and does not change the
    strides of 1 x 1 convolutions' weights, which then differ from those of their gradients:
    ``DistributedDataParallel`` warns of that.
    """

    def convert(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        strides = torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
        return tensor.contiguous(memory_format=memory_format).as_strided(tensor.shape, strides)

    return network._apply(convert)


def has_avx512() -> bool:
    """True if torch uses the AVX-512 instructions of this CPU."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def unsafe_channels_last(network: nn.Module, device: torch.device) -> str | None:
    """The name of a convolution whose weight gradient corrupts memory in channels-last, or None:
    strided, 1 x 1, with fewer than 16 input channels, on a CPU with AVX-512 (a fault of oneDNN,
    seen with torch 2.14.1: ``Conv2d(3, 48, 1, 2)`` alone crashes).
    """
    if device.type != "cpu" or not has_avx512():
        return None
    for name, module in network.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.in_channels // module.groups < FEWEST_CHANNELS
        ):
            return name
    return None
