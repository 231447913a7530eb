"""Launches of compiled kernels without Triton's binding of arguments.

In every call of a kernel, Triton finds out again for which types and alignments it is compiled,
which takes ten times as long as the launch. A ``Launcher`` looks the compiled kernel up by a key of
the caller and by the alignment of the addresses, and launches it with the addresses alone.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel
from triton.runtime import driver

VECTOR_MASK = 15
"""Triton compiles other code for addresses that are multiples of 16."""
MOST_LAUNCHES = 4096

Argument = Any
"""A tensor, or a tuple of tensors."""


class Launch(NamedTuple):
    """A compiled kernel, its grid, and its last arguments, which are no tensors."""

    kernel: CompiledKernel
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]


class Launcher:
    """Launches kernels, and remembers the compiled ones."""

    def __init__(self) -> None:
        self.launches: dict[Hashable, Launch] = {}

    def __call__(
        self,
        key: tuple[Hashable, ...],
        device: int,
        tensors: tuple[Argument, ...],
        first_launch: Callable[[], tuple[Any, int, tuple[Any, ...]]],
    ) -> None:
        """Launch a kernel on the current stream of the current device.

        Args:
            key: all that the choice of the kernel, its specialization, the grid and the constants
                depend on, except for alignments.
            device: the index of the current device.
            tensors: the kernel's first arguments.
            first_launch: launches the kernel by Triton; returns Triton's result, the number of
                programs, and the kernel's last arguments.
        """
        addresses, alignment = _addresses(tensors)
        key = (*key, device, alignment)
        launch = self.launches.get(key)
        if launch is not None:
            stream = driver.active.get_current_stream(device)
            launch.kernel[launch.grid](*addresses, *launch.constants, stream=stream)
            return
        kernel, programs, constants = first_launch()
        if isinstance(kernel, CompiledKernel):  # Triton's interpreter returns None
            if len(self.launches) >= MOST_LAUNCHES:
                self.launches.clear()
            self.launches[key] = Launch(kernel, (programs, 1, 1), constants)


def _addresses(tensors: tuple[Argument, ...]) -> tuple[list[Any], Hashable]:
    """The addresses, in tuples where the tensors are, and which of them are aligned: True if all
    are.
    """
    addresses: list[Any] = []
    flat: list[int] = []
    for tensor in tensors:
        if isinstance(tensor, tuple):
            part = tuple([each.data_ptr() for each in tensor])
            addresses.append(part)
            flat += part
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            flat.append(address)
    bits = 0
    for address in flat:
        bits |= address
    if not bits & VECTOR_MASK:
        return addresses, True
    return addresses, tuple([not address & VECTOR_MASK for address in flat])
