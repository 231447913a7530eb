"""The memories of a launch, which check every access."""

from collections.abc import Sequence

import numpy as np
import torch
from ptx_values import Array

GAP = 256
"""Bytes between tensors in global memory, and the alignment that is kept."""


class Error(Exception):
    """A violation of the machine's rules, or PTX that the interpreter does not know."""


class Memory:
    """Global memory with a copy of every tensor."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.storages: dict[int, tuple[int, torch.Tensor]] = {}
        end = GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.storages:
                address = end + storage.data_ptr() % GAP
                values = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.storages[storage.data_ptr()] = address, values
                end = (address + storage.nbytes()) // GAP * GAP + 2 * GAP
        self.bytes = np.zeros(end, np.uint8)
        self.accessible = np.zeros(end, np.bool_)
        for address, values in self.storages.values():
            self.bytes[address : address + len(values)] = values.numpy()
        for tensor in filter(torch.numel, tensors):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((count - 1) * stride for count, stride in steps)
            first = self.address(tensor)
            self.accessible[first : first + extent * tensor.element_size()] = True

    def address(self, tensor: torch.Tensor) -> int:
        """A tensor's address, aligned as it is in this process."""
        start = tensor.untyped_storage().data_ptr()
        return self.storages[start][0] + tensor.data_ptr() - start if tensor.numel() else 0

    def check(self, addresses: Array, size: int) -> None:
        if (addresses % size).any():
            raise Error(f"misaligned access of {size} bytes")
        last = addresses + size - 1
        if (addresses < 0).any() or (last >= len(self.bytes)).any():
            raise Error("access outside all tensors")
        if not (self.accessible[addresses] & self.accessible[last]).all():
            raise Error("access outside all tensors")

    def copy_back(self) -> None:
        for address, values in self.storages.values():
            values.numpy()[:] = self.bytes[address : address + len(values)]


class SharedMemory:
    """The shared memory of all programs, and the warps that read and wrote it since a barrier."""

    def __init__(self, size: int, programs: Array, warps: Array) -> None:
        self.size, self.programs = size, programs
        self.warp_bits = np.uint32(1) << warps.astype(np.uint32)
        count = int(programs[-1]) + 1
        self.bytes = np.full(count * size, 0xFF, np.uint8)
        self.readers = np.zeros((count, size // 2), np.uint32)
        self.writers = np.zeros((count, size // 2), np.uint32)

    def locate(self, addresses: Array, threads: Array, size: int, stored: bool) -> Array:
        """Positions in ``bytes`` of what the threads access, after all checks."""
        if (addresses % size).any():
            raise Error(f"misaligned access of {size} bytes of shared memory")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise Error("access outside the program's shared memory")
        programs, bits = self.programs[threads], self.warp_bits[threads]
        for half in range(max(size // 2, 1)):
            cells = programs, addresses // 2 + half
            np.bitwise_or.at(self.writers if stored else self.readers, cells, bits)
            others = self.writers[cells] | self.readers[cells] if stored else self.writers[cells]
            if (others & ~bits).any():
                raise Error("race: another warp accesses this shared memory before the barrier")
        return programs * self.size + addresses

    def pass_barrier(self) -> None:
        self.readers[:] = self.writers[:] = 0
